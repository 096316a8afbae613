// The kernels of CoSiMultiHeadAttentionStep and CoSiTransformerEncoderStep.

#include <string>

#include "absl/status/status.h"
#include "cc/tensorflow/bound_variables.h"
#include "cc/tensorflow/co_si_mha_step_call.h"
#include "cc/tensorflow/inputs.h"
#include "cc/tensorflow/threads.h"
#include "tensorflow/core/framework/op_kernel.h"

namespace continual_transformers {
namespace {

using absl::Status;
using tensorflow::OpKernel;
using tensorflow::OpKernelConstruction;
using tensorflow::OpKernelContext;
using tensorflow::Tensor;

class OpOutputs : public CoSiMhaStepOutputs {
 public:
  explicit OpOutputs(OpKernelContext* ctx) : ctx_(ctx) {}
  Status Allocate(int index, tensorflow::DataType, const tensorflow::TensorShape& shape,
                  Tensor** tensor) override {
    return ctx_->allocate_output(index, shape, tensor);
  }

 private:
  OpKernelContext* ctx_;
};

class CoSiMultiHeadAttentionStepOp : public OpKernel {
 public:
  explicit CoSiMultiHeadAttentionStepOp(OpKernelConstruction* ctx) : OpKernel(ctx) {
    OP_REQUIRES_OK(ctx, ExpectTarget());
    OP_REQUIRES_OK(ctx, ctx->GetAttr("use_bias", &options_.use_bias));
    OP_REQUIRES_OK(ctx, ctx->GetAttr("use_gate", &options_.use_gate));
    OP_REQUIRES_OK(ctx, ctx->GetAttr("use_delay", &options_.use_delay));
    OP_REQUIRES_OK(ctx, ctx->GetAttr("first_step", &options_.first_step));
    OP_REQUIRES_OK(ctx, ctx->GetAttr("update_state", &options_.update_state));
    int scores;
    OP_REQUIRES_OK(ctx, ctx->GetAttr("num_scores", &scores));
    OP_REQUIRES(ctx, scores <= 1, InvalidArgument("expected num_scores 0 or 1, but got ", scores));
    options_.return_attention_scores = scores == 1;
  }

  void Compute(OpKernelContext* ctx) override {
    VariablesOfInput variables;
    OP_REQUIRES_OK(ctx, variables.Look(ctx, "variables"));
    CoSiMhaStepInputs inputs = {};
    inputs.query = &ctx->input(0);
    OP_REQUIRES_OK(ctx, OptionalInput(ctx, "value", &inputs.value));
    OP_REQUIRES_OK(ctx, OptionalInput(ctx, "key", &inputs.key));
    OP_REQUIRES_OK(ctx, OptionalInput(ctx, "streams", &inputs.streams));
    OP_REQUIRES_OK(ctx, OptionalInput(ctx, "attention_mask", &inputs.attention_mask));
    OP_REQUIRES_OK(ctx, OptionalInput(ctx, "query_mask", &inputs.query_mask));
    OP_REQUIRES_OK(ctx, OptionalInput(ctx, "key_mask", &inputs.key_mask));
    OpOutputs outputs(ctx);
    OP_REQUIRES_OK(ctx, CallCoSiMhaStep(options_, inputs, variables.all(), ThreadsOf(ctx->device()),
                                        &outputs));
  }

 private:
  CoSiMhaStepOptions options_ = {};
};

class CoSiTransformerEncoderStepOp : public OpKernel {
 public:
  explicit CoSiTransformerEncoderStepOp(OpKernelConstruction* ctx) : OpKernel(ctx) {
    OP_REQUIRES_OK(ctx, ExpectTarget());
    OP_REQUIRES_OK(ctx, ctx->GetAttr("use_bias", &options_.use_bias));
    OP_REQUIRES_OK(ctx, ctx->GetAttr("first_step", &options_.first_step));
    OP_REQUIRES_OK(ctx, ctx->GetAttr("update_state", &options_.update_state));
    CoSiEncoderOptions encoder;
    float epsilon, epsilon_low;
    std::string activation;
    OP_REQUIRES_OK(ctx, ctx->GetAttr("norm_first", &encoder.norm_first));
    OP_REQUIRES_OK(ctx, ctx->GetAttr("epsilon", &epsilon));
    OP_REQUIRES_OK(ctx, ctx->GetAttr("epsilon_low", &epsilon_low));
    OP_REQUIRES_OK(ctx, ctx->GetAttr("activation", &activation));
    encoder.epsilon = static_cast<double>(epsilon) + epsilon_low;
    encoder.activation = activation == "gelu"   ? Activation::kGelu
                         : activation == "relu" ? Activation::kRelu
                                                : Activation::kLinear;
    options_.encoder = encoder;
  }

  void Compute(OpKernelContext* ctx) override {
    VariablesOfInput variables;
    OP_REQUIRES_OK(ctx, variables.Look(ctx, "variables"));
    CoSiMhaStepInputs inputs = {};
    inputs.query = &ctx->input(0);
    OP_REQUIRES_OK(ctx, OptionalInput(ctx, "streams", &inputs.streams));
    OpOutputs outputs(ctx);
    OP_REQUIRES_OK(ctx, CallCoSiMhaStep(options_, inputs, variables.all(), ThreadsOf(ctx->device()),
                                        &outputs));
  }

 private:
  CoSiMhaStepOptions options_ = {};
};

REGISTER_KERNEL_BUILDER(
    Name("ContinualTransformers>CoSiMultiHeadAttentionStep").Device(tensorflow::DEVICE_CPU),
    CoSiMultiHeadAttentionStepOp);
REGISTER_KERNEL_BUILDER(
    Name("ContinualTransformers>CoSiTransformerEncoderStep").Device(tensorflow::DEVICE_CPU),
    CoSiTransformerEncoderStepOp);

}  // namespace
}  // namespace continual_transformers
