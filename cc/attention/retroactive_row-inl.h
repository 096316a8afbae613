// The vector loops of retroactive attention: dot products that have the same bits in both orders of
// key and query, and sums in double. Compiled once per target, so the include guard is Highway's.

#if defined(CONTINUAL_TRANSFORMERS_ATTENTION_RETROACTIVE_ROW_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef CONTINUAL_TRANSFORMERS_ATTENTION_RETROACTIVE_ROW_INL_H_
#undef CONTINUAL_TRANSFORMERS_ATTENTION_RETROACTIVE_ROW_INL_H_
#else
#define CONTINUAL_TRANSFORMERS_ATTENTION_RETROACTIVE_ROW_INL_H_
#endif

#include <algorithm>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "cc/attention/vector_math-inl.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace continual_transformers {
namespace HWY_NAMESPACE {

// Rows whose dot products are computed together.
constexpr int64_t kRowsPerDot = 4;

// A logit further above its reference than this is recomputed instead. e^60 is far from overflow in
// float, and in double the sums of such weights are as exact as any.
constexpr double kMostAboveReference = 60;

// logits[i] = scale * (vector . row i) for rows of `size` elements, `stride` apart; the same for a
// second vector, so that the rows are read once. What is added to a row's sums when a key enters
// must be subtracted with the same bits when it leaves. So every logit of a query and a key sums
// the same products in the same order, wherever it is computed.
template <typename T>
HWY_INLINE void DotsOfTwo(const T* HWY_RESTRICT first, const T* HWY_RESTRICT second,
                          const T* HWY_RESTRICT rows, int64_t stride, int64_t count, int64_t size,
                          T scale, T* HWY_RESTRICT first_logits, T* HWY_RESTRICT second_logits) {
  const hn::ScalableTag<T> d;
  using V = hn::Vec<decltype(d)>;
  const int64_t lanes = hn::Lanes(d);
  for (int64_t i = 0; i < count; i += kRowsPerDot) {
    // Separate names, as the compiler would keep arrays in memory. The last row replaces missing
    // ones.
    const T* r0 = rows + i * stride;
    const T* r1 = r0 + (count - i > 1 ? stride : 0);
    const T* r2 = r1 + (count - i > 2 ? stride : 0);
    const T* r3 = r2 + (count - i > 3 ? stride : 0);
    V a0 = hn::Zero(d), a1 = a0, a2 = a0, a3 = a0, b0 = a0, b1 = a0, b2 = a0, b3 = a0;
    int64_t at = 0;
    for (; at + lanes <= size; at += lanes) {
      const V a = hn::LoadU(d, first + at), b = hn::LoadU(d, second + at);
      const V x0 = hn::LoadU(d, r0 + at), x1 = hn::LoadU(d, r1 + at);
      const V x2 = hn::LoadU(d, r2 + at), x3 = hn::LoadU(d, r3 + at);
      a0 = hn::MulAdd(a, x0, a0);
      a1 = hn::MulAdd(a, x1, a1);
      a2 = hn::MulAdd(a, x2, a2);
      a3 = hn::MulAdd(a, x3, a3);
      b0 = hn::MulAdd(b, x0, b0);
      b1 = hn::MulAdd(b, x1, b1);
      b2 = hn::MulAdd(b, x2, b2);
      b3 = hn::MulAdd(b, x3, b3);
    }
    if (at < size) {
      const size_t rest = size - at;
      const V a = hn::LoadN(d, first + at, rest), b = hn::LoadN(d, second + at, rest);
      const V x0 = hn::LoadN(d, r0 + at, rest), x1 = hn::LoadN(d, r1 + at, rest);
      const V x2 = hn::LoadN(d, r2 + at, rest), x3 = hn::LoadN(d, r3 + at, rest);
      a0 = hn::MulAdd(a, x0, a0);
      a1 = hn::MulAdd(a, x1, a1);
      a2 = hn::MulAdd(a, x2, a2);
      a3 = hn::MulAdd(a, x3, a3);
      b0 = hn::MulAdd(b, x0, b0);
      b1 = hn::MulAdd(b, x1, b1);
      b2 = hn::MulAdd(b, x2, b2);
      b3 = hn::MulAdd(b, x3, b3);
    }
    StoreScaledSums(d, a0, a1, a2, a3, scale, first_logits + i);
    StoreScaledSums(d, b0, b1, b2, b3, scale, second_logits + i);
  }
}

// The same for one vector, with the same bits.
template <typename T>
HWY_INLINE void DotsOfOne(const T* HWY_RESTRICT vector, const T* HWY_RESTRICT rows, int64_t stride,
                          int64_t count, int64_t size, T scale, T* HWY_RESTRICT logits) {
  const hn::ScalableTag<T> d;
  using V = hn::Vec<decltype(d)>;
  const int64_t lanes = hn::Lanes(d);
  for (int64_t i = 0; i < count; i += kRowsPerDot) {
    const T* r0 = rows + i * stride;
    const T* r1 = r0 + (count - i > 1 ? stride : 0);
    const T* r2 = r1 + (count - i > 2 ? stride : 0);
    const T* r3 = r2 + (count - i > 3 ? stride : 0);
    V a0 = hn::Zero(d), a1 = a0, a2 = a0, a3 = a0;
    int64_t at = 0;
    for (; at + lanes <= size; at += lanes) {
      const V a = hn::LoadU(d, vector + at);
      a0 = hn::MulAdd(a, hn::LoadU(d, r0 + at), a0);
      a1 = hn::MulAdd(a, hn::LoadU(d, r1 + at), a1);
      a2 = hn::MulAdd(a, hn::LoadU(d, r2 + at), a2);
      a3 = hn::MulAdd(a, hn::LoadU(d, r3 + at), a3);
    }
    if (at < size) {
      const size_t rest = size - at;
      const V a = hn::LoadN(d, vector + at, rest);
      a0 = hn::MulAdd(a, hn::LoadN(d, r0 + at, rest), a0);
      a1 = hn::MulAdd(a, hn::LoadN(d, r1 + at, rest), a1);
      a2 = hn::MulAdd(a, hn::LoadN(d, r2 + at, rest), a2);
      a3 = hn::MulAdd(a, hn::LoadN(d, r3 + at, rest), a3);
    }
    StoreScaledSums(d, a0, a1, a2, a3, scale, logits + i);
  }
}

// Replaces logits, minus their references, by their weights. May write a whole vector past the
// last. Logits above kMostAboveReference only need to give more than e^kMostAboveReference. NaN
// stays NaN.
template <typename T>
HWY_INLINE void TurnIntoWeights(T* HWY_RESTRICT logits, int64_t count) {
  const hn::ScalableTag<T> d;
  const auto most = hn::Set(d, static_cast<T>(kMostAboveReference + 1));
  for (int64_t i = 0; i < count; i += hn::Lanes(d)) {
    const auto x = hn::LoadU(d, logits + i);
    const auto limited = hn::IfThenElse(hn::Gt(x, most), most, x);
    hn::StoreU(ExpOfNonPositive(d, limited), d, logits + i);
  }
}

// Loads `count` <= Lanes(d) elements as doubles; a whole vector if count is 0.
template <class D, typename T>
HWY_INLINE hn::Vec<D> LoadAsDouble(D d, const T* p, size_t count) {
  if constexpr (std::is_same_v<T, double>) {
    return count == 0 ? hn::LoadU(d, p) : hn::LoadN(d, p, count);
  } else {
    const hn::Rebind<float, D> narrow;
    return hn::PromoteTo(d, count == 0 ? hn::LoadU(narrow, p) : hn::LoadN(narrow, p, count));
  }
}

template <class D, typename T>
HWY_INLINE void StoreAs(D d, hn::Vec<D> v, T* p, size_t count) {
  if constexpr (std::is_same_v<T, double>) {
    count == 0 ? hn::StoreU(v, d, p) : hn::StoreN(v, d, p, count);
  } else {
    const hn::Rebind<float, D> narrow;
    const auto rounded = hn::DemoteTo(narrow, v);
    count == 0 ? hn::StoreU(rounded, narrow, p) : hn::StoreN(rounded, narrow, p, count);
  }
}

// The weights and values that enter and leave the sums of a kept row.
struct Exchange {
  double fresh_weight, leaving_weight;
  const double* HWY_RESTRICT fresh;    // [Dv]
  const double* HWY_RESTRICT leaving;  // [Dv]
};

// The larger magnitude in each lane, ignoring NaN.
template <class D, class V = hn::Vec<D>>
HWY_INLINE V LargerMagnitude(D, V largest, V v) {
  const V magnitude = hn::Abs(v);
  return hn::IfThenElse(hn::Gt(magnitude, largest), magnitude, largest);
}

// sum += fresh - leaving, and output = normalizer * sum. Returns the sum's largest magnitude.
template <typename T>
HWY_INLINE double ExchangeValues(const Exchange& x, double normalizer, int64_t size,
                                 double* HWY_RESTRICT sum, T* HWY_RESTRICT output) {
  const hn::ScalableTag<double> d;
  using V = hn::Vec<decltype(d)>;
  const int64_t lanes = hn::Lanes(d);
  const V fresh_weight = hn::Set(d, x.fresh_weight), leaving_weight = hn::Set(d, x.leaving_weight);
  const V factor = hn::Set(d, normalizer);
  V largest = hn::Zero(d);
  int64_t at = 0;
  for (; at + lanes <= size; at += lanes) {
    V s = hn::MulAdd(fresh_weight, hn::LoadU(d, x.fresh + at), hn::LoadU(d, sum + at));
    s = hn::NegMulAdd(leaving_weight, hn::LoadU(d, x.leaving + at), s);
    largest = LargerMagnitude(d, largest, s);
    hn::StoreU(s, d, sum + at);
    StoreAs(d, hn::Mul(s, factor), output + at, 0);
  }
  if (at < size) {
    const size_t rest = size - at;
    V s = hn::MulAdd(fresh_weight, hn::LoadN(d, x.fresh + at, rest), hn::LoadN(d, sum + at, rest));
    s = hn::NegMulAdd(leaving_weight, hn::LoadN(d, x.leaving + at, rest), s);
    largest = LargerMagnitude(d, largest, s);
    hn::StoreN(s, d, sum + at, rest);
    StoreAs(d, hn::Mul(s, factor), output + at, rest);
  }
  return hn::ReduceMax(d, largest);
}

// sum = the weighted sum of the rows of values, in double, over those whose mask is set; output =
// normalizer * sum. For kVectors vectors of columns, or `partial` < Lanes columns. Returns the
// sum's largest magnitude.
template <int kVectors, typename T>
HWY_INLINE double SumColumns(const T* HWY_RESTRICT value, int64_t stride,
                             const T* HWY_RESTRICT weights, const bool* HWY_RESTRICT mask,
                             int64_t count, double normalizer, double* HWY_RESTRICT sum,
                             T* HWY_RESTRICT output, size_t partial = 0) {
  const hn::ScalableTag<double> d;
  using V = hn::Vec<decltype(d)>;
  constexpr int64_t kLanes = hn::Lanes(decltype(d)());
  const size_t rest = kVectors == 1 ? partial : 0;
  V sums[kVectors];
  for (int v = 0; v < kVectors; ++v) sums[v] = hn::Zero(d);
  for (int64_t i = 0; i < count; ++i) {
    if (!mask[i]) continue;  // a masked value can be NaN
    const V weight = hn::Set(d, static_cast<double>(weights[i]));
    for (int v = 0; v < kVectors; ++v) {
      sums[v] = hn::MulAdd(weight, LoadAsDouble(d, value + i * stride + v * kLanes, rest), sums[v]);
    }
  }
  const V factor = hn::Set(d, normalizer);
  V largest = hn::Zero(d);
  for (int v = 0; v < kVectors; ++v) {
    largest = LargerMagnitude(d, largest, sums[v]);
    StoreAs(d, sums[v], sum + v * kLanes, rest);
    StoreAs(d, hn::Mul(sums[v], factor), output + v * kLanes, rest);
  }
  return hn::ReduceMax(d, largest);
}

template <typename T>
double SumValues(const T* value, int64_t stride, int64_t size, const T* weights, const bool* mask,
                 int64_t count, double normalizer, double* sum, T* output) {
  constexpr int64_t kLanes = hn::Lanes(hn::ScalableTag<double>());
  double largest = 0;
  int64_t at = 0;
  const auto columns = [&](auto vectors, size_t partial) HWY_ATTR {
    largest = std::max(
        largest, SumColumns<decltype(vectors)::value>(value + at, stride, weights, mask, count,
                                                      normalizer, sum + at, output + at, partial));
  };
  const std::integral_constant<int, 8> eight;
  const std::integral_constant<int, 4> four;
  const std::integral_constant<int, 1> one;
  for (; at + 8 * kLanes <= size; at += 8 * kLanes) columns(eight, 0);
  for (; at + 4 * kLanes <= size; at += 4 * kLanes) columns(four, 0);
  for (; at + kLanes <= size; at += kLanes) columns(one, 0);
  if (at < size) columns(one, size - at);
  return largest;
}

}  // namespace HWY_NAMESPACE
}  // namespace continual_transformers
HWY_AFTER_NAMESPACE();

#endif  // CONTINUAL_TRANSFORMERS_ATTENTION_RETROACTIVE_ROW_INL_H_
