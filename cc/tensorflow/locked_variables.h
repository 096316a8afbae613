// The variables that an op changes in place.

#ifndef CONTINUAL_TRANSFORMERS_TENSORFLOW_LOCKED_VARIABLES_H_
#define CONTINUAL_TRANSFORMERS_TENSORFLOW_LOCKED_VARIABLES_H_

#include "absl/container/inlined_vector.h"
#include "absl/status/status.h"
#include "absl/types/span.h"
#include "tensorflow/core/framework/resource_var.h"
#include "tensorflow/core/framework/tensor.h"

namespace continual_transformers {

// Locked against every other op until this goes out of scope. The variables must outlive it.
class LockedVariables {
 public:
  struct Variable {
    tensorflow::Var* var;
    const char* name;
    tensorflow::DataType dtype;
  };

  LockedVariables() = default;
  LockedVariables(const LockedVariables&) = delete;
  LockedVariables& operator=(const LockedVariables&) = delete;
  ~LockedVariables();

  absl::Status Lock(absl::Span<const Variable> variables);

 private:
  absl::InlinedVector<tensorflow::Var*, 8> locked_;
};

}  // namespace continual_transformers

#endif  // CONTINUAL_TRANSFORMERS_TENSORFLOW_LOCKED_VARIABLES_H_
