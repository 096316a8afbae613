// The activations of a plan; see Apply in cc/attention/activations.cc.

#ifndef CONTINUAL_TRANSFORMERS_CUDA_SESSION_ACTIVATE_CUH_
#define CONTINUAL_TRANSFORMERS_CUDA_SESSION_ACTIVATE_CUH_

#include <cuda_runtime.h>

#include <cmath>

#include "cc/attention/activations.h"

namespace continual_transformers {

// An ActivationSpec in the type of the computation.
struct DeviceActivation {
  explicit DeviceActivation(const ActivationSpec& spec)
      : kind(spec.kind),
        a(static_cast<float>(spec.a)),
        b(static_cast<float>(spec.b)),
        c(static_cast<float>(spec.c)) {}

  Activation kind;
  float a, b, c;
};

// 1 / (1 + exp(-x)). exp of a number that is not positive cannot overflow.
__device__ inline float SigmoidOf(float x) {
  const float e = std::exp(-std::abs(x));
  return (x < 0 ? e : 1.f) / (1.f + e);
}

__device__ inline float SoftplusOf(float x) {
  return (x < 0 ? 0.f : x) + std::log1p(std::exp(-std::abs(x)));
}

__device__ inline float Clip(float x, float low, float high) {
  return x < low ? low : x > high ? high : x;
}

// NaN gives NaN, except for kThreshold.
__device__ inline float Activate(const DeviceActivation& f, float x) {
  switch (f.kind) {
    case Activation::kAbsolute:
      return std::abs(x);
    case Activation::kArccos:
      return std::acos(x);
    case Activation::kArccosh:
      return std::acosh(x);
    case Activation::kArcsin:
      return std::asin(x);
    case Activation::kArcsinh:
      return std::asinh(x);
    case Activation::kArctan:
      return std::atan(x);
    case Activation::kArctanh:
      return std::atanh(x);
    case Activation::kCbrt:
      return std::cbrt(x);
    case Activation::kCeil:
      return std::ceil(x);
    case Activation::kCelu:
      return x > 0 ? x : f.a * std::expm1(x / f.a);
    case Activation::kCos:
      return std::cos(x);
    case Activation::kCosh:
      return std::cosh(x);
    case Activation::kElu:
      return x > 0 ? x : f.a * std::expm1(x);
    case Activation::kErf:
      return std::erf(x);
    case Activation::kErfc:
      return std::erfc(x);
    case Activation::kExpm1:
      return std::expm1(x);
    case Activation::kExponential:
      return std::exp(x);
    case Activation::kFloor:
      return std::floor(x);
    case Activation::kGelu:
      return 0.5f * x * std::erfc(x * -0.70710678118654752f);
    case Activation::kGeluTanh:
      // 0.5 (1 + tanh(u)) is the sigmoid of 2u, which does not cancel.
      return x * SigmoidOf(2 * 0.79788456080286536f * (x + 0.044715f * x * x * x));
    case Activation::kHardShrink:
      return std::abs(x) <= f.a ? 0.f : x;
    case Activation::kHardSigmoid:
      return Clip(x + 3, 0, 6) / 6;
    case Activation::kHardSilu:
      return x * (Clip(x + 3, 0, 6) / 6);
    case Activation::kHardTanh:
      return Clip(x, -1, 1);
    case Activation::kLeakyRelu:
      return x < 0 ? f.a * x : x;
    case Activation::kLinear:
      return x;
    case Activation::kLog:
      return std::log(x);
    case Activation::kLog1p:
      return std::log1p(x);
    case Activation::kLogSigmoid:
      return -SoftplusOf(-x);
    case Activation::kMish:
      return x * std::tanh(SoftplusOf(x));
    case Activation::kNegative:
      return -x;
    case Activation::kReciprocal:
      return 1 / x;
    case Activation::kRelu:
      return x < f.c ? (f.a == 0 ? 0.f : f.a * (x - f.c)) : x > f.b ? f.b : x;
    case Activation::kRound:
      return std::nearbyint(x);
    case Activation::kRsqrt:
      return 1 / std::sqrt(x);
    case Activation::kSelu:
      return 1.0507009873554805f * (x > 0 ? x : 1.6732632423543772f * std::expm1(x));
    case Activation::kSigmoid:
      return SigmoidOf(x);
    case Activation::kSign:
      return x > 0 ? 1.f : x < 0 ? -1.f : x;
    case Activation::kSilu:
      return x * SigmoidOf(x);
    case Activation::kSin:
      return std::sin(x);
    case Activation::kSinc: {
      const float angle = 3.14159265358979323846f * x;
      return x == 0 ? 1.f : std::sin(angle) / angle;
    }
    case Activation::kSinh:
      return std::sinh(x);
    case Activation::kSoftShrink:
      return x > f.a ? x - f.a : x < -f.a ? x + f.a : x * 0;
    case Activation::kSoftplus:
      return SoftplusOf(x);
    case Activation::kSoftsign:
      return x / (1 + std::abs(x));
    case Activation::kSparsePlus:
      return x <= -1 ? 0.f : x >= 1 ? x : (x + 1) * (x + 1) / 4;
    case Activation::kSparseSigmoid:
      return x <= -1 ? 0.f : x >= 1 ? 1.f : (x + 1) / 2;
    case Activation::kSqrt:
      return std::sqrt(x);
    case Activation::kSquare:
      return x * x;
    case Activation::kSquareplus:
      return (x + std::sqrt(x * x + f.a)) / 2;
    case Activation::kTan:
      return std::tan(x);
    case Activation::kTanh:
      return std::tanh(x);
    case Activation::kTanhShrink:
      return x - std::tanh(x);
    case Activation::kThreshold:
      return x > f.a ? x : f.b;
    case Activation::kTrunc:
      return std::trunc(x);
  }
  return x;
}

}  // namespace continual_transformers

#endif  // CONTINUAL_TRANSFORMERS_CUDA_SESSION_ACTIVATE_CUH_
