// Continual single-output attention (CoSi; Hedegaard & Iosifidis, ICLR 2023, arXiv 2201.06268):
// each step's query attends to the N newest steps of its stream, whose keys and values are kept in
// a ring.

#ifndef CONTINUAL_TRANSFORMERS_ATTENTION_SINGLE_OUTPUT_H_
#define CONTINUAL_TRANSFORMERS_ATTENTION_SINGLE_OUTPUT_H_

#include <cstdint>

#include "cc/attention/params.h"

namespace continual_transformers {

// Takes the T steps of the (stream, head) pairs begin, ..., end - 1, where pair m * H + h is head h
// of the call's m-th stream. Pairs touch disjoint memory: any split of [0, M * H) over threads
// gives the same bits. Instantiated for (T, C) of (float, float), (float, BFloat16),
// (float, Float16) and (double, double).
template <typename T, typename C>
void SingleOutputAttention(const SingleOutputParams<T, C>& params, int64_t begin, int64_t end);

// When all pairs are done: writes what the heads of a stream share, its key mask. Positions are
// only read; whoever calls advances them.
template <typename T, typename C>
void WriteKeyMask(const SingleOutputParams<T, C>& params);

// Roughly what one (stream, head) pair costs with a full window, in CPU cycles.
template <typename T, typename C>
int64_t SingleOutputCyclesPerPair(const SingleOutputParams<T, C>& params);

}  // namespace continual_transformers

#endif  // CONTINUAL_TRANSFORMERS_ATTENTION_SINGLE_OUTPUT_H_
