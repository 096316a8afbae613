#include "cc/attention/single_output.h"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>

#include "cc/attention/half.h"
#include "cc/attention/online_softmax.h"
#include "cc/attention/params.h"
#include "cc/attention/ring_cache.h"

namespace continual_transformers {
namespace {

// Logits wait on the stack, a block at a time, for the block's maximum: one rescaling of the output
// per block instead of one per row. As many rows as a word has bits, which say who is attended to.
constexpr int64_t kRowsPerBlock = 64;

// Independent partial sums of a dot product. One sum alone would be a chain of additions that the
// compiler may not reorder, and so would never be vectorised.
constexpr int64_t kPartialSums = 16;

template <typename T, typename C>
T Dot(const T* __restrict a, const C* __restrict b, int64_t size) {
  T partial[kPartialSums] = {};
  int64_t i = 0;
  for (; i + kPartialSums <= size; i += kPartialSums) {
    for (int64_t j = 0; j < kPartialSums; ++j) partial[j] += a[i + j] * Widen(b[i + j]);
  }
  for (int64_t j = 0; i + j < size; ++j) partial[j] += a[i + j] * Widen(b[i + j]);
  for (int64_t half = kPartialSums / 2; half > 0; half /= 2) {
    for (int64_t j = 0; j < half; ++j) partial[j] += partial[j + half];
  }
  return partial[0];
}

// Bit i of the result: whether bit i of `bits` and allowed[i] are both set, for i < count.
uint64_t And(uint64_t bits, const bool* allowed, int64_t count) {
  static_assert(sizeof(bool) == 1);
  // Eight at a time: a mask is mostly true, and is read for every head.
  constexpr uint64_t kEightTrue = 0x0101010101010101u;
  for (int64_t i = 0; i < count; i += 8) {
    uint64_t eight = kEightTrue;
    std::memcpy(&eight, allowed + i, std::min<int64_t>(8, count - i));
    if (eight == kEightTrue) continue;
    for (int64_t j = i; j < std::min(i + 8, count); ++j) {
      bits &= ~(static_cast<uint64_t>(!allowed[j]) << j);
    }
  }
  return bits;
}

// Rows of keys and values that lie at even distances.
template <typename C>
struct Rows {
  const C* key;
  int64_t key_stride;
  const C* value;
  int64_t value_stride;
  const bool* key_mask;  // Which rows have a key; null: all.
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

// One query's pass over its window, span by span, oldest first.
template <typename T, typename C>
class WindowPass {
 public:
  // `mask` and `scores` point at the first column of the window; either may be null. `output`
  // accumulates the weighted sum of values.
  WindowPass(const T* query, const SingleOutputParams<T, C>& params, const bool* mask, T* scores,
             T* output)
      : query_(query),
        scale_(params.scale),
        key_dim_(params.key_dim),
        value_dim_(params.value_dim),
        mask_(mask),
        scores_(scores),
        output_(output) {
    std::fill_n(output_, value_dim_, T(0));
  }

  // Attends to rows that fill the window's columns from `column` on.
  void Attend(const Rows<C>& rows, int64_t column) {
    for (int64_t first = 0; first < rows.count; first += kRowsPerBlock) {
      AttendBlock(rows.From(first, std::min(kRowsPerBlock, rows.count - first)), column + first);
    }
  }

  // Normalizes the output, and the scores of the columns from `first_column` on.
  void Finish(int64_t first_column, int64_t window) {
    const T normalizer = softmax_.Normalizer();
    for (int64_t d = 0; d < value_dim_; ++d) output_[d] *= normalizer;
    if (scores_ == nullptr) return;
    std::fill_n(scores_, first_column, T(0));
    for (int64_t c = first_column; c < window; ++c) {
      const bool attended = scores_[c] != kNotAttended;
      scores_[c] = attended ? softmax_.Weight(scores_[c]) * normalizer : T(0);
    }
  }

 private:
  // The logit of what may not be attended to, and of what has weight zero anyway.
  static constexpr T kNotAttended = -std::numeric_limits<T>::infinity();

