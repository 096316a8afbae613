// One step of a whole single-output encoder block on a GPU: the launches of the attention layer
// (co_si_mha_step.h), and one for each norm and each dense layer of the feed-forward part.

#ifndef CONTINUAL_TRANSFORMERS_CUDA_CO_SI_ENCODER_STEP_H_
#define CONTINUAL_TRANSFORMERS_CUDA_CO_SI_ENCODER_STEP_H_

#include <cuda_runtime.h>

#include <cstdint>

#include "cc/attention/co_si_encoder_step.h"
#include "cuda/co_si_mha_step.h"

namespace continual_transformers {

// CoSiEncoderStep with every pointer to device memory.
template <typename T, typename C, typename W>
struct DeviceCoSiEncoderStep {
  // Its scratch, residual and result are the block's own business.
  DeviceCoSiMhaStep<T, C, W> attention;
  LayerNorm<T> attention_norm, output_norm;  // [E]
  Projection<T, W> hidden, output;           // E -> F -> E; their inputs are null
  int64_t hidden_features;                   // F
  Activation activation;
  bool norm_first;
  T* result;      // [M, E]; null: not wanted, the streams only take the step
  void* scratch;  // ScratchBytes() of it, 16-byte aligned, the attention's with it

  int64_t ScratchBytes() const;
};

// Why no kernel takes these sizes; null where one does.
template <typename T, typename C, typename W>
const char* RefusesCoSiEncoderStep(const DeviceCoSiEncoderStep<T, C, W>& step);

// Takes the step, and advances the positions. Instantiated for the step types of step_types.h.
template <typename T, typename C, typename W>
cudaError_t LaunchCoSiEncoderStep(const DeviceCoSiEncoderStep<T, C, W>& step, cudaStream_t stream);

}  // namespace continual_transformers

#endif  // CONTINUAL_TRANSFORMERS_CUDA_CO_SI_ENCODER_STEP_H_
