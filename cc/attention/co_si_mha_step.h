// One step of a whole multi-head attention layer: projections, continual single-output attention,
// projection back.

#ifndef CONTINUAL_TRANSFORMERS_ATTENTION_CO_SI_MHA_STEP_H_
#define CONTINUAL_TRANSFORMERS_ATTENTION_CO_SI_MHA_STEP_H_

#include <cstdint>

#include "cc/attention/params.h"
#include "cc/attention/threads.h"

namespace continual_transformers {

// A dense layer of the attention layer's: its input, and its weights.
template <typename T, typename W>
struct Projection {
  const T* input;   // [M, inputs]
  const W* kernel;  // [inputs, outputs]; null: there is no such layer
  const T* bias;    // [outputs]; null: none
  int64_t inputs;
};

// T is what is computed in, C what keys and values are kept in, W what kernels are kept in.
template <typename T, typename C, typename W>
struct CoSiMhaStep {
  Projection<T, W> query, key, value, gate;
  // From the attended values, [M, H * Dv], which are the step's own business: input is null.
  Projection<T, W> output;
  T* result;  // [M, output_features]; null: not wanted, the streams only take the step
  int64_t output_features;

  // The attention: its sizes, state, masks, scores and scale. num_steps is 1. Its query, key, value
  // and output, its parts and its strides but those of mask and scores, are the step's own
  // business.
  SingleOutputParams<T, C> attention;

  // With a delay, whose turn it is to attend is the query of `delay` steps before. Row p mod delay
  // of the rings has that of step number p of a stream, until then.
  int64_t delay;
  T* query_ring;          // [S, delay, H, D]
  bool* query_mask_ring;  // [S, delay]
  T* gate_ring;           // [S, delay, H, Dv]; null without a gate

  const bool* query_mask;  // [M]; where false the query attends to nothing. Null: all true.
};

// Takes the step. Positions are only read; whoever calls advances them. Instantiated for (T, C, W)
// of (float, float | BFloat16 | Float16, float | BFloat16) and (double, double, double).
template <typename T, typename C, typename W>
void TakeCoSiMhaStep(const CoSiMhaStep<T, C, W>& step, const Threads& threads);

}  // namespace continual_transformers

#endif  // CONTINUAL_TRANSFORMERS_ATTENTION_CO_SI_MHA_STEP_H_
