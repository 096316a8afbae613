// The inputs and attributes that SingleOutputAttention and RetroactiveAttention share: what
// RingParams holds.

#ifndef CONTINUAL_TRANSFORMERS_TENSORFLOW_RING_INPUTS_H_
#define CONTINUAL_TRANSFORMERS_TENSORFLOW_RING_INPUTS_H_

#include <array>
#include <cstdint>

#include "absl/status/status.h"
#include "cc/attention/params.h"
#include "cc/tensorflow/attention_state.h"
#include "cc/tensorflow/dtypes.h"
#include "cc/tensorflow/expect.h"
#include "cc/tensorflow/masks.h"
#include "cc/tensorflow/op_io.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "tensorflow/core/framework/tensor.h"

namespace continual_transformers {

class RingInputs {
 public:
  // The variables of a call. They must outlive the AttentionState that locks them.
  using Variables = std::array<VariablePtr, 4>;

  // Reads what stays the same from call to call.
  absl::Status Read(tensorflow::OpKernelConstruction* ctx, const tensorflow::OpKernel& kernel) {
    TF_RETURN_IF_ERROR(ctx->GetAttr("update_state", &update_state_));
    TF_RETURN_IF_ERROR(ctx->GetAttr("advance_position", &advance_position_));
    TF_RETURN_IF_ERROR(ctx->GetAttr("sequence_first", &order_.sequence_first));
    TF_RETURN_IF_ERROR(query_.Find(kernel, "query"));
    TF_RETURN_IF_ERROR(key_.Find(kernel, "key"));
    TF_RETURN_IF_ERROR(value_.Find(kernel, "value"));
    TF_RETURN_IF_ERROR(cache_[0].Find(kernel, "key_cache"));
    TF_RETURN_IF_ERROR(cache_[1].Find(kernel, "value_cache"));
    TF_RETURN_IF_ERROR(cache_[2].Find(kernel, "key_mask_cache"));
    TF_RETURN_IF_ERROR(cache_[3].Find(kernel, "position"));
    TF_RETURN_IF_ERROR(streams_.Find(kernel, "streams"));
    TF_RETURN_IF_ERROR(scale_.Find(kernel, "scale"));
    return key_mask_.Find(kernel, "key_mask");
  }

  const RingOrder& order() const { return order_; }
  const tensorflow::Tensor& streams(tensorflow::OpKernelContext* ctx) const {
    return streams_.Get(ctx);
  }

  AttentionState State(DeviceMemory* device) const {
    return AttentionState(order_, advance_position_, device);
  }

  absl::Status GetVariables(tensorflow::OpKernelContext* ctx, Variables* variables) const {
    for (size_t i = 0; i < cache_.size(); ++i) {
      TF_RETURN_IF_ERROR(cache_[i].GetVariable(ctx, &(*variables)[i]));
    }
    return absl::OkStatus();
  }

  // Checks everything and sets all of *p except its output, and on a device its streams. `state` is
  // locked.
  template <typename T, typename C>
  absl::Status Fill(tensorflow::OpKernelContext* ctx, AttentionState* state,
                    RingParams<T, C>* p) const {
    const tensorflow::Tensor& query = query_.Get(ctx);
    const tensorflow::Tensor& key = key_.Get(ctx);
    const tensorflow::Tensor& value = value_.Get(ctx);
    TF_RETURN_IF_ERROR(ExpectRank("query", query, 4, "[M, T, H, D]"));
    TF_RETURN_IF_ERROR(ExpectRank("value", value, 4, "[M, T, H, Dv]"));
    const int64_t m = p->num_streams = query.dim_size(0);
    const int64_t t = p->num_steps = query.dim_size(1);
    const int64_t h = p->num_heads = query.dim_size(2);
    const int64_t d = p->key_dim = query.dim_size(3);
    const int64_t dv = p->value_dim = value.dim_size(3);
    p->window = state->window();
    if (t < 1 || h < 1 || p->window < 1 || d < 1 || dv < 1) {
      return InvalidArgument(
          "expected at least one step, head, feature and row of the window, "
          "but got query [M, T, H, D] = ",
          query.shape().DebugString(), ", value [M, T, H, Dv] = ", value.shape().DebugString(),
          " and key_cache ", order_.axes(), " = ", state->key()->shape().DebugString());
    }
    TF_RETURN_IF_ERROR(ExpectShape("key", key, {m, t, h, d}));
    TF_RETURN_IF_ERROR(ExpectShape("value", value, {m, t, h, dv}));
    TF_RETURN_IF_ERROR(state->Fill(&streams(ctx), p));
    const tensorflow::Tensor& scale = scale_.Get(ctx);
    TF_RETURN_IF_ERROR(ExpectShape("scale", scale, {}));
    p->scale = static_cast<T>(scale.scalar<double>()());
    TF_RETURN_IF_ERROR(FillMask("key_mask", key_mask_.Get(ctx), {m, t}, &p->key_mask));
    p->query = Data<T>(query);
    p->query_strides = BatchTimeHead(t, h, d);
    p->key = Data<C>(key);
    p->key_strides = p->query_strides;
    p->value = Data<C>(value);
    p->value_strides = BatchTimeHead(t, h, dv);
    p->update_state = update_state_;
    return absl::OkStatus();
  }

 private:
  OpInput query_, key_, value_, streams_, scale_;
  std::array<OpInput, 4> cache_;  // in the order of AttentionState::Cache
  OptionalOpInput key_mask_;
  RingOrder order_;
  bool update_state_, advance_position_;
};

// The variables as AttentionState takes them.
inline AttentionState::Cache CacheOf(const RingInputs::Variables& variables) {
  return {variables[0].get(), variables[1].get(), variables[2].get(), variables[3].get()};
}

}  // namespace continual_transformers

#endif  // CONTINUAL_TRANSFORMERS_TENSORFLOW_RING_INPUTS_H_
