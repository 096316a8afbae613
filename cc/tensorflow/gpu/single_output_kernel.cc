// SingleOutputAttention on a GPU. Positions stay in its memory, so only the launch can find one
// below 0. The outputs of that stream are then NaN.

#include "cc/attention/step_types.h"
#include "cc/tensorflow/dtypes.h"
#include "cc/tensorflow/gpu/gpu_device.h"
#include "cc/tensorflow/single_output_op.h"
#include "tensorflow/core/framework/op_kernel.h"

namespace continual_transformers {
namespace {

#define REGISTER(T, C)                                                        \
  REGISTER_KERNEL_BUILDER(Name("ContinualTransformers>SingleOutputAttention") \
                              .Device(tensorflow::DEVICE_GPU)                 \
                              .HostMemory("key_cache")                        \
                              .HostMemory("value_cache")                      \
                              .HostMemory("key_mask_cache")                   \
                              .HostMemory("position")                         \
                              .HostMemory("streams")                          \
                              .HostMemory("scale")                            \
                              .TypeConstraint<T>("T")                         \
                              .TypeConstraint<TensorFlowType<C>::type>("C"),  \
                          SingleOutputAttentionOp<GpuDevice, T, C>);
CONTINUAL_TRANSFORMERS_FOR_CACHE_TYPES(REGISTER)
#undef REGISTER

}  // namespace
}  // namespace continual_transformers
