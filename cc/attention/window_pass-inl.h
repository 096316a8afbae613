// One query's pass over the rows of its window: logits, softmax, weighted sum of values. Compiled
// once per target, so the include guard is Highway's.

#if defined(CONTINUAL_TRANSFORMERS_ATTENTION_WINDOW_PASS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef CONTINUAL_TRANSFORMERS_ATTENTION_WINDOW_PASS_INL_H_
#undef CONTINUAL_TRANSFORMERS_ATTENTION_WINDOW_PASS_INL_H_
#else
#define CONTINUAL_TRANSFORMERS_ATTENTION_WINDOW_PASS_INL_H_
#endif

#include <algorithm>
#include <cstdint>
#include <limits>

#include "cc/attention/online_softmax.h"
#include "cc/attention/params.h"
#include "cc/attention/rows.h"
#include "cc/attention/vector_math-inl.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace continual_transformers {
namespace HWY_NAMESPACE {

// A block of logits waits on the stack for its maximum: the output is rescaled once per block, not
// once per row. A block has as many rows as a word has bits; the bits say which rows are attended
// to.
constexpr int64_t kRowsPerBlock = 64;

template <typename T, typename C>
class WindowPass {
 public:
  // `mask` and `scores` point to the first column of the window. Either may be null. `output`
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
    const int64_t key_ring = params.window * key_dim_ * sizeof(C);
    const int64_t value_ring = params.window * value_dim_ * sizeof(C);
    const int64_t all = params.num_streams * params.num_heads * (key_ring + value_ring);
    if (all > kNearBytes) {
      key_ahead_ = std::min(kFarBytes, key_ring);
      value_ahead_ = std::min(kFarBytes, value_ring);
      next_head_ = key_ring <= kFarBytes && value_ring <= kFarBytes;
    }
  }

  // Attends to rows that are the window's columns from `column` on.
  void Attend(const Rows<C>& rows, int64_t column) {
    for (int64_t first = 0; first < rows.count; first += kRowsPerBlock) {
      AttendBlock(rows.From(first, std::min(kRowsPerBlock, rows.count - first)), column + first);
    }
  }

  // Normalizes the output, and the scores of the columns from `first_column` on.
  void Finish(int64_t first_column, int64_t window) {
    const T normalizer = softmax_.Normalizer();
    ScaleOutput(normalizer);
    if (scores_ == nullptr) return;
    std::fill_n(scores_, first_column, T(0));
    const D d;
    const V reference = hn::Set(d, softmax_.Reference());
    for (int64_t c = first_column; c < window; c += kLanes) {
      const size_t count = std::min<size_t>(kLanes, window - c);
      const V x = hn::Sub(hn::LoadN(d, scores_ + c, count), reference);
      hn::StoreN(hn::Mul(ExpOfNonPositive(d, x), hn::Set(d, normalizer)), d, scores_ + c, count);
    }
  }

  // The softmax state of the output's weighted sum, for merging it with other parts of the window.
  const OnlineSoftmax<T>& softmax() const { return softmax_; }

 private:
  using D = hn::ScalableTag<T>;
  using V = hn::Vec<D>;

  // The logit of a row that is not attended to: its weight is zero.
  static constexpr T kNotAttended = -std::numeric_limits<T>::infinity();
  // Rows whose dot products are computed together. They share each load of the query, and their
  // chains of additions overlap.
  static constexpr int64_t kRowsPerDot = 8;
  static constexpr size_t kLanes = hn::Lanes(D());
  static constexpr int64_t kNearBytes = 8 << 20, kFarBytes = 64 << 10;

