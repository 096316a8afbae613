// The variables that an op changes in place.

#ifndef CONTINUAL_TRANSFORMERS_TENSORFLOW_LOCKED_VARIABLES_H_
#define CONTINUAL_TRANSFORMERS_TENSORFLOW_LOCKED_VARIABLES_H_

#include "absl/container/inlined_vector.h"
#include "absl/status/status.h"
#include "absl/types/span.h"
#include "tensorflow/core/framework/resource_var.h"
#include "tensorflow/core/framework/tensor.h"

namespace continual_transformers {

// Memory that the host cannot read, such as a GPU's.
class DeviceMemory {
 public:
  virtual ~DeviceMemory() = default;
  // Makes *to a copy of a tensor in this memory.
  virtual absl::Status Copy(const tensorflow::Tensor& from, tensorflow::Tensor* to) = 0;
};

// Keeps variables locked against every other op until this goes out of scope. The variables must
// outlive it.
class LockedVariables {
 public:
  struct Variable {
    tensorflow::Var* var;
    const char* name;
    tensorflow::DataType dtype;
  };

  // `device` owns the memory of the variables; null: the host.
  explicit LockedVariables(DeviceMemory* device = nullptr) : device_(device) {}
  LockedVariables(const LockedVariables&) = delete;
  LockedVariables& operator=(const LockedVariables&) = delete;
  ~LockedVariables();

  absl::Status Lock(absl::Span<const Variable> variables);

 private:
  absl::Status PrepareInPlaceUpdate(const Variable& variable);

  DeviceMemory* const device_;
  absl::InlinedVector<tensorflow::Var*, 8> locked_;
};

}  // namespace continual_transformers

#endif  // CONTINUAL_TRANSFORMERS_TENSORFLOW_LOCKED_VARIABLES_H_
