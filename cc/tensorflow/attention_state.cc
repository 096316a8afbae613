#include "cc/tensorflow/attention_state.h"

#include <cstdint>
#include <limits>

#include "absl/container/inlined_vector.h"
#include "cc/tensorflow/expect.h"

namespace continual_transformers {
namespace {

using absl::Status;
using tensorflow::Tensor;

// Checks that each stream is in the cache and named once: the steps of a stream named twice would
// have no order. `position` is null if the host cannot read it.
Status CheckStreams(const int32_t* streams, int64_t count, int64_t num_steps,
                    const int64_t* position, int64_t num_held) {
  bool ascending = true;
  for (int64_t m = 0; m < count; ++m) {
    if (streams[m] < 0 || streams[m] >= num_held) return StreamNotHeld(streams[m], m, num_held);
    const int64_t taken = position == nullptr ? 0 : position[streams[m]];
    if (taken < 0 || taken > std::numeric_limits<int64_t>::max() - num_steps) {
      return InvalidArgument("expected a position >= 0 with room for ", num_steps,
                             " more steps in 63 bits, but got ", taken, " for stream ", streams[m]);
    }
    ascending = ascending && (m == 0 || streams[m] > streams[m - 1]);
  }
  if (ascending) return absl::OkStatus();
  return ExpectDistinct({streams, static_cast<size_t>(count)});
}

}  // namespace

Status AttentionState::Lock(const Cache& cache, tensorflow::DataType dtype,
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
  const int64_t held = this->held();
  TF_RETURN_IF_ERROR(ExpectShape("key_cache", *key(), order_.Shape(held, heads, window, key_dim)));
  TF_RETURN_IF_ERROR(
      ExpectShape("value_cache", *value(), order_.Shape(held, heads, window, value_dim)));
  TF_RETURN_IF_ERROR(ExpectShape("key_mask_cache", *key_mask(), {held, window}));
  TF_RETURN_IF_ERROR(ExpectShape("position", *position(), {held}));
  if (streams == nullptr) {
    return streams_stepped > held ? StreamNotHeld(held, held, held) : absl::OkStatus();
  }
  TF_RETURN_IF_ERROR(ExpectShape("streams", *streams, {streams_stepped}));
  const int64_t* positions = device_ == nullptr ? position()->flat<int64_t>().data() : nullptr;
  return CheckStreams(streams->flat<int32_t>().data(), streams_stepped, steps, positions, held);
}

}  // namespace continual_transformers
