// Attention among the rows of a window, of several queries: keys and values are in the window's
// order, with heads side by side. A session uses it where a step changes all rows of a window.

#ifndef CONTINUAL_TRANSFORMERS_ATTENTION_WINDOW_ATTENTION_H_
#define CONTINUAL_TRANSFORMERS_ATTENTION_WINDOW_ATTENTION_H_

#include <algorithm>
#include <cstdint>

#include "cc/attention/ring_attention.h"

namespace continual_transformers {

// The queries are the newest rows of the window: query i is row N - Nq + i.
template <typename T>
struct WindowAttentionParams {
  const T* query;     // [Nq, H, D]
  const T* key;       // [N, H, D]
  const T* value;     // [N, H, Dv]
  T* output;          // [Nq, H, Dv]
  int64_t queries;    // Nq
  int64_t rows;       // N
  int64_t heads;      // H
  int64_t key_dim;    // D
  int64_t value_dim;  // Dv
  T scale;            // multiplies each logit, query . key
  int64_t first_row;  // earlier rows are no keys, and may hold anything
  int64_t band;       // more than 0: only keys less than so many rows away
  bool causal;        // no keys after the query
  T* scratch;         // ScratchSize() elements

  // The keys of a query: rows first, ..., end - 1.
  struct Keys {
    int64_t first, end;
  };
  Keys KeysOf(int64_t i) const {
    const int64_t row = rows - queries + i;
    const int64_t first = band > 0 ? std::max(first_row, row - band + 1) : first_row;
    const int64_t end = causal ? row + 1 : band > 0 ? std::min(rows, row + band) : rows;
    return {first, std::max(first, end)};
  }

  // Queries that are computed together. They share each load of keys and values. Six do not fit in
  // the registers of AVX2, and took 1.6 times as long. Fewer queries are computed one by one, by
  // RingAttention: transposing the keys first took one query 2.7 us instead of 1.1 (N=64 H=4 D=32,
  // AVX2, Zen 3).
  static constexpr int kQueriesOfBlock = 4;
  bool IsInBlocks() const { return queries >= kQueriesOfBlock; }

  // In blocks, the scratch has logits for one of them, and one head's keys, transposed.
  // Their stride is an odd number of lines: with a power of two they fall into few sets of the
  // cache, and four queries took 3 times as long (N=1024 D=64, AVX2).
  int64_t ScratchStride() const { return ((rows + 15) / 16 | 1) * 16; }
  int64_t ScratchSize() const {
    return IsInBlocks() ? (kQueriesOfBlock + key_dim) * ScratchStride()
                        : heads * RingAttentionLogits(rows);
  }
};

// Computes heads begin, ..., end - 1. A query without keys gives zeros. No query reads a value that
// is not of its keys. Instantiated for the compute types of step_types.h.
template <typename T>
void WindowAttention(const WindowAttentionParams<T>& params, int64_t begin, int64_t end);

}  // namespace continual_transformers

#endif  // CONTINUAL_TRANSFORMERS_ATTENTION_WINDOW_ATTENTION_H_
