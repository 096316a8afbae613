#include "cc/tensorflow/inputs.h"

#include <algorithm>
#include <cstdint>
#include <limits>

#include "absl/container/inlined_vector.h"
#include "cc/attention/targets.h"

namespace continual_transformers {
namespace {

using absl::Status;
using tensorflow::OpKernelContext;
using tensorflow::Tensor;
using tensorflow::TensorShape;

Status NotHeld(int64_t stream, int64_t index, int64_t num_held) {
  return InvalidArgument("expected streams in [0, ", num_held,
                         "), the streams that are held, but got ", stream, " at index ", index,
                         ". (ensure_streams makes room for more.)");
}

// Checks that each stream is in the cache and named once: the steps of a stream named twice would
// have no order. `position` is null if the host cannot read it.
Status CheckStreams(const int32_t* streams, int64_t count, int64_t num_steps,
                    const int64_t* position, int64_t num_held) {
  bool ascending = true;
  for (int64_t m = 0; m < count; ++m) {
    if (streams[m] < 0 || streams[m] >= num_held) return NotHeld(streams[m], m, num_held);
    const int64_t taken = position == nullptr ? 0 : position[streams[m]];
    if (taken < 0 || taken > std::numeric_limits<int64_t>::max() - num_steps) {
      return InvalidArgument("expected a position >= 0 with room for ", num_steps,
                             " more steps in 63 bits, but got ", taken, " for stream ", streams[m]);
    }
    ascending = ascending && (m == 0 || streams[m] > streams[m - 1]);
  }
  if (ascending) return absl::OkStatus();
  absl::InlinedVector<int32_t, 64> sorted(streams, streams + count);
  std::sort(sorted.begin(), sorted.end());
  const auto twice = std::adjacent_find(sorted.begin(), sorted.end());
  if (twice == sorted.end()) return absl::OkStatus();
  return InvalidArgument("expected each stream once in a call, but got ", *twice, " twice");
}

}  // namespace

Status ExpectShape(const char* name, const Tensor& tensor, const TensorShape& expected) {
  if (tensor.shape() == expected) return absl::OkStatus();
  return InvalidArgument("expected ", name, " of shape ", expected.DebugString(), ", but got ",
                         tensor.shape().DebugString());
}

Status ExpectRank(const char* name, const Tensor& tensor, int rank, const char* axes) {
  if (tensor.dims() == rank) return absl::OkStatus();
  return InvalidArgument("expected ", name, " of rank ", rank, ", ", axes, ", but got ",
                         tensor.shape().DebugString());
}

Status ExpectTarget() {
  return TargetError().empty() ? absl::OkStatus() : InvalidArgument(TargetError());
}

Status AttentionState::Lock(const std::array<tensorflow::Var*, 4>& cache,
                            tensorflow::DataType dtype,
                            absl::Span<const LockedVariables::Variable> others) {
  cache_ = cache;
  absl::InlinedVector<LockedVariables::Variable, 8> variables = {
      {cache[0], "key_cache", dtype},
      {cache[1], "value_cache", dtype},
      {cache[2], "key_mask_cache", tensorflow::DT_BOOL},
      {cache[3], "position", tensorflow::DT_INT64}};
  variables.insert(variables.end(), others.begin(), others.end());
  TF_RETURN_IF_ERROR(locked_.Lock(variables));
  return ExpectRank("key_cache", *key(), 4, order_.axes());
}

Status AttentionState::CheckSizes(int64_t streams_stepped, int64_t steps, int64_t heads,
                                  int64_t window, int64_t key_dim, int64_t value_dim,
                                  const Tensor* streams) {
  if (heads < 1 || window < 1 || key_dim < 1 || value_dim < 1) {
    return InvalidArgument("expected heads, rows of the window and features >= 1, but got ", heads,
                           ", ", window, ", and ", key_dim, " and ", value_dim);
  }
  const int64_t held = key()->dim_size(0);
  TF_RETURN_IF_ERROR(ExpectShape("key_cache", *key(), order_.Shape(held, heads, window, key_dim)));
  TF_RETURN_IF_ERROR(
      ExpectShape("value_cache", *value(), order_.Shape(held, heads, window, value_dim)));
  TF_RETURN_IF_ERROR(ExpectShape("key_mask_cache", *key_mask(), {held, window}));
  TF_RETURN_IF_ERROR(ExpectShape("position", *position(), {held}));
  if (streams == nullptr) {
    return streams_stepped > held ? NotHeld(held, held, held) : absl::OkStatus();
  }
  TF_RETURN_IF_ERROR(ExpectShape("streams", *streams, {streams_stepped}));
  const int64_t* positions = device_ == nullptr ? position()->flat<int64_t>().data() : nullptr;
  return CheckStreams(streams->flat<int32_t>().data(), streams_stepped, steps, positions, held);
}

Status OptionalInput(OpKernelContext* ctx, const char* name, const Tensor** input) {
  tensorflow::OpInputList inputs;
  TF_RETURN_IF_ERROR(ctx->input_list(name, &inputs));
  if (inputs.size() > 1) {
    return InvalidArgument("expected at most one ", name, ", but got ", inputs.size());
  }
  *input = inputs.size() == 0 ? nullptr : &inputs[0];
  return absl::OkStatus();
}

Status FillMask(const char* name, const Tensor* mask, const TensorShape& expected,
                const bool** data) {
  if (mask == nullptr) return absl::OkStatus();
  TF_RETURN_IF_ERROR(ExpectShape(name, *mask, expected));
  *data = mask->flat<bool>().data();
  return absl::OkStatus();
}

}  // namespace continual_transformers
