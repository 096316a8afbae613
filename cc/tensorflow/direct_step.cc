// A step called from Python without TensorFlow's eager runtime, which takes longer to call the op
// than the op takes: a step of N=64 E=128 took 60 us by the op and 18 so, of which 9 are the step's
// own (AVX2, Zen 3).
//
// What is called here of Python's and TensorFlow's own is looked up by name when Python asks for
// it: the library has to load where there is no Python, and goes without any header of Python's, so
// that one library serves all its versions. Whatever is out of the ordinary is declined, and the
// caller then takes the step by the op, which finds the same error in it, if it is one: a step that
// fails has changed nothing.

#include <dlfcn.h>

#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "cc/attention/targets.h"
#include "cc/tensorflow/bound_variables.h"
#include "cc/tensorflow/co_si_mha_step_call.h"
#include "cc/tensorflow/inputs.h"
#include "cc/tensorflow/threads.h"
#include "tensorflow/c/eager/c_api_experimental.h"
#include "tensorflow/core/framework/resource_handle.h"
#include "tensorflow/core/platform/denormal.h"

#define EXPORTED extern "C" __attribute__((visibility("default")))

namespace tensorflow {
class TensorHandle;  // What a TFE_TensorHandle is, without the headers that it would take.
}

namespace continual_transformers {
namespace {

using absl::Status;
using tensorflow::DataType;
using tensorflow::Tensor;
using tensorflow::TensorHandle;

struct PyObject;  // Python's own begins likewise, and is as little looked into here.

// As Python's stable ABI lays it out.
struct PyBuffer {
  void* data;
  PyObject* owner;
  intptr_t bytes, item_bytes;
  int readonly, axes;
  char* format;
  intptr_t *shape, *strides, *suboffsets;
  void* internal;
};
constexpr int kContiguousOfFormat = 0x38 | 0x4;  // PyBUF_C_CONTIGUOUS | PyBUF_FORMAT

// What there is to call. Names are those of Python and TensorFlow.
struct Runtime {
  void* (*PyEval_SaveThread)();
  void (*PyEval_RestoreThread)(void*);
  int (*PyObject_GetBuffer)(PyObject*, PyBuffer*, int);
  void (*PyBuffer_Release)(PyBuffer*);
  void (*PyErr_Clear)();
  void (*Py_IncRef)(PyObject*);
  PyObject* none;             // Py_None
  PyObject* not_implemented;  // Py_NotImplemented

  bool (*EagerTensor_CheckExact)(const PyObject*);
  TFE_TensorHandle* (*EagerTensor_Handle)(const PyObject*);
  PyObject* (*EagerTensorFromHandle)(TFE_TensorHandle*, bool);
  decltype(&TFE_ContextGetExecutorForThread) ContextGetExecutorForThread;
  decltype(&TFE_ExecutorIsAsync) ExecutorIsAsync;
  decltype(&TFE_DeleteExecutor) DeleteExecutor;
  decltype(&TFE_TensorHandleBackingDeviceName) BackingDeviceName;
  // Member functions, of which `this` is the first argument.
  Status (*TensorOfHandle)(const TensorHandle*, const Tensor**);
  TFE_TensorHandle* (*HandleOfTensor)(const Tensor&);

