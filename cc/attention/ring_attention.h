// Single-output attention of one query over rows of keys and values with heads side by side,
// [N, Hk, D]. A full ring is one span of rows, as softmax does not depend on their order. Sessions
// call it, and single_output.h does for the layers' ops.

#ifndef CONTINUAL_TRANSFORMERS_ATTENTION_RING_ATTENTION_H_
#define CONTINUAL_TRANSFORMERS_ATTENTION_RING_ATTENTION_H_

#include <cstdint>

#include "cc/attention/online_softmax.h"
#include "cc/attention/ring_cache.h"

namespace continual_transformers {

// T is the compute type, C the type of keys and values: T, or with float BFloat16, Float16 or
// int8_t. Rows of int8_t have a scale each.
template <typename T, typename C = T>
struct RingAttentionParams {
  const T* query;      // [H, D]
  const C* key;        // rows [Hk, D]
  int64_t key_stride;  // elements from one row to the next
  const C* value;      // rows [Hk, Dv]
  int64_t value_stride;
  const T* key_scale;    // one per row; null unless C is int8_t
  const T* value_scale;  // the same
  // One per row: which rows of the spans are attended to; null: all. Others may hold anything.
  const bool* key_mask;
  RingSpans spans;  // the rows that are attended to
  T* output;        // [H, Dv]

  // The bound c of c * tanh(logit / c), which replaces a scaled logit; 0: none.
  T soft_cap;

  // Added to the logits after that: [H, bias_rows], and that of row r at (r + bias_first) mod
  // bias_rows. Null: none.
  const T* bias;
  int64_t bias_rows, bias_first;

  int64_t heads;      // H
  int64_t key_heads;  // Hk, a divisor of H: H / Hk successive queries share keys and values
  int64_t key_dim;    // D
  int64_t value_dim;  // Dv
  T scale;            // multiplies each logit, query . key

  // Scratch, RingAttentionLogits(rows of both spans) elements per head. In the end it holds the
  // rows' weights: not normalized, and of int8_t times the values' scales.
  T* logits;
  OnlineSoftmax<T>* softmax;  // [H], written; null: not wanted

  bool far;           // Whether these rows are in no near cache (kNearRingsBytes).
  const C* next_key;  // The keys of the next call, to prefetch; null: near, or not known.
};

// Rings of so many bytes, of all streams together, stay in a near cache until their next turn.
constexpr int64_t kNearRingsBytes = 256 << 10;

// The scratch elements that one head needs for `rows` rows.
inline int64_t RingAttentionLogits(int64_t rows) { return (rows + 15) / 16 * 16 + 16; }

// Computes heads begin, ..., end - 1. A query with nothing to attend to gives zeros. Instantiated
// for the ring types of step_types.h.
template <typename T, typename C>
void RingAttention(const RingAttentionParams<T, C>& params, int64_t begin, int64_t end);

}  // namespace continual_transformers

#endif  // CONTINUAL_TRANSFORMERS_ATTENTION_RING_ATTENTION_H_
