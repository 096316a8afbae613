// Checks and accessors for the kernels' inputs.

#ifndef CONTINUAL_TRANSFORMERS_TENSORFLOW_INPUTS_H_
#define CONTINUAL_TRANSFORMERS_TENSORFLOW_INPUTS_H_

#include <array>
#include <cstdint>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "cc/attention/half.h"
#include "cc/attention/params.h"
#include "cc/tensorflow/locked_variables.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "tensorflow/core/framework/tensor.h"
#include "tensorflow/core/framework/types.h"

namespace continual_transformers {

template <typename... Args>
absl::Status InvalidArgument(const Args&... args) {
  return absl::InvalidArgumentError(absl::StrCat(args...));
}

absl::Status ExpectShape(const char* name, const tensorflow::Tensor& tensor,
                         const tensorflow::TensorShape& expected);
absl::Status ExpectRank(const char* name, const tensorflow::Tensor& tensor, int rank,
                        const char* axes);

// Checks that CONTINUAL_TRANSFORMERS_TARGET, if set, names an existing target.
absl::Status ExpectTarget();

// An optional input is a list of at most one tensor. *input is null if it is absent.
absl::Status OptionalInput(tensorflow::OpKernelContext* ctx, const char* name,
                           const tensorflow::Tensor** input);

// TensorFlow's name for a type of a ring; the bits are the same.
template <typename C>
struct TensorFlowType {
  using type = C;
};
template <>
struct TensorFlowType<BFloat16> {
  using type = Eigen::bfloat16;
};
template <>
struct TensorFlowType<Float16> {
  using type = Eigen::half;
};
template <typename C>
constexpr tensorflow::DataType kDataType =
    tensorflow::DataTypeToEnum<typename TensorFlowType<C>::type>::value;

template <typename C>
C* Data(tensorflow::Tensor* tensor) {
  return reinterpret_cast<C*>(tensor->flat<typename TensorFlowType<C>::type>().data());
}
template <typename C>
const C* Data(const tensorflow::Tensor& tensor) {
  return reinterpret_cast<const C*>(tensor.flat<typename TensorFlowType<C>::type>().data());
}

inline Strides BatchTimeHead(int64_t steps, int64_t heads, int64_t size) {
  return {/*stream=*/steps * heads * size, /*step=*/heads * size, /*head=*/size};
}

inline Strides BatchHeadTime(int64_t heads, int64_t steps, int64_t size) {
  return {/*stream=*/heads * steps * size, /*step=*/size, /*head=*/steps * size};
}

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
  // `device` owns the memory of the variables; null: the host.
  explicit AttentionState(RingOrder order, DeviceMemory* device = nullptr)
      : order_(order), device_(device), locked_(device) {}

  // Locks `cache` (key_cache, value_cache, key_mask_cache and position, with keys and values of
  // `dtype`), together with `others`. They must outlive this object.
  absl::Status Lock(const std::array<tensorflow::Var*, 4>& cache, tensorflow::DataType dtype,
                    absl::Span<const LockedVariables::Variable> others = {});

  tensorflow::Tensor* key() { return cache_[0]->tensor(); }
  tensorflow::Tensor* value() { return cache_[1]->tensor(); }
  tensorflow::Tensor* key_mask() { return cache_[2]->tensor(); }
  tensorflow::Tensor* position() { return cache_[3]->tensor(); }
  const RingOrder& order() const { return order_; }
  int64_t window() { return key()->dim_size(order_.window_axis()); }
  int64_t heads() { return key()->dim_size(order_.heads_axis()); }

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

  // The op's attribute advance_position.
  void set_advances(bool advances) { advances_ = advances; }
  bool advances() const { return advances_; }

  // Advances the streams after a call, in host memory.
  template <typename T, typename C>
  void Advance(const RingParams<T, C>& p) {
    if (!p.update_state || !advances_) return;
    auto positions = position()->flat<int64_t>();
    for (int64_t m = 0; m < p.num_streams; ++m) positions(p.streams[m]) += p.num_steps;
  }

 private:
  absl::Status CheckSizes(int64_t streams_stepped, int64_t steps, int64_t heads, int64_t window,
                          int64_t key_dim, int64_t value_dim, const tensorflow::Tensor* streams);

  const RingOrder order_;
  DeviceMemory* const device_;
  std::array<tensorflow::Var*, 4> cache_;
  bool advances_ = true;
  LockedVariables locked_;
};

// Every axis of the mask except the last may be 1: a stride of 0 broadcasts it. Null: no mask.
template <typename T, typename C>
absl::Status FillAttentionMask(const tensorflow::Tensor* given, SingleOutputParams<T, C>* p) {
  if (given == nullptr) return absl::OkStatus();
  const tensorflow::Tensor& mask = *given;
  const tensorflow::TensorShape full = {p->num_streams, p->num_heads, p->num_steps, p->window};
  bool fits = mask.dims() == 4 && mask.dim_size(3) == p->window;
  for (int axis = 0; fits && axis < 3; ++axis) {
    fits = mask.dim_size(axis) == 1 || mask.dim_size(axis) == full.dim_size(axis);
  }
  if (!fits) {
    return InvalidArgument("expected attention_mask of shape ", full.DebugString(),
                           ", [M, H, T, N], where M, H and T may be 1, but got ",
                           mask.shape().DebugString());
  }
  p->mask = mask.flat<bool>().data();
  p->mask_strides = BatchHeadTime(mask.dim_size(1), mask.dim_size(2), p->window);
  if (mask.dim_size(0) == 1) p->mask_strides.stream = 0;
  if (mask.dim_size(1) == 1) p->mask_strides.head = 0;
  if (mask.dim_size(2) == 1) p->mask_strides.step = 0;
  return absl::OkStatus();
}

// Checks that a mask has the `expected` shape and stores its data in *data. Null: no mask.
absl::Status FillMask(const char* name, const tensorflow::Tensor* mask,
                      const tensorflow::TensorShape& expected, const bool** data);

}  // namespace continual_transformers

#endif  // CONTINUAL_TRANSFORMERS_TENSORFLOW_INPUTS_H_
