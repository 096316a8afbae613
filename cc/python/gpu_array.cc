#include "cc/python/gpu_array.h"

#include <cstdint>
#include <string>

#include "cc/python/python_session.h"

namespace continual_transformers {
namespace {

// The structs of dlpack.h. A capsule "dltensor" points to a DLTensor; what follows the DLTensor is
// not read here. A capsule "dltensor_versioned", of version 1, points to a
// DLManagedTensorVersioned.
struct DLDataType {
  uint8_t code;  // 0: int, 2: float, 6: bool
  uint8_t bits;
  uint16_t lanes;
};
struct DLTensor {
  void* data;
  int32_t device_type, device;
  int32_t ndim;
  DLDataType dtype;
  int64_t* shape;
  int64_t* strides;  // in elements; null: C-contiguous
  uint64_t byte_offset;
};
struct DLManagedTensorVersioned {
  uint32_t major, minor;
  void* manager;
  void (*deleter)(DLManagedTensorVersioned*);
  uint64_t flags;
  DLTensor tensor;
};
constexpr long kCuda = 2, kCudaManaged = 13;
constexpr char kCapsule[] = "dltensor", kVersionedCapsule[] = "dltensor_versioned";
constexpr uint32_t kMajor = 1;
constexpr uint64_t kReadOnly = 1;

// NumPy's number of the type, or -1: no input or output of a model has it.
int TypeNumber(const DLDataType& type) {
  if (type.lanes != 1) return -1;
  switch (type.code) {
    case 0:
      return type.bits == 32 ? NPY_INT32 : type.bits == 64 ? NPY_INT64 : -1;
    case 2:
      return type.bits == 32 ? NPY_FLOAT32 : type.bits == 64 ? NPY_FLOAT64 : -1;
    case 6:
      return type.bits == 8 ? NPY_BOOL : -1;
    default:
      return -1;
  }
}

// Owns a reference.
class Reference {
 public:
  explicit Reference(PyObject* owned) : object_(owned) {}
  ~Reference() { Py_XDECREF(object_); }
  Reference(const Reference&) = delete;
  Reference& operator=(const Reference&) = delete;

  PyObject* get() const { return object_; }
  PyObject* release() {
    PyObject* const object = object_;
    object_ = nullptr;
    return object;
  }

 private:
  PyObject* object_;
};

// Returns whether an array lies on a GPU, and writes which.
bool IsOnGpu(PyObject* given, long* gpu) {
  const Reference method(PyObject_GetAttrString(given, "__dlpack_device__"));
  if (method.get() == nullptr) {
    PyErr_Clear();
    return false;
  }
  const Reference device(PyObject_CallNoArgs(method.get()));
  if (device.get() == nullptr) throw PythonError();
  if (!PyTuple_Check(device.get()) || PyTuple_GET_SIZE(device.get()) != 2) return false;
  const long type = PyLong_AsLong(PyTuple_GET_ITEM(device.get(), 0));
  *gpu = PyLong_AsLong(PyTuple_GET_ITEM(device.get(), 1));
  if (PyErr_Occurred() != nullptr) throw PythonError();
  return type == kCuda || type == kCudaManaged;
}

// Returns the capsule with a DLTensor. The owner's work is done before what is put on the default
// stream afterwards, which is number 1. Only capsules of version 1 say that an array is read-only.
PyObject* Capsule(PyObject* given) {
  const Reference method(PyObject_GetAttrString(given, "__dlpack__"));
  if (method.get() == nullptr) throw PythonError();
  const Reference none(PyTuple_New(0));
  const Reference versioned(Py_BuildValue("{s:i,s:(ii)}", "stream", 1, "max_version", 1, 0));
  const Reference plain(Py_BuildValue("{s:i}", "stream", 1));
  if (none.get() == nullptr || versioned.get() == nullptr || plain.get() == nullptr) {
    throw PythonError();
  }
  PyObject* capsule = PyObject_Call(method.get(), none.get(), versioned.get());
  if (capsule == nullptr && PyErr_ExceptionMatches(PyExc_TypeError) != 0) {
    PyErr_Clear();  // A library from before version 1 does not know the argument.
    capsule = PyObject_Call(method.get(), none.get(), plain.get());
  }
  if (capsule == nullptr) throw PythonError();
  return capsule;
}

// Returns what a capsule points to, and writes whether it may be written.
const DLTensor* TensorOf(PyObject* capsule, const std::string& label, bool* is_writeable) {
  *is_writeable = true;
  if (PyCapsule_IsValid(capsule, kVersionedCapsule) == 0) {
    const void* const tensor = PyCapsule_GetPointer(capsule, kCapsule);
    if (tensor == nullptr) throw PythonError();
    return static_cast<const DLTensor*>(tensor);
  }
  const auto* const versioned = static_cast<const DLManagedTensorVersioned*>(
      PyCapsule_GetPointer(capsule, kVersionedCapsule));
  if (versioned->major != kMajor) {
    Raise(PyExc_ValueError, label + " gives its memory by version " +
                                std::to_string(versioned->major) +
                                " of DLPack, although it was asked for version 1.");
  }
  *is_writeable = (versioned->flags & kReadOnly) == 0;
  return &versioned->tensor;
}

}  // namespace

PyArrayObject* GpuArrayOrNull(PyObject* given, int gpu, const std::string& label) {
  long of;
  if (!IsOnGpu(given, &of)) return nullptr;
  if (of != gpu) {
    Raise(PyExc_ValueError, label + " is on GPU " + std::to_string(of) +
                                ". Expected an array on the session's GPU, number " +
                                std::to_string(gpu) + ", or a NumPy array.");
  }
  // The capsule is not renamed to "used_dltensor": it frees the tensor when it goes.
  Reference capsule(Capsule(given));
  bool is_writeable;
  const DLTensor* const tensor = TensorOf(capsule.get(), label, &is_writeable);
  const int type = TypeNumber(tensor->dtype);
  if (type < 0 || tensor->ndim > kMostAxes) {
    Raise(PyExc_ValueError, label +
                                " has a dtype or a number of axes that no input or output has. "
                                "session.inputs and session.outputs say what they are.");
  }
  npy_intp shape[kMostAxes];
  int64_t stride = 1;
  bool contiguous = true;
  for (int axis = tensor->ndim - 1; axis >= 0; --axis) {
    shape[axis] = static_cast<npy_intp>(tensor->shape[axis]);
    contiguous = contiguous && (tensor->strides == nullptr || shape[axis] <= 1 ||
                                tensor->strides[axis] == stride);
    stride *= shape[axis];
  }
  char* const data = static_cast<char*>(tensor->data) + tensor->byte_offset;
  // NumPy would copy it, which it cannot.
  const bool aligned = reinterpret_cast<uintptr_t>(data) % (tensor->dtype.bits / 8) == 0;
  if ((!contiguous && stride != 0) || !aligned) {
    Raise(PyExc_ValueError,
          label + " is on the GPU and not C-contiguous. Make a contiguous copy of it.");
  }
  PyArray_Descr* const dtype = PyArray_DescrFromType(type);
  PyObject* const array =
      PyArray_NewFromDescr(&PyArray_Type, dtype, tensor->ndim, shape, nullptr, data,
                           is_writeable ? NPY_ARRAY_WRITEABLE : 0, nullptr);
  if (array == nullptr) throw PythonError();
  if (PyArray_SetBaseObject(reinterpret_cast<PyArrayObject*>(array), capsule.release()) != 0) {
    Py_DECREF(array);
    throw PythonError();
  }
  return reinterpret_cast<PyArrayObject*>(array);
}

}  // namespace continual_transformers
