// Continual single-output attention (CoSi; Hedegaard et al., ICLR 2023, arXiv 2201.06268):
// each step's query attends to the N newest steps of its stream, whose keys and values are kept in
// a ring. ring_attention.h attends to a ring's rows. Here are the steps around it: rings of any
// strides, several steps, masks, scores, calls that leave the state as it is, parts of windows.

#ifndef CONTINUAL_TRANSFORMERS_ATTENTION_SINGLE_OUTPUT_H_
#define CONTINUAL_TRANSFORMERS_ATTENTION_SINGLE_OUTPUT_H_

#include <cstdint>

#include "cc/attention/params.h"

namespace continual_transformers {

// How a call is divided into tasks. If the heads of a row are next to each other in the rings, a
// task is the T steps of several heads of a stream, otherwise of one. If there are fewer heads than
// threads and windows are long, a task is one part of the window of one (stream, head).
struct SingleOutputPlan {
  int64_t window_parts;     // the value for params.window_parts
  int64_t tasks;            // M * H * window_parts, or M * (H / heads_per_task, rounded up)
  int64_t cycles_per_task;  // a rough estimate, with full windows
  int64_t heads_per_task;   // the value for params.heads_per_task
};
template <typename T, typename C>
SingleOutputPlan PlanSingleOutput(const SingleOutputParams<T, C>& params, int64_t threads);

// Runs tasks begin, ..., end - 1. Every split of them over threads gives the same bits.
// Instantiated for the cache types of step_types.h.
template <typename T, typename C>
void SingleOutputAttention(const SingleOutputParams<T, C>& params, int64_t begin, int64_t end);

// Call it when all tasks are done. Merges the parts of windows, and writes the key mask, which the
// heads of a stream share. Does not change positions: the caller advances them.
template <typename T, typename C>
void FinishSingleOutput(const SingleOutputParams<T, C>& params);

}  // namespace continual_transformers

#endif  // CONTINUAL_TRANSFORMERS_ATTENTION_SINGLE_OUTPUT_H_