  // Looks everything up. Returns what could not be found, or "".
  std::string Find(const char* tensorflow_library) {
    std::string missing;
    void* library = dlopen(tensorflow_library, RTLD_LAZY | RTLD_NOLOAD);
    if (library == nullptr) return tensorflow_library;
    const auto find = [&](void* where, const char* name, auto* to) {
      void* symbol = dlsym(where, name);
      if (symbol == nullptr) missing += (missing.empty() ? "" : ", ") + std::string(name);
      std::memcpy(to, &symbol, sizeof(symbol));
    };
    find(RTLD_DEFAULT, "PyEval_SaveThread", &PyEval_SaveThread);
    find(RTLD_DEFAULT, "PyEval_RestoreThread", &PyEval_RestoreThread);
    find(RTLD_DEFAULT, "PyObject_GetBuffer", &PyObject_GetBuffer);
    find(RTLD_DEFAULT, "PyBuffer_Release", &PyBuffer_Release);
    find(RTLD_DEFAULT, "PyErr_Clear", &PyErr_Clear);
    find(RTLD_DEFAULT, "Py_IncRef", &Py_IncRef);
    find(RTLD_DEFAULT, "_Py_NoneStruct", &none);
    find(RTLD_DEFAULT, "_Py_NotImplementedStruct", &not_implemented);
    find(library, "_Z22EagerTensor_CheckExactPK7_object", &EagerTensor_CheckExact);
    find(library, "_Z18EagerTensor_HandlePK7_object", &EagerTensor_Handle);
    find(library, "_Z21EagerTensorFromHandleP16TFE_TensorHandleb", &EagerTensorFromHandle);
    find(library, "TFE_ContextGetExecutorForThread", &ContextGetExecutorForThread);
    find(library, "TFE_ExecutorIsAsync", &ExecutorIsAsync);
    find(library, "TFE_DeleteExecutor", &DeleteExecutor);
    find(library, "TFE_TensorHandleBackingDeviceName", &BackingDeviceName);
    find(library, "_ZNK10tensorflow12TensorHandle6TensorEPPKNS_6TensorE", &TensorOfHandle);
    find(library, "_ZN10tensorflow12TensorHandle17CreateLocalHandleERKNS_6TensorE",
         &HandleOfTensor);
    return missing;
  }
};

Runtime runtime;

// The tensor of an eager tensor that lies in the host's memory; null where it is anything else. May
// wait for who makes the tensor, who may want Python's lock: to be called without it.
const Tensor* TensorOf(TFE_TensorHandle* handle) {
  thread_local const std::unique_ptr<TF_Status, decltype(&TF_DeleteStatus)> status(TF_NewStatus(),
                                                                                   TF_DeleteStatus);
  const char* device = runtime.BackingDeviceName(handle, status.get());
  const Tensor* tensor;
  if (TF_GetCode(status.get()) != TF_OK || std::strstr(device, "CPU:") == nullptr ||
      !runtime.TensorOfHandle(reinterpret_cast<TensorHandle*>(handle), &tensor).ok()) {
    return nullptr;
  }
  return tensor;
}

// A tensor of `dtype` with the elements of an array of NumPy's that has `axes`: the same type, or
// of int32 another integer's, if they fit. False where the object is anything else.
bool CopyArray(PyObject* object, DataType dtype, int axes, Tensor* tensor) {
  PyBuffer buffer;
  if (runtime.PyObject_GetBuffer(object, &buffer, kContiguousOfFormat) != 0) {
    runtime.PyErr_Clear();
    return false;
  }
  const auto copy = [&] {
    if (buffer.format == nullptr || std::strlen(buffer.format) != 1 || buffer.axes != axes) {
      return false;
    }
    const char format = buffer.format[0];
    tensorflow::TensorShape shape;
    for (int axis = 0; axis < axes; ++axis) shape.AddDim(buffer.shape[axis]);
    *tensor = Tensor(dtype, shape);
    if (!tensor->IsInitialized()) return false;  // There is no memory.
    if (dtype == tensorflow::DT_INT32 && format == 'l') {
      const int64_t* from = static_cast<const int64_t*>(buffer.data);
      auto to = tensor->flat<int32_t>();
      for (int64_t i = 0; i < to.size(); ++i) {
        if (from[i] < 0 || from[i] > std::numeric_limits<int32_t>::max()) return false;
        to(i) = static_cast<int32_t>(from[i]);
      }
      return true;
    }
    const char expected = dtype == tensorflow::DT_INT32   ? 'i'
                          : dtype == tensorflow::DT_FLOAT ? 'f'
                                                          : 'd';
    if (format != expected || buffer.bytes != static_cast<intptr_t>(tensor->TotalBytes())) {
      return false;
    }
    std::memcpy(tensor->data(), buffer.data, buffer.bytes);
    return true;
  };
  const bool copied = copy();
  runtime.PyBuffer_Release(&buffer);
  return copied;
}

// An argument of a step: an eager tensor, an array, or None. Read with Python's lock held, resolved
// without.
class Argument {
 public:
  // False where it is none of these.
  bool Read(PyObject* object, DataType dtype, int axes) {
    dtype_ = dtype;
    if (object == runtime.none) return true;
    if (runtime.EagerTensor_CheckExact(object)) {
      handle_ = runtime.EagerTensor_Handle(object);
      return true;
    }
    tensor_ = &copy_;
    return CopyArray(object, dtype, axes, &copy_);
  }
  // False where it is a tensor of another dtype, or elsewhere.
  bool Resolve() {
    if (handle_ == nullptr) return true;
    tensor_ = TensorOf(handle_);
    return tensor_ != nullptr && tensor_->dtype() == dtype_;
  }
  const Tensor* tensor() const { return tensor_; }

 private:
  DataType dtype_;
  TFE_TensorHandle* handle_ = nullptr;
  const Tensor* tensor_ = nullptr;
  Tensor copy_;
};

class OneOutput : public CoSiMhaStepOutputs {
 public:
  Status Allocate(int, DataType dtype, const tensorflow::TensorShape& shape,
                  Tensor** tensor) override {
    tensor_ = Tensor(dtype, shape);
    if (!tensor_.IsInitialized()) return absl::ResourceExhaustedError("out of memory");
    *tensor = &tensor_;
    return absl::OkStatus();
  }
  const Tensor& tensor() const { return tensor_; }

