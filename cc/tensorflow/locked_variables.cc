#include "cc/tensorflow/locked_variables.h"

#include <algorithm>

#include "cc/tensorflow/expect.h"
#include "tensorflow/core/framework/tensor_util.h"

namespace continual_transformers {
using absl::Status;
using tensorflow::DataTypeString;
using tensorflow::Tensor;
using tensorflow::Var;

LockedVariables::~LockedVariables() {
  for (Var* var : locked_) var->mu()->unlock();
}

Status LockedVariables::Lock(absl::Span<const Variable> variables) {
  absl::InlinedVector<Var*, 8> ordered;
  for (const Variable& variable : variables) ordered.push_back(variable.var);
  // All ops lock in the order of addresses, so no two ops can each hold a lock that the other waits
  // for. A variable that is given twice is locked once.
  std::sort(ordered.begin(), ordered.end());
  ordered.erase(std::unique(ordered.begin(), ordered.end()), ordered.end());
  for (Var* var : ordered) {
    var->mu()->lock();
    locked_.push_back(var);
  }
  for (const Variable& variable : variables) TF_RETURN_IF_ERROR(PrepareInPlaceUpdate(variable));
  return absl::OkStatus();
}

Status LockedVariables::PrepareInPlaceUpdate(const Variable& variable) {
  Var* var = variable.var;
  if (!var->is_initialized) {
    return InvalidArgument("expected initialized variables, but ", variable.name, " is not");
  }
  if (var->tensor()->dtype() != variable.dtype) {
    return InvalidArgument("expected ", variable.name, " to hold ", DataTypeString(variable.dtype),
                           ", but got ", DataTypeString(var->tensor()->dtype()));
  }
  // From now on, a read of the variable copies it. A reader that already holds the buffer keeps it
  // with the old values, and the op changes a copy.
  var->copy_on_read_mode.store(true);
  if (var->tensor()->RefCountIsOne()) return absl::OkStatus();
  if (device_ == nullptr) {
    *var->tensor() = tensorflow::tensor::DeepCopy(*var->tensor());
    return absl::OkStatus();
  }
  Tensor copy;
  TF_RETURN_IF_ERROR(device_->Copy(*var->tensor(), &copy));
  *var->tensor() = copy;
  return absl::OkStatus();
}

}  // namespace continual_transformers
