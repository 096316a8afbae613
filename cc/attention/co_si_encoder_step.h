// One step of a transformer encoder block whose attention is single-output: attention, residual,
// layer norm, feed-forward, residual, layer norm, or with the norms first.

#ifndef CONTINUAL_TRANSFORMERS_ATTENTION_CO_SI_ENCODER_STEP_H_
#define CONTINUAL_TRANSFORMERS_ATTENTION_CO_SI_ENCODER_STEP_H_

#include <cstdint>

#include "cc/attention/co_si_mha_step.h"
#include "cc/attention/elementwise.h"
#include "cc/attention/threads.h"

namespace continual_transformers {

enum class Activation { kLinear = 0, kGelu = 1, kRelu = 2 };

template <typename T, typename C, typename W>
struct CoSiEncoderStep {
  // Self-attention, whose input and output have E features and whose delay is 0. Its inputs, with
  // norm_first, and its result are the step's own business; query.input is the block's own.
  CoSiMhaStep<T, C, W> attention;
  LayerNorm<T> attention_norm, output_norm;  // [E]
  // The inputs of the feed-forward layers, E -> F -> E, are the step's own business: null.
  Projection<T, W> hidden, output;
  int64_t hidden_features;  // F
  Activation activation;    // Between them.
  bool norm_first;
  T* result;  // [M, E]; null: not wanted, the streams only take the step
};

// Takes the step. Instantiated as TakeCoSiMhaStep is.
template <typename T, typename C, typename W>
void TakeCoSiEncoderStep(const CoSiEncoderStep<T, C, W>& step, const Threads& threads);

}  // namespace continual_transformers

#endif  // CONTINUAL_TRANSFORMERS_ATTENTION_CO_SI_ENCODER_STEP_H_
