// Parameters of the retroactive kernel; see params.h.

#ifndef CONTINUAL_TRANSFORMERS_ATTENTION_RETROACTIVE_PARAMS_H_
#define CONTINUAL_TRANSFORMERS_ATTENTION_RETROACTIVE_PARAMS_H_

#include <cstdint>

#include "cc/attention/params.h"

namespace continual_transformers {

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
  //   peak: the largest denominator since then.
  //   peak_sum: the largest magnitude in weighted_sum since then.
  double* softmax;       // [S, H, 4, N]: reference, denominator, peak, peak_sum
  double* weighted_sum;  // [S, H, N, Dv], the sum of values with these weights
  // The arithmetic and scale of these weights, as in MadeWith. Another arithmetic
  // or scale gives other bits, so subtracting would not undo adding. All rows are then recomputed.
  double* made_with;  // [S, 2]

  int64_t output_row_stride;
  char* scratch;   // RetroactiveScratchBytes, aligned for double; null: the kernel allocates it
  bool recompute;  // recomputes all rows at each step, and keeps no softmax state
};

}  // namespace continual_transformers

#endif  // CONTINUAL_TRANSFORMERS_ATTENTION_RETROACTIVE_PARAMS_H_
