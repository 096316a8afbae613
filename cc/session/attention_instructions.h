// Attention nodes of a plan: over a stream's ring, or among the rows of a window that a step
// changes as a whole.

#ifndef CONTINUAL_TRANSFORMERS_SESSION_ATTENTION_INSTRUCTIONS_H_
#define CONTINUAL_TRANSFORMERS_SESSION_ATTENTION_INSTRUCTIONS_H_

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>
#include <vector>

#include "cc/attention/elementwise.h"
#include "cc/attention/online_softmax.h"
#include "cc/attention/ring_attention.h"
#include "cc/attention/ring_cache.h"
#include "cc/attention/window_attention.h"
#include "cc/session/instruction.h"

namespace continual_transformers {

// Plan values, sizes, and byte offsets in the stream block.
struct AttentionSpec {
  int query, key, value, output;
  int key_mask = -1, query_mask = -1;  // plan values, bool [rows]; -1: none
  int64_t rows = 1;                    // of each step
  int64_t heads, key_heads, window, key_dim, value_dim;
  int64_t first_column, end_column, query_delay;
  double scale;
  double soft_cap = 0;  // 0: none
  int64_t key_ring, value_ring, mask_ring;
  int64_t key_scales = -1, value_scales = -1;  // of rings in int8
  int64_t threads = 1;                         // that may share a step
};

// Returns whether a row of a step of a frame has a key.
inline bool HasKey(const Frame& frame, int mask, int64_t step, int64_t row) {
  return (frame.key_mask == nullptr || frame.key_mask[step]) &&
         (mask < 0 || frame.Rows<bool>(mask)[row]);
}

template <typename T, typename C>
class AttentionInstruction : public Instruction {
 public:
  // `bias` [H, N] is that of the columns of the window, and `sink` [H] has the logits of a step
  // without a value, which every query attends to. Both may be empty.
  AttentionInstruction(const AttentionSpec& spec, std::vector<T> bias, std::vector<T> sink)
      : s_(spec),
        bias_(std::move(bias)),
        sink_(std::move(sink)),
        key_size_(spec.key_heads * spec.key_dim),
        value_size_(spec.key_heads * spec.value_dim),
        output_size_(spec.heads * spec.value_dim),
        // With more streams than this, rings are prefetched.
        streams_near_(std::max<int64_t>(1, kNearRingsBytes / RingBytes())) {}

  void Run(const Frame& frame) const override {
    const bool far = frame.streams > streams_near_;
    for (int64_t m = 0; m < frame.streams; ++m) {
      const char* const next = far && m + 1 < frame.streams ? frame.blocks[m + 1] : nullptr;
      for (int64_t t = 0; t < frame.steps; ++t) {
        const int64_t step = m * frame.steps + t, first = FirstRow(frame.Position(m, t));
        for (int64_t i = 0; i < s_.rows; ++i) {
          const bool is_first = t == 0 && i == 0;
          const bool is_last = t == frame.steps - 1 && i == s_.rows - 1;
          Row(frame, m, step, step * s_.rows + i, first + i, far && is_first,
              is_last ? next : nullptr);
        }
      }
    }
  }

  int64_t Cycles(int64_t steps) const override { return steps * s_.rows * CyclesOfRow(); }

  int64_t ScratchBytes() const override {
    const int64_t parts = std::max<int64_t>(1, std::min(s_.threads, s_.window / kLeastRowsOfPart));
    // A part of n rows has RingAttentionLogits(n) <= n + 31, and parts may differ by one row.
    const int64_t logits = s_.heads * (s_.window + 32 * parts);
    const int64_t numbers = logits + parts * output_size_;
    return numbers * static_cast<int64_t>(sizeof(T)) +
           parts * s_.heads * static_cast<int64_t>(sizeof(OnlineSoftmax<T>));
  }

 private:
  static constexpr int64_t kLeastRowsOfPart = 32;
  static constexpr bool kScaled = std::is_same_v<C, int8_t>;

