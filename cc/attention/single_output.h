// Continual single-output attention (CoSi; Hedegaard & Iosifidis, ICLR 2023, arXiv 2201.06268):
// each step's query attends to the N newest steps of its stream, whose keys and values are kept in
// a ring.

#ifndef CONTINUAL_TRANSFORMERS_ATTENTION_SINGLE_OUTPUT_H_
#define CONTINUAL_TRANSFORMERS_ATTENTION_SINGLE_OUTPUT_H_

#include <cstdint>

#include "cc/attention/params.h"

namespace continual_transformers {

// How a call is shared out. The T steps of one (stream, head) are one task; or where heads are too
// few for the threads and windows long, one part of the window of one (stream, head).
struct SingleOutputPlan {
  int64_t window_parts;     // What params.window_parts is to be.
  int64_t tasks;            // M * H * window_parts.
  int64_t cycles_per_task;  // Roughly, with full windows.
};
template <typename T, typename C>
SingleOutputPlan PlanSingleOutput(const SingleOutputParams<T, C>& params, int64_t threads);

// Takes tasks begin, ..., end - 1: any split of them over threads gives the same bits. Instantiated
// for (T, C) of (float, float), (float, BFloat16), (float, Float16) and (double, double).
template <typename T, typename C>
void SingleOutputAttention(const SingleOutputParams<T, C>& params, int64_t begin, int64_t end);

// When all tasks are done: merges the parts of windows, and writes what the heads of a stream
// share, its key mask. Positions are only read; whoever calls advances them.
template <typename T, typename C>
void FinishSingleOutput(const SingleOutputParams<T, C>& params);

}  // namespace continual_transformers

#endif  // CONTINUAL_TRANSFORMERS_ATTENTION_SINGLE_OUTPUT_H_
