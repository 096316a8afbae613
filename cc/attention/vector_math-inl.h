// Vector functions that Highway does not have: widening loads, sums of many vectors' lanes,
// exponentials, tanh. Compiled once per target, so the include guard is Highway's.

#if defined(CONTINUAL_TRANSFORMERS_ATTENTION_VECTOR_MATH_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef CONTINUAL_TRANSFORMERS_ATTENTION_VECTOR_MATH_INL_H_
#undef CONTINUAL_TRANSFORMERS_ATTENTION_VECTOR_MATH_INL_H_
#else
#define CONTINUAL_TRANSFORMERS_ATTENTION_VECTOR_MATH_INL_H_
#endif

#include <cstdint>
#include <type_traits>

#include "cc/attention/half.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace continual_transformers {
namespace HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

// Highway's name for a type of a ring; the bits are the same.
template <typename C>
struct HighwayType {
  using type = C;
};
template <>
struct HighwayType<BFloat16> {
  using type = hwy::bfloat16_t;
};
template <>
struct HighwayType<Float16> {
  using type = hwy::float16_t;
};

// 16-bit lanes as floats.
template <class D, class V>
HWY_INLINE hn::Vec<D> Promote(D d, V narrow) {
  const hn::Vec<D> wide = hn::PromoteTo(d, narrow);
#if HWY_TARGET == HWY_SSE2
  // Without a conversion instruction, Highway reads infinities and NaNs of binary16 as numbers from
  // 2^16 on. Binary16 has no such numbers.
  if constexpr (std::is_same_v<hn::TFromV<V>, hwy::float16_t>) {
    const auto infinity = hn::Inf(d);
    const auto special = hn::Ge(hn::Abs(wide), hn::Set(d, 0x1p16f));
    return hn::Or(wide, hn::IfThenElseZero(special, infinity));
  }
#endif
  return wide;
}

// Loads Lanes(d) elements from `p`, with any alignment, as the compute type.
template <class D, typename C>
HWY_INLINE hn::Vec<D> LoadWide(D d, const C* p) {
  if constexpr (std::is_same_v<hn::TFromD<D>, C>) {
    return hn::LoadU(d, p);
  } else if constexpr (std::is_same_v<C, int8_t>) {
    const hn::Rebind<int8_t, D> narrow;
    const hn::RebindToSigned<D> integers;
    return hn::ConvertTo(d, hn::PromoteTo(integers, hn::LoadU(narrow, p)));
  } else {
    using H = typename HighwayType<C>::type;
    const hn::Rebind<H, D> narrow;
    return Promote(d, hn::LoadU(narrow, reinterpret_cast<const H*>(p)));
  }
}

// The same for the first `count` <= Lanes(d) elements. Reads no others; their lanes are 0.
template <class D, typename C>
HWY_INLINE hn::Vec<D> LoadWideN(D d, const C* p, size_t count) {
  if constexpr (std::is_same_v<hn::TFromD<D>, C>) {
    return hn::LoadN(d, p, count);
  } else if constexpr (std::is_same_v<C, int8_t>) {
    const hn::Rebind<int8_t, D> narrow;
    const hn::RebindToSigned<D> integers;
    // A 4-, a 2- and a 1-byte load, each if needed, took 1.2 times as long for keys of 12 (AVX2).
    return hn::ConvertTo(d, hn::PromoteTo(integers, hn::LoadN(narrow, p, count)));
  } else {
    const hn::Rebind<typename HighwayType<C>::type, D> narrow;
    const hn::Rebind<uint16_t, D> bits;
    const auto loaded = hn::LoadN(bits, reinterpret_cast<const uint16_t*>(p), count);
    return Promote(d, hn::BitCast(narrow, loaded));
  }
}

// Two elements of bfloat16 in each word.
template <class D, class W, class V = hn::Vec<D>>
HWY_INLINE void SplitEvenOdd(D d, W words, V* even, V* odd) {
  *even = hn::BitCast(d, hn::ShiftLeft<16>(words));
  *odd = hn::BitCast(d, hn::And(words, hn::Set(hn::RebindToUnsigned<D>(), 0xFFFF0000u)));
}

