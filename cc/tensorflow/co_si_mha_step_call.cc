#include "cc/tensorflow/co_si_mha_step_call.h"

#include <string>

#include "absl/status/status.h"
#include "cc/attention/co_si_encoder_step.h"
#include "cc/tensorflow/inputs.h"
#include "tensorflow/core/framework/resource_handle.h"
#include "tensorflow/core/framework/resource_mgr.h"

namespace continual_transformers {

using absl::Status;

Status ReadCoSiMhaStepOptions(tensorflow::OpKernelConstruction* ctx, CoSiMhaStepOptions* options) {
  TF_RETURN_IF_ERROR(ctx->GetAttr("use_bias", &options->use_bias));
  TF_RETURN_IF_ERROR(ctx->GetAttr("use_gate", &options->use_gate));
  TF_RETURN_IF_ERROR(ctx->GetAttr("use_delay", &options->use_delay));
  TF_RETURN_IF_ERROR(ctx->GetAttr("first_step", &options->first_step));
  TF_RETURN_IF_ERROR(ctx->GetAttr("update_state", &options->update_state));
  TF_RETURN_IF_ERROR(ctx->GetAttr("advance_position", &options->advance_position));
  TF_RETURN_IF_ERROR(ctx->GetAttr("sequence_first", &options->sequence_first));
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
  TF_RETURN_IF_ERROR(ctx->GetAttr("advance_position", &options->advance_position));
  TF_RETURN_IF_ERROR(ctx->GetAttr("sequence_first", &options->sequence_first));
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

Status ReadVariables(tensorflow::OpKernelContext* ctx, Variables* variables) {
  tensorflow::OpInputList handles;
  TF_RETURN_IF_ERROR(ctx->input_list("variables", &handles));
  for (const tensorflow::Tensor& handle : handles) {
    variables->emplace_back();
    TF_RETURN_IF_ERROR(
        LookupResource(ctx, handle.scalar<tensorflow::ResourceHandle>()(), &variables->back()));
  }
  return absl::OkStatus();
}

}  // namespace continual_transformers
