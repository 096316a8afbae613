// What the retroactive kernel is told; see params.h.

#ifndef CONTINUAL_TRANSFORMERS_ATTENTION_RETROACTIVE_PARAMS_H_
#define CONTINUAL_TRANSFORMERS_ATTENTION_RETROACTIVE_PARAMS_H_

#include <cstdint>

#include "cc/attention/params.h"

namespace continual_transformers {

// T is what is computed and kept in, float or double. Sums are kept in double in either case: what
// was added to them as a key came is taken away again as it leaves, and in float what the two
// roundings leave behind grows over the N steps of a row to more than 5e-6 from N = 1000 on.
//
// The output is [M, T, H, N, Dv], oldest row first; rows of steps never taken are zeros. A step
// without a key is never attended to, but its query attends.
template <typename T>
struct RetroactiveParams : RingParams<T> {
  T* query_cache;  // [S, H, N, D] or [S, N, H, D]
  Strides query_cache_strides;

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

  int64_t output_row_stride;
  char* scratch;   // RetroactiveScratchBytes, aligned for double; null: the kernel allocates it
  bool recompute;  // computes all rows anew at each step, and keeps nothing of their softmax
};

}  // namespace continual_transformers

#endif  // CONTINUAL_TRANSFORMERS_ATTENTION_RETROACTIVE_PARAMS_H_
