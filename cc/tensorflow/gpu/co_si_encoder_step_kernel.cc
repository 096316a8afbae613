// CoSiTransformerEncoderStep on a GPU.

#include "cc/tensorflow/co_si_encoder_step_op.h"
#include "cc/tensorflow/gpu/gpu_device.h"
#include "tensorflow/core/framework/op_kernel.h"

namespace continual_transformers {
namespace {

REGISTER_KERNEL_BUILDER(Name("ContinualTransformers>CoSiTransformerEncoderStep")
                            .Device(tensorflow::DEVICE_GPU)
                            .HostMemory("variables")
                            .HostMemory("streams"),
                        CoSiEncoderStepOp<GpuDevice>);

}  // namespace
}  // namespace continual_transformers