  void AttendBlock(const Rows<C>& rows, int64_t column) {
    uint64_t attended = ~uint64_t{0} >> (kRowsPerBlock - rows.count);
    if (mask_ != nullptr) attended = And(attended, mask_ + column, rows.count);
    if (rows.key_mask != nullptr) attended = And(attended, rows.key_mask, rows.count);
    if (attended == 0) {
      if (scores_ != nullptr) std::fill_n(scores_ + column, rows.count, kNotAttended);
      return;
    }

    HWY_ALIGN T logits[kRowsPerBlock];
    for (int64_t i = 0; i < rows.count; i += kRowsPerDot) {
      Prefetch(rows.key + i * rows.key_stride, rows.key_stride, rows.value + i * rows.value_stride,
               rows.value_stride);
      Dots(rows.key + i * rows.key_stride, rows.key_stride, rows.count - i, logits + i);
    }
    // Replace the logits of rows that are not attended to, which may be NaN.
    const uint64_t ignored = ~attended;
    ForEachRun(ignored,
               [&](int first, int end) { std::fill(logits + first, logits + end, kNotAttended); });
    if (scores_ != nullptr) std::copy_n(logits, rows.count, scores_ + column);
    const T rescale = softmax_.Raise(MaxOf(logits, rows.count));
    if (rescale != T(1)) ScaleOutput(rescale);
    softmax_.denominator += TurnIntoWeights(logits, rows.count);
    ForEachRun(attended, [&](int first, int end) {
      AddValues(rows.value + first * rows.value_stride, rows.value_stride, logits + first,
                end - first);
    });
  }

  // Prefetches rows while the dots of kRowsPerDot rows are computed: the hardware prefetchers lose
  // the keys while the values are read, and start over at every head. If a call reads more than the
  // near caches hold, keys and values are prefetched into the second-level cache, kFarBytes ahead,
  // or with smaller rings the same rows of the next head. Otherwise only the next keys are
  // prefetched. Median times relative to a plain read of the same bytes (AVX3, Zen 4): 1.2 instead
  // of 1.5 for N=4096 H=16 D=64, 1.5 instead of 3.0 for 1,000 streams of N=64 H=4 D=32; but 41 us
  // instead of 32 for N=512 H=8 D=64, whose 2 MB are near. Alternatives that lost: prefetching
  // values only a block ahead (1.7 for N=4096), and adding a block's values while the next one's
  // dots are computed.
  //
  // Between the rows of a row-major ring are those of the other heads. Only the same rows of the
  // next head are prefetched, if its ring is small: 1.25 instead of 1.7 times as long as in rings
  // [S, H, N, D] for 64 streams of N=120 H=8 D=64 (AVX3, Xeon with 2 MB of second-level cache).
  // Rows ahead of the same head lost: 2.8 instead of 2.0 for N=4096 H=16 D=64.
  HWY_INLINE void Prefetch(const C* keys, int64_t key_stride, const C* values,
                           int64_t value_stride) const {
    constexpr int64_t kBytes = sizeof(C), kLineBytes = 64, kNextBytes = 3072;
    if (key_stride != key_dim_ || value_stride != value_dim_) {
      if (next_head_) {
        PrefetchRows(keys + key_dim_, key_stride, key_dim_ * kBytes);
        PrefetchRows(values + value_dim_, value_stride, value_dim_ * kBytes);
      }
      return;
    }
    const int64_t key_bytes = kRowsPerDot * key_stride * kBytes;
    const char* key = reinterpret_cast<const char*>(keys);
    if (key_ahead_ == 0) {
      for (int64_t i = 0; i < key_bytes; i += kLineBytes) {
        __builtin_prefetch(key + kNextBytes + i, /*rw=*/0, /*locality=*/3);
      }
      return;
    }
    for (int64_t i = 0; i < key_bytes; i += kLineBytes) {
      __builtin_prefetch(key + key_ahead_ + i, /*rw=*/0, /*locality=*/2);
    }
    const char* value = reinterpret_cast<const char*>(values) + value_ahead_;
    for (int64_t i = 0; i < kRowsPerDot * value_stride * kBytes; i += kLineBytes) {
      __builtin_prefetch(value + i, /*rw=*/0, /*locality=*/2);
    }
  }

