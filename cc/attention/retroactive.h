// Continual retroactive attention (CoRe; Hedegaard et al., ICLR 2023, arXiv 2201.06268): each
// step updates the outputs of all N queries of its stream's window. A kept row gains the new key
// and loses the oldest one. The new row is computed in full.
//
// The published update adds and subtracts plain exponentials, which overflow and cancel. Here each
// row's weights are relative to a reference, the row's maximum when it was last computed exactly,
// and its sums are in double. The weight that is subtracted has the same bits as the one that was
// added, so only the roundings of the sums remain: at most about 2 N 2^-53 of their peak. A row is
// recomputed exactly if that is too much of the remainder, which happens when the departing key
// dominated the row. It is also recomputed if a new key is so far above the reference that weights
// would overflow.

#ifndef CONTINUAL_TRANSFORMERS_ATTENTION_RETROACTIVE_H_
#define CONTINUAL_TRANSFORMERS_ATTENTION_RETROACTIVE_H_

#include <cstdint>

#include "cc/attention/params.h"

namespace continual_transformers {

// Returns whether a step is faster with params.recompute, given the sizes in `params`.
template <typename T>
bool RecomputingIsFaster(const RetroactiveParams<T>& params);

// Returns how many bytes params.scratch must have for a call of RetroactiveAttention. Calls that
// run at the same time need one each.
template <typename T>
int64_t RetroactiveScratchBytes(const RetroactiveParams<T>& params);

// A task is the T steps of one (stream, head); there are M * H. Returns a rough estimate of its
// cycles.
template <typename T>
int64_t RetroactiveCyclesPerTask(const RetroactiveParams<T>& params);

// Runs tasks begin, ..., end - 1. Every split of them over threads gives the same bits.
// Instantiated for the compute types of step_types.h.
template <typename T>
void RetroactiveAttention(const RetroactiveParams<T>& params, int64_t begin, int64_t end);

// Call it when all tasks are done. Writes what the heads of a stream share: its key mask, and
// made_with. Does not change positions: the caller advances them.
template <typename T>
void FinishRetroactive(const RetroactiveParams<T>& params);

}  // namespace continual_transformers

#endif  // CONTINUAL_TRANSFORMERS_ATTENTION_RETROACTIVE_H_