// Loads 2 * Lanes(d) elements from `p`, the even ones into one vector and the odd ones into
// another. In their order they would take two shuffles and a shift more, and AMD's processors have
// only two units for both.
template <class D, class V = hn::Vec<D>>
HWY_INLINE void LoadEvenOdd(D d, const BFloat16* p, V* even, V* odd) {
  const hn::Repartition<uint16_t, D> narrow;
  const auto both = hn::LoadU(narrow, reinterpret_cast<const uint16_t*>(p));
  SplitEvenOdd(d, hn::BitCast(hn::RebindToUnsigned<D>(), both), even, odd);
}

// The same for the first `count` elements, an even number. Reads no others; their lanes are 0. `p`
// is aligned for two elements: loading them one by one took 1.5 times as long for keys of 12
// (AVX2).
template <class D, class V = hn::Vec<D>>
HWY_INLINE void LoadEvenOddN(D d, const BFloat16* p, size_t count, V* even, V* odd) {
  const hn::RebindToUnsigned<D> words;
  SplitEvenOdd(d, hn::LoadN(words, reinterpret_cast<const uint32_t*>(p), count / 2), even, odd);
}

// Replaces two vectors by their even and odd elements, and the other way round.
template <class D, class V = hn::Vec<D>>
HWY_INLINE void ToEvenOdd(D d, V* first, V* second) {
  const V even = hn::ConcatEven(d, *second, *first), odd = hn::ConcatOdd(d, *second, *first);
  *first = even;
  *second = odd;
}
template <class D, class V = hn::Vec<D>>
HWY_INLINE void FromEvenOdd(D d, V* even, V* odd) {
  const V first = hn::InterleaveWholeLower(d, *even, *odd);
  *odd = hn::InterleaveWholeUpper(d, *even, *odd);
  *even = first;
}

// Returns the sum of a vector's 128-bit blocks, as one block.
template <class D>
HWY_INLINE auto SumOfBlocks(D d, hn::Vec<D> v) {
  if constexpr (d.MaxBytes() <= 16) {
    return v;
  } else {
    const hn::Half<D> half;
    return SumOfBlocks(half, hn::Add(hn::LowerHalf(half, v), hn::UpperHalf(half, v)));
  }
}

// sums[i] = scale * the sum of the lanes of vector i. Four vectors share the shuffles that one
// needs alone: a ReduceSum per vector took 34 us instead of 31 for N=512 H=8 D=64, and 9.6 instead
// of 7.4 for N=120 H=16 D=12 (AVX3, Zen 4). The sums are scaled before they are stored. Reading
// them back at once in pieces of another size would make the processor wait for the stores.
template <class D, class V = hn::Vec<D>>
HWY_INLINE void StoreScaledSums(D d, V v0, V v1, V v2, V v3, hn::TFromD<D> scale,
                                hn::TFromD<D>* HWY_RESTRICT sums) {
  const hn::CappedTag<hn::TFromD<D>, 16 / sizeof(hn::TFromD<D>)> block;
  const auto factor = hn::Set(block, scale);
  const V a = hn::Add(hn::InterleaveLower(d, v0, v1), hn::InterleaveUpper(d, v0, v1));
  const V b = hn::Add(hn::InterleaveLower(d, v2, v3), hn::InterleaveUpper(d, v2, v3));
  if constexpr (sizeof(hn::TFromD<D>) == 8) {
    hn::StoreU(hn::Mul(SumOfBlocks(d, a), factor), block, sums);
    hn::StoreU(hn::Mul(SumOfBlocks(d, b), factor), block, sums + 2);
  } else {
    const hn::Repartition<uint64_t, D> wide;
    const auto a2 = hn::BitCast(wide, a), b2 = hn::BitCast(wide, b);
    const V four = hn::Add(hn::BitCast(d, hn::InterleaveLower(wide, a2, b2)),
                           hn::BitCast(d, hn::InterleaveUpper(wide, a2, b2)));
    hn::StoreU(hn::Mul(SumOfBlocks(d, four), factor), block, sums);
  }
}

