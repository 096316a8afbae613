// Continual retroactive attention (CoRe; Hedegaard & Iosifidis, ICLR 2023, arXiv 2201.06268): each
// step updates the outputs of all N queries of its stream's window. A kept row gains the new key
// and loses the oldest one; the new row is computed as a whole.
//
// The published update adds and subtracts exponentials as they are, which overflow, and cancel.
// Here each row's weights are relative to a reference, its maximum as it was last computed exactly,
// and its sums are in double. The weight that is taken away has the bits of that which was added,
// so the sums are off only by their own roundings: at most about 2 N 2^-53 of their peak. A row is
// computed exactly anew where this is too much of what is left, which is where the departing key
// carried the row; and where a new key is so far above the reference that weights would overflow.

#ifndef CONTINUAL_TRANSFORMERS_ATTENTION_RETROACTIVE_H_
#define CONTINUAL_TRANSFORMERS_ATTENTION_RETROACTIVE_H_

#include <cstdint>

#include "cc/attention/retroactive_params.h"

namespace continual_transformers {

// Whether a step is faster with params.recompute, from the sizes in `params`.
template <typename T>
bool RecomputingIsFaster(const RetroactiveParams<T>& params);

// What params.scratch must hold for a call of RetroactiveAttention. Calls at the same time need one
// each.
template <typename T>
int64_t RetroactiveScratchBytes(const RetroactiveParams<T>& params);

// The T steps of one (stream, head) are one task, of M * H; this many cycles each, roughly.
template <typename T>
int64_t RetroactiveCyclesPerTask(const RetroactiveParams<T>& params);

// Takes tasks begin, ..., end - 1: any split of them over threads gives the same bits. Instantiated
// for float and double.
template <typename T>
void RetroactiveAttention(const RetroactiveParams<T>& params, int64_t begin, int64_t end);

// When all tasks are done: writes what the heads of a stream share, its key mask and what its rows
// were made with. Positions are only read; whoever calls advances them.
template <typename T>
void FinishRetroactive(const RetroactiveParams<T>& params);

}  // namespace continual_transformers

#endif  // CONTINUAL_TRANSFORMERS_ATTENTION_RETROACTIVE_H_
