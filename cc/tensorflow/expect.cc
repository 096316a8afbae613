#include "cc/tensorflow/expect.h"

#include <algorithm>

#include "absl/container/inlined_vector.h"
#include "cc/attention/targets.h"

namespace continual_transformers {

using absl::Status;
using tensorflow::DataTypeString;
using tensorflow::Tensor;

Status ExpectShape(const char* name, const Tensor& tensor,
                   const tensorflow::TensorShape& expected) {
  if (tensor.shape() == expected) return absl::OkStatus();
  return InvalidArgument("expected ", name, " of shape ", expected.DebugString(), ", but got ",
                         tensor.shape().DebugString());
}

Status ExpectRank(const char* name, const Tensor& tensor, int rank, const char* axes) {
  if (tensor.dims() == rank) return absl::OkStatus();
  return InvalidArgument("expected ", name, " of rank ", rank, ", ", axes, ", but got ",
                         tensor.shape().DebugString());
}

Status ExpectDtype(const char* name, const Tensor& tensor, tensorflow::DataType dtype) {
  if (tensor.dtype() == dtype) return absl::OkStatus();
  return InvalidArgument("expected ", name, " of ", DataTypeString(dtype), ", but got ",
                         DataTypeString(tensor.dtype()));
}

Status StreamNotHeld(int64_t stream, int64_t index, int64_t held) {
  return InvalidArgument("expected streams in [0, ", held, "), the streams that are held, but got ",
                         stream, " at index ", index, ". (ensure_streams makes room for more.)");
}

Status ExpectDistinct(absl::Span<const int32_t> streams) {
  absl::InlinedVector<int32_t, 64> sorted(streams.begin(), streams.end());
  std::sort(sorted.begin(), sorted.end());
  const auto twice = std::adjacent_find(sorted.begin(), sorted.end());
  if (twice == sorted.end()) return absl::OkStatus();
  return InvalidArgument("expected each stream once in a call, but got ", *twice, " twice");
}

Status ExpectTarget() {
  return TargetError().empty() ? absl::OkStatus() : InvalidArgument(TargetError());
}

}  // namespace continual_transformers