// 2^n for integers n with a normal result, built from the exponent bits.
template <class D>
HWY_INLINE hn::Vec<D> PowerOfTwo(D d, hn::Vec<D> n) {
  constexpr int kMantissaBits = sizeof(hn::TFromD<D>) == 4 ? 23 : 52;
  constexpr int kBias = sizeof(hn::TFromD<D>) == 4 ? 127 : 1023;
  const hn::RebindToSigned<D> integers;
  const auto biased = hn::Add(hn::ConvertTo(integers, n), hn::Set(integers, kBias));
  return hn::BitCast(d, hn::ShiftLeft<kMantissaBits>(biased));
}

// exp(x) for x <= 0, which is all that a softmax needs. Within 1.4 units in the last place of the
// exact value (tests/cc/vector_math_test.cc). It is 0 where that would be subnormal, for x below
// -87.3365 or -708.396, and NaN for NaN. It is as exact up to x = 64, for a softmax whose reference
// is not its maximum.
//
// x = n ln 2 + r with |r| <= ln 2 / 2. ln 2 is a sum of two numbers, so that r is exact to its last
// bits (Cody & Waite 1980). exp(r) is a minimax polynomial of degree 6 or 11.
template <class D>
HWY_INLINE hn::Vec<D> ExpOfNonPositive(D d, hn::Vec<D> x) {
  using T = hn::TFromD<D>;
  constexpr bool kFloat = sizeof(T) == 4;
  const auto set = [d](double constant) HWY_ATTR { return hn::Set(d, static_cast<T>(constant)); };
  const auto n = hn::Round(hn::Mul(x, set(1.4426950408889634)));
  auto r = hn::NegMulAdd(n, set(kFloat ? 0x1.62e4p-1 : 0x1.62e42fefap-1), x);
  r = hn::NegMulAdd(n, set(kFloat ? 0x1.7f7d1cf79abcap-20 : 0x1.cf79abc9e3b39p-40), r);
  auto p = set(0);
  if constexpr (kFloat) {
    constexpr double kCoefficients[] = {0.0013941108434,
                                        0.0083751263982,
                                        0.041666352897,
                                        0.16666415515,
                                        0.500000004712,
                                        1.00000003771,
                                        1};
    p = set(kCoefficients[0]);
    for (int i = 1; i < 7; ++i) p = hn::MulAdd(p, r, set(kCoefficients[i]));
  } else {
    constexpr double kCoefficients[] = {2.5110628766254416e-08,
                                        2.7632670412038143e-07,
                                        2.7557238777925211e-06,
                                        2.4801485389689232e-05,
                                        0.00019841269893046751,
                                        0.0013888888952414277,
                                        0.0083333333333176132,
                                        0.041666666666487648,
                                        0.16666666666666688,
                                        0.50000000000000189,
                                        1,
                                        1};
    p = set(kCoefficients[0]);
    for (int i = 1; i < 12; ++i) p = hn::MulAdd(p, r, set(kCoefficients[i]));
  }
  const auto tiny = hn::Lt(x, set(kFloat ? -87.3365 : -708.396));
  return hn::IfThenZeroElse(tiny, hn::Mul(p, PowerOfTwo(d, n)));
}

