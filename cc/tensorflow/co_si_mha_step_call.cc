#include "cc/tensorflow/co_si_mha_step_call.h"

#include <cstdint>
#include <string>

#include "absl/status/status.h"
#include "cc/attention/co_si_encoder_step.h"
#include "cc/attention/co_si_mha_step.h"
#include "cc/tensorflow/co_si_mha_step_call-inl.h"
#include "cc/tensorflow/inputs.h"

namespace continual_transformers {
namespace {

using absl::Status;
using tensorflow::Tensor;

class Cpu {
 public:
  explicit Cpu(const Threads& threads) : threads_(threads) {}

  DeviceMemory* memory() { return nullptr; }

  Status Positions(AttentionState* state, const int64_t** positions) {
    *positions = state->position()->flat<int64_t>().data();
    return absl::OkStatus();
  }

  template <typename T, typename C, typename W>
  Status Take(const CoSiMhaStep<T, C, W>& step, const Tensor*, AttentionState* state) {
    TakeCoSiMhaStep(step, threads_);
    state->Advance(step.attention);
    return absl::OkStatus();
  }

  template <typename T, typename C, typename W>
  Status Take(const CoSiEncoderStep<T, C, W>& encoder, const Tensor*, AttentionState* state) {
    TakeCoSiEncoderStep(encoder, threads_);
    state->Advance(encoder.attention.attention);
    return absl::OkStatus();
  }

 private:
  const Threads& threads_;
};

}  // namespace

Status ReadCoSiMhaStepOptions(tensorflow::OpKernelConstruction* ctx, CoSiMhaStepOptions* options) {
  TF_RETURN_IF_ERROR(ctx->GetAttr("use_bias", &options->use_bias));
  TF_RETURN_IF_ERROR(ctx->GetAttr("use_gate", &options->use_gate));
  TF_RETURN_IF_ERROR(ctx->GetAttr("use_delay", &options->use_delay));
  TF_RETURN_IF_ERROR(ctx->GetAttr("first_step", &options->first_step));
  TF_RETURN_IF_ERROR(ctx->GetAttr("update_state", &options->update_state));
  int scores;
  TF_RETURN_IF_ERROR(ctx->GetAttr("num_scores", &scores));
  if (scores > 1) return InvalidArgument("expected num_scores 0 or 1, but got ", scores);
  options->return_attention_scores = scores == 1;
  return absl::OkStatus();
}

Status ReadCoSiEncoderStepOptions(tensorflow::OpKernelConstruction* ctx,
                                  CoSiMhaStepOptions* options) {
  TF_RETURN_IF_ERROR(ctx->GetAttr("use_bias", &options->use_bias));
  TF_RETURN_IF_ERROR(ctx->GetAttr("first_step", &options->first_step));
  TF_RETURN_IF_ERROR(ctx->GetAttr("update_state", &options->update_state));
  CoSiEncoderOptions encoder;
  float epsilon, epsilon_low;
  std::string activation;
  TF_RETURN_IF_ERROR(ctx->GetAttr("norm_first", &encoder.norm_first));
  TF_RETURN_IF_ERROR(ctx->GetAttr("epsilon", &epsilon));
  TF_RETURN_IF_ERROR(ctx->GetAttr("epsilon_low", &epsilon_low));
  TF_RETURN_IF_ERROR(ctx->GetAttr("activation", &activation));
  encoder.epsilon = static_cast<double>(epsilon) + epsilon_low;
  encoder.activation = activation == "gelu"   ? Activation::kGelu
                       : activation == "relu" ? Activation::kRelu
                                              : Activation::kLinear;
  options->encoder = encoder;
  return absl::OkStatus();
}

Status ReadCoSiEncoderStepInputs(tensorflow::OpKernelContext* ctx, CoSiMhaStepInputs* inputs) {
  *inputs = {};
  inputs->query = &ctx->input(0);
  return OptionalInput(ctx, "streams", &inputs->streams);
}

Status ReadCoSiMhaStepInputs(tensorflow::OpKernelContext* ctx, CoSiMhaStepInputs* inputs) {
  inputs->query = &ctx->input(0);
  TF_RETURN_IF_ERROR(OptionalInput(ctx, "value", &inputs->value));
  TF_RETURN_IF_ERROR(OptionalInput(ctx, "key", &inputs->key));
  TF_RETURN_IF_ERROR(OptionalInput(ctx, "streams", &inputs->streams));
  TF_RETURN_IF_ERROR(OptionalInput(ctx, "attention_mask", &inputs->attention_mask));
  TF_RETURN_IF_ERROR(OptionalInput(ctx, "query_mask", &inputs->query_mask));
  return OptionalInput(ctx, "key_mask", &inputs->key_mask);
}

Status CallCoSiMhaStep(const CoSiMhaStepOptions& options, const CoSiMhaStepInputs& inputs,
                       const Variables& variables, const Threads& threads,
                       CoSiMhaStepOutputs* outputs) {
  Cpu cpu(threads);
  return CallCoSiMhaStepOn(&cpu, options, inputs, variables, outputs);
}

}  // namespace continual_transformers
