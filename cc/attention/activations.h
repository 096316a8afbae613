// Activations: the functions of keras.activations and the unary functions of keras.ops, applied to
// each element. Kernels, plans, ops and cuda/ use this one enum.

#ifndef CONTINUAL_TRANSFORMERS_ATTENTION_ACTIVATIONS_H_
#define CONTINUAL_TRANSFORMERS_ATTENTION_ACTIVATIONS_H_

#include <cstdint>
#include <limits>

namespace continual_transformers {

enum class Activation {
  kAbsolute,
  kArccos,
  kArccosh,
  kArcsin,
  kArcsinh,
  kArctan,
  kArctanh,
  kCbrt,
  kCeil,
  kCelu,
  kCos,
  kCosh,
  kElu,
  kErf,
  kErfc,
  kExpm1,
  kExponential,
  kFloor,
  kGelu,
  kGeluTanh,
  kHardShrink,
  kHardSigmoid,
  kHardSilu,
  kHardTanh,
  kLeakyRelu,
  kLinear,
  kLog,
  kLog1p,
  kLogSigmoid,
  kMish,
  kNegative,
  kReciprocal,
  kRelu,
  kRound,
  kRsqrt,
  kSelu,
  kSigmoid,
  kSign,
  kSilu,
  kSin,
  kSinc,
  kSinh,
  kSoftShrink,
  kSoftplus,
  kSoftsign,
  kSparsePlus,
  kSparseSigmoid,
  kSqrt,
  kSquare,
  kSquareplus,
  kTan,
  kTanh,
  kTanhShrink,
  kThreshold,
  kTrunc,
};

// An activation and its parameters.
struct ActivationSpec {
  Activation kind = Activation::kLinear;
  // kCelu, kElu: alpha. kLeakyRelu, kRelu: negative_slope. kHardShrink, kSoftShrink, kThreshold:
  // threshold. kSquareplus: b.
  double a = 0;
  // kRelu: max_value, or infinity. kThreshold: value.
  double b = 0;
  // kRelu: threshold.
  double c = 0;
};

// x where it is positive, else 0.
constexpr ActivationSpec PlainRelu() {
  return {Activation::kRelu, 0, std::numeric_limits<double>::infinity(), 0};
}

// y[i] = activation(x[i]); x and y may be the same. NaN gives NaN, except for kThreshold, which
// returns `value` for it as Keras does. Instantiated for the compute types of step_types.h.
template <typename T>
void Apply(const ActivationSpec& spec, const T* x, int64_t size, T* y);

// A rough estimate of the CPU cycles per element.
int64_t CyclesPerElement(Activation activation);

}  // namespace continual_transformers

#endif  // CONTINUAL_TRANSFORMERS_ATTENTION_ACTIVATIONS_H_
