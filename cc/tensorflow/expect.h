// Checks of what an op is given, and their errors.

#ifndef CONTINUAL_TRANSFORMERS_TENSORFLOW_EXPECT_H_
#define CONTINUAL_TRANSFORMERS_TENSORFLOW_EXPECT_H_

#include <cstdint>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/types/span.h"
#include "tensorflow/core/framework/tensor.h"
#include "tensorflow/core/framework/tensor_shape.h"
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
absl::Status ExpectDtype(const char* name, const tensorflow::Tensor& tensor,
                         tensorflow::DataType dtype);

// The error for streams[index] = stream, which is not one of the `held` streams.
absl::Status StreamNotHeld(int64_t stream, int64_t index, int64_t held);
// Checks that each stream is named once: the steps of a stream named twice would have no order.
absl::Status ExpectDistinct(absl::Span<const int32_t> streams);

// Checks that CONTINUAL_TRANSFORMERS_TARGET, if set, names an existing target.
absl::Status ExpectTarget();

}  // namespace continual_transformers

#endif  // CONTINUAL_TRANSFORMERS_TENSORFLOW_EXPECT_H_