  int64_t RingBytes() const {
    return s_.window * (key_size_ + value_size_) * static_cast<int64_t>(sizeof(C));
  }

  // Returns how many rows a stream has at a position, or as many a few windows earlier: far into a
  // stream the product could overflow.
  int64_t FirstRow(int64_t position) const {
    if (s_.rows == 1) return position;
    const int64_t n = s_.window;
    return (position < n ? position : n + position % n) * s_.rows;
  }

  int64_t CyclesOfRow() const {
    // Reading the ring, 16 bytes a cycle, plus the softmax of each head.
    return RingBytes() / 16 + s_.heads * (100 + s_.window * 2);
  }

  // Adds a row to the ring and attends from it. `step` is its step in the frame, and `r` its row
  // there. `position` is how many rows the stream had before. As a call it made a step of
  // 32 streams write 2.5 % more, inlined 1.8 % (make guard). `far` and `next`, the block of the
  // next stream: see RingAttentionParams.
  [[gnu::always_inline]] void Row(const Frame& frame, int64_t m, int64_t step, int64_t r,
                                  int64_t position, bool far, const char* next) const {
    const int64_t n = s_.window, row = position % n;
    char* block = frame.blocks[m];
    C* keys = reinterpret_cast<C*>(block + s_.key_ring);
    C* values = reinterpret_cast<C*>(block + s_.value_ring);
    bool* mask = reinterpret_cast<bool*>(block + s_.mask_ring);
    // The new row is written first. Softmax does not depend on order, so the filled part of the
    // ring is one span. A row without a key is zeros.
    const bool has_key = HasKey(frame, s_.key_mask, step, r);
    mask[row] = has_key;
    T* key_scale = nullptr;
    T* value_scale = nullptr;
    if constexpr (kScaled) {
      key_scale = reinterpret_cast<T*>(block + s_.key_scales);
      value_scale = reinterpret_cast<T*>(block + s_.value_scales);
    }
    Put(has_key, frame.Rows<T>(s_.key) + r * key_size_, key_size_, keys + row * key_size_,
        key_scale + row);
    Put(has_key, frame.Rows<T>(s_.value) + r * value_size_, value_size_, values + row * value_size_,
        value_scale + row);

    T* output = frame.Rows<T>(s_.output) + r * output_size_;
    const bool asks =
        position >= s_.query_delay && (s_.query_mask < 0 || frame.Rows<bool>(s_.query_mask)[r]);
    const RingSpans spans = Spans(position);
    if (!asks || spans.before_wrap.rows == 0) {
      std::fill_n(output, output_size_, T(0));
      return;
    }
    const bool masked =
        std::memchr(mask, 0, static_cast<size_t>(std::min(position + 1, n))) != nullptr;
    RingAttentionParams<T, C> p;
    p.query = frame.Rows<T>(s_.query) + r * s_.heads * s_.key_dim;
    p.key = keys;
    p.key_stride = key_size_;
    p.value = values;
    p.value_stride = value_size_;
    p.key_scale = key_scale;
    p.value_scale = value_scale;
    p.key_mask = masked ? mask : nullptr;
    p.spans = spans;
    p.output = output;
    p.softmax = nullptr;
    p.soft_cap = static_cast<T>(s_.soft_cap);
    p.bias = bias_.empty() ? nullptr : bias_.data();
    p.bias_rows = n;
    p.bias_first = n - 1 - row;  // The newest step is the last column.
    p.heads = s_.heads;
    p.key_heads = s_.key_heads;
    p.key_dim = s_.key_dim;
    p.value_dim = s_.value_dim;
    p.scale = static_cast<T>(s_.scale);
    p.logits = reinterpret_cast<T*>(frame.scratch);
    p.far = far;
    p.next_key = next == nullptr ? nullptr : reinterpret_cast<const C*>(next + s_.key_ring);
    const int64_t rows = spans.before_wrap.rows + spans.after_wrap.rows;
    const int64_t parts =
        frame.pool == nullptr ? 1 : std::min(frame.pool->threads(), rows / kLeastRowsOfPart);
    if (parts > 1 && CyclesOfRow() >= kCyclesWorthThreads) {
      AttendInParts(frame.pool, parts, rows, p);
      return;
    }
    if (!sink_.empty()) {
      p.softmax =
          reinterpret_cast<OnlineSoftmax<T>*>(p.logits + s_.heads * RingAttentionLogits(rows));
    }
    RingAttention(p, 0, s_.heads);
    for (size_t h = 0; h < sink_.size(); ++h) {
      OnlineSoftmax<T> whole = p.softmax[h];
      const T sum = whole.denominator;  // The output is divided by it.
      const T factor = whole.Merge({sink_[h], T(1)}).own * sum * whole.Normalizer();
      T* const y = output + h * s_.value_dim;
      for (int64_t i = 0; i < s_.value_dim; ++i) y[i] *= factor;
    }
  }

