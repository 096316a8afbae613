// The kernels of CoSiMultiHeadAttentionStep and CoSiTransformerEncoderStep on the CPU.

#include <cstdint>
#include <utility>

#include "absl/status/status.h"
#include "cc/attention/co_si_encoder_step.h"
#include "cc/attention/co_si_mha_step.h"
#include "cc/attention/threads.h"
#include "cc/tensorflow/co_si_mha_step_call-inl.h"
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
using tensorflow::Tensor;

class Cpu {
 public:
  explicit Cpu(Threads threads) : threads_(std::move(threads)) {}

  DeviceMemory* memory() { return nullptr; }

  Status Positions(AttentionState* state, const int64_t** positions) {
    *positions = state->position()->flat<int64_t>().data();
    return absl::OkStatus();
  }

  template <typename T, typename C, typename W>
  Status Take(const CoSiMhaStep<T, C, W>& step, const Tensor*, AttentionState* state) {
    TakeCoSiMhaStep(step, threads_);
    state->Advance(step.attention);
    return absl::OkStatus();
  }

  template <typename T, typename C, typename W>
  Status Take(const CoSiEncoderStep<T, C, W>& encoder, const Tensor*, AttentionState* state) {
    TakeCoSiEncoderStep(encoder, threads_);
    state->Advance(encoder.attention.attention);
    return absl::OkStatus();
  }

 private:
  const Threads threads_;
};

template <Status (*kReadOptions)(OpKernelConstruction*, CoSiMhaStepOptions*),
          Status (*kReadInputs)(OpKernelContext*, CoSiMhaStepInputs*)>
class StepOp : public OpKernel {
 public:
  explicit StepOp(OpKernelConstruction* ctx) : OpKernel(ctx) {
    OP_REQUIRES_OK(ctx, ExpectTarget());
    OP_REQUIRES_OK(ctx, kReadOptions(ctx, &options_));
  }

  void Compute(OpKernelContext* ctx) override {
    Variables variables;
    OP_REQUIRES_OK(ctx, ReadVariables(ctx, &variables));
    CoSiMhaStepInputs inputs;
    OP_REQUIRES_OK(ctx, kReadInputs(ctx, &inputs));
    Cpu cpu(ThreadsOf(ctx->device()));
    OP_REQUIRES_OK(ctx, CallCoSiMhaStep(&cpu, options_, inputs, variables, ctx));
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
