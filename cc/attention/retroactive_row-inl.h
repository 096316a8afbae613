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

#include "cc/attention/retroactive_rule.h"
#include "cc/attention/vector_math-inl.h"
#include "hwy/cache_control.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace continual_transformers {
namespace HWY_NAMESPACE {

// Rows whose dot products are computed together.
constexpr int64_t kRowsPerDot = 4;

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

// Loads `count` <= Lanes(d) doubles as T, and no others.
template <class D>
HWY_INLINE hn::Vec<D> LoadNarrowN(D d, const double* p, size_t count) {
  if constexpr (sizeof(hn::TFromD<D>) == 8) {
    return hn::LoadN(d, p, count);
  } else {
    const hn::Half<D> half;
    const hn::Rebind<double, decltype(half)> wide;
    const size_t lanes = hn::Lanes(wide), low = std::min(count, lanes);
    return hn::Combine(d, hn::DemoteTo(half, hn::LoadN(wide, p + low, count - low)),
                       hn::DemoteTo(half, hn::LoadN(wide, p, low)));
  }
}

// The same for whole vectors.
template <class D>
HWY_INLINE hn::Vec<D> LoadNarrow(D d, const double* p) {
  if constexpr (sizeof(hn::TFromD<D>) == 8) {
    return hn::LoadU(d, p);
  } else {
    const hn::Half<D> half;
    const hn::Rebind<double, decltype(half)> wide;
    return hn::Combine(d, hn::DemoteTo(half, hn::LoadU(wide, p + hn::Lanes(wide))),
                       hn::DemoteTo(half, hn::LoadU(wide, p)));
  }
}

// The weight of a logit minus its reference. Logits above kMostAboveReference only need to give
// more than e^kMostAboveReference. NaN stays NaN.
template <class D>
HWY_INLINE hn::Vec<D> WeightOf(D d, hn::Vec<D> x) {
  const auto most = hn::Set(d, static_cast<hn::TFromD<D>>(kMostAboveReference + 1));
  return ExpOfNonPositive(d, hn::IfThenElse(hn::Gt(x, most), most, x));
}

// Replaces the logits of one key and `count` queries by their weights, given each query's
// reference. May write up to a vector past the last.
template <typename T>
HWY_INLINE void WeighAgainstReferences(const double* HWY_RESTRICT references, int64_t count,
                                       T* HWY_RESTRICT logits) {
  const hn::ScalableTag<T> d;
  const int64_t lanes = hn::Lanes(d);
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes) {
    const auto x = hn::Sub(hn::LoadU(d, logits + i), LoadNarrow(d, references + i));
    hn::StoreU(WeightOf(d, x), d, logits + i);
  }
  if (i < count) {
    const auto x = hn::Sub(hn::LoadU(d, logits + i), LoadNarrowN(d, references + i, count - i));
    hn::StoreU(WeightOf(d, x), d, logits + i);
  }
}

// Replaces the logits of one query by their weights, given its reference. Returns their sum.
template <typename T>
HWY_INLINE double WeighAgainst(T reference, int64_t count, T* HWY_RESTRICT logits) {
  const hn::ScalableTag<T> d;
  const hn::ScalableTag<double> wide;
  const int64_t lanes = hn::Lanes(d);
  const auto subtracted = hn::Set(d, reference);
  auto sum = hn::Zero(wide);
  for (int64_t i = 0; i < count; i += lanes) {
    auto weight = WeightOf(d, hn::Sub(hn::LoadU(d, logits + i), subtracted));
    if (i + lanes > count) weight = hn::IfThenElseZero(hn::FirstN(d, count - i), weight);
    hn::StoreU(weight, d, logits + i);
    if constexpr (sizeof(T) == 8) {
      sum = hn::Add(sum, weight);
    } else {
      sum = hn::Add(sum, hn::PromoteLowerTo(wide, weight));
      sum = hn::Add(sum, hn::PromoteUpperTo(wide, weight));
    }
  }
  return hn::ReduceSum(wide, sum);
}

