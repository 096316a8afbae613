// An op's inputs and outputs. A kernel finds them by name when it is made, so a call looks up no
// names.

#ifndef CONTINUAL_TRANSFORMERS_TENSORFLOW_OP_IO_H_
#define CONTINUAL_TRANSFORMERS_TENSORFLOW_OP_IO_H_

#include "absl/status/status.h"
#include "cc/tensorflow/expect.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "tensorflow/core/framework/resource_handle.h"
#include "tensorflow/core/framework/resource_mgr.h"
#include "tensorflow/core/framework/resource_var.h"
#include "tensorflow/core/framework/tensor.h"

namespace continual_transformers {

using VariablePtr = tensorflow::core::RefCountPtr<tensorflow::Var>;

// A tensor, or a list of tensors.
class OpInput {
 public:
  absl::Status Find(const tensorflow::OpKernel& kernel, const char* name) {
    int end;
    TF_RETURN_IF_ERROR(kernel.InputRange(name, &begin_, &end));
    size_ = end - begin_;
    return absl::OkStatus();
  }

  int size() const { return size_; }
  const tensorflow::Tensor& Get(tensorflow::OpKernelContext* ctx, int i = 0) const {
    return ctx->input(begin_ + i);
  }

  // Looks up the variable whose handle this input is.
  absl::Status GetVariable(tensorflow::OpKernelContext* ctx, VariablePtr* variable,
                           int i = 0) const {
    return tensorflow::LookupResource(ctx, Get(ctx, i).flat<tensorflow::ResourceHandle>()(0),
                                      variable);
  }

 private:
  int begin_ = 0, size_ = 0;
};

// A list of at most one tensor.
class OptionalOpInput {
 public:
  absl::Status Find(const tensorflow::OpKernel& kernel, const char* name) {
    TF_RETURN_IF_ERROR(input_.Find(kernel, name));
    if (input_.size() <= 1) return absl::OkStatus();
    return InvalidArgument("expected at most one ", name, ", but got ", input_.size());
  }

  // Returns null if there is none, or if the op has no input of this name.
  const tensorflow::Tensor* Get(tensorflow::OpKernelContext* ctx) const {
    return input_.size() == 0 ? nullptr : &input_.Get(ctx);
  }

 private:
  OpInput input_;
};

// A tensor, or a list of tensors.
class OpOutput {
 public:
  absl::Status Find(const tensorflow::OpKernel& kernel, const char* name) {
    int end;
    TF_RETURN_IF_ERROR(kernel.OutputRange(name, &begin_, &end));
    size_ = end - begin_;
    return absl::OkStatus();
  }

  int size() const { return size_; }
  tensorflow::DataType dtype(const tensorflow::OpKernelContext* ctx, int i = 0) const {
    return ctx->expected_output_dtype(begin_ + i);
  }
  absl::Status Allocate(tensorflow::OpKernelContext* ctx, const tensorflow::TensorShape& shape,
                        tensorflow::Tensor** tensor, int i = 0) const {
    return ctx->allocate_output(begin_ + i, shape, tensor);
  }

 private:
  int begin_ = 0, size_ = 0;
};

}  // namespace continual_transformers

#endif  // CONTINUAL_TRANSFORMERS_TENSORFLOW_OP_IO_H_
