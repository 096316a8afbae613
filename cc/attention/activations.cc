#include "cc/attention/activations.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "cc/attention/step_types.h"
#include "cc/attention/targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cc/attention/activations.cc"
#include "hwy/foreach_target.h"
// Must follow foreach_target.h: otherwise these are compiled for one target only.
#include "cc/attention/vector_math-inl.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace continual_transformers {
namespace HWY_NAMESPACE {

// y[i] = f(x[i]), a vector of lanes at a time.
template <typename T, class F>
HWY_INLINE void Map(const T* x, int64_t size, T* y, const F& f) {
  const hn::ScalableTag<T> d;
  constexpr int64_t kLanes = hn::Lanes(d);
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) hn::StoreU(f(d, hn::LoadU(d, x + i)), d, y + i);
  if (i < size) hn::StoreN(f(d, hn::LoadN(d, x + i, size - i)), d, y + i, size - i);
}

// 1 / (1 + exp(-x)). exp of a number that is not positive cannot overflow.
template <class D, class V = hn::Vec<D>>
HWY_INLINE V SigmoidOf(D d, V x) {
  const V one = hn::Set(d, hn::TFromD<D>(1));
  const V e = ExpOfNonPositive(d, hn::Neg(hn::Abs(x)));
  return hn::Div(hn::IfThenElse(hn::Lt(x, hn::Zero(d)), e, one), hn::Add(one, e));
}

// x P(Z <= x) for a standard normal Z (Hendrycks & Gimpel 2016, arXiv 1606.08415).
template <class D, class V = hn::Vec<D>>
HWY_INLINE V GeluOf(D d, V x) {
  const V tail = NormalTail(d, hn::Abs(x));
  const V one = hn::Set(d, hn::TFromD<D>(1));
  return hn::Mul(x, hn::IfThenElse(hn::Lt(x, hn::Zero(d)), tail, hn::Sub(one, tail)));
}

template <class D, class V = hn::Vec<D>>
HWY_INLINE V GeluTanhOf(D d, V x) {
  using T = hn::TFromD<D>;
  const auto set = [d](double v) HWY_ATTR { return hn::Set(d, static_cast<T>(v)); };
  // 0.5 (1 + tanh(u)) is the sigmoid of 2u, which does not cancel.
  const V u = hn::Mul(set(2 * 0.79788456080286536),
                      hn::MulAdd(hn::Mul(set(0.044715), hn::Mul(x, x)), x, x));
  return hn::Mul(x, SigmoidOf(d, u));
}

