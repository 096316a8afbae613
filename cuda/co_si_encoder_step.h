// One step of a single-output encoder block on a GPU: the launches of the attention layer
// (co_si_mha_step.h), and one launch for each norm and each dense layer of the feed-forward part.

#ifndef CONTINUAL_TRANSFORMERS_CUDA_CO_SI_ENCODER_STEP_H_
#define CONTINUAL_TRANSFORMERS_CUDA_CO_SI_ENCODER_STEP_H_

#include <cuda_runtime.h>

#include <cstdint>

#include "cc/attention/co_si_encoder_step.h"
#include "cuda/co_si_mha_step.h"

namespace continual_transformers {

// CoSiEncoderStep with all pointers to device memory.
template <typename T, typename C, typename W>
struct DeviceCoSiEncoderStep {
  // The block sets its scratch, residual and result.
  DeviceCoSiMhaStep<T, C, W> attention;
  LayerNorm<T> attention_norm, output_norm;  // [E]
  Projection<T, W> hidden, output;           // E -> F -> E; the block sets their inputs
  int64_t hidden_features;                   // F
  Activation activation;                     // HasActivation() in dense.h
  bool norm_first;
  T* result;      // [M, E]; null: not wanted, the step only updates the state
  void* scratch;  // ScratchBytes(), 16-byte aligned; it includes the attention's scratch

  int64_t ScratchBytes() const;
};

// Returns the reason why no kernel takes this step, or null if one does.
template <typename T, typename C, typename W>
const char* RefusesCoSiEncoderStep(const DeviceCoSiEncoderStep<T, C, W>& step);

// Takes the step, and advances the positions. Instantiated for the step types of step_types.h.
template <typename T, typename C, typename W>
cudaError_t LaunchCoSiEncoderStep(const DeviceCoSiEncoderStep<T, C, W>& step, cudaStream_t stream);

}  // namespace continual_transformers

#endif  // CONTINUAL_TRANSFORMERS_CUDA_CO_SI_ENCODER_STEP_H_
