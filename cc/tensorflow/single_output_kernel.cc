// SingleOutputAttention on the CPU.

#include "cc/attention/step_types.h"
#include "cc/tensorflow/cpu_device.h"
#include "cc/tensorflow/dtypes.h"
#include "cc/tensorflow/single_output_op.h"
#include "tensorflow/core/framework/op_kernel.h"

namespace continual_transformers {
namespace {

#define REGISTER(T, C)                                                        \
  REGISTER_KERNEL_BUILDER(Name("ContinualTransformers>SingleOutputAttention") \
                              .Device(tensorflow::DEVICE_CPU)                 \
                              .TypeConstraint<T>("T")                         \
                              .TypeConstraint<TensorFlowType<C>::type>("C"),  \
                          SingleOutputAttentionOp<CpuDevice, T, C>);
CONTINUAL_TRANSFORMERS_FOR_CACHE_TYPES(REGISTER)
#undef REGISTER

}  // namespace
}  // namespace continual_transformers