  // A row that is not attended to is never touched: multiplying it by zero would let its NaN
  // through.
  void AttendBlock(const Rows<C>& rows, int64_t column) {
    uint64_t attended = ~uint64_t{0} >> (kRowsPerBlock - rows.count);
    if (mask_ != nullptr) attended = And(attended, mask_ + column, rows.count);
    if (rows.key_mask != nullptr) attended = And(attended, rows.key_mask, rows.count);

    T logits[kRowsPerBlock];
    T max = kNotAttended;
    for (int64_t i = 0; i < rows.count; ++i) {
      logits[i] = (attended >> i & 1) != 0
                      ? scale_ * Dot(query_, rows.key + i * rows.key_stride, key_dim_)
                      : kNotAttended;
      if (logits[i] > max) max = logits[i];
    }
    if (scores_ != nullptr) std::copy_n(logits, rows.count, scores_ + column);
    const T rescale = softmax_.Raise(max);
    if (rescale != T(1)) {
      for (int64_t d = 0; d < value_dim_; ++d) output_[d] *= rescale;
    }
    for (int64_t i = 0; i < rows.count; ++i) {
      if ((attended >> i & 1) == 0) continue;
      const T weight = softmax_.Weight(logits[i]);
      softmax_.denominator += weight;
      const C* __restrict value = rows.value + i * rows.value_stride;
      T* __restrict output = output_;
      for (int64_t d = 0; d < value_dim_; ++d) output[d] += weight * Widen(value[d]);
    }
  }

  const T* query_;
  T scale_;
  int64_t key_dim_;
  int64_t value_dim_;
  const bool* mask_;
  T* scores_;
  T* output_;
  OnlineSoftmax<T> softmax_;
};

// Copies the N - 1 steps before `position` from a ring to `window`, oldest first; steps that were
// never taken become zeros.
template <typename U>
void CopyWindow(const U* ring, int64_t size, int64_t position, int64_t rows, U* window) {
  const int64_t taken = std::min(position, rows - 1);
  const RingSpans spans = FindRingSpans(position - taken, taken, rows);
  window = std::fill_n(window, (rows - 1 - taken) * size, U{});
  for (const RingSpan& span : {spans.before_wrap, spans.after_wrap}) {
    window = std::copy_n(ring + span.first_row * size, span.rows * size, window);
  }
}

// The steps of one head of one stream. Steps older than this call are read from the ring and this
// call's own from its inputs; the ring is written last. So the rows that this call overwrites are
// still there for its first queries, and peeking is the same code without the last line.
template <typename T, typename C>
class HeadStepper {
 public:
  HeadStepper(const SingleOutputParams<T, C>& params, int64_t m, int64_t h)
      : p_(params),
        query_(At(params.query, params.query_strides, m, h)),
        key_(At(params.key, params.key_strides, m, h)),
        value_(At(params.value, params.value_strides, m, h)),
        key_mask_(params.key_mask == nullptr ? nullptr : params.key_mask + m * params.num_steps),
        mask_(At(params.mask, params.mask_strides, m, h)),
        output_(At(params.output, params.output_strides, m, h)),
        scores_(At(params.scores, params.scores_strides, m, h)),
        pair_(m * params.num_heads + h) {
    const int64_t stream = params.streams[m];
    const int64_t ring = stream * params.num_heads + h;
    key_ring_ = params.key_cache + ring * params.window * params.key_dim;
    value_ring_ = params.value_cache + ring * params.window * params.value_dim;
    key_mask_ring_ = params.key_mask_cache + stream * params.window;
    position_ = params.position[stream];
  }

  void Run() {
    for (int64_t t = 0; t < p_.num_steps; ++t) AttendAtStep(t);
    if (p_.window_key != nullptr) CopyWindows();
    if (p_.update_state) WriteRing();
  }

 private:
  template <typename U>
  static U* At(U* base, const Strides& strides, int64_t m, int64_t h) {
    return base == nullptr ? nullptr : base + m * strides.stream + h * strides.head;
  }

  Rows<C> RingRows() const {
    return {key_ring_, p_.key_dim, value_ring_, p_.value_dim, key_mask_ring_, p_.window};
  }

  Rows<C> InputRows() const {
    return {key_, p_.key_strides.step, value_, p_.value_strides.step, key_mask_, p_.num_steps};
  }