  // The threads share the rows, and not the heads: a head's part of a row is a short piece of
  // memory, and there may be fewer heads than threads.
  void AttendInParts(ThreadPool* pool, int64_t parts, int64_t rows,
                     const RingAttentionParams<T, C>& p) const {
    const int64_t most = (rows + parts - 1) / parts;
    T* const outputs = p.logits + parts * s_.heads * RingAttentionLogits(most);
    auto* const softmax = reinterpret_cast<OnlineSoftmax<T>*>(outputs + parts * output_size_);
    pool->Share(parts, [&](int64_t part, int64_t) {
      RingAttentionParams<T, C> one = p;
      one.spans = PartOf(p.spans, part * rows / parts, (part + 1) * rows / parts);
      one.logits += part * s_.heads * RingAttentionLogits(most);
      one.output = outputs + part * output_size_;
      one.softmax = softmax + part * s_.heads;
      RingAttention(one, 0, s_.heads);
    });
    for (int64_t h = 0; h < s_.heads; ++h) {
      OnlineSoftmax<T> whole;
      T* const y = p.output + h * s_.value_dim;
      std::fill_n(y, s_.value_dim, T(0));
      for (int64_t part = 0; part < parts; ++part) {
        const OnlineSoftmax<T>& of_part = softmax[part * s_.heads + h];
        auto factors = whole.Merge(of_part);
        factors.others *= of_part.denominator;  // Its outputs are normalized.
        const T* const x = outputs + part * output_size_ + h * s_.value_dim;
        for (int64_t i = 0; i < s_.value_dim; ++i)
          y[i] = y[i] * factors.own + x[i] * factors.others;
      }
      const T own = sink_.empty() ? T(1) : whole.Merge({sink_[h], T(1)}).own;
      const T normalizer = own * whole.Normalizer();
      for (int64_t i = 0; i < s_.value_dim; ++i) y[i] *= normalizer;
    }
  }

  // Returns the ring rows of the columns that the query attends to, except steps that were never
  // taken.
  RingSpans Spans(int64_t position) const {
    const int64_t n = s_.window;
    if (s_.first_column == 0 && s_.end_column == n) {
      return {{0, std::min(position + 1, n)}, {0, 0}};
    }
    const int64_t first = std::max<int64_t>(0, position - (n - 1) + s_.first_column);
    const int64_t end = position - (n - 1) + s_.end_column;
    if (end <= first) return {{0, 0}, {0, 0}};
    return FindRingSpans(first, end - first, n);
  }

  static void Put(bool has_key, const T* from, int64_t size, C* to, T* scale) {
    if (!has_key) {
      std::memset(static_cast<void*>(to), 0, size * sizeof(C));
      if constexpr (kScaled) *scale = 0;
    } else if constexpr (kScaled) {
      Quantize(from, size, to, scale);
    } else if constexpr (std::is_same_v<T, C>) {
      std::memcpy(to, from, size * sizeof(C));
    } else {
      Narrow(from, size, to);
    }
  }

