// RetroactiveAttention on a GPU. Positions stay in its memory, so only the launch can find one
// below 0. The outputs of that stream are then NaN.

#include "cc/attention/step_types.h"
#include "cc/tensorflow/gpu/gpu_device.h"
#include "cc/tensorflow/retroactive_op.h"
#include "tensorflow/core/framework/op_kernel.h"

namespace continual_transformers {
namespace {

#define REGISTER(T)                                                          \
  REGISTER_KERNEL_BUILDER(Name("ContinualTransformers>RetroactiveAttention") \
                              .Device(tensorflow::DEVICE_GPU)                \
                              .HostMemory("key_cache")                       \
                              .HostMemory("value_cache")                     \
                              .HostMemory("key_mask_cache")                  \
                              .HostMemory("position")                        \
                              .HostMemory("query_cache")                     \
                              .HostMemory("softmax")                         \
                              .HostMemory("weighted_sum")                    \
                              .HostMemory("made_with")                       \
                              .HostMemory("streams")                         \
                              .HostMemory("scale")                           \
                              .TypeConstraint<T>("T"),                       \
                          RetroactiveAttentionOp<GpuDevice, T>);
CONTINUAL_TRANSFORMERS_FOR_COMPUTE_TYPES(REGISTER)
#undef REGISTER

}  // namespace
}  // namespace continual_transformers
