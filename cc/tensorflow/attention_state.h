// The variables with the state of streams: their locks, their shapes, and the streams of a call.

#ifndef CONTINUAL_TRANSFORMERS_TENSORFLOW_ATTENTION_STATE_H_
#define CONTINUAL_TRANSFORMERS_TENSORFLOW_ATTENTION_STATE_H_

#include <array>
#include <cstdint>

#include "absl/status/status.h"
#include "absl/types/span.h"
#include "cc/attention/params.h"
#include "cc/tensorflow/dtypes.h"
#include "cc/tensorflow/locked_variables.h"
#include "tensorflow/core/framework/resource_var.h"
#include "tensorflow/core/framework/tensor.h"
#include "tensorflow/core/framework/types.h"

namespace continual_transformers {

// The order of a ring's axes: the ops' attribute sequence_first. Graphs from before this attribute
// have rings [S, H, N, D].
struct RingOrder {
  bool sequence_first;

  int window_axis() const { return sequence_first ? 1 : 2; }
  int heads_axis() const { return sequence_first ? 2 : 1; }
  const char* axes() const { return sequence_first ? "[S, N, H, D]" : "[S, H, N, D]"; }
  tensorflow::TensorShape Shape(int64_t streams, int64_t heads, int64_t window,
                                int64_t size) const {
    if (sequence_first) return {streams, window, heads, size};
    return {streams, heads, window, size};
  }
  Strides RingStrides(int64_t heads, int64_t window, int64_t size) const {
    return (sequence_first ? RowMajorRing : HeadMajorRing)(heads, window, size);
  }
};

// The variables of an `AttentionCache`, and the streams of a call.
class AttentionState {
 public:
  // key_cache, value_cache, key_mask_cache, position.
  using Cache = std::array<tensorflow::Var*, 4>;

  // `advances` is the op's attribute advance_position. `device` owns the memory of the variables;
  // null: the host.
  AttentionState(RingOrder order, bool advances, DeviceMemory* device)
      : order_(order), advances_(advances), device_(device), locked_(device) {}

  // Locks `cache`, with keys and values of `dtype`, together with `others`. All variables must
  // outlive this object.
  absl::Status Lock(const Cache& cache, tensorflow::DataType dtype,
                    absl::Span<const LockedVariables::Variable> others = {});

  tensorflow::Tensor* key() { return cache_[0]->tensor(); }
  tensorflow::Tensor* value() { return cache_[1]->tensor(); }
  tensorflow::Tensor* key_mask() { return cache_[2]->tensor(); }
  tensorflow::Tensor* position() { return cache_[3]->tensor(); }
  const RingOrder& order() const { return order_; }
  int64_t held() { return key()->dim_size(0); }
  int64_t window() { return key()->dim_size(order_.window_axis()); }
  int64_t heads() { return key()->dim_size(order_.heads_axis()); }
  bool advances() const { return advances_; }

  // Sets the state fields of `p`, after its sizes are set. Checks that the cache and the streams
  // fit the sizes. `streams` is in host memory; null: row m is stream m. For device memory, the
  // kernel must check positions, and the caller must set p->streams.
  template <typename T, typename C>
  absl::Status Fill(const tensorflow::Tensor* streams, RingParams<T, C>* p) {
    TF_RETURN_IF_ERROR(CheckSizes(p->num_streams, p->num_steps, p->num_heads, p->window, p->key_dim,
                                  p->value_dim, streams));
    if (device_ == nullptr) p->streams = streams->flat<int32_t>().data();
    p->position = position()->flat<int64_t>().data();
    p->key_cache = Data<C>(key());
    p->key_cache_strides = order_.RingStrides(p->num_heads, p->window, p->key_dim);
    p->value_cache = Data<C>(value());
    p->value_cache_strides = order_.RingStrides(p->num_heads, p->window, p->value_dim);
    p->key_mask_cache = key_mask()->flat<bool>().data();
    return absl::OkStatus();
  }

  // Advances the streams after a call, in host memory. `steps_taken`, [M], gets their positions
  // after the call, also if they do not advance; null: not wanted.
  template <typename T, typename C>
  void Advance(const RingParams<T, C>& p, int64_t* steps_taken = nullptr) {
    int64_t* positions = position()->flat<int64_t>().data();
    for (int64_t m = 0; m < p.num_streams; ++m) {
      int64_t* position = positions + p.streams[m];
      const int64_t taken = *position + p.num_steps;
      if (steps_taken != nullptr) steps_taken[m] = taken;
      if (p.update_state && advances_) *position = taken;
    }
  }

 private:
  absl::Status CheckSizes(int64_t streams_stepped, int64_t steps, int64_t heads, int64_t window,
                          int64_t key_dim, int64_t value_dim, const tensorflow::Tensor* streams);

  const RingOrder order_;
  const bool advances_;
  DeviceMemory* const device_;
  Cache cache_;
  LockedVariables locked_;
};

}  // namespace continual_transformers

#endif  // CONTINUAL_TRANSFORMERS_TENSORFLOW_ATTENTION_STATE_H_