  void AttendAtStep(int64_t t) {
    const int64_t newest = position_ + t;
    const int64_t oldest = std::max<int64_t>(0, newest - p_.window + 1);
    const int64_t first_column = p_.window - 1 - (newest - oldest);
    const int64_t old_steps = std::max<int64_t>(0, position_ - oldest);
    const int64_t first_new = std::max<int64_t>(0, oldest - position_);

    WindowPass<T, C> pass(query_ + t * p_.query_strides.step, p_,
                          mask_ == nullptr ? nullptr : mask_ + t * p_.mask_strides.step,
                          scores_ == nullptr ? nullptr : scores_ + t * p_.scores_strides.step,
                          output_ + t * p_.output_strides.step);
    int64_t column = first_column;
    const RingSpans old = FindRingSpans(oldest, old_steps, p_.window);
    for (const RingSpan& span : {old.before_wrap, old.after_wrap}) {
      pass.Attend(RingRows().From(span.first_row, span.rows), column);
      column += span.rows;
    }
    pass.Attend(InputRows().From(first_new, t + 1 - first_new), column);
    pass.Finish(first_column, p_.window);
  }

  void CopyWindows() {
    const int64_t rows = p_.window - 1;
    CopyWindow(key_ring_, p_.key_dim, position_, p_.window,
               p_.window_key + pair_ * rows * p_.key_dim);
    CopyWindow(value_ring_, p_.value_dim, position_, p_.window,
               p_.window_value + pair_ * rows * p_.value_dim);
  }

  void WriteRing() {
    for (int64_t t = std::max<int64_t>(0, p_.num_steps - p_.window); t < p_.num_steps; ++t) {
      const int64_t row = (position_ + t) % p_.window;
      std::copy_n(key_ + t * p_.key_strides.step, p_.key_dim, key_ring_ + row * p_.key_dim);
      std::copy_n(value_ + t * p_.value_strides.step, p_.value_dim,
                  value_ring_ + row * p_.value_dim);
    }
  }

  const SingleOutputParams<T, C>& p_;
  const T* query_;
  const C* key_;
  const C* value_;
  const bool* key_mask_;
  const bool* mask_;
  T* output_;
  T* scores_;
  int64_t pair_;
  C* key_ring_;
  C* value_ring_;
  const bool* key_mask_ring_;
  int64_t position_;
};

}  // namespace

template <typename T, typename C>
void SingleOutputAttention(const SingleOutputParams<T, C>& params, int64_t begin, int64_t end) {
  for (int64_t pair = begin; pair < end; ++pair) {
    HeadStepper<T, C>(params, pair / params.num_heads, pair % params.num_heads).Run();
  }
}

template <typename T, typename C>
void WriteKeyMask(const SingleOutputParams<T, C>& params) {
  const int64_t steps = params.num_steps, window = params.window;
  for (int64_t m = 0; m < params.num_streams; ++m) {
    const int64_t stream = params.streams[m], position = params.position[stream];
    bool* ring = params.key_mask_cache + stream * window;
    if (params.window_key_mask != nullptr) {
      CopyWindow<bool>(ring, 1, position, window, params.window_key_mask + m * (window - 1));
    }
    if (!params.update_state) continue;
    for (int64_t t = std::max<int64_t>(0, steps - window); t < steps; ++t) {
      ring[(position + t) % window] = params.key_mask == nullptr || params.key_mask[m * steps + t];
    }
  }
}

template <typename T, typename C>
int64_t SingleOutputCyclesPerPair(const SingleOutputParams<T, C>& params) {
  // Measured with SSE2 on an AMD Zen 4, windows in cache: 32, 40, 58 and 92 cycles a row of float
  // for D = Dv = 12, 32, 64 and 128, 115 for double and 64. The constant is mostly the exponential.
  const int64_t bytes = (params.key_dim + params.value_dim) * sizeof(T);
  const int64_t per_row = 24 + bytes / 14;
  return params.num_steps * params.window * per_row;
}

#define INSTANTIATE(T, C)                                                                       \
  template void SingleOutputAttention<T, C>(const SingleOutputParams<T, C>&, int64_t, int64_t); \
  template void WriteKeyMask<T, C>(const SingleOutputParams<T, C>&);                            \
  template int64_t SingleOutputCyclesPerPair<T, C>(const SingleOutputParams<T, C>&)
INSTANTIATE(float, float);
INSTANTIATE(float, BFloat16);
INSTANTIATE(float, Float16);
INSTANTIATE(double, double);
#undef INSTANTIATE

}  // namespace continual_transformers
