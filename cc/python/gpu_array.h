// Arrays of other libraries that lie on a GPU, by DLPack (https://dmlc.github.io/dlpack).

#ifndef CONTINUAL_TRANSFORMERS_PYTHON_GPU_ARRAY_H_
#define CONTINUAL_TRANSFORMERS_PYTHON_GPU_ARRAY_H_

#include "cc/python/numpy_api.h"
// NumPy's header comes first: it includes Python.h.
#include <string>

namespace continual_transformers {

// Returns a new NumPy array with the dtype, the shape and the address of an array on GPU number
// `gpu`, or null if `given` is no array on a GPU. No one may read or write its elements on the
// host. It is read-only if its library says so. It keeps the memory. What the array's owner has put
// on any stream is done before what is put on CUDA's default stream afterwards. `label` is its name
// in errors. Throws PythonError.
PyArrayObject* GpuArrayOrNull(PyObject* given, int gpu, const std::string& label);

}  // namespace continual_transformers

#endif  // CONTINUAL_TRANSFORMERS_PYTHON_GPU_ARRAY_H_
