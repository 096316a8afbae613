// CoSiMultiHeadAttentionStep on a device; see cpu_device.h.

#ifndef CONTINUAL_TRANSFORMERS_TENSORFLOW_CO_SI_MHA_STEP_OP_H_
#define CONTINUAL_TRANSFORMERS_TENSORFLOW_CO_SI_MHA_STEP_OP_H_

#include "absl/status/status.h"
#include "cc/tensorflow/co_si_mha_step_call.h"
#include "cc/tensorflow/co_si_mha_step_options.h"
#include "cc/tensorflow/op_io.h"
#include "tensorflow/core/framework/op_kernel.h"

namespace continual_transformers {

template <typename Device>
class CoSiMhaStepOp : public tensorflow::OpKernel {
 public:
  explicit CoSiMhaStepOp(tensorflow::OpKernelConstruction* ctx) : OpKernel(ctx) {
    OP_REQUIRES_OK(ctx, Device::Check());
    OP_REQUIRES_OK(ctx, options_.ReadAll(ctx));
    OP_REQUIRES_OK(ctx, query_.Find(*this, "query"));
    OP_REQUIRES_OK(ctx, value_.Find(*this, "value"));
    OP_REQUIRES_OK(ctx, key_.Find(*this, "key"));
    OP_REQUIRES_OK(ctx, variables_.Find(*this, "variables"));
    OP_REQUIRES_OK(ctx, streams_.Find(*this, "streams"));
    OP_REQUIRES_OK(ctx, attention_mask_.Find(*this, "attention_mask"));
    OP_REQUIRES_OK(ctx, query_mask_.Find(*this, "query_mask"));
    OP_REQUIRES_OK(ctx, key_mask_.Find(*this, "key_mask"));
    OP_REQUIRES_OK(ctx, result_.Find(*this, "result"));
    OP_REQUIRES_OK(ctx, attention_scores_.Find(*this, "attention_scores"));
  }

  void Compute(tensorflow::OpKernelContext* ctx) override { OP_REQUIRES_OK(ctx, Run(ctx)); }

 private:
  absl::Status Run(tensorflow::OpKernelContext* ctx) const {
    Device device(ctx, &kept_);
    StepVariables variables;
    TF_RETURN_IF_ERROR(variables.Get(ctx, variables_, options_.variables()));
    const CoSiMhaStepInputs inputs = {
        &query_.Get(ctx),         value_.Get(ctx),      key_.Get(ctx),     streams_.Get(ctx),
        attention_mask_.Get(ctx), query_mask_.Get(ctx), key_mask_.Get(ctx)};
    return RunCoSiMhaStep(options_, inputs, variables, &device, [&](auto* call) {
      TF_RETURN_IF_ERROR(call->Prepare(ctx, result_, attention_scores_));
      return device.Take(call->step(), call->streams(), call->state());
    });
  }

  mutable typename Device::Kept kept_;
  CoSiMhaStepOptions options_;
  OpInput query_, variables_;
  OptionalOpInput value_, key_, streams_, attention_mask_, query_mask_, key_mask_;
  OpOutput result_, attention_scores_;
};

}  // namespace continual_transformers

#endif  // CONTINUAL_TRANSFORMERS_TENSORFLOW_CO_SI_MHA_STEP_OP_H_
