// What the retroactive kernel is told; see params.h.

#ifndef CONTINUAL_TRANSFORMERS_ATTENTION_RETROACTIVE_PARAMS_H_
#define CONTINUAL_TRANSFORMERS_ATTENTION_RETROACTIVE_PARAMS_H_

#include <cstdint>

#include "cc/attention/params.h"

namespace continual_transformers {

// T is what is computed and kept in, float or double. Sums are kept in double in either case: what
// was added to them as a key came is taken away again as it leaves, and in float what the two
// roundings leave behind grows over the N steps of a row to more than 5e-6 from N = 1000 on.
template <typename T>
struct RetroactiveParams {
  // This call's projected steps.
  const T* query;  // [M, T, H, D]
  Strides query_strides;
  const T* key;  // [M, T, H, D]
  Strides key_strides;
  const T* value;  // [M, T, H, Dv]
  Strides value_strides;
  // Which of this call's steps have a key; one that has none is never attended to, but its query
  // attends. Null: all.
  const bool* key_mask;  // [M, T]

  // The streams' state. Step number p of a stream lives in row p mod N of its rings.
  T* query_cache;           // [S, H, N, D]
  T* key_cache;             // [S, H, N, D]
  T* value_cache;           // [S, H, N, Dv]
  bool* key_mask_cache;     // [S, N]
  const int64_t* position;  // [S], steps taken before this call
  const int32_t* streams;   // [M], distinct, each in [0, S)

  // What is known of the softmax of each row of the window, whose query is in the ring.
  //   reference: what is subtracted from a logit before its exponential is taken: the row's maximum
  //     when the row was last computed exactly.
  //   denominator: the sum of the weights exp(logit - reference) over the window.
  //   peak: the largest denominator since then.
  //   peak_sum: the largest magnitude in weighted_sum since then.
  double* softmax;       // [S, H, 4, N]: reference, denominator, peak, peak_sum
  double* weighted_sum;  // [S, H, N, Dv], the values' sum with these weights
  // What these rows' weights were computed with: MadeWith's arithmetic and scale. Others give other
  // bits, of which not the same can be taken away as was added: then all rows are computed anew.
  double* made_with;  // [S, 2]

  T* output;  // [M, T, H, N, Dv], oldest row first; rows of steps never taken are zeros
  Strides output_strides;
  int64_t output_row_stride;

  int64_t num_streams;  // M
  int64_t num_steps;    // T
  int64_t num_heads;    // H
  int64_t window;       // N
  int64_t key_dim;      // D
  int64_t value_dim;    // Dv

  T scale;            // what a logit, query . key, is multiplied by
  bool recompute;     // computes all rows anew at each step, and keeps nothing of their softmax
  bool update_state;  // false: as if the steps were taken, but the state stays as it was
};

}  // namespace continual_transformers

#endif  // CONTINUAL_TRANSFORMERS_ATTENTION_RETROACTIVE_PARAMS_H_