// The largest of `count` numbers, or -infinity. Ignores NaN.
template <typename T>
HWY_INLINE T Largest(const T* HWY_RESTRICT x, int64_t count) {
  const hn::ScalableTag<T> d;
  const int64_t lanes = hn::Lanes(d);
  constexpr T kLeast = -std::numeric_limits<T>::infinity();
  auto largest = hn::Set(d, kLeast);
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes) {
    const auto v = hn::LoadU(d, x + i);
    largest = hn::IfThenElse(hn::Gt(v, largest), v, largest);
  }
  T max = hn::ReduceMax(d, largest);
  for (; i < count; ++i) {
    if (x[i] > max) max = x[i];
  }
  return max;
}

// Loads `count` <= Lanes(d) elements as doubles; a whole vector if count is 0.
template <class D, typename T>
HWY_INLINE hn::Vec<D> LoadAsDouble(D d, const T* p, size_t count = 0) {
  if constexpr (std::is_same_v<T, double>) {
    return count == 0 ? hn::LoadU(d, p) : hn::LoadN(d, p, count);
  } else {
    const hn::Rebind<float, D> narrow;
    return hn::PromoteTo(d, count == 0 ? hn::LoadU(narrow, p) : hn::LoadN(narrow, p, count));
  }
}

template <class D, typename T>
HWY_INLINE void StoreAs(D d, hn::Vec<D> v, T* p, size_t count = 0) {
  if constexpr (std::is_same_v<T, double>) {
    count == 0 ? hn::StoreU(v, d, p) : hn::StoreN(v, d, p, count);
  } else {
    const hn::Rebind<float, D> narrow;
    const auto rounded = hn::DemoteTo(narrow, v);
    count == 0 ? hn::StoreU(rounded, narrow, p) : hn::StoreN(rounded, narrow, p, count);
  }
}

// The sum of the magnitudes of x. Infinities and NaN count as 0: they spoil the sums that they are
// in, which are computed exactly when they leave, and say nothing about the others.
template <typename T>
HWY_INLINE double MagnitudeOf(const T* HWY_RESTRICT x, int64_t size) {
  const hn::ScalableTag<double> d;
  const int64_t lanes = hn::Lanes(d);
  const auto infinity = hn::Inf(d);
  auto sum = hn::Zero(d);
  const auto add = [&](hn::Vec<decltype(d)> v) HWY_ATTR {
    const auto magnitude = hn::Abs(v);
    sum = hn::Add(sum, hn::IfThenElseZero(hn::Lt(magnitude, infinity), magnitude));
  };
  int64_t at = 0;
  for (; at + lanes <= size; at += lanes) add(LoadAsDouble(d, x + at));
  if (at < size) add(LoadAsDouble(d, x + at, size - at));
  return hn::ReduceSum(d, sum);
}

// The softmax state of rows, [N] each.
struct RowsState {
  double* HWY_RESTRICT reference;
  double* HWY_RESTRICT denominator;
  double* HWY_RESTRICT magnitude;
  double* HWY_RESTRICT peaks;
};

// Two positive doubles in the bits of one: the upper halves of their bits. They are rounded down by
// at most 2^-20, which does not matter for a peak.
template <class D, class V = hn::Vec<D>>
HWY_INLINE V PackPeaks(D d, V denominator, V magnitude) {
  const hn::RebindToUnsigned<D> bits;
  const auto upper = hn::Set(bits, 0xFFFFFFFF00000000u);
  return hn::BitCast(d, hn::Or(hn::And(hn::BitCast(bits, denominator), upper),
                               hn::ShiftRight<32>(hn::BitCast(bits, magnitude))));
}
template <class D, class V = hn::Vec<D>>
HWY_INLINE V DenominatorPeak(D d, V peaks) {
  const hn::RebindToUnsigned<D> bits;
  const auto upper = hn::Set(bits, 0xFFFFFFFF00000000u);
  return hn::BitCast(d, hn::And(hn::BitCast(bits, peaks), upper));
}
template <class D, class V = hn::Vec<D>>
HWY_INLINE V MagnitudePeak(D d, V peaks) {
  const hn::RebindToUnsigned<D> bits;
  return hn::BitCast(d, hn::ShiftLeft<32>(hn::BitCast(bits, peaks)));
}

// What a key that enters and one that leaves do to all rows.
template <typename T>
struct Exchange {
  const T* fresh_weights;  // [N]
  const T* leaving_weights;
  double fresh_magnitude, leaving_magnitude;  // of the values
  bool has_fresh;
  double least_of_peak, most_weight;
};

