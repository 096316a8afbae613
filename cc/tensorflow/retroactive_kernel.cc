// RetroactiveAttention on the CPU.

#include "cc/attention/step_types.h"
#include "cc/tensorflow/cpu_device.h"
#include "cc/tensorflow/retroactive_op.h"
#include "tensorflow/core/framework/op_kernel.h"

namespace continual_transformers {
namespace {

#define REGISTER(T)                                                          \
  REGISTER_KERNEL_BUILDER(Name("ContinualTransformers>RetroactiveAttention") \
                              .Device(tensorflow::DEVICE_CPU)                \
                              .TypeConstraint<T>("T"),                       \
                          RetroactiveAttentionOp<CpuDevice, T>);
CONTINUAL_TRANSFORMERS_FOR_COMPUTE_TYPES(REGISTER)
#undef REGISTER

}  // namespace
}  // namespace continual_transformers
