// NumPy's C API, shared by the files of the extension module. The file that calls import_array
// defines CONTINUAL_TRANSFORMERS_IMPORT_NUMPY first.

#ifndef CONTINUAL_TRANSFORMERS_PYTHON_NUMPY_API_H_
#define CONTINUAL_TRANSFORMERS_PYTHON_NUMPY_API_H_

#include <Python.h>

#define NPY_NO_DEPRECATED_API NPY_1_22_API_VERSION
#define NPY_TARGET_VERSION NPY_1_22_API_VERSION
#define PY_ARRAY_UNIQUE_SYMBOL continual_transformers_numpy
#ifndef CONTINUAL_TRANSFORMERS_IMPORT_NUMPY
#define NO_IMPORT_ARRAY
#endif
#include <numpy/arrayobject.h>

#endif  // CONTINUAL_TRANSFORMERS_PYTHON_NUMPY_API_H_
