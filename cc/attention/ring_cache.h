// The rows of a stream's steps in its ring. Step p is in row p mod N and never moves, so any run of
// at most N successive steps is at most two contiguous spans of rows. A kernel asks for the spans
// once, outside its loops, and needs no wrap-around test inside them.

#ifndef CONTINUAL_TRANSFORMERS_ATTENTION_RING_CACHE_H_
#define CONTINUAL_TRANSFORMERS_ATTENTION_RING_CACHE_H_

#include <algorithm>
#include <cstdint>

namespace continual_transformers {

struct RingSpan {
  int64_t first_row;
  int64_t rows;
};

// `before_wrap` has the older steps. `after_wrap` is empty unless the run passes the ring's end.
struct RingSpans {
  RingSpan before_wrap;
  RingSpan after_wrap;
};

// Returns the rows of steps first_step, ..., first_step + steps - 1 in a ring of `window` rows.
// Requires first_step >= 0 and 0 <= steps <= window.
inline RingSpans FindRingSpans(int64_t first_step, int64_t steps, int64_t window) {
  const int64_t row = first_step % window;
  const int64_t before = std::min(steps, window - row);
  return {{row, before}, {0, steps - before}};
}

// Returns rows begin, ..., end - 1 of these, counted over both spans.
inline RingSpans PartOf(const RingSpans& spans, int64_t begin, int64_t end) {
  const auto part = [begin, end](const RingSpan& span, int64_t before) {
    const int64_t from = std::clamp<int64_t>(begin - before, 0, span.rows);
    return RingSpan{span.first_row + from,
                    std::clamp<int64_t>(end - before, from, span.rows) - from};
  };
  return {part(spans.before_wrap, 0), part(spans.after_wrap, spans.before_wrap.rows)};
}

}  // namespace continual_transformers

#endif  // CONTINUAL_TRANSFORMERS_ATTENTION_RING_CACHE_H_
