// Takes the steps of ops on a GPU; see cpu_device.h. The launches advance the positions, which stay
// in the GPU's memory. The host waits for them only if an op asks for Positions().

#ifndef CONTINUAL_TRANSFORMERS_TENSORFLOW_GPU_GPU_DEVICE_H_
#define CONTINUAL_TRANSFORMERS_TENSORFLOW_GPU_GPU_DEVICE_H_

#include <cstdint>
#include <mutex>
#include <vector>

#include "absl/status/status.h"
#include "cc/attention/co_si_encoder_step.h"
#include "cc/attention/co_si_mha_step.h"
#include "cc/attention/params.h"
#include "cc/tensorflow/attention_state.h"
#include "cc/tensorflow/expect.h"
#include "cc/tensorflow/gpu/cuda_status.h"
#include "cc/tensorflow/gpu/gpu_call.h"
#include "cuda/co_si_encoder_step.h"
#include "cuda/co_si_mha_step.h"
#include "cuda/retroactive.h"
#include "cuda/single_output.h"
#include "cuda/window_parts.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "tensorflow/core/framework/tensor.h"

namespace continual_transformers {

class GpuDevice {
 public:
  static absl::Status Check() { return absl::OkStatus(); }

  // Counters that are zeros between launches. They are set to zero once, and not in every call. All
  // calls of an op are on one CUDA stream, so they can share them.
  class Kept {
   public:
    // Sets *counters to zeros. *memory keeps them.
    absl::Status Zeros(GpuCall* call, int64_t count, tensorflow::Tensor* memory,
                       uint32_t** counters) {
      const std::lock_guard<std::mutex> lock(mutex_);
      // Beside the work of a call with more counters, setting them to zero is little.
      constexpr int64_t kMost = 16384;
      if (count > kMost) {
        TF_RETURN_IF_ERROR(call->AllocateZeros(count * sizeof(uint32_t), memory));
      } else {
        if (zeros_.NumElements() == 0) {
          TF_RETURN_IF_ERROR(call->AllocateZeros(kMost * sizeof(uint32_t), &zeros_));
        }
        *memory = zeros_;
      }
      *counters = reinterpret_cast<uint32_t*>(memory->data());
      return absl::OkStatus();
    }

   private:
    std::mutex mutex_;
    tensorflow::Tensor zeros_;
  };

  GpuDevice(tensorflow::OpKernelContext* ctx, Kept* kept) : call_(ctx), kept_(kept) {}

  DeviceMemory* memory() { return &call_; }

  absl::Status Positions(AttentionState* state, int64_t first, int64_t count,
                         const int64_t** positions) {
    positions_.resize(count);
    TF_RETURN_IF_ERROR(call_.Positions(*state->position(), first, &positions_));
    *positions = positions_.data();
    return absl::OkStatus();
  }

  template <typename T, typename C>
  absl::Status Take(const SingleOutputParams<T, C>& params, const tensorflow::Tensor* streams,
                    int64_t* steps_taken, AttentionState* state) {
    if (params.num_streams == 0) return absl::OkStatus();
    DeviceSingleOutputParams<T, C> launched = {};
    static_cast<SingleOutputParams<T, C>&>(launched) = params;
    launched.num_held = state->held();
    launched.next_position = NextPosition(state);
    launched.steps_taken = steps_taken;
    launched.overlap = true;
    int multiprocessors;
    TF_RETURN_IF_ERROR(call_.Multiprocessors(&multiprocessors));
    launched.window_parts = PlanWindowParts(launched.NumQueries(), params.window, multiprocessors);
    TF_RETURN_IF_ERROR(NotRefused(RefusesSingleOutput(launched), params));
    TF_RETURN_IF_ERROR(CopyStreams(streams, &launched.streams));
    tensorflow::Tensor parts;
    TF_RETURN_IF_ERROR(call_.Allocate(launched.NumParts() * sizeof(T), &parts));
    launched.parts = reinterpret_cast<T*>(parts.data());
    TF_RETURN_IF_ERROR(
        kept_->Zeros(&call_, launched.NumArrivals(), &arrivals_, &launched.arrivals));
    return CudaStatus(LaunchSingleOutput(launched, call_.stream()),
                      "launching SingleOutputAttention");
  }

  template <typename T>
  static bool RecomputingIsFaster(const RetroactiveParams<T>& params) {
    return RecomputingIsFasterOnGpu(params.window);
  }