// Updates the softmax state of `count` rows, and writes the weights in double and 1 / denominator.
// Appends to `inexact` the rows that must be computed exactly. Returns their new number.
template <typename T>
HWY_INLINE int64_t ExchangeWeights(const Exchange<T>& x, const RowsState& rows, int64_t count,
                                   double* HWY_RESTRICT fresh_weights,
                                   double* HWY_RESTRICT leaving_weights,
                                   double* HWY_RESTRICT normalizers, int64_t skipped,
                                   int64_t* HWY_RESTRICT inexact, int64_t num_inexact) {
  const hn::ScalableTag<double> d;
  using V = hn::Vec<decltype(d)>;
  const int64_t lanes = hn::Lanes(d);
  const V zero = hn::Zero(d), one = hn::Set(d, 1), least = hn::Set(d, x.least_of_peak);
  const V most = hn::Set(d, x.most_weight);
  const V fresh_magnitude = hn::Set(d, x.fresh_magnitude);
  const V leaving_magnitude = hn::Set(d, x.leaving_magnitude);
  // A row that has had no key yet has no reference.
  const V unset = hn::Set(d, x.has_fresh ? 0.0 : -1.0);
  const auto block = [&](int64_t i, size_t part) HWY_ATTR {
    const auto load = [&](const double* p)
                          HWY_ATTR { return part == 0 ? hn::LoadU(d, p) : hn::LoadN(d, p, part); };
    const auto store = [&](V v, double* p) HWY_ATTR {
      part == 0 ? hn::StoreU(v, d, p) : hn::StoreN(v, d, p, part);
    };
    const V fresh = LoadAsDouble(d, x.fresh_weights + i, part);
    const V leaving = LoadAsDouble(d, x.leaving_weights + i, part);
    const V before = load(rows.denominator + i), peaks = load(rows.peaks + i);
    const V denominator = hn::Sub(hn::Add(before, fresh), leaving);
    V magnitude = hn::MulAdd(fresh, fresh_magnitude, load(rows.magnitude + i));
    magnitude = hn::NegMulAdd(leaving, leaving_magnitude, magnitude);
    const V denominator_peak = DenominatorPeak(d, peaks), magnitude_peak = MagnitudePeak(d, peaks);
    // A NaN that stays changes nothing. One that leaves has spoiled the sums.
    auto bad = hn::Or(hn::Lt(denominator, hn::Mul(least, denominator_peak)),
                      hn::Lt(magnitude, hn::Mul(least, magnitude_peak)));
    bad = hn::Or(bad, hn::Or(hn::Gt(fresh, most), hn::IsNaN(leaving)));
    bad = hn::Or(bad, hn::Eq(before, unset));
    const auto larger = [&](V v, V peak)
                            HWY_ATTR { return hn::IfThenElse(hn::Gt(v, peak), v, peak); };
    store(denominator, rows.denominator + i);
    store(magnitude, rows.magnitude + i);
    store(PackPeaks(d, larger(denominator, denominator_peak), larger(magnitude, magnitude_peak)),
          rows.peaks + i);
    store(fresh, fresh_weights + i);
    store(leaving, leaving_weights + i);
    const V normalizer = hn::Div(one, denominator);
    store(hn::IfThenZeroElse(hn::Eq(denominator, zero), normalizer), normalizers + i);
    if (part != 0) bad = hn::And(bad, hn::FirstN(d, part));
    if (HWY_UNLIKELY(!hn::AllFalse(d, bad))) {
      uint64_t bits = hn::BitsFromMask(d, bad);
      for (int64_t row = i; bits != 0; ++row, bits >>= 1) {
        if ((bits & 1) != 0 && row != skipped) inexact[num_inexact++] = row;
      }
    }
  };
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes) block(i, 0);
  if (i < count) block(i, count - i);
  return num_inexact;
}

// The weights and values that enter and leave the sums of kept rows. The weights and normalizers
// are those of the first row.
struct ExchangedValues {
  const double* fresh_weights;
  const double* leaving_weights;
  const double* normalizers;
  const double* fresh;    // [Dv]
  const double* leaving;  // [Dv]
};