// tanh(x). Uses exponentials where they do not cancel. Near 0 it uses the first terms of the
// series; the next term would be less than 1e-8 of the result in float and 1e-16 in double.
template <class D, class V = hn::Vec<D>>
HWY_INLINE V TanhOf(D d, V x) {
  using T = hn::TFromD<D>;
  const auto set = [d](double v) HWY_ATTR { return hn::Set(d, static_cast<T>(v)); };
  const V a = hn::Abs(x), one = set(1);
  const V e = ExpOfNonPositive(d, hn::Mul(set(-2), a));
  const V far = hn::Div(hn::Sub(one, e), hn::Add(one, e));
  const V square = hn::Mul(x, x);
  constexpr double kTerms[] = {
      -1.0 / 3,         2.0 / 15,          -17.0 / 315,           62.0 / 2835,
      -1382.0 / 155925, 21844.0 / 6081075, -929569.0 / 638512875, 6404582.0 / 10854718875.0};
  constexpr int kCount = sizeof(T) == 4 ? 5 : 8;
  V p = set(kTerms[kCount - 1]);
  for (int i = kCount - 2; i >= 0; --i) p = hn::MulAdd(p, square, set(kTerms[i]));
  const V near = hn::MulAdd(hn::Mul(p, square), a, a);
  const V result = hn::IfThenElse(hn::Lt(a, set(sizeof(T) == 4 ? 0.25 : 0.12)), near, far);
  return hn::CopySign(result, x);
}

// P(Z > x) of a standard normal Z, for x >= 0. The relative error is within 2e-6 for x < 5.6 and
// 1e-5 for x < 12 in float, and within 1e-14 for x < 5.6 and 2e-13 for x < 35 in double, from the
// rounding of x^2 (tests/cc/vector_math_test.cc). Below about 1e-38 and 1e-308 it is 0.
//
// exp(x^2 / 2) P(Z > x) (x + k) is smooth in s = (x - k) / (x + k), which maps all x to [-1, 1]
// (Schonfelder 1978, for erfc). There it is a polynomial of degree 8 or 20 that interpolates at
// Chebyshev's points. With 1 + 2x in place of x + k there were two divisions, and GELU took 1.2
// times as long.
template <class D>
HWY_INLINE hn::Vec<D> NormalTail(D d, hn::Vec<D> x) {
  using T = hn::TFromD<D>;
  constexpr bool kFloat = sizeof(T) == 4;
  constexpr double kCenter = kFloat ? 2.875 : 6.5;
  const auto set = [d](double constant) HWY_ATTR { return hn::Set(d, static_cast<T>(constant)); };
  const auto one = set(1);
  const auto t = hn::Div(one, hn::Add(x, set(kCenter)));
  const auto s = hn::NegMulAdd(set(2 * kCenter), t, one);
  auto p = set(0);
  if constexpr (kFloat) {
    constexpr double kCoefficients[] = {-0.000330195536, -0.000668773279, 0.00188097862,
                                        0.00529626854,   -0.0141855102,   -0.0314297799,
                                        0.206555322,     -0.492497156,    0.724279923};
    p = set(kCoefficients[0]);
    for (int i = 1; i < 9; ++i) p = hn::MulAdd(p, s, set(kCoefficients[i]));
  } else {
    constexpr double kCoefficients[] = {
        1.8829237654433334e-08,  4.0783270981783517e-08, -1.7936852656096586e-07,
        -1.5628304637317342e-07, 1.6767286789687762e-06, -2.3695095492211456e-06,
        -8.9975493311343921e-06, 4.9999185278441434e-05, -8.1916818540822071e-05,
        -0.00021182147279350455, 0.0019171447004337732,  -0.007653213926328303,
        0.022332557059306306,    -0.053287075812685533,  0.10898017885476823,
        -0.19591458351572474,    0.31435526887368159,    -0.45468743486346158,
        0.59677160990738443,     -0.71382224390663396,   0.78020377946123376};
    p = set(kCoefficients[0]);
    for (int i = 1; i < 21; ++i) p = hn::MulAdd(p, s, set(kCoefficients[i]));
  }
  const auto exponent = hn::Mul(hn::Mul(set(-0.5), x), x);
  return hn::Mul(ExpOfNonPositive(d, exponent), hn::Mul(p, t));
}

}  // namespace HWY_NAMESPACE
}  // namespace continual_transformers
HWY_AFTER_NAMESPACE();

#endif  // CONTINUAL_TRANSFORMERS_ATTENTION_VECTOR_MATH_INL_H_
