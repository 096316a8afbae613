#include "cc/attention/window_attention.h"

#include <algorithm>
#include <cstdint>
#include <limits>

#include "cc/attention/ring_attention.h"
#include "cc/attention/step_types.h"
#include "cc/attention/targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cc/attention/window_attention.cc"
#include "hwy/foreach_target.h"
// Must follow foreach_target.h: otherwise these are compiled for one target only.
#include "cc/attention/vector_math-inl.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace continual_transformers {
namespace HWY_NAMESPACE {

// One head. The keys are transposed once, so that a vector of logits is a sum of vectors of them.
// Then blocks of queries share each load of keys and values.
template <typename T>
class WindowHead {
 public:
  WindowHead(const WindowAttentionParams<T>& params, int64_t head)
      : p_(params),
        key_stride_(params.heads * params.key_dim),
        value_stride_(params.heads * params.value_dim),
        stride_(params.ScratchStride()),
        query_(params.query + head * params.key_dim),
        key_(params.key + head * params.key_dim),
        value_(params.value + head * params.value_dim),
        output_(params.output + head * params.value_dim),
        logits_(params.scratch),
        keys_(params.scratch + kQueriesOfBlock * stride_) {}

  void Run() const {
    Transpose();
    int64_t i = 0;
    for (; i + kQueriesOfBlock <= p_.queries; i += kQueriesOfBlock) Attend<kQueriesOfBlock>(i);
    for (; i < p_.queries; ++i) Attend<1>(i);
  }

 private:
  using D = hn::ScalableTag<T>;
  using V = hn::Vec<D>;
  static constexpr int64_t kLanes = hn::Lanes(D());
  static constexpr int kQueriesOfBlock = WindowAttentionParams<T>::kQueriesOfBlock;
  static constexpr T kNotAttended = -std::numeric_limits<T>::infinity();

  // Writes element d of all keys side by side, for each d. Whatever lies beyond the last key is not
  // attended to.
  void Transpose() const {
    int64_t n = p_.first_row, d = 0;
    if constexpr (sizeof(T) == 4) {
      for (; n + 4 <= p_.rows; n += 4) {
        for (d = 0; d + 4 <= p_.key_dim; d += 4) TransposeBlock(n, d);
        TransposeSingly(n, n + 4, d);
      }
    }
    TransposeSingly(n, p_.rows, 0);
  }

  void TransposeSingly(int64_t begin, int64_t end, int64_t first) const {
    for (int64_t n = begin; n < end; ++n) {
      const T* HWY_RESTRICT from = key_ + n * key_stride_;
      for (int64_t d = first; d < p_.key_dim; ++d) keys_[d * stride_ + n] = from[d];
    }
  }

  // Four elements of four keys. One by one, the keys of N=64 D=32 took 1.0 us a head, as long as
  // all products of four queries (AVX2, Zen 3).
  HWY_INLINE void TransposeBlock(int64_t n, int64_t d) const {
    const hn::FixedTag<T, 4> four;
    const hn::Repartition<uint64_t, decltype(four)> pairs;
    const T* HWY_RESTRICT from = key_ + n * key_stride_ + d;
    const auto a = hn::LoadU(four, from), b = hn::LoadU(four, from + key_stride_);
    const auto c = hn::LoadU(four, from + 2 * key_stride_);
    const auto e = hn::LoadU(four, from + 3 * key_stride_);
    const auto ab = hn::BitCast(pairs, hn::InterleaveLower(four, a, b));
    const auto ce = hn::BitCast(pairs, hn::InterleaveLower(four, c, e));
    const auto ab2 = hn::BitCast(pairs, hn::InterleaveUpper(four, a, b));
    const auto ce2 = hn::BitCast(pairs, hn::InterleaveUpper(four, c, e));
    T* HWY_RESTRICT to = keys_ + d * stride_ + n;
    hn::StoreU(hn::BitCast(four, hn::InterleaveLower(pairs, ab, ce)), four, to);
    hn::StoreU(hn::BitCast(four, hn::InterleaveUpper(pairs, ab, ce)), four, to + stride_);
    hn::StoreU(hn::BitCast(four, hn::InterleaveLower(pairs, ab2, ce2)), four, to + 2 * stride_);
    hn::StoreU(hn::BitCast(four, hn::InterleaveUpper(pairs, ab2, ce2)), four, to + 3 * stride_);
  }

  template <int kRows>
  void Attend(int64_t query) const {
    typename WindowAttentionParams<T>::Keys keys[kRows];
    for (int r = 0; r < kRows; ++r) keys[r] = p_.KeysOf(query + r);
    // The keys of a later query neither begin nor end earlier.
    const int64_t first = keys[0].first / kLanes * kLanes;
    const int64_t end = keys[kRows - 1].end;
    const T* q = query_ + query * key_stride_;
    int64_t n = first;
    for (; n + kLanes < end; n += 2 * kLanes) Logits<kRows, 2>(q, n);
    if (n < end) Logits<kRows, 1>(q, n);
    T normalizer[kRows];
    Softmax<kRows>(keys, first, end, normalizer);
    T* output = output_ + query * value_stride_;
    int64_t column = 0;
    for (; column + 2 * kLanes <= p_.value_dim; column += 2 * kLanes) {
      Sum<kRows, 2>(keys, normalizer, column, 0, output);
    }
    for (; column < p_.value_dim; column += kLanes) {
      const int64_t rest = p_.value_dim - column;
      Sum<kRows, 1>(keys, normalizer, column, rest < kLanes ? rest : 0, output);
    }
  }

