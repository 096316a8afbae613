// One step of a transformer encoder block with single-output attention: attention, residual, layer
// norm, feed-forward, residual, layer norm, or with the norms first.

#ifndef CONTINUAL_TRANSFORMERS_ATTENTION_CO_SI_ENCODER_STEP_H_
#define CONTINUAL_TRANSFORMERS_ATTENTION_CO_SI_ENCODER_STEP_H_

#include <cstdint>

#include "cc/attention/activations.h"
#include "cc/attention/co_si_mha_step.h"
#include "cc/attention/elementwise.h"
#include "cc/attention/threads.h"

namespace continual_transformers {

template <typename T, typename C, typename W>
struct CoSiEncoderStep {
  // Self-attention with E input and output features and no delay. Set query.input to the block's
  // input. The step sets `result`, and the inputs if norm_first is true.
  CoSiMhaStep<T, C, W> attention;
  LayerNorm<T> attention_norm, output_norm;  // [E]
  // The feed-forward layers, E -> F -> E. Their inputs are null: the step sets them.
  Projection<T, W> hidden, output;
  int64_t hidden_features;    // F
  ActivationSpec activation;  // between `hidden` and `output`
  bool norm_first;
  T* result;  // [M, E]; null: not wanted, the step only updates the state
};

// Takes the step. Instantiated for the step types of step_types.h.
template <typename T, typename C, typename W>
void TakeCoSiEncoderStep(const CoSiEncoderStep<T, C, W>& step, const Threads& threads);

}  // namespace continual_transformers

#endif  // CONTINUAL_TRANSFORMERS_ATTENTION_CO_SI_ENCODER_STEP_H_
