// Single-output attention of one query over rows of keys and values in which all heads lie side by
// side, [N, H, D]: what a session keeps of a stream. A ring that is full is one span of rows, since
// softmax does not ask for their order.

#ifndef CONTINUAL_TRANSFORMERS_ATTENTION_RING_ATTENTION_H_
#define CONTINUAL_TRANSFORMERS_ATTENTION_RING_ATTENTION_H_

#include <cstdint>

#include "cc/attention/ring_cache.h"

namespace continual_transformers {

// T is what is computed in, C what keys and values are kept in: T, or under float BFloat16 or
// Float16.
template <typename T, typename C = T>
struct RingAttentionParams {
  const T* query;      // [H, D]
  const C* key;        // Rows [H, D].
  int64_t key_stride;  // Elements from one row to the next.
  const C* value;      // Rows [H, Dv].
  int64_t value_stride;
  const bool* key_mask;  // One a row: which rows have a key; null: all.
  RingSpans spans;       // The rows that are attended to.
  T* output;             // [H, Dv]

  int64_t heads;      // H
  int64_t key_dim;    // D
  int64_t value_dim;  // Dv
  T scale;            // What a logit, query . key, is multiplied by.

  T* logits;  // Scratch of RingAttentionLogits(rows of both spans) for each head.

  // Where the rows are that will be attended to next; null: not known. The processor is asked for
  // as many of them as there are rows here.
  const C* next_key;
  const C* next_value;
};

// Elements of scratch that a head needs for so many rows.
inline int64_t RingAttentionLogits(int64_t rows) { return (rows + 15) / 16 * 16 + 16; }

// Heads begin, ..., end - 1. A query with nothing to attend to gives zeros. Instantiated for (T, C)
// of (float, float), (float, BFloat16), (float, Float16) and (double, double).
template <typename T, typename C>
void RingAttention(const RingAttentionParams<T, C>& params, int64_t begin, int64_t end);

}  // namespace continual_transformers

#endif  // CONTINUAL_TRANSFORMERS_ATTENTION_RING_ATTENTION_H_
