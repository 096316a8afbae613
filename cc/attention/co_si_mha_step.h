// One step of a multi-head attention layer: projections, continual single-output attention, and the
// output projection.

#ifndef CONTINUAL_TRANSFORMERS_ATTENTION_CO_SI_MHA_STEP_H_
#define CONTINUAL_TRANSFORMERS_ATTENTION_CO_SI_MHA_STEP_H_

#include <cstdint>

#include "cc/attention/params.h"
#include "cc/attention/threads.h"

namespace continual_transformers {

// A dense layer inside the attention layer: its input and its weights.
template <typename T, typename W>
struct Projection {
  const T* input;   // [M, inputs]
  const W* kernel;  // [inputs, outputs]; null: no such layer
  const T* bias;    // [outputs]; null: none
  int64_t inputs;
};

// T is the compute type, C the type of cached keys and values, W the type of kernels.
template <typename T, typename C, typename W>
struct CoSiMhaStep {
  Projection<T, W> query, key, value, gate;
  // Projects the attended values, [M, H * Dv]. Its input is null: the step sets it.
  Projection<T, W> output;
  T* result;  // [M, output_features]; null: not wanted, the step only updates the state
  int64_t output_features;

  // The attention: its sizes, state, masks, scores and scale. num_steps is 1. The step sets its
  // query, key, value, output and parts, and all strides except those of mask and scores.
  SingleOutputParams<T, C> attention;

  // With a delay, the query of `delay` steps before attends now. Until then, row p mod delay of the
  // rings holds the query of step p of a stream.
  int64_t delay;
  T* query_ring;          // [S, delay, H, D]
  bool* query_mask_ring;  // [S, delay]
  T* gate_ring;           // [S, delay, H, Dv]; null without a gate

  const bool* query_mask;  // [M]; if false, the query attends to nothing. Null: all true.
};

// Takes the step. Does not change positions: the caller advances them. Instantiated for the step
// types of step_types.h.
template <typename T, typename C, typename W>
void TakeCoSiMhaStep(const CoSiMhaStep<T, C, W>& step, const Threads& threads);

}  // namespace continual_transformers

#endif  // CONTINUAL_TRANSFORMERS_ATTENTION_CO_SI_MHA_STEP_H_
