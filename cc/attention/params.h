// Kernel parameters: plain structs of pointers, sizes and strides that the caller fills in one
// place. They hold no framework types, so the CPU kernels here and the launchers in cuda/ share
// them.
//
// Letters: S streams held, M streams stepped in this call, T steps in this call, H heads, N window,
// D key size, Dv value size.

#ifndef CONTINUAL_TRANSFORMERS_ATTENTION_PARAMS_H_
#define CONTINUAL_TRANSFORMERS_ATTENTION_PARAMS_H_

#include <cstdint>

namespace continual_transformers {

// The distance, in elements, between neighbours along each axis. The innermost axis is always
// contiguous. A stride of 0 broadcasts.
struct Strides {
  int64_t stream;
  int64_t step;
  int64_t head;
};

// The strides of rings [S, H, N, D] and [S, N, H, D].
constexpr Strides HeadMajorRing(int64_t heads, int64_t window, int64_t size) {
  return {heads * window * size, size, window * size};
}
constexpr Strides RowMajorRing(int64_t heads, int64_t window, int64_t size) {
  return {heads * window * size, heads * size, size};
}

// The strides of contiguous arrays [M, T, H, size] and [M, H, T, size].
constexpr Strides BatchTimeHead(int64_t steps, int64_t heads, int64_t size) {
  return {steps * heads * size, heads * size, size};
}
constexpr Strides BatchHeadTime(int64_t heads, int64_t steps, int64_t size) {
  return {heads * steps * size, size, steps * size};
}

// The parameters that single-output and retroactive attention share: the new steps, and their
// rings. T is the compute type, float or double. C is the type of keys and values: T, or with float
// a type of half.h.
template <typename T, typename C = T>
struct RingParams {
  // The projected steps of this call.
  const T* query;  // [M, T, H, D]
  Strides query_strides;
  const C* key;  // [M, T, H, D]
  Strides key_strides;
  const C* value;  // [M, T, H, Dv]
  Strides value_strides;
  // Which steps of this call have a key. A step without one advances its stream, but no query
  // attends to it, now or later. Null: all have one.
  const bool* key_mask;  // [M, T]

  // The streams' state. Step p of a stream is in row p mod N of its ring. The stride `step` of a
  // ring goes from one row to the next.
  C* key_cache;  // [S, H, N, D] or [S, N, H, D]
  Strides key_cache_strides;
  C* value_cache;  // [S, H, N, Dv] or [S, N, H, Dv]
  Strides value_cache_strides;
  bool* key_mask_cache;     // [S, N]
  const int64_t* position;  // [S], steps taken before this call
  const int32_t* streams;   // [M], distinct, each in [0, S)

  T* output;
  Strides output_strides;

  int64_t num_streams;  // M
  int64_t num_steps;    // T
  int64_t num_heads;    // H
  int64_t window;       // N
  int64_t key_dim;      // D
  int64_t value_dim;    // Dv

  T scale;            // multiplies each logit, query . key
  bool update_state;  // false: computes the outputs, but leaves the state unchanged
};

// Single-output attention (single_output.h). The output is [M, T, H, Dv].
template <typename T, typename C = T>
struct SingleOutputParams : RingParams<T, C> {
  // The columns of the window that may be attended to, oldest first; null: all. The innermost axis,
  // of size N, is contiguous.
  const bool* mask;  // [M, H, T, N]
  Strides mask_strides;

  T* scores;  // [M, H, T, N], oldest column first; null: not wanted
  Strides scores_strides;

  // Where to copy the N - 1 steps before this call, oldest first, before any row is overwritten: a
  // gradient needs them. Steps that were never taken are zeros. Null: not wanted.
  C* window_key;          // [M, H, N - 1, D]
  C* window_value;        // [M, H, N - 1, Dv]
  bool* window_key_mask;  // [M, N - 1]

  // The number of parts of a window that threads share; 1: not divided. More than 1 only if
  // num_steps is 1, and neither scores nor window_key are wanted. Each part leaves its output, its
  // maximum and its denominator in `parts` until all are merged. (cuda/ leaves its sum of values.)
  int64_t window_parts;
  T* parts;  // [M, H, window_parts, Dv + 2]

  // The number of heads of a stream that a task takes together. 0: 1. More only as PlanSingleOutput
  // says. (cuda/ ignores it.)
  int64_t heads_per_task;
};

// Retroactive attention (retroactive.h).
//
// T is the type of the computation and of the rings, float or double. Sums are always in double: a
// term is added when its key enters and subtracted when it leaves. In float the two rounding errors
// would add up over the N steps of a row to more than 5e-6 from N = 1000 on.
//
// The output is [M, T, H, N, Dv], oldest row first. Rows of steps never taken are zeros. A step
// without a key is never attended to, but its query attends.
template <typename T>
struct RetroactiveParams : RingParams<T> {
  T* query_cache;  // [S, H, N, D] or [S, N, H, D]
  Strides query_cache_strides;

  // The softmax state of each row of the window whose query is in the ring.
  //   reference: what is subtracted from a logit before its exponential: the row's maximum when
  //     the row was last computed exactly.
  //   denominator: the sum of the weights exp(logit - reference) over the window.
  //   magnitude: the sum of weight * |value|, over the window and all elements of its values.
  //   peaks: the largest denominator and the largest magnitude since then. Each has 32 of the bits.
  double* softmax;       // [S, H, 4, N]: reference, denominator, magnitude, peaks
  double* weighted_sum;  // [S, H, N, Dv], the sum of values with these weights
  // The arithmetic and scale of these weights, as in MadeWith. Another arithmetic
  // or scale gives other bits, so subtracting would not undo adding. All rows are then recomputed.
  double* made_with;  // [S, 2]

  int64_t output_row_stride;
  char* scratch;   // RetroactiveScratchBytes, aligned for double; null: the kernel allocates it
  bool recompute;  // recomputes all rows at each step, and keeps no softmax state
};

}  // namespace continual_transformers

#endif  // CONTINUAL_TRANSFORMERS_ATTENTION_PARAMS_H_