 private:
  Tensor tensor_;
};

// Whether operations of this thread may still be under way when they have returned.
bool IsAsync(TFE_Context* context) {
  TFE_Executor* executor = runtime.ContextGetExecutorForThread(context);
  const bool async = runtime.ExecutorIsAsync(executor);
  runtime.DeleteExecutor(executor);
  return async;
}

PyObject* NewReference(PyObject* object) {
  runtime.Py_IncRef(object);
  return object;
}

}  // namespace

// Makes the function below ready to be called. `tensorflow_library` is a shared library of
// TensorFlow's that depends on all others. Returns the names of what is not there, or "".
EXPORTED const char* continual_transformers_find_runtime(const char* tensorflow_library) {
  static std::string missing;
  missing = runtime.Find(tensorflow_library);
  return missing.c_str();
}

// Takes the step of CoSiMultiHeadAttentionStep, whose `variables` are an eager tensor of what
// BindVariables gave. Returns a new reference: to an eager tensor, the result; to None, while none
// of these streams has come as far as `first_step`; or to NotImplemented, and then no step was
// taken. To be called with Python's lock held, which other threads have while the step is computed.
//
// `options` has the attributes of the op, for each argument takes ctypes 0.1 us: a bit each for
// use_bias, use_gate, use_delay, update_state, whether the op is CoSiTransformerEncoderStep, its
// norm_first, and whether T is double, in this order from the lowest; above them the number of the
// encoder's activation. `epsilon` is that of its layer norms.
EXPORTED PyObject* continual_transformers_co_si_step(TFE_Context* context, PyObject* variables,
                                                     PyObject* query, PyObject* value,
                                                     PyObject* key, PyObject* streams,
                                                     int64_t first_step, int options,
                                                     double epsilon) {
  const auto declined = [] { return NewReference(runtime.not_implemented); };
  const auto bit = [options](int i) { return (options >> i & 1) != 0; };
  if (IsAsync(context) || !TargetError().empty() || query == runtime.none ||
      !runtime.EagerTensor_CheckExact(variables)) {
    return declined();
  }
  CoSiMhaStepOptions step_options = {};
  step_options.use_bias = bit(0);
  step_options.use_gate = bit(1);
  step_options.use_delay = bit(2);
  step_options.update_state = bit(3);
  step_options.first_step = first_step;
  if (bit(4)) step_options.encoder = {bit(5), static_cast<Activation>(options >> 7), epsilon};
  const DataType dtype = bit(6) ? tensorflow::DT_DOUBLE : tensorflow::DT_FLOAT;

  TFE_TensorHandle* bound = runtime.EagerTensor_Handle(variables);
  Argument queries, values, keys, numbers;
  if (!queries.Read(query, dtype, 2) || !values.Read(value, dtype, 2) ||
      !keys.Read(key, dtype, 2) || !numbers.Read(streams, tensorflow::DT_INT32, 1)) {
    return declined();
  }
  OneOutput output;
  // Whoever else has a reference to the arguments keeps them: the caller.
  void* thread = runtime.PyEval_SaveThread();
  const bool taken = [&] {
    const Tensor* handle = TensorOf(bound);
    if (handle == nullptr || !queries.Resolve() || !values.Resolve() || !keys.Resolve() ||
        !numbers.Resolve()) {
      return false;
    }
    const auto found = handle->scalar<tensorflow::ResourceHandle>()().GetResource<BoundVariables>();
    // Of variables on a GPU the handles lie here too.
    if (!found.ok() || (*found)->device()->attributes().device_type() != tensorflow::DEVICE_CPU) {
      return false;
    }
    CoSiMhaStepInputs inputs = {};
    inputs.query = queries.tensor();
    inputs.value = values.tensor();
    inputs.key = keys.tensor();
    inputs.streams = numbers.tensor();
    // As the runtime has it, so that the bits are the op's.
    const tensorflow::port::ScopedFlushDenormal flush;
    return CallCoSiMhaStep(step_options, inputs, (*found)->variables(),
                           ThreadsOf((*found)->device()), &output)
        .ok();
  }();
  runtime.PyEval_RestoreThread(thread);
  if (!taken) return declined();
  if (output.tensor().dim_size(0) == 0 && first_step > 1) {
    return NewReference(runtime.none);
  }
  return runtime.EagerTensorFromHandle(runtime.HandleOfTensor(output.tensor()),
                                       /*is_packed=*/false);
}

}  // namespace continual_transformers