  // Prefetches kRowsPerDot rows into the second-level cache.
  static HWY_INLINE void PrefetchRows(const C* rows, int64_t stride, int64_t bytes) {
    for (int64_t r = 0; r < kRowsPerDot; ++r) {
      const char* row = reinterpret_cast<const char*>(rows + r * stride);
      for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(row + i, /*rw=*/0, /*locality=*/2);
    }
  }

  // Computes the scaled dot products of the query with kRowsPerDot keys. If `count` is less, the
  // last key replaces missing ones.
  HWY_INLINE void Dots(const C* HWY_RESTRICT key, int64_t stride, int64_t count,
                       T* HWY_RESTRICT logits) const {
    const D d;
    // Separate names, as the compiler would keep arrays in memory.
    const C* k0 = key;
    const C* k1 = k0 + (count > 1 ? stride : 0);
    const C* k2 = k1 + (count > 2 ? stride : 0);
    const C* k3 = k2 + (count > 3 ? stride : 0);
    const C* k4 = k3 + (count > 4 ? stride : 0);
    const C* k5 = k4 + (count > 5 ? stride : 0);
    const C* k6 = k5 + (count > 6 ? stride : 0);
    const C* k7 = k6 + (count > 7 ? stride : 0);
    V s0 = hn::Zero(d), s1 = s0, s2 = s0, s3 = s0, s4 = s0, s5 = s0, s6 = s0, s7 = s0;
    size_t at = 0;
    const size_t size = key_dim_;
    for (; at + kLanes <= size; at += kLanes) {
      const V q = hn::LoadU(d, query_ + at);
      s0 = hn::MulAdd(q, LoadWide(d, k0 + at), s0);
      s1 = hn::MulAdd(q, LoadWide(d, k1 + at), s1);
      s2 = hn::MulAdd(q, LoadWide(d, k2 + at), s2);
      s3 = hn::MulAdd(q, LoadWide(d, k3 + at), s3);
      s4 = hn::MulAdd(q, LoadWide(d, k4 + at), s4);
      s5 = hn::MulAdd(q, LoadWide(d, k5 + at), s5);
      s6 = hn::MulAdd(q, LoadWide(d, k6 + at), s6);
      s7 = hn::MulAdd(q, LoadWide(d, k7 + at), s7);
    }
    if (at < size) {
      const size_t rest = size - at;
      const V q = hn::LoadN(d, query_ + at, rest);
      s0 = hn::MulAdd(q, LoadWideN(d, k0 + at, rest), s0);
      s1 = hn::MulAdd(q, LoadWideN(d, k1 + at, rest), s1);
      s2 = hn::MulAdd(q, LoadWideN(d, k2 + at, rest), s2);
      s3 = hn::MulAdd(q, LoadWideN(d, k3 + at, rest), s3);
      s4 = hn::MulAdd(q, LoadWideN(d, k4 + at, rest), s4);
      s5 = hn::MulAdd(q, LoadWideN(d, k5 + at, rest), s5);
      s6 = hn::MulAdd(q, LoadWideN(d, k6 + at, rest), s6);
      s7 = hn::MulAdd(q, LoadWideN(d, k7 + at, rest), s7);
    }
    StoreScaledSums(d, s0, s1, s2, s3, scale_, logits);
    StoreScaledSums(d, s4, s5, s6, s7, scale_, logits + 4);
  }

  // A NaN is not a maximum, but it becomes a weight.
  static T MaxOf(const T* HWY_RESTRICT logits, int64_t count) {
    const D d;
    V max = hn::Set(d, kNotAttended);
    for (int64_t i = 0; i < count; i += kLanes) {
      const V x = hn::Load(d, logits + i);
      max = hn::IfThenElse(hn::Gt(x, max), x, max);
    }
    return hn::ReduceMax(d, max);
  }

  // Replaces logits by their unnormalized weights. Returns the sum of the weights.
  T TurnIntoWeights(T* HWY_RESTRICT logits, int64_t count) const {
    const D d;
    const V reference = hn::Set(d, softmax_.Reference());
    V sum = hn::Zero(d);
    for (int64_t i = 0; i < count; i += kLanes) {
      const V weight = ExpOfNonPositive(d, hn::Sub(hn::Load(d, logits + i), reference));
      hn::Store(weight, d, logits + i);
      sum = hn::Add(sum, weight);
    }
    return hn::ReduceSum(d, sum);
  }