  template <int kRows, int kVectors>
  HWY_INLINE void Logits(const T* HWY_RESTRICT query, int64_t n) const {
    const D d;
    V sum[kRows][kVectors];
    CONTINUAL_TRANSFORMERS_UNROLL
    for (auto& row : sum) {
      CONTINUAL_TRANSFORMERS_UNROLL
      for (auto& x : row) x = hn::Zero(d);
    }
    const T* HWY_RESTRICT key = keys_ + n;
    for (int64_t i = 0; i < p_.key_dim; ++i, key += stride_) {
      CONTINUAL_TRANSFORMERS_UNROLL
      for (int v = 0; v < kVectors; ++v) {
        const V k = hn::LoadU(d, key + v * kLanes);
        CONTINUAL_TRANSFORMERS_UNROLL
        for (int r = 0; r < kRows; ++r) {
          sum[r][v] = hn::MulAdd(hn::Set(d, query[r * key_stride_ + i]), k, sum[r][v]);
        }
      }
    }
    const V scale = hn::Set(d, p_.scale);
    CONTINUAL_TRANSFORMERS_UNROLL
    for (int r = 0; r < kRows; ++r) {
      CONTINUAL_TRANSFORMERS_UNROLL
      for (int v = 0; v < kVectors; ++v) {
        hn::StoreU(hn::Mul(sum[r][v], scale), d, logits_ + r * stride_ + n + v * kLanes);
      }
    }
  }

  // Replaces the logits of rows first, ..., end - 1 by weights, and computes what normalizes them.
  // The queries take turns, so that their latencies overlap.
  template <int kRows>
  HWY_INLINE void Softmax(const typename WindowAttentionParams<T>::Keys* keys, int64_t first,
                          int64_t end, T* normalizer) const {
    const D d;
    const int64_t rounded = (end + kLanes - 1) / kLanes * kLanes;
    V max[kRows], sum[kRows];
    CONTINUAL_TRANSFORMERS_UNROLL
    for (int r = 0; r < kRows; ++r) {
      T* const logits = logits_ + r * stride_;
      for (int64_t n = first; n < keys[r].first; ++n) logits[n] = kNotAttended;
      for (int64_t n = keys[r].end; n < rounded; ++n) logits[n] = kNotAttended;
      max[r] = hn::Set(d, kNotAttended);
      sum[r] = hn::Zero(d);
    }
    // A NaN is not a maximum, but it becomes a weight.
    for (int64_t n = first; n < end; n += kLanes) {
      CONTINUAL_TRANSFORMERS_UNROLL
      for (int r = 0; r < kRows; ++r) {
        const V x = hn::LoadU(d, logits_ + r * stride_ + n);
        max[r] = hn::IfThenElse(hn::Gt(x, max[r]), x, max[r]);
      }
    }
    CONTINUAL_TRANSFORMERS_UNROLL
    for (int r = 0; r < kRows; ++r) {
      // If nothing is attended, -infinity minus -infinity would be NaN.
      const T largest = hn::ReduceMax(d, max[r]);
      max[r] = hn::Set(d, largest == kNotAttended ? T(0) : largest);
    }
    for (int64_t n = first; n < end; n += kLanes) {
      CONTINUAL_TRANSFORMERS_UNROLL
      for (int r = 0; r < kRows; ++r) {
        T* const logits = logits_ + r * stride_ + n;
        const V weight = ExpOfNonPositive(d, hn::Sub(hn::LoadU(d, logits), max[r]));
        hn::StoreU(weight, d, logits);
        sum[r] = hn::Add(sum[r], weight);
      }
    }
    CONTINUAL_TRANSFORMERS_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const T denominator = hn::ReduceSum(d, sum[r]);
      normalizer[r] = denominator == T(0) ? T(0) : T(1) / denominator;
    }
  }

