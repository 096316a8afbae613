// The masks of a call: checks, and how kernels see them.

#ifndef CONTINUAL_TRANSFORMERS_TENSORFLOW_MASKS_H_
#define CONTINUAL_TRANSFORMERS_TENSORFLOW_MASKS_H_

#include "absl/status/status.h"
#include "cc/attention/params.h"
#include "cc/tensorflow/expect.h"
#include "tensorflow/core/framework/tensor.h"
#include "tensorflow/core/framework/tensor_shape.h"

namespace continual_transformers {

// Checks that a mask has the `expected` shape and stores its data in *data. Null: no mask.
inline absl::Status FillMask(const char* name, const tensorflow::Tensor* mask,
                             const tensorflow::TensorShape& expected, const bool** data) {
  if (mask == nullptr) return absl::OkStatus();
  TF_RETURN_IF_ERROR(ExpectShape(name, *mask, expected));
  *data = mask->flat<bool>().data();
  return absl::OkStatus();
}

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

}  // namespace continual_transformers

#endif  // CONTINUAL_TRANSFORMERS_TENSORFLOW_MASKS_H_
