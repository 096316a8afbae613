// SingleOutputAttention on a device; see cpu_device.h for what a device is. The op checks
// everything and allocates. Only then does the device take the steps, so an op that fails changes
// no state.

#ifndef CONTINUAL_TRANSFORMERS_TENSORFLOW_SINGLE_OUTPUT_OP_H_
#define CONTINUAL_TRANSFORMERS_TENSORFLOW_SINGLE_OUTPUT_OP_H_

#include <cstdint>

#include "absl/status/status.h"
#include "cc/attention/params.h"
#include "cc/tensorflow/attention_state.h"
#include "cc/tensorflow/dtypes.h"
#include "cc/tensorflow/masks.h"
#include "cc/tensorflow/op_io.h"
#include "cc/tensorflow/ring_inputs.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "tensorflow/core/framework/tensor.h"

namespace continual_transformers {

template <typename Device, typename T, typename C>
class SingleOutputAttentionOp : public tensorflow::OpKernel {
 public:
  explicit SingleOutputAttentionOp(tensorflow::OpKernelConstruction* ctx) : OpKernel(ctx) {
    OP_REQUIRES_OK(ctx, Device::Check());
    OP_REQUIRES_OK(ctx, ctx->GetAttr("return_attention_scores", &return_attention_scores_));
    OP_REQUIRES_OK(ctx, ctx->GetAttr("return_window", &return_window_));
    OP_REQUIRES_OK(ctx, inputs_.Read(ctx, *this));
    OP_REQUIRES_OK(ctx, attention_mask_.Find(*this, "attention_mask"));
    OP_REQUIRES_OK(ctx, output_.Find(*this, "output"));
    OP_REQUIRES_OK(ctx, attention_scores_.Find(*this, "attention_scores"));
    OP_REQUIRES_OK(ctx, steps_taken_.Find(*this, "steps_taken"));
    OP_REQUIRES_OK(ctx, window_key_.Find(*this, "window_key"));
    OP_REQUIRES_OK(ctx, window_value_.Find(*this, "window_value"));
    OP_REQUIRES_OK(ctx, window_key_mask_.Find(*this, "window_key_mask"));
  }

  void Compute(tensorflow::OpKernelContext* ctx) override { OP_REQUIRES_OK(ctx, Run(ctx)); }

 private:
  absl::Status Run(tensorflow::OpKernelContext* ctx) const {
    Device device(ctx, &kept_);
    RingInputs::Variables variables;
    TF_RETURN_IF_ERROR(inputs_.GetVariables(ctx, &variables));
    AttentionState state = inputs_.State(device.memory());
    TF_RETURN_IF_ERROR(state.Lock(CacheOf(variables), kDataType<C>));
    SingleOutputParams<T, C> params = {};
    TF_RETURN_IF_ERROR(inputs_.Fill(ctx, &state, &params));
    TF_RETURN_IF_ERROR(FillAttentionMask(attention_mask_.Get(ctx), &params));
    int64_t* steps_taken;
    TF_RETURN_IF_ERROR(AllocateOutputs(ctx, &params, &steps_taken));
    return device.Take(params, &inputs_.streams(ctx), steps_taken, &state);
  }

  absl::Status AllocateOutputs(tensorflow::OpKernelContext* ctx, SingleOutputParams<T, C>* p,
                               int64_t** steps_taken) const {
    const int64_t m = p->num_streams, t = p->num_steps, h = p->num_heads, n = p->window;
    const int64_t columns = return_attention_scores_ ? n : 0;
    const int64_t before = return_window_ ? n - 1 : 0;
    tensorflow::Tensor *output, *scores, *taken, *window_key, *window_value, *window_key_mask;
    TF_RETURN_IF_ERROR(output_.Allocate(ctx, {m, t, h, p->value_dim}, &output));
    TF_RETURN_IF_ERROR(attention_scores_.Allocate(ctx, {m, h, t, columns}, &scores));
    TF_RETURN_IF_ERROR(steps_taken_.Allocate(ctx, {m}, &taken));
    TF_RETURN_IF_ERROR(window_key_.Allocate(ctx, {m, h, before, p->key_dim}, &window_key));
    TF_RETURN_IF_ERROR(window_value_.Allocate(ctx, {m, h, before, p->value_dim}, &window_value));
    TF_RETURN_IF_ERROR(window_key_mask_.Allocate(ctx, {m, before}, &window_key_mask));
    p->output = Data<T>(output);
    p->output_strides = BatchTimeHead(t, h, p->value_dim);
    *steps_taken = taken->flat<int64_t>().data();
    if (return_attention_scores_) {
      p->scores = Data<T>(scores);
      p->scores_strides = BatchHeadTime(h, t, n);
    }
    if (return_window_) {
      p->window_key = Data<C>(window_key);
      p->window_value = Data<C>(window_value);
      p->window_key_mask = window_key_mask->flat<bool>().data();
    }
    return absl::OkStatus();
  }

  mutable typename Device::Kept kept_;
  RingInputs inputs_;
  OptionalOpInput attention_mask_;
  OpOutput output_, attention_scores_, steps_taken_, window_key_, window_value_, window_key_mask_;
  bool return_attention_scores_, return_window_;
};

}  // namespace continual_transformers

#endif  // CONTINUAL_TRANSFORMERS_TENSORFLOW_SINGLE_OUTPUT_OP_H_
