// What a kernel is told: plain structs of pointers, sizes and strides, filled in one place by the
// caller. They hold no framework types, so the CPU kernels here and the launchers in cuda/ take the
// same ones.
//
// Letters: S streams held, M streams stepped in this call, T steps in this call, H heads, N window,
// D key size, Dv value size.

#ifndef CONTINUAL_TRANSFORMERS_ATTENTION_PARAMS_H_
#define CONTINUAL_TRANSFORMERS_ATTENTION_PARAMS_H_

#include <cstdint>

namespace continual_transformers {

// Distance, in elements, between neighbours along each axis. The innermost axis is always
// contiguous. A stride of 0 broadcasts.
struct Strides {
  int64_t stream;
  int64_t step;
  int64_t head;
};

// The strides of a ring [S, H, N, D] and of one [S, N, H, D].
constexpr Strides HeadMajorRing(int64_t heads, int64_t window, int64_t size) {
  return {heads * window * size, size, window * size};
}
constexpr Strides RowMajorRing(int64_t heads, int64_t window, int64_t size) {
  return {heads * window * size, heads * size, size};
}

// What single-output and retroactive attention have in common: the new steps, and the rings that
// they enter. T is what is computed in, float or double; C what keys and values are kept in: T, or
// under float one of the types of half.h.
template <typename T, typename C = T>
struct RingParams {
  // This call's projected steps.
  const T* query;  // [M, T, H, D]
  Strides query_strides;
  const C* key;  // [M, T, H, D]
  Strides key_strides;
  const C* value;  // [M, T, H, Dv]
  Strides value_strides;
  // Which of this call's steps have a key; one that has none advances its stream, but is never
  // attended to, now or later. Null: all.
  const bool* key_mask;  // [M, T]

  // The streams' state. Step number p of a stream lives in row p mod N of its ring. Along `step`
  // the strides of a ring go from one row to the next. (cuda/ takes rings [S, H, N, D] only, and
  // looks at no strides of theirs.)
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

  T scale;            // what a logit, query . key, is multiplied by
  bool update_state;  // false: as if the steps were taken, but the state stays as it was
};

// The output is [M, T, H, Dv].
template <typename T, typename C = T>
struct SingleOutputParams : RingParams<T, C> {
  // Which columns of the window may be attended to, oldest first; null: all. The innermost axis, of
  // size N, is contiguous.
  const bool* mask;  // [M, H, T, N]
  Strides mask_strides;

  T* scores;  // [M, H, T, N], oldest column first; null: not wanted
  Strides scores_strides;

  // Where the N - 1 steps before this call are copied, oldest first, before any row is overwritten:
  // what a gradient needs of the rings. Steps that were never taken are zeros. Null: not wanted.
  C* window_key;          // [M, H, N - 1, D]
  C* window_value;        // [M, H, N - 1, Dv]
  bool* window_key_mask;  // [M, N - 1]

  // Into how many parts a window is cut, so that threads can share it; 1: none. Only where
  // num_steps is 1, and neither scores nor window_key are wanted. Each part leaves its sum of
  // values, its maximum and its denominator here, until all are merged.
  int64_t window_parts;
  T* parts;  // [M, H, window_parts, Dv + 2]
};

}  // namespace continual_transformers

#endif  // CONTINUAL_TRANSFORMERS_ATTENTION_PARAMS_H_