  const AttentionSpec s_;
  const std::vector<T> bias_, sink_;
  const int64_t key_size_, value_size_;  // Of a row of the rings.
  const int64_t output_size_, streams_near_;
};

// Attention among the rows of a window in the arena: `query` [Nq, H * D], `key` [N, H * D], `value`
// [N, H * Dv]. Steps that were never taken have no key.
struct WindowAttentionSpec {
  int query, key, value, output;
  int64_t heads, queries, window, key_dim, value_dim, band;
  bool causal;
  double scale;
  int64_t threads = 1;  // that may share a step
  // Each step adds `rows` rows, and at position 0 the window's first row has the number `first`.
  int64_t rows, first;

  // How many rows of the window are of no step yet. Far into a stream the product could overflow.
  int64_t Untaken(int64_t position) const {
    return position > -first ? 0 : std::min(window, std::max<int64_t>(0, -first - position * rows));
  }
};

template <typename T>
class WindowAttentionInstruction : public Instruction {
 public:
  explicit WindowAttentionInstruction(const WindowAttentionSpec& spec)
      : s_(spec), key_size_(spec.heads * spec.key_dim), value_size_(spec.heads * spec.value_dim) {}

  void Run(const Frame& frame) const override {
    for (int64_t m = 0; m < frame.streams; ++m) {
      for (int64_t t = 0; t < frame.steps; ++t) {
        Step(frame, m * frame.steps + t, frame.Position(m, t));
      }
    }
  }

  int64_t Cycles(int64_t rows) const override {
    const int64_t products = s_.window * (key_size_ + value_size_);
    return rows * s_.queries * (products / 8 + s_.heads * (100 + s_.window * 2));
  }

  int64_t ScratchBytes() const override {
    return Parts() * Params().ScratchSize() * static_cast<int64_t>(sizeof(T));
  }

 private:
  // How many threads share the heads. One by one, the heads' sums depend on which are together, so
  // the bits would depend on the threads.
  int64_t Parts() const { return Params().IsInBlocks() ? std::min(s_.threads, s_.heads) : 1; }

  WindowAttentionParams<T> Params() const {
    WindowAttentionParams<T> p = {};
    p.queries = s_.queries;
    p.rows = s_.window;
    p.heads = s_.heads;
    p.key_dim = s_.key_dim;
    p.value_dim = s_.value_dim;
    p.scale = static_cast<T>(s_.scale);
    p.band = s_.band;
    p.causal = s_.causal;
    return p;
  }

  void Step(const Frame& frame, int64_t r, int64_t position) const {
    WindowAttentionParams<T> p = Params();
    p.query = frame.Rows<T>(s_.query) + r * s_.queries * key_size_;
    p.key = frame.Rows<T>(s_.key) + r * s_.window * key_size_;
    p.value = frame.Rows<T>(s_.value) + r * s_.window * value_size_;
    p.output = frame.Rows<T>(s_.output) + r * s_.queries * value_size_;
    p.first_row = s_.Untaken(position);
    p.scratch = reinterpret_cast<T*>(frame.scratch);
    const int64_t parts = Parts();
    if (frame.pool == nullptr || parts == 1 || Cycles(1) < kCyclesWorthThreads) {
      return WindowAttention(p, 0, s_.heads);
    }
    frame.pool->Share(parts, [&](int64_t part, int64_t) {
      WindowAttentionParams<T> one = p;
      one.scratch += part * p.ScratchSize();
      WindowAttention(one, part * s_.heads / parts, (part + 1) * s_.heads / parts);
    });
  }

  const WindowAttentionSpec s_;
  const int64_t key_size_, value_size_;
};

}  // namespace continual_transformers

#endif  // CONTINUAL_TRANSFORMERS_SESSION_ATTENTION_INSTRUCTIONS_H_
