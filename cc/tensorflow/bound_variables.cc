#include "cc/tensorflow/bound_variables.h"

#include <utility>

#include "tensorflow/core/framework/resource_handle.h"
#include "tensorflow/core/framework/resource_mgr.h"

namespace continual_transformers {
namespace {

using absl::Status;
using tensorflow::OpInputList;
using tensorflow::OpKernel;
using tensorflow::OpKernelContext;
using tensorflow::ResourceHandle;
using tensorflow::Tensor;

Status LookUpAll(OpKernelContext* ctx, const OpInputList& handles, Variables* variables) {
  for (const Tensor& handle : handles) {
    variables->emplace_back();
    TF_RETURN_IF_ERROR(LookupResource(ctx, handle.scalar<ResourceHandle>()(), &variables->back()));
  }
  return absl::OkStatus();
}

class BindVariablesOp : public OpKernel {
 public:
  using OpKernel::OpKernel;

  void Compute(OpKernelContext* ctx) override {
    OpInputList handles;
    OP_REQUIRES_OK(ctx, ctx->input_list("variables", &handles));
    Variables variables;
    OP_REQUIRES_OK(ctx, LookUpAll(ctx, handles, &variables));
    Tensor* bound;
    OP_REQUIRES_OK(ctx, ctx->allocate_output(0, {}, &bound));
    // Gone with the last tensor that holds the handle.
    bound->scalar<ResourceHandle>()() = ResourceHandle::MakeRefCountingHandle(
        new BoundVariables(std::move(variables), ctx->device()), ctx->device()->name());
  }
};

REGISTER_KERNEL_BUILDER(Name("ContinualTransformers>BindVariables").Device(tensorflow::DEVICE_CPU),
                        BindVariablesOp);
#ifdef CONTINUAL_TRANSFORMERS_CUDA
// Handles are the host's wherever their variables are.
REGISTER_KERNEL_BUILDER(Name("ContinualTransformers>BindVariables")
                            .Device(tensorflow::DEVICE_GPU)
                            .HostMemory("variables")
                            .HostMemory("bound"),
                        BindVariablesOp);
#endif

}  // namespace

Status VariablesOfInput::Look(OpKernelContext* ctx, const char* input) {
  OpInputList handles;
  TF_RETURN_IF_ERROR(ctx->input_list(input, &handles));
  if (handles.size() != 1) return LookUpAll(ctx, handles, &given_);
  TF_RETURN_IF_ERROR(LookupResource(ctx, handles[0].scalar<ResourceHandle>()(), &bound_));
  variables_ = &bound_->variables();
  return absl::OkStatus();
}

}  // namespace continual_transformers
