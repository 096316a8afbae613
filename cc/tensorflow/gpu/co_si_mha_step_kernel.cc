// The kernels of CoSiMultiHeadAttentionStep and CoSiTransformerEncoderStep on a GPU. The launches
// let the streams' positions advance too; only `first_step` has the host look at them, and wait.

#include <cstdint>
#include <vector>

#include "absl/status/status.h"
#include "cc/attention/co_si_encoder_step.h"
#include "cc/attention/co_si_mha_step.h"
#include "cc/tensorflow/co_si_mha_step_call-inl.h"
#include "cc/tensorflow/co_si_mha_step_call.h"
#include "cc/tensorflow/gpu/cuda_status.h"
#include "cc/tensorflow/gpu/gpu_call.h"
#include "cc/tensorflow/inputs.h"
#include "cuda/co_si_encoder_step.h"
#include "cuda/co_si_mha_step.h"
#include "tensorflow/core/framework/op_kernel.h"

namespace continual_transformers {
namespace {

using absl::Status;
using tensorflow::OpKernel;
using tensorflow::OpKernelConstruction;
using tensorflow::OpKernelContext;
using tensorflow::Tensor;

class Gpu {
 public:
  explicit Gpu(OpKernelContext* ctx) : call_(ctx) {}

  DeviceMemory* memory() { return &call_; }

  Status Positions(AttentionState* state, const int64_t** positions) {
    TF_RETURN_IF_ERROR(call_.Positions(*state->position(), &positions_));
    *positions = positions_.data();
    return absl::OkStatus();
  }

  template <typename T, typename C, typename W>
  Status Take(const CoSiMhaStep<T, C, W>& step, const Tensor* streams, AttentionState* state) {
    if (step.attention.num_streams == 0) return absl::OkStatus();
    DeviceCoSiMhaStep<T, C, W> launched = {};
    TF_RETURN_IF_ERROR(FillState(step, state, &launched));
    TF_RETURN_IF_ERROR(NotRefused(RefusesCoSiMhaStep(launched), step.attention));
    TF_RETURN_IF_ERROR(FillTemporaries(streams, &launched));
    Tensor scratch;
    TF_RETURN_IF_ERROR(call_.Allocate(launched.ScratchBytes(), &scratch));
    launched.scratch = scratch.data();
    return CudaStatus(LaunchCoSiMhaStep(launched, call_.stream()),
                      "launching CoSiMultiHeadAttentionStep");
  }

  template <typename T, typename C, typename W>
  Status Take(const CoSiEncoderStep<T, C, W>& step, const Tensor* streams, AttentionState* state) {
    if (step.attention.attention.num_streams == 0) return absl::OkStatus();
    DeviceCoSiEncoderStep<T, C, W> launched = {};
    TF_RETURN_IF_ERROR(FillState(step.attention, state, &launched.attention));
    launched.attention_norm = step.attention_norm;
    launched.output_norm = step.output_norm;
    launched.hidden = step.hidden;
    launched.output = step.output;
    launched.hidden_features = step.hidden_features;
    launched.activation = step.activation;
    launched.norm_first = step.norm_first;
    launched.result = step.result;
    TF_RETURN_IF_ERROR(NotRefused(RefusesCoSiEncoderStep(launched), step.attention.attention));
    TF_RETURN_IF_ERROR(FillTemporaries(streams, &launched.attention));
    Tensor scratch;
    TF_RETURN_IF_ERROR(call_.Allocate(launched.ScratchBytes(), &scratch));
    launched.scratch = scratch.data();
    return CudaStatus(LaunchCoSiEncoderStep(launched, call_.stream()),
                      "launching CoSiTransformerEncoderStep");
  }

 private:
  template <typename T, typename C, typename W>
  Status FillState(const CoSiMhaStep<T, C, W>& step, AttentionState* state,
                   DeviceCoSiMhaStep<T, C, W>* launched) {
    static_cast<CoSiMhaStep<T, C, W>&>(*launched) = step;
    launched->num_held = state->key()->dim_size(0);
    launched->next_position =
        state->advances() ? state->position()->template flat<int64_t>().data() : nullptr;
    return call_.Multiprocessors(&launched->multiprocessors);
  }

  template <typename T, typename C, typename W>
  Status FillTemporaries(const Tensor* streams, DeviceCoSiMhaStep<T, C, W>* launched) {
    if (streams != nullptr) {
      TF_RETURN_IF_ERROR(call_.Streams(*streams, &streams_, &launched->attention.streams));
    }
    TF_RETURN_IF_ERROR(call_.AllocateZeros(launched->NumArrivals() * sizeof(uint32_t), &arrivals_));
    launched->arrivals = reinterpret_cast<uint32_t*>(arrivals_.data());
    return absl::OkStatus();
  }

  GpuCall call_;
  std::vector<int64_t> positions_;
  Tensor streams_, arrivals_;
};

template <Status (*kReadOptions)(OpKernelConstruction*, CoSiMhaStepOptions*),
          Status (*kReadInputs)(OpKernelContext*, CoSiMhaStepInputs*)>
class StepGpuOp : public OpKernel {
 public:
  explicit StepGpuOp(OpKernelConstruction* ctx) : OpKernel(ctx) {
    OP_REQUIRES_OK(ctx, kReadOptions(ctx, &options_));
  }

  void Compute(OpKernelContext* ctx) override {
    Variables variables;
    OP_REQUIRES_OK(ctx, ReadVariables(ctx, &variables));
    CoSiMhaStepInputs inputs;
    OP_REQUIRES_OK(ctx, kReadInputs(ctx, &inputs));
    Gpu gpu(ctx);
    OP_REQUIRES_OK(ctx, CallCoSiMhaStep(&gpu, options_, inputs, variables, ctx));
  }

 private:
  CoSiMhaStepOptions options_ = {};
};

using MhaStepGpuOp = StepGpuOp<ReadCoSiMhaStepOptions, ReadCoSiMhaStepInputs>;
using EncoderStepGpuOp = StepGpuOp<ReadCoSiEncoderStepOptions, ReadCoSiEncoderStepInputs>;

REGISTER_KERNEL_BUILDER(Name("ContinualTransformers>CoSiMultiHeadAttentionStep")
                            .Device(tensorflow::DEVICE_GPU)
                            .HostMemory("variables")
                            .HostMemory("streams"),
                        MhaStepGpuOp);
REGISTER_KERNEL_BUILDER(Name("ContinualTransformers>CoSiTransformerEncoderStep")
                            .Device(tensorflow::DEVICE_GPU)
                            .HostMemory("variables")
                            .HostMemory("streams"),
                        EncoderStepGpuOp);

}  // namespace
}  // namespace continual_transformers
