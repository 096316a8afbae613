// Takes the steps of ops on the CPU. gpu/gpu_device.h is the same for a GPU. An op is a template on
// its device:
//
//   static Status Check();     whether the device can run kernels
//   class Kept;                what it keeps between the calls of an op
//   Device(OpKernelContext*, Kept*);
//   DeviceMemory* memory();    the memory of all inputs but streams and scale; null: the host's
//   Status Positions(AttentionState*, int64_t first, int64_t count, const int64_t**);
//                              of streams from the first on, in host memory
//   Status Take(params, const Tensor* streams, ...);      takes the step and advances the streams
//   static bool RecomputingIsFaster(const RetroactiveParams<T>&);
//
// `streams` is in host memory. It may be null if memory() is not: then row m is stream m.

#ifndef CONTINUAL_TRANSFORMERS_TENSORFLOW_CPU_DEVICE_H_
#define CONTINUAL_TRANSFORMERS_TENSORFLOW_CPU_DEVICE_H_

#include <cstdint>

#include "absl/status/status.h"
#include "cc/attention/co_si_encoder_step.h"
#include "cc/attention/co_si_mha_step.h"
#include "cc/attention/params.h"
#include "cc/attention/retroactive.h"
#include "cc/attention/single_output.h"
#include "cc/attention/threads.h"
#include "cc/tensorflow/attention_state.h"
#include "cc/tensorflow/dtypes.h"
#include "cc/tensorflow/expect.h"
#include "cc/tensorflow/threads.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "tensorflow/core/framework/tensor.h"

namespace continual_transformers {

class CpuDevice {
 public:
  static absl::Status Check() { return ExpectTarget(); }

  class Kept {};

  CpuDevice(tensorflow::OpKernelContext* ctx, Kept*)
      : ctx_(ctx), threads_(ThreadsOf(ctx->device())) {}

  DeviceMemory* memory() { return nullptr; }

  absl::Status Positions(AttentionState* state, int64_t first, int64_t, const int64_t** positions) {
    *positions = state->position()->flat<int64_t>().data() + first;
    return absl::OkStatus();
  }

  template <typename T, typename C>
  absl::Status Take(SingleOutputParams<T, C> params, const tensorflow::Tensor*,
                    int64_t* steps_taken, AttentionState* state) {
    const SingleOutputPlan plan = PlanSingleOutput(params, threads_.count);
    params.window_parts = plan.window_parts;
    params.heads_per_task = plan.heads_per_task;
    tensorflow::Tensor parts;
    if (plan.window_parts > 1) {
      TF_RETURN_IF_ERROR(
          ctx_->allocate_temp(kDataType<T>, {plan.tasks, params.value_dim + 2}, &parts));
      params.parts = Data<T>(&parts);
    }
    threads_.share(plan.tasks, plan.cycles_per_task, [&params](int64_t begin, int64_t end) {
      SingleOutputAttention(params, begin, end);
    });
    FinishSingleOutput(params);
    state->Advance(params, steps_taken);
    return absl::OkStatus();
  }

  template <typename T>
  static bool RecomputingIsFaster(const RetroactiveParams<T>& params) {
    return continual_transformers::RecomputingIsFaster(params);
  }

  template <typename T>
  absl::Status Take(const RetroactiveParams<T>& params, const tensorflow::Tensor*,
                    int64_t* steps_taken, AttentionState* state) {
    threads_.share(
        params.num_streams * params.num_heads, RetroactiveCyclesPerTask(params),
        [&params](int64_t begin, int64_t end) { RetroactiveAttention(params, begin, end); });
    FinishRetroactive(params);
    state->Advance(params, steps_taken);
    return absl::OkStatus();
  }

  template <typename T, typename C, typename W>
  absl::Status Take(const CoSiMhaStep<T, C, W>& step, const tensorflow::Tensor*,
                    AttentionState* state) {
    TakeCoSiMhaStep(step, threads_);
    state->Advance(step.attention);
    return absl::OkStatus();
  }

  template <typename T, typename C, typename W>
  absl::Status Take(const CoSiEncoderStep<T, C, W>& step, const tensorflow::Tensor*,
                    AttentionState* state) {
    TakeCoSiEncoderStep(step, threads_);
    state->Advance(step.attention.attention);
    return absl::OkStatus();
  }

 private:
  tensorflow::OpKernelContext* const ctx_;
  const Threads threads_;
};

}  // namespace continual_transformers

#endif  // CONTINUAL_TRANSFORMERS_TENSORFLOW_CPU_DEVICE_H_
