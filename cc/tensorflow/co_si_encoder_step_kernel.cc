// CoSiTransformerEncoderStep on the CPU.

#include "cc/tensorflow/co_si_encoder_step_op.h"
#include "cc/tensorflow/cpu_device.h"
#include "tensorflow/core/framework/op_kernel.h"

namespace continual_transformers {
namespace {

REGISTER_KERNEL_BUILDER(
    Name("ContinualTransformers>CoSiTransformerEncoderStep").Device(tensorflow::DEVICE_CPU),
    CoSiEncoderStepOp<CpuDevice>);

}  // namespace
}  // namespace continual_transformers