// Prefetches the bytes of kVectors vectors of doubles as T, from `p` on.
template <int kVectors, typename T>
HWY_INLINE void PrefetchVectors(const T* p) {
  constexpr int64_t kBytes = kVectors * hn::Lanes(hn::ScalableTag<double>()) * sizeof(T);
  CONTINUAL_TRANSFORMERS_UNROLL
  for (int64_t at = 0; at < kBytes; at += 64) {
    hwy::Prefetch(reinterpret_cast<const char*>(p) + at);
  }
}
// How many rows ahead outputs are prefetched. Rows of one head are far apart in memory, so the
// processor does not foresee them. This made a step 1.06 to 1.18 times as fast (N = 64 to 512,
// 4 heads, D = 16 and 32, AVX3). The same for queries, sums or values gained nothing.
constexpr int64_t kRowsAhead = 8;

// For each row: sum += fresh - leaving, and output = normalizer * sum. For kVectors vectors of
// columns, or `partial` < Lanes columns. The values stay in registers from row to row.
template <int kVectors, typename T>
HWY_INLINE void ExchangeColumns(const ExchangedValues& x, int64_t count, int64_t value_dim,
                                double* HWY_RESTRICT sum, int64_t output_stride,
                                T* HWY_RESTRICT output, size_t partial = 0) {
  const hn::ScalableTag<double> d;
  using V = hn::Vec<decltype(d)>;
  constexpr int64_t kLanes = hn::Lanes(decltype(d)());
  const size_t rest = kVectors == 1 ? partial : 0;
  V fresh[kVectors], leaving[kVectors];
  CONTINUAL_TRANSFORMERS_UNROLL
  for (int v = 0; v < kVectors; ++v) {
    fresh[v] = LoadAsDouble(d, x.fresh + v * kLanes, rest);
    leaving[v] = LoadAsDouble(d, x.leaving + v * kLanes, rest);
  }
  for (int64_t i = 0; i < count; ++i, sum += value_dim, output += output_stride) {
    const V fresh_weight = hn::Set(d, x.fresh_weights[i]);
    const V leaving_weight = hn::Set(d, x.leaving_weights[i]);
    const V normalizer = hn::Set(d, x.normalizers[i]);
    CONTINUAL_TRANSFORMERS_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      V s = hn::MulAdd(fresh_weight, fresh[v], LoadAsDouble(d, sum + v * kLanes, rest));
      s = hn::NegMulAdd(leaving_weight, leaving[v], s);
      StoreAs(d, s, sum + v * kLanes, rest);
      StoreAs(d, hn::Mul(s, normalizer), output + v * kLanes, rest);
    }
    PrefetchVectors<kVectors>(output + kRowsAhead * output_stride);
  }
}

// Calls f(vectors, at, partial) for blocks of columns: `at` is the first column, and `vectors` an
// integral_constant, at most kMost. `partial` is 0, or the number of columns of a part of a vector.
template <int kMost, class F>
HWY_INLINE void ForColumns(int64_t size, const F& f) {
  constexpr int64_t kLanes = hn::Lanes(hn::ScalableTag<double>());
  int64_t at = 0;
  for (; at + kMost * kLanes <= size; at += kMost * kLanes) {
    f(std::integral_constant<int, kMost>(), at, 0);
  }
  if constexpr (kMost > 4) {
    if (at + 4 * kLanes <= size) {
      f(std::integral_constant<int, 4>(), at, 0);
      at += 4 * kLanes;
    }
  }
  if (at + 2 * kLanes <= size) {
    f(std::integral_constant<int, 2>(), at, 0);
    at += 2 * kLanes;
  }
  if (at + kLanes <= size) {
    f(std::integral_constant<int, 1>(), at, 0);
    at += kLanes;
  }
  if (at < size) f(std::integral_constant<int, 1>(), at, size - at);
}

// How many vectors of values stay in registers, with their counterparts.
constexpr int kExchangedVectors = HWY_TARGET == HWY_AVX3 || !HWY_ARCH_X86 ? 8 : 4;

template <typename T>
void ExchangeValues(const ExchangedValues& x, int64_t count, int64_t value_dim, double* sum,
                    int64_t output_stride, T* output) {
  ForColumns<kExchangedVectors>(value_dim, [&](auto vectors, int64_t at, size_t partial) HWY_ATTR {
    const ExchangedValues columns = {x.fresh_weights, x.leaving_weights, x.normalizers,
                                     x.fresh + at, x.leaving + at};
    ExchangeColumns<decltype(vectors)::value>(columns, count, value_dim, sum + at, output_stride,
                                              output + at, partial);
  });
}

