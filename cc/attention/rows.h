// Rows of keys and values, and which of them are attended to.

#ifndef CONTINUAL_TRANSFORMERS_ATTENTION_ROWS_H_
#define CONTINUAL_TRANSFORMERS_ATTENTION_ROWS_H_

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "cc/attention/ring_cache.h"

namespace continual_transformers {

// Rows of keys and values at constant distances.
template <typename C>
struct Rows {
  const C* key;
  int64_t key_stride;
  const C* value;
  int64_t value_stride;
  const bool* key_mask;  // which rows have a key; null: all
  int64_t count;

  Rows From(int64_t row, int64_t rows) const {
    return {key + row * key_stride,
            key_stride,
            value + row * value_stride,
            value_stride,
            key_mask == nullptr ? nullptr : key_mask + row,
            rows};
  }
};

// Bit i of the result is set if bit i of `bits` and allowed[i] are set, for i < count.
inline uint64_t And(uint64_t bits, const bool* allowed, int64_t count) {
  static_assert(sizeof(bool) == 1);
  // Eight at a time: a mask is mostly true, and is read for every head.
  constexpr uint64_t kEightTrue = 0x0101010101010101u;
  for (int64_t i = 0; i < count; i += 8) {
    uint64_t eight = kEightTrue;
    if (count - i >= 8) {
      std::memcpy(&eight, allowed + i, 8);
    } else {
      std::memcpy(&eight, allowed + i, count - i);
    }
    if (eight == kEightTrue) continue;
    for (int64_t j = i; j < std::min(i + 8, count); ++j) {
      bits &= ~(static_cast<uint64_t>(!allowed[j]) << j);
    }
  }
  return bits;
}

// Calls f(first, end) for every run of set bits, lowest first.
template <typename F>
void ForEachRun(uint64_t bits, const F& f) {
  while (bits != 0) {
    const int first = __builtin_ctzll(bits);
    const uint64_t above = ~(bits >> first);  // from the run's end on; the run may reach bit 63
    const int length = above == 0 ? 64 : __builtin_ctzll(above);
    f(first, first + length);
    if (first + length == 64) return;
    bits &= ~uint64_t{0} << (first + length);
  }
}

// Copies the N - 1 steps before `position` from a ring to `window`, oldest first. The ring's rows
// have `size` elements and are `stride` apart. Steps that were never taken become zeros.
template <typename U>
void CopyWindow(const U* ring, int64_t stride, int64_t size, int64_t position, int64_t rows,
                U* window) {
  const int64_t taken = std::min(position, rows - 1);
  const RingSpans spans = FindRingSpans(position - taken, taken, rows);
  window = std::fill_n(window, (rows - 1 - taken) * size, U{});
  for (const RingSpan& span : {spans.before_wrap, spans.after_wrap}) {
    for (int64_t i = 0; i < span.rows; ++i) {
      window = std::copy_n(ring + (span.first_row + i) * stride, size, window);
    }
  }
}

}  // namespace continual_transformers

#endif  // CONTINUAL_TRANSFORMERS_ATTENTION_ROWS_H_
