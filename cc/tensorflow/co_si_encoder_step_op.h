// CoSiTransformerEncoderStep on a device; see cpu_device.h.

#ifndef CONTINUAL_TRANSFORMERS_TENSORFLOW_CO_SI_ENCODER_STEP_OP_H_
#define CONTINUAL_TRANSFORMERS_TENSORFLOW_CO_SI_ENCODER_STEP_OP_H_

#include <cstdint>
#include <string>

#include "absl/status/status.h"
#include "cc/attention/activations.h"
#include "cc/attention/co_si_encoder_step.h"
#include "cc/tensorflow/co_si_mha_step_call.h"
#include "cc/tensorflow/co_si_mha_step_options.h"
#include "cc/tensorflow/dtypes.h"
#include "cc/tensorflow/expect.h"
#include "cc/tensorflow/op_io.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "tensorflow/core/framework/tensor.h"

namespace continual_transformers {

template <typename Device>
class CoSiEncoderStepOp : public tensorflow::OpKernel {
 public:
  explicit CoSiEncoderStepOp(tensorflow::OpKernelConstruction* ctx) : OpKernel(ctx) {
    OP_REQUIRES_OK(ctx, Device::Check());
    OP_REQUIRES_OK(ctx, options_.Read(ctx));
    OP_REQUIRES_OK(ctx, ctx->GetAttr("norm_first", &norm_first_));
    float epsilon, epsilon_low;
    OP_REQUIRES_OK(ctx, ctx->GetAttr("epsilon", &epsilon));
    OP_REQUIRES_OK(ctx, ctx->GetAttr("epsilon_low", &epsilon_low));
    epsilon_ = static_cast<double>(epsilon) + epsilon_low;
    std::string activation;
    OP_REQUIRES_OK(ctx, ctx->GetAttr("activation", &activation));
    if (activation == "gelu") activation_ = {Activation::kGelu};
    if (activation == "relu") activation_ = PlainRelu();
    OP_REQUIRES_OK(ctx, x_.Find(*this, "x"));
    OP_REQUIRES_OK(ctx, variables_.Find(*this, "variables"));
    OP_REQUIRES_OK(ctx, streams_.Find(*this, "streams"));
    OP_REQUIRES_OK(ctx, result_.Find(*this, "result"));
  }

  void Compute(tensorflow::OpKernelContext* ctx) override { OP_REQUIRES_OK(ctx, Run(ctx)); }

 private:
  absl::Status Run(tensorflow::OpKernelContext* ctx) const {
    Device device(ctx, &kept_);
    StepVariables variables;
    TF_RETURN_IF_ERROR(
        variables.Get(ctx, variables_, options_.variables() + kCoSiEncoderStepWeights));
    CoSiMhaStepInputs inputs = {};
    inputs.query = &x_.Get(ctx);
    inputs.streams = streams_.Get(ctx);
    return RunCoSiMhaStep(options_, inputs, variables, &device, [&](auto* call) {
      TF_RETURN_IF_ERROR(call->Prepare(ctx, result_, OpOutput()));
      return Take(&device, call);
    });
  }

  template <typename T, typename C, typename W>
  absl::Status Take(Device* device, CoSiMhaStepCall<Device, T, C, W>* call) const {
    CoSiEncoderStep<T, C, W> step = {};
    step.attention = call->step();
    step.activation = activation_;
    step.norm_first = norm_first_;
    step.result = call->step().result;
    TF_RETURN_IF_ERROR(FillLayers(*call, &step));
    return device->Take(step, call->streams(), call->state());
  }

  // Fills the layers around the attention, whose input and output have the same features: its norm,
  // two dense layers, and their norm.
  template <typename T, typename C, typename W>
  absl::Status FillLayers(const CoSiMhaStepCall<Device, T, C, W>& call,
                          CoSiEncoderStep<T, C, W>* step) const {
    const int64_t features = call.step().query.inputs;
    const auto weight = [&](CoSiEncoderStepWeight of) -> const tensorflow::Tensor& {
      return call.weight(options_.variables() + of);
    };
    const tensorflow::Tensor& hidden = weight(kHiddenKernel);
    const tensorflow::Tensor& output = weight(kOutputKernel);
    TF_RETURN_IF_ERROR(ExpectDtype("kernels", hidden, kDataType<W>));
    TF_RETURN_IF_ERROR(ExpectDtype("kernels", output, kDataType<W>));
    TF_RETURN_IF_ERROR(ExpectRank("the hidden layer's kernel", hidden, 2, "[E, F]"));
    const int64_t width = step->hidden_features = hidden.dim_size(1);
    TF_RETURN_IF_ERROR(ExpectShape("the hidden layer's kernel", hidden, {features, width}));
    TF_RETURN_IF_ERROR(ExpectShape("the feed-forward kernel", output, {width, features}));
    step->hidden = {nullptr, Data<W>(hidden), nullptr, features};
    step->output = {nullptr, Data<W>(output), nullptr, width};
    const auto fill = [&](CoSiEncoderStepWeight of, int64_t size, const T** data) {
      const tensorflow::Tensor& tensor = weight(of);
      TF_RETURN_IF_ERROR(ExpectDtype("biases and norms", tensor, kDataType<T>));
      TF_RETURN_IF_ERROR(ExpectShape("a bias or norm", tensor, {size}));
      *data = Data<T>(tensor);
      return absl::OkStatus();
    };
    TF_RETURN_IF_ERROR(fill(kAttentionNormScale, features, &step->attention_norm.scale));
    TF_RETURN_IF_ERROR(fill(kAttentionNormOffset, features, &step->attention_norm.offset));
    TF_RETURN_IF_ERROR(fill(kHiddenBias, width, &step->hidden.bias));
    TF_RETURN_IF_ERROR(fill(kOutputBias, features, &step->output.bias));
    TF_RETURN_IF_ERROR(fill(kOutputNormScale, features, &step->output_norm.scale));
    TF_RETURN_IF_ERROR(fill(kOutputNormOffset, features, &step->output_norm.offset));
    step->attention_norm.epsilon = step->output_norm.epsilon = static_cast<T>(epsilon_);
    if (call.step().output_features == features) return absl::OkStatus();
    return InvalidArgument("expected attention from ", features, " features to as many, but got ",
                           call.step().output_features);
  }

  mutable typename Device::Kept kept_;
  CoSiMhaStepOptions options_;
  bool norm_first_;
  double epsilon_;  // of the layer norms
  ActivationSpec activation_;
  OpInput x_, variables_;
  OptionalOpInput streams_;
  OpOutput result_;
};

}  // namespace continual_transformers

#endif  // CONTINUAL_TRANSFORMERS_TENSORFLOW_CO_SI_ENCODER_STEP_OP_H_