// Applies the common functions, a vector at a time. Returns false for other functions.
template <typename T>
bool ApplyVectors(const ActivationSpec& spec, const T* x, int64_t size, T* y) {
  switch (spec.kind) {
    case Activation::kGelu:
      Map(x, size, y, [](auto d, auto v) HWY_ATTR { return GeluOf(d, v); });
      return true;
    case Activation::kGeluTanh:
      Map(x, size, y, [](auto d, auto v) HWY_ATTR { return GeluTanhOf(d, v); });
      return true;
    case Activation::kSigmoid:
      Map(x, size, y, [](auto d, auto v) HWY_ATTR { return SigmoidOf(d, v); });
      return true;
    case Activation::kSilu:
      Map(x, size, y, [](auto d, auto v) HWY_ATTR { return hn::Mul(v, SigmoidOf(d, v)); });
      return true;
    case Activation::kTanh:
      Map(x, size, y, [](auto d, auto v) HWY_ATTR { return TanhOf(d, v); });
      return true;
    default:
      return false;
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace continual_transformers
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace continual_transformers {
namespace {

template <typename T>
bool TryVectors(const ActivationSpec& spec, const T* x, int64_t size, T* y) {
  CONTINUAL_TRANSFORMERS_DISPATCH(ApplyVectors, spec, x, size, y);
}

template <typename T, class F>
void Each(const T* x, int64_t size, T* y, const F& f) {
  for (int64_t i = 0; i < size; ++i) y[i] = f(x[i]);
}

template <typename T>
T SoftplusOf(T x) {
  return std::max(x, T(0)) + std::log1p(std::exp(-std::abs(x)));
}

template <typename T>
T Clip(T x, T low, T high) {
  return x < low ? low : x > high ? high : x;
}

}  // namespace

template <typename T>
void Apply(const ActivationSpec& spec, const T* x, int64_t size, T* y) {
  if (TryVectors(spec, x, size, y)) return;
  const T a = static_cast<T>(spec.a), b = static_cast<T>(spec.b), c = static_cast<T>(spec.c);
  switch (spec.kind) {
    case Activation::kAbsolute:
      return Each(x, size, y, [](T v) { return std::abs(v); });
    case Activation::kArccos:
      return Each(x, size, y, [](T v) { return std::acos(v); });
    case Activation::kArccosh:
      return Each(x, size, y, [](T v) { return std::acosh(v); });
    case Activation::kArcsin:
      return Each(x, size, y, [](T v) { return std::asin(v); });
    case Activation::kArcsinh:
      return Each(x, size, y, [](T v) { return std::asinh(v); });
    case Activation::kArctan:
      return Each(x, size, y, [](T v) { return std::atan(v); });
    case Activation::kArctanh:
      return Each(x, size, y, [](T v) { return std::atanh(v); });
    case Activation::kCbrt:
      return Each(x, size, y, [](T v) { return std::cbrt(v); });
    case Activation::kCeil:
      return Each(x, size, y, [](T v) { return std::ceil(v); });
    case Activation::kCelu:
      return Each(x, size, y, [a](T v) { return v > 0 ? v : a * std::expm1(v / a); });
    case Activation::kCos:
      return Each(x, size, y, [](T v) { return std::cos(v); });
    case Activation::kCosh:
      return Each(x, size, y, [](T v) { return std::cosh(v); });
    case Activation::kElu:
      return Each(x, size, y, [a](T v) { return v > 0 ? v : a * std::expm1(v); });
    case Activation::kErf:
      return Each(x, size, y, [](T v) { return std::erf(v); });
    case Activation::kErfc:
      return Each(x, size, y, [](T v) { return std::erfc(v); });
    case Activation::kExpm1:
      return Each(x, size, y, [](T v) { return std::expm1(v); });
    case Activation::kExponential:
      return Each(x, size, y, [](T v) { return std::exp(v); });
    case Activation::kFloor:
      return Each(x, size, y, [](T v) { return std::floor(v); });
    case Activation::kHardShrink:
      return Each(x, size, y, [a](T v) { return std::abs(v) <= a ? T(0) : v; });
    case Activation::kHardSigmoid:
      return Each(x, size, y, [](T v) { return Clip(v + 3, T(0), T(6)) / 6; });
    case Activation::kHardSilu:
      return Each(x, size, y, [](T v) { return v * (Clip(v + 3, T(0), T(6)) / 6); });
    case Activation::kHardTanh:
      return Each(x, size, y, [](T v) { return Clip(v, T(-1), T(1)); });
    case Activation::kLeakyRelu:
      return Each(x, size, y, [a](T v) { return v < 0 ? a * v : v; });
    case Activation::kLinear:
      if (x != y) std::copy_n(x, size, y);
      return;
    case Activation::kLog:
      return Each(x, size, y, [](T v) { return std::log(v); });
    case Activation::kLog1p:
      return Each(x, size, y, [](T v) { return std::log1p(v); });
    case Activation::kLogSigmoid:
      return Each(x, size, y, [](T v) { return -SoftplusOf(-v); });
    case Activation::kMish:
      return Each(x, size, y, [](T v) { return v * std::tanh(SoftplusOf(v)); });
    case Activation::kNegative:
      return Each(x, size, y, [](T v) { return -v; });
    case Activation::kReciprocal:
      return Each(x, size, y, [](T v) { return 1 / v; });
    case Activation::kRelu:
      if (a == 0 && c == 0 && std::isinf(b)) {
        return Each(x, size, y, [](T v) { return v < 0 ? T(0) : v; });
      }
      return Each(x, size, y, [a, b, c](T v) {
        return v < c ? (a == 0 ? T(0) : a * (v - c)) : v > b ? b : v;
      });
    case Activation::kRound:  // Half to even, the default rounding mode.
      return Each(x, size, y, [](T v) { return std::nearbyint(v); });
    case Activation::kRsqrt:
      return Each(x, size, y, [](T v) { return 1 / std::sqrt(v); });
    case Activation::kSelu:
      return Each(x, size, y, [](T v) {
        constexpr T kScale = T(1.0507009873554805), kAlpha = T(1.6732632423543772);
        return kScale * (v > 0 ? v : kAlpha * std::expm1(v));
      });
    case Activation::kSign:
      return Each(x, size, y, [](T v) { return v > 0 ? T(1) : v < 0 ? T(-1) : v; });
    case Activation::kSin:
      return Each(x, size, y, [](T v) { return std::sin(v); });
    case Activation::kSinc:
      return Each(x, size, y, [](T v) {
        constexpr T kPi = T(3.14159265358979323846);
        return v == 0 ? T(1) : std::sin(kPi * v) / (kPi * v);
      });
    case Activation::kSinh:
      return Each(x, size, y, [](T v) { return std::sinh(v); });
    case Activation::kSoftShrink:
      return Each(x, size, y, [a](T v) { return v > a ? v - a : v < -a ? v + a : v * 0; });
    case Activation::kSoftplus:
      return Each(x, size, y, [](T v) { return SoftplusOf(v); });
    case Activation::kSoftsign:
      return Each(x, size, y, [](T v) { return v / (1 + std::abs(v)); });
    case Activation::kSparsePlus:
      return Each(x, size, y, [](T v) {
        return v <= -1 ? T(0) : v >= 1 ? v : (v + 1) * (v + 1) / 4;
      });
    case Activation::kSparseSigmoid:
      return Each(x, size, y, [](T v) { return v <= -1 ? T(0) : v >= 1 ? T(1) : (v + 1) / 2; });
    case Activation::kSqrt:
      return Each(x, size, y, [](T v) { return std::sqrt(v); });
    case Activation::kSquare:
      return Each(x, size, y, [](T v) { return v * v; });
    case Activation::kSquareplus:
      return Each(x, size, y, [a](T v) { return (v + std::sqrt(v * v + a)) / 2; });
    case Activation::kTan:
      return Each(x, size, y, [](T v) { return std::tan(v); });
    case Activation::kTanhShrink:
      return Each(x, size, y, [](T v) { return v - std::tanh(v); });
    case Activation::kThreshold:
      return Each(x, size, y, [a, b](T v) { return v > a ? v : b; });
    case Activation::kTrunc:
      return Each(x, size, y, [](T v) { return std::trunc(v); });
    case Activation::kGelu:
    case Activation::kGeluTanh:
    case Activation::kSigmoid:
    case Activation::kSilu:
    case Activation::kTanh:
      return;  // ApplyVectors has done it
  }
}

int64_t CyclesPerElement(Activation activation) {
  switch (activation) {
    case Activation::kAbsolute:
    case Activation::kCeil:
    case Activation::kFloor:
    case Activation::kHardShrink:
    case Activation::kHardSigmoid:
    case Activation::kHardSilu:
    case Activation::kHardTanh:
    case Activation::kLeakyRelu:
    case Activation::kLinear:
    case Activation::kNegative:
    case Activation::kRelu:
    case Activation::kRound:
    case Activation::kSign:
    case Activation::kSquare:
    case Activation::kTrunc:
      return 1;
    case Activation::kGelu:
    case Activation::kGeluTanh:
    case Activation::kSigmoid:
    case Activation::kSilu:
    case Activation::kTanh:
      return 6;
    default:
      return 30;
  }
}

#define INSTANTIATE(T) template void Apply<T>(const ActivationSpec&, const T*, int64_t, T*);
CONTINUAL_TRANSFORMERS_FOR_COMPUTE_TYPES(INSTANTIATE)
#undef INSTANTIATE

}  // namespace continual_transformers
#endif  // HWY_ONCE