  // Adds weights[i] * value[i] over `count` rows to the output. As many of the output's columns as
  // possible stay in registers while the rows pass.
  void AddValues(const C* HWY_RESTRICT value, int64_t stride, const T* HWY_RESTRICT weights,
                 int64_t count) {
    size_t at = 0;
    const size_t size = value_dim_;
    for (; at + 8 * kLanes <= size; at += 8 * kLanes) {
      AddColumns<8, 1>(value + at, stride, weights, count, output_ + at);
    }
    for (; at + 4 * kLanes <= size; at += 4 * kLanes) {
      AddColumns<4, 2>(value + at, stride, weights, count, output_ + at);
    }
    for (; at + 2 * kLanes <= size; at += 2 * kLanes) {
      AddColumns<2, 4>(value + at, stride, weights, count, output_ + at);
    }
    for (; at + kLanes <= size; at += kLanes) {
      AddColumns<1, 4>(value + at, stride, weights, count, output_ + at);
    }
    if (at < size) {
      AddColumns<1, 4>(value + at, stride, weights, count, output_ + at, size - at);
    }
  }

  // AddValues for kVectors * Lanes columns, or for `partial` < Lanes columns. Adds kChains rows at
  // a time, each to its own sum, if a single chain of additions would stall.
  template <int kVectors, int kChains>
  static void AddColumns(const C* HWY_RESTRICT value, int64_t stride, const T* HWY_RESTRICT weights,
                         int64_t count, T* HWY_RESTRICT output, size_t partial = 0) {
    const D d;
    const auto load = [d, partial](const auto* p) HWY_ATTR {
      return kVectors == 1 && partial != 0 ? LoadWideN(d, p, partial) : LoadWide(d, p);
    };
    V sum[kChains][kVectors];
    for (int c = 0; c < kChains; ++c) {
      for (int v = 0; v < kVectors; ++v) {
        sum[c][v] = c == 0 ? load(output + v * kLanes) : hn::Zero(d);
      }
    }
    int64_t i = 0;
    for (; i + kChains <= count; i += kChains) {
      for (int c = 0; c < kChains; ++c) {
        const V weight = hn::Set(d, weights[i + c]);
        for (int v = 0; v < kVectors; ++v) {
          sum[c][v] = hn::MulAdd(weight, load(value + (i + c) * stride + v * kLanes), sum[c][v]);
        }
      }
    }
    for (; i < count; ++i) {
      const V weight = hn::Set(d, weights[i]);
      for (int v = 0; v < kVectors; ++v) {
        sum[0][v] = hn::MulAdd(weight, load(value + i * stride + v * kLanes), sum[0][v]);
      }
    }
    for (int v = 0; v < kVectors; ++v) {
      V total = sum[0][v];
      for (int c = 1; c < kChains; ++c) total = hn::Add(total, sum[c][v]);
      if (kVectors == 1 && partial != 0) {
        hn::StoreN(total, d, output, partial);
      } else {
        hn::StoreU(total, d, output + v * kLanes);
      }
    }
  }

  void ScaleOutput(T factor) {
    for (int64_t i = 0; i < value_dim_; ++i) output_[i] *= factor;
  }

  const T* query_;
  T scale_;
  int64_t key_dim_;
  int64_t value_dim_;
  const bool* mask_;
  T* scores_;
  T* output_;
  OnlineSoftmax<T> softmax_;
  // Bytes, see Prefetch. 0 if what the call reads is near.
  int64_t key_ahead_ = 0;
  int64_t value_ahead_ = 0;
  bool next_head_ = false;
};

}  // namespace HWY_NAMESPACE
}  // namespace continual_transformers
HWY_AFTER_NAMESPACE();

#endif  // CONTINUAL_TRANSFORMERS_ATTENTION_WINDOW_PASS_INL_H_