// sum = the weighted sum of the rows of values, in double, over those whose mask is set; output =
// normalizer * sum. For kVectors vectors of columns, or `partial` < Lanes columns. Returns the
// weighted sum of the values' magnitudes, over all columns.
template <int kVectors, typename T>
HWY_INLINE double SumColumns(const T* HWY_RESTRICT value, int64_t stride,
                             const T* HWY_RESTRICT weights, const bool* HWY_RESTRICT mask,
                             int64_t count, double normalizer, double* HWY_RESTRICT sum,
                             T* HWY_RESTRICT output, size_t partial = 0) {
  const hn::ScalableTag<double> d;
  using V = hn::Vec<decltype(d)>;
  constexpr int64_t kLanes = hn::Lanes(decltype(d)());
  const size_t rest = kVectors == 1 ? partial : 0;
  V sums[kVectors], magnitudes[kVectors], odd_sums[kVectors], odd_magnitudes[kVectors];
  CONTINUAL_TRANSFORMERS_UNROLL
  for (int v = 0; v < kVectors; ++v) {
    sums[v] = magnitudes[v] = odd_sums[v] = odd_magnitudes[v] = hn::Zero(d);
  }
  const auto add = [&](int64_t i, V* to, V* magnitudes_to) HWY_ATTR {
    if (!mask[i]) return;  // a masked value can be NaN
    const T* row = value + i * stride;
    const V weight = hn::Set(d, static_cast<double>(weights[i]));
    CONTINUAL_TRANSFORMERS_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      const V x = LoadAsDouble(d, row + v * kLanes, rest);
      to[v] = hn::MulAdd(weight, x, to[v]);
      magnitudes_to[v] = hn::MulAdd(weight, hn::Abs(x), magnitudes_to[v]);
    }
  };
  int64_t i = 0;
  if constexpr (kVectors <= 2) {  // Otherwise each addition would wait for the one before.
    for (; i + 2 <= count; i += 2) {
      add(i, sums, magnitudes);
      add(i + 1, odd_sums, odd_magnitudes);
    }
  }
  for (; i < count; ++i) add(i, sums, magnitudes);
  CONTINUAL_TRANSFORMERS_UNROLL
  for (int v = 0; v < kVectors; ++v) {
    sums[v] = hn::Add(sums[v], odd_sums[v]);
    magnitudes[v] = hn::Add(magnitudes[v], odd_magnitudes[v]);
  }
  const V factor = hn::Set(d, normalizer);
  V magnitude = hn::Zero(d);
  CONTINUAL_TRANSFORMERS_UNROLL
  for (int v = 0; v < kVectors; ++v) {
    magnitude = hn::Add(magnitude, magnitudes[v]);
    StoreAs(d, sums[v], sum + v * kLanes, rest);
    StoreAs(d, hn::Mul(sums[v], factor), output + v * kLanes, rest);
  }
  return hn::ReduceSum(d, magnitude);
}

template <typename T>
double SumValues(const T* value, int64_t stride, int64_t size, const T* weights, const bool* mask,
                 int64_t count, double normalizer, double* sum, T* output) {
  double magnitude = 0;
  ForColumns<kExchangedVectors>(size, [&](auto vectors, int64_t at, size_t partial) HWY_ATTR {
    magnitude += SumColumns<decltype(vectors)::value>(value + at, stride, weights, mask, count,
                                                      normalizer, sum + at, output + at, partial);
  });
  if (magnitude < std::numeric_limits<double>::infinity()) return magnitude;
  magnitude = 0;
  for (int64_t i = 0; i < count; ++i) {
    const double one = mask[i] ? weights[i] * MagnitudeOf(value + i * stride, size) : 0;
    if (one < std::numeric_limits<double>::infinity()) magnitude += one;
  }
  return magnitude;
}

}  // namespace HWY_NAMESPACE
}  // namespace continual_transformers
HWY_AFTER_NAMESPACE();

#endif  // CONTINUAL_TRANSFORMERS_ATTENTION_RETROACTIVE_ROW_INL_H_