  // Sums kVectors vectors of columns of the values. If `rest` is not 0, only so many columns are
  // there, less than one vector of them.
  template <int kRows, int kVectors>
  HWY_INLINE void Sum(const typename WindowAttentionParams<T>::Keys* keys, const T* normalizer,
                      int64_t column, size_t rest, T* HWY_RESTRICT output) const {
    const D d;
    const int64_t stride = stride_, value_stride = value_stride_;
    const auto load = [d, rest](const T* p)
                          HWY_ATTR { return rest > 0 ? hn::LoadN(d, p, rest) : hn::LoadU(d, p); };
    V sum[kRows][kVectors];
    CONTINUAL_TRANSFORMERS_UNROLL
    for (auto& row : sum) {
      CONTINUAL_TRANSFORMERS_UNROLL
      for (auto& x : row) x = hn::Zero(d);
    }
    // First the values that all queries of the block attend to. The others may be NaN, so a weight
    // of 0 would not be enough.
    const int64_t first = keys[kRows - 1].first, end = std::max(first, keys[0].end);
    const T* HWY_RESTRICT value = value_ + first * value_stride + column;
    const T* HWY_RESTRICT weights = logits_ + first;
    for (int64_t n = first; n < end; ++n, value += value_stride, ++weights) {
      CONTINUAL_TRANSFORMERS_UNROLL
      for (int v = 0; v < kVectors; ++v) {
        const V x = load(value + v * kLanes);
        CONTINUAL_TRANSFORMERS_UNROLL
        for (int r = 0; r < kRows; ++r) {
          sum[r][v] = hn::MulAdd(hn::Set(d, weights[r * stride]), x, sum[r][v]);
        }
      }
    }
    CONTINUAL_TRANSFORMERS_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const T* of_query = logits_ + r * stride;
      AddRows(of_query, keys[r].first, std::min(first, keys[r].end), column, rest, sum[r]);
      AddRows(of_query, end, keys[r].end, column, rest, sum[r]);
      T* y = output + r * value_stride + column;
      const V factor = hn::Set(d, normalizer[r]);
      CONTINUAL_TRANSFORMERS_UNROLL
      for (int v = 0; v < kVectors; ++v) {
        const V total = hn::Mul(sum[r][v], factor);
        if (rest > 0) {
          hn::StoreN(total, d, y, rest);
        } else {
          hn::StoreU(total, d, y + v * kLanes);
        }
      }
    }
  }

  template <int kVectors>
  HWY_INLINE void AddRows(const T* HWY_RESTRICT weights, int64_t begin, int64_t end, int64_t column,
                          size_t rest, V (&sum)[kVectors]) const {
    const D d;
    for (int64_t n = begin; n < end; ++n) {
      const V weight = hn::Set(d, weights[n]);
      const T* HWY_RESTRICT value = value_ + n * value_stride_ + column;
      CONTINUAL_TRANSFORMERS_UNROLL
      for (int v = 0; v < kVectors; ++v) {
        const V x = rest > 0 ? hn::LoadN(d, value, rest) : hn::LoadU(d, value + v * kLanes);
        sum[v] = hn::MulAdd(weight, x, sum[v]);
      }
    }
  }

  const WindowAttentionParams<T>& p_;
  const int64_t key_stride_, value_stride_;
  const int64_t stride_;
  const T* const query_;
  const T* const key_;
  const T* const value_;
  T* const output_;
  T* const logits_;  // [kQueriesOfBlock, stride_]
  T* const keys_;    // [D, stride_]
};

template <typename T>
void AttendInBlocks(const WindowAttentionParams<T>& params, int64_t begin, int64_t end) {
  for (int64_t h = begin; h < end; ++h) WindowHead<T>(params, h).Run();
}

}  // namespace HWY_NAMESPACE
}  // namespace continual_transformers
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace continual_transformers {
namespace {

template <typename T>
void AttendOneByOne(const WindowAttentionParams<T>& params, int64_t begin, int64_t end) {
  RingAttentionParams<T> p = {};
  p.key = params.key;
  p.key_stride = params.heads * params.key_dim;
  p.value = params.value;
  p.value_stride = params.heads * params.value_dim;
  p.heads = p.key_heads = params.heads;
  p.key_dim = params.key_dim;
  p.value_dim = params.value_dim;
  p.scale = params.scale;
  p.logits = params.scratch;
  for (int64_t i = 0; i < params.queries; ++i) {
    const auto [first, last] = params.KeysOf(i);
    p.query = params.query + i * p.key_stride;
    p.output = params.output + i * p.value_stride;
    p.spans = {{first, last - first}, {0, 0}};
    if (first == last) {
      std::fill(p.output + begin * p.value_dim, p.output + end * p.value_dim, T(0));
    } else {
      RingAttention(p, begin, end);
    }
  }
}

template <typename T>
void DispatchBlocks(const WindowAttentionParams<T>& params, int64_t begin, int64_t end) {
  CONTINUAL_TRANSFORMERS_DISPATCH(AttendInBlocks, params, begin, end);
}

}  // namespace

template <typename T>
void WindowAttention(const WindowAttentionParams<T>& params, int64_t begin, int64_t end) {
  if (params.IsInBlocks()) return DispatchBlocks(params, begin, end);
  AttendOneByOne(params, begin, end);
}

#define INSTANTIATE(T) \
  template void WindowAttention<T>(const WindowAttentionParams<T>&, int64_t, int64_t);
CONTINUAL_TRANSFORMERS_FOR_COMPUTE_TYPES(INSTANTIATE)
#undef INSTANTIATE

}  // namespace continual_transformers
#endif  // HWY_ONCE
