// The kernels of CoSiMultiHeadAttentionStep and CoSiTransformerEncoderStep on the CPU.

#include "cc/tensorflow/bound_variables.h"
#include "cc/tensorflow/co_si_mha_step_call.h"
#include "cc/tensorflow/inputs.h"
#include "cc/tensorflow/threads.h"
#include "tensorflow/core/framework/op_kernel.h"

namespace continual_transformers {
namespace {

using absl::Status;
using tensorflow::OpKernel;
using tensorflow::OpKernelConstruction;
using tensorflow::OpKernelContext;

template <Status (*kReadOptions)(OpKernelConstruction*, CoSiMhaStepOptions*),
          Status (*kReadInputs)(OpKernelContext*, CoSiMhaStepInputs*)>
class StepOp : public OpKernel {
 public:
  explicit StepOp(OpKernelConstruction* ctx) : OpKernel(ctx) {
    OP_REQUIRES_OK(ctx, ExpectTarget());
    OP_REQUIRES_OK(ctx, kReadOptions(ctx, &options_));
  }

  void Compute(OpKernelContext* ctx) override {
    VariablesOfInput variables;
    OP_REQUIRES_OK(ctx, variables.Look(ctx, "variables"));
    CoSiMhaStepInputs inputs;
    OP_REQUIRES_OK(ctx, kReadInputs(ctx, &inputs));
    CoSiMhaStepOpOutputs outputs(ctx);
    OP_REQUIRES_OK(ctx, CallCoSiMhaStep(options_, inputs, variables.all(), ThreadsOf(ctx->device()),
                                        &outputs));
  }

 private:
  CoSiMhaStepOptions options_ = {};
};

using MhaStepOp = StepOp<ReadCoSiMhaStepOptions, ReadCoSiMhaStepInputs>;
using EncoderStepOp = StepOp<ReadCoSiEncoderStepOptions, ReadCoSiEncoderStepInputs>;

REGISTER_KERNEL_BUILDER(
    Name("ContinualTransformers>CoSiMultiHeadAttentionStep").Device(tensorflow::DEVICE_CPU),
    MhaStepOp);
REGISTER_KERNEL_BUILDER(
    Name("ContinualTransformers>CoSiTransformerEncoderStep").Device(tensorflow::DEVICE_CPU),
    EncoderStepOp);

}  // namespace
}  // namespace continual_transformers
