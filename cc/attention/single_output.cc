#include "cc/attention/single_output.h"

#include <algorithm>
#include <cstdint>
#include <limits>

#include "cc/attention/online_softmax.h"
#include "cc/attention/params.h"
#include "cc/attention/ring_cache.h"

namespace continual_transformers {
namespace {

// Logits wait on the stack, a block at a time, for the block's maximum: one rescaling of the output
// per block instead of one per row.
constexpr int64_t kRowsPerBlock = 64;

// Independent partial sums of a dot product. One sum alone would be a chain of additions that the
// compiler may not reorder, and so would never be vectorised.
constexpr int64_t kPartialSums = 16;

template <typename T>
T Dot(const T* __restrict a, const T* __restrict b, int64_t size) {
  T partial[kPartialSums] = {};
  int64_t i = 0;
  for (; i + kPartialSums <= size; i += kPartialSums) {
    for (int64_t j = 0; j < kPartialSums; ++j) partial[j] += a[i + j] * b[i + j];
  }
  for (int64_t j = 0; i + j < size; ++j) partial[j] += a[i + j] * b[i + j];
  for (int64_t half = kPartialSums / 2; half > 0; half /= 2) {
    for (int64_t j = 0; j < half; ++j) partial[j] += partial[j + half];
  }
  return partial[0];
}

// Rows of keys and values that lie at even distances.
template <typename T>
struct Rows {
  const T* key;
  int64_t key_stride;
  const T* value;
  int64_t value_stride;
  int64_t count;
};

// One query's pass over its window, span by span, oldest first.
template <typename T>
class WindowPass {
 public:
  // `mask` and `scores` point at the first column of the window; either may be null. `output`
  // accumulates the weighted sum of values.
  WindowPass(const T* query, const SingleOutputParams<T>& params, const bool* mask, T* scores,
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
  void Attend(const Rows<T>& rows, int64_t column) {
    for (int64_t first = 0; first < rows.count; first += kRowsPerBlock) {
      const int64_t count = std::min(kRowsPerBlock, rows.count - first);
      AttendBlock({rows.key + first * rows.key_stride, rows.key_stride,
                   rows.value + first * rows.value_stride, rows.value_stride, count},
                  column + first);
    }
  }

  // Normalizes the output, and the scores of the columns from `first_column` on.
  void Finish(int64_t first_column, int64_t window) {
    const T normalizer = softmax_.Normalizer();
    for (int64_t d = 0; d < value_dim_; ++d) output_[d] *= normalizer;
    if (scores_ == nullptr) return;
    std::fill_n(scores_, first_column, T(0));
    for (int64_t c = first_column; c < window; ++c) {
      scores_[c] = Attended(c) ? softmax_.Weight(scores_[c]) * normalizer : T(0);
    }
  }

 private:
  bool Attended(int64_t column) const { return mask_ == nullptr || mask_[column]; }

  // A masked row is never touched: multiplying it by zero would let its NaN through.
  void AttendBlock(const Rows<T>& rows, int64_t column) {
    T logits[kRowsPerBlock];
    T max = -std::numeric_limits<T>::infinity();
    for (int64_t i = 0; i < rows.count; ++i) {
      if (!Attended(column + i)) continue;
      logits[i] = scale_ * Dot(query_, rows.key + i * rows.key_stride, key_dim_);
      if (logits[i] > max) max = logits[i];
      if (scores_ != nullptr) scores_[column + i] = logits[i];
    }
    const T rescale = softmax_.Raise(max);
    if (rescale != T(1)) {
      for (int64_t d = 0; d < value_dim_; ++d) output_[d] *= rescale;
    }
    for (int64_t i = 0; i < rows.count; ++i) {
      if (!Attended(column + i)) continue;
      const T weight = softmax_.Weight(logits[i]);
      softmax_.denominator += weight;
      const T* __restrict value = rows.value + i * rows.value_stride;
      T* __restrict output = output_;
      for (int64_t d = 0; d < value_dim_; ++d) output[d] += weight * value[d];
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

// The steps of one head of one stream. Steps older than this call are read from the ring and this
// call's own from its inputs; the ring is written last. So the rows that this call overwrites are
// still there for its first queries, and peeking is the same code without the last line.
template <typename T>
class HeadStepper {
 public:
  HeadStepper(const SingleOutputParams<T>& params, int64_t m, int64_t h)
      : p_(params),
        query_(At(params.query, params.query_strides, m, h)),
        key_(At(params.key, params.key_strides, m, h)),
        value_(At(params.value, params.value_strides, m, h)),
        mask_(At(params.mask, params.mask_strides, m, h)),
        output_(At(params.output, params.output_strides, m, h)),
        scores_(At(params.scores, params.scores_strides, m, h)) {
    const int64_t stream = params.streams[m];
    const int64_t ring = stream * params.num_heads + h;
    key_ring_ = params.key_cache + ring * params.window * params.key_dim;
    value_ring_ = params.value_cache + ring * params.window * params.value_dim;
    position_ = params.position[stream];
  }

  void Run() {
    for (int64_t t = 0; t < p_.num_steps; ++t) AttendAtStep(t);
    if (p_.update_state) WriteRing();
  }

 private:
  template <typename U>
  static U* At(U* base, const Strides& strides, int64_t m, int64_t h) {
    return base == nullptr ? nullptr : base + m * strides.stream + h * strides.head;
  }

  Rows<T> RingRows(const RingSpan& span) const {
    return {key_ring_ + span.first_row * p_.key_dim, p_.key_dim,
            value_ring_ + span.first_row * p_.value_dim, p_.value_dim, span.rows};
  }

  void AttendAtStep(int64_t t) {
    const int64_t newest = position_ + t;
    const int64_t oldest = std::max<int64_t>(0, newest - p_.window + 1);
    const int64_t first_column = p_.window - 1 - (newest - oldest);
    const int64_t old_steps = std::max<int64_t>(0, position_ - oldest);
    const int64_t first_new = std::max<int64_t>(0, oldest - position_);

    WindowPass<T> pass(query_ + t * p_.query_strides.step, p_,
                       mask_ == nullptr ? nullptr : mask_ + t * p_.mask_strides.step,
                       scores_ == nullptr ? nullptr : scores_ + t * p_.scores_strides.step,
                       output_ + t * p_.output_strides.step);
    const RingSpans old = FindRingSpans(oldest, old_steps, p_.window);
    pass.Attend(RingRows(old.before_wrap), first_column);
    pass.Attend(RingRows(old.after_wrap), first_column + old.before_wrap.rows);
    pass.Attend(
        {key_ + first_new * p_.key_strides.step, p_.key_strides.step,
         value_ + first_new * p_.value_strides.step, p_.value_strides.step, t + 1 - first_new},
        first_column + old_steps);
    pass.Finish(first_column, p_.window);
  }

  void WriteRing() {
    for (int64_t t = std::max<int64_t>(0, p_.num_steps - p_.window); t < p_.num_steps; ++t) {
      const int64_t row = (position_ + t) % p_.window;
      std::copy_n(key_ + t * p_.key_strides.step, p_.key_dim, key_ring_ + row * p_.key_dim);
      std::copy_n(value_ + t * p_.value_strides.step, p_.value_dim,
                  value_ring_ + row * p_.value_dim);
    }
  }

  const SingleOutputParams<T>& p_;
  const T* query_;
  const T* key_;
  const T* value_;
  const bool* mask_;
  T* output_;
  T* scores_;
  T* key_ring_;
  T* value_ring_;
  int64_t position_;
};

}  // namespace

template <typename T>
void SingleOutputAttention(const SingleOutputParams<T>& params, int64_t begin, int64_t end) {
  for (int64_t pair = begin; pair < end; ++pair) {
    HeadStepper<T>(params, pair / params.num_heads, pair % params.num_heads).Run();
  }
}

template <typename T>
int64_t SingleOutputCyclesPerPair(const SingleOutputParams<T>& params) {
  // Measured with SSE2 on an AMD Zen 4, windows in cache: 32, 40, 58 and 92 cycles a row of float
  // for D = Dv = 12, 32, 64 and 128, 115 for double and 64. The constant is mostly the exponential.
  const int64_t bytes = (params.key_dim + params.value_dim) * sizeof(T);
  const int64_t per_row = 24 + bytes / 14;
  return params.num_steps * params.window * per_row;
}

template void SingleOutputAttention<float>(const SingleOutputParams<float>&, int64_t, int64_t);
template void SingleOutputAttention<double>(const SingleOutputParams<double>&, int64_t, int64_t);
template int64_t SingleOutputCyclesPerPair<float>(const SingleOutputParams<float>&);
template int64_t SingleOutputCyclesPerPair<double>(const SingleOutputParams<double>&);

}  // namespace continual_transformers
