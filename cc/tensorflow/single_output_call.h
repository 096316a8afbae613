// A call of SingleOutputAttention, on whatever device: check everything and allocate, so that its
// kernel has only to be run. Whatever fails, fails before any state has changed.

#ifndef CONTINUAL_TRANSFORMERS_TENSORFLOW_SINGLE_OUTPUT_CALL_H_
#define CONTINUAL_TRANSFORMERS_TENSORFLOW_SINGLE_OUTPUT_CALL_H_

#include <array>
#include <cstdint>

#include "absl/status/status.h"
#include "cc/attention/params.h"
#include "cc/tensorflow/inputs.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "tensorflow/core/framework/resource_mgr.h"
#include "tensorflow/core/framework/resource_var.h"

namespace continual_transformers {

// The op's attributes.
struct SingleOutputOptions {
  bool return_attention_scores, return_window, update_state, advance_position, sequence_first;

  absl::Status Read(tensorflow::OpKernelConstruction* ctx) {
    TF_RETURN_IF_ERROR(ctx->GetAttr("return_attention_scores", &return_attention_scores));
    TF_RETURN_IF_ERROR(ctx->GetAttr("return_window", &return_window));
    TF_RETURN_IF_ERROR(ctx->GetAttr("update_state", &update_state));
    TF_RETURN_IF_ERROR(ctx->GetAttr("advance_position", &advance_position));
    return ctx->GetAttr("sequence_first", &sequence_first);
  }
};

template <typename T, typename C>
class SingleOutputCall {
 public:
  // `device` is whose memory the variables and the inputs lie in; null: the host's. Streams and
  // scale are the host's wherever the others are.
  SingleOutputCall(const SingleOutputOptions& options, tensorflow::OpKernelContext* ctx,
                   DeviceMemory* device = nullptr)
      : options_(options), ctx_(ctx), state_({options.sequence_first}, device) {
    state_.set_advances(options.advance_position);
  }

  // Locks the state until this goes out of scope, and sets all of *p but its parts and, where it is
  // on a device, its streams.
  absl::Status Prepare(SingleOutputParams<T, C>* p) {
    for (int i = 0; i < 4; ++i) {
      TF_RETURN_IF_ERROR(LookupResource(ctx_, HandleFromInput(ctx_, 3 + i), &variables_[i]));
    }
    TF_RETURN_IF_ERROR(state_.Lock(
        {variables_[0].get(), variables_[1].get(), variables_[2].get(), variables_[3].get()},
        kDataType<C>));
    TF_RETURN_IF_ERROR(FillInputs(p));
    return AllocateOutputs(p);
  }

  AttentionState& state() { return state_; }
  const tensorflow::Tensor& streams() const { return ctx_->input(7); }
  tensorflow::Tensor* steps_taken() { return steps_taken_; }

 private:
  absl::Status FillInputs(SingleOutputParams<T, C>* p) {
    const tensorflow::Tensor& query = ctx_->input(0);
    const tensorflow::Tensor& key = ctx_->input(1);
    const tensorflow::Tensor& value = ctx_->input(2);
    TF_RETURN_IF_ERROR(ExpectRank("query", query, 4, "[M, T, H, D]"));
    TF_RETURN_IF_ERROR(ExpectRank("value", value, 4, "[M, T, H, Dv]"));
    const int64_t m = p->num_streams = query.dim_size(0);
    const int64_t t = p->num_steps = query.dim_size(1);
    const int64_t h = p->num_heads = query.dim_size(2);
    const int64_t d = p->key_dim = query.dim_size(3);
    const int64_t dv = p->value_dim = value.dim_size(3);
    p->window = state_.window();
    if (t < 1 || h < 1 || p->window < 1 || d < 1 || dv < 1) {
      return InvalidArgument(
          "expected at least one step, head, feature and row of the window, "
          "but got query [M, T, H, D] = ",
          query.shape().DebugString(), ", value [M, T, H, Dv] = ", value.shape().DebugString(),
          " and key_cache ", state_.order().axes(), " = ", state_.key()->shape().DebugString());
    }
    TF_RETURN_IF_ERROR(ExpectShape("key", key, {m, t, h, d}));
    TF_RETURN_IF_ERROR(ExpectShape("value", value, {m, t, h, dv}));
    TF_RETURN_IF_ERROR(state_.Fill(&streams(), p));
    const tensorflow::Tensor& scale = ctx_->input(8);
    TF_RETURN_IF_ERROR(ExpectShape("scale", scale, {}));
    p->scale = static_cast<T>(scale.scalar<double>()());
    const tensorflow::Tensor *attention_mask, *key_mask;
    TF_RETURN_IF_ERROR(OptionalInput(ctx_, "attention_mask", &attention_mask));
    TF_RETURN_IF_ERROR(FillAttentionMask(attention_mask, p));
    TF_RETURN_IF_ERROR(OptionalInput(ctx_, "key_mask", &key_mask));
    TF_RETURN_IF_ERROR(FillMask("key_mask", key_mask, {m, t}, &p->key_mask));
    p->query = query.flat<T>().data();
    p->query_strides = BatchTimeHead(t, h, d);
    p->key = Data<C>(key);
    p->key_strides = p->query_strides;
    p->value = Data<C>(value);
    p->value_strides = BatchTimeHead(t, h, dv);
    p->update_state = options_.update_state;
    return absl::OkStatus();
  }

  absl::Status AllocateOutputs(SingleOutputParams<T, C>* p) {
    const int64_t m = p->num_streams, t = p->num_steps, h = p->num_heads, n = p->window;
    const int64_t columns = options_.return_attention_scores ? n : 0;
    const int64_t before = options_.return_window ? n - 1 : 0;
    tensorflow::Tensor *output, *scores, *window_key, *window_value, *window_key_mask;
    TF_RETURN_IF_ERROR(ctx_->allocate_output(0, {m, t, h, p->value_dim}, &output));
    TF_RETURN_IF_ERROR(ctx_->allocate_output(1, {m, h, t, columns}, &scores));
    TF_RETURN_IF_ERROR(ctx_->allocate_output(2, {m}, &steps_taken_));
    TF_RETURN_IF_ERROR(ctx_->allocate_output(3, {m, h, before, p->key_dim}, &window_key));
    TF_RETURN_IF_ERROR(ctx_->allocate_output(4, {m, h, before, p->value_dim}, &window_value));
    TF_RETURN_IF_ERROR(ctx_->allocate_output(5, {m, before}, &window_key_mask));
    p->output = output->flat<T>().data();
    p->output_strides = BatchTimeHead(t, h, p->value_dim);
    if (options_.return_attention_scores) {
      p->scores = scores->flat<T>().data();
      p->scores_strides = BatchHeadTime(h, t, n);
    }
    if (options_.return_window) {
      p->window_key = Data<C>(window_key);
      p->window_value = Data<C>(window_value);
      p->window_key_mask = window_key_mask->flat<bool>().data();
    }
    return absl::OkStatus();
  }

  const SingleOutputOptions& options_;
  tensorflow::OpKernelContext* const ctx_;
  std::array<tensorflow::core::RefCountPtr<tensorflow::Var>, 4> variables_;
  AttentionState state_;  // Holds locks of the variables: it goes before them.
  tensorflow::Tensor* steps_taken_ = nullptr;
};

}  // namespace continual_transformers

#endif  // CONTINUAL_TRANSFORMERS_TENSORFLOW_SINGLE_OUTPUT_CALL_H_