  template <typename T>
  absl::Status Take(const RetroactiveParams<T>& params, const tensorflow::Tensor* streams,
                    int64_t* steps_taken, AttentionState* state) {
    if (params.num_streams == 0) return absl::OkStatus();
    DeviceRetroactiveParams<T> launched = {};
    static_cast<RetroactiveParams<T>&>(launched) = params;
    launched.num_held = state->held();
    launched.next_position = NextPosition(state);
    launched.steps_taken = steps_taken;
    TF_RETURN_IF_ERROR(NotRefused(RefusesRetroactive(launched), params));
    TF_RETURN_IF_ERROR(CopyStreams(streams, &launched.streams));
    return CudaStatus(LaunchRetroactive(launched, call_.stream()),
                      "launching RetroactiveAttention");
  }

  template <typename T, typename C, typename W>
  absl::Status Take(const CoSiMhaStep<T, C, W>& step, const tensorflow::Tensor* streams,
                    AttentionState* state) {
    if (step.attention.num_streams == 0) return absl::OkStatus();
    DeviceCoSiMhaStep<T, C, W> launched = {};
    TF_RETURN_IF_ERROR(FillState(step, state, &launched));
    TF_RETURN_IF_ERROR(NotRefused(RefusesCoSiMhaStep(launched), step.attention));
    TF_RETURN_IF_ERROR(FillTemporaries(streams, &launched));
    tensorflow::Tensor scratch;
    TF_RETURN_IF_ERROR(call_.Allocate(launched.ScratchBytes(), &scratch));
    launched.scratch = scratch.data();
    return CudaStatus(LaunchCoSiMhaStep(launched, call_.stream()),
                      "launching CoSiMultiHeadAttentionStep");
  }

  template <typename T, typename C, typename W>
  absl::Status Take(const CoSiEncoderStep<T, C, W>& step, const tensorflow::Tensor* streams,
                    AttentionState* state) {
    if (step.attention.attention.num_streams == 0) return absl::OkStatus();
    DeviceCoSiEncoderStep<T, C, W> launched = {};
    TF_RETURN_IF_ERROR(FillState(step.attention, state, &launched.attention));
    launched.attention_norm = step.attention_norm;
    launched.output_norm = step.output_norm;
    launched.hidden = step.hidden;
    launched.output = step.output;
    launched.hidden_features = step.hidden_features;
    launched.activation = step.activation.kind;
    launched.norm_first = step.norm_first;
    launched.result = step.result;
    TF_RETURN_IF_ERROR(NotRefused(RefusesCoSiEncoderStep(launched), step.attention.attention));
    TF_RETURN_IF_ERROR(FillTemporaries(streams, &launched.attention));
    tensorflow::Tensor scratch;
    TF_RETURN_IF_ERROR(call_.Allocate(launched.ScratchBytes(), &scratch));
    launched.scratch = scratch.data();
    return CudaStatus(LaunchCoSiEncoderStep(launched, call_.stream()),
                      "launching CoSiTransformerEncoderStep");
  }

 private:
  // Turns a launcher's refusal of these sizes into an error. Null: it does not refuse.
  template <typename T, typename C>
  static absl::Status NotRefused(const char* refusal, const RingParams<T, C>& p) {
    if (refusal == nullptr) return absl::OkStatus();
    return InvalidArgument("on a GPU ", refusal, "; but got keys of size ", p.key_dim,
                           " and values of size ", p.value_dim, ", a window of ", p.window, " and ",
                           p.num_steps,
                           " steps. (CONTINUAL_TRANSFORMERS_BACKEND=tensorflow takes any.)");
  }

  static int64_t* NextPosition(AttentionState* state) {
    return state->advances() ? state->position()->flat<int64_t>().data() : nullptr;
  }

  template <typename T, typename C, typename W>
  absl::Status FillState(const CoSiMhaStep<T, C, W>& step, AttentionState* state,
                         DeviceCoSiMhaStep<T, C, W>* launched) {
    static_cast<CoSiMhaStep<T, C, W>&>(*launched) = step;
    launched->num_held = state->held();
    launched->next_position = NextPosition(state);
    return call_.Multiprocessors(&launched->multiprocessors);
  }

  template <typename T, typename C, typename W>
  absl::Status FillTemporaries(const tensorflow::Tensor* streams,
                               DeviceCoSiMhaStep<T, C, W>* launched) {
    TF_RETURN_IF_ERROR(CopyStreams(streams, &launched->attention.streams));
    return kept_->Zeros(&call_, launched->NumArrivals(), &arrivals_, &launched->arrivals);
  }

  absl::Status CopyStreams(const tensorflow::Tensor* streams, const int32_t** data) {
    if (streams == nullptr) return absl::OkStatus();
    return call_.Streams(*streams, &streams_, data);
  }

  GpuCall call_;
  Kept* const kept_;
  std::vector<int64_t> positions_;
  tensorflow::Tensor streams_, arrivals_;
};

}  // namespace continual_transformers

#endif  // CONTINUAL_TRANSFORMERS_TENSORFLOW_GPU_GPU_DEVICE_H_
