// Element-wise functions: keras.activations, and the unary functions of keras.ops.

#ifndef CONTINUAL_TRANSFORMERS_ATTENTION_ACTIVATIONS_H_
#define CONTINUAL_TRANSFORMERS_ATTENTION_ACTIVATIONS_H_

#include <cstdint>
#include <string>

namespace continual_transformers {

enum class Function {
  kAbsolute,
  kCelu,
  kCos,
  kElu,
  kExponential,
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
  kRsqrt,
  kSelu,
  kSigmoid,
  kSign,
  kSilu,
  kSin,
  kSoftShrink,
  kSoftplus,
  kSoftsign,
  kSparsePlus,
  kSparseSigmoid,
  kSqrt,
  kSquare,
  kSquareplus,
  kTanh,
  kTanhShrink,
  kThreshold,
};

// A function and its parameters.
struct FunctionSpec {
  Function function = Function::kLinear;
  // kCelu, kElu: alpha. kLeakyRelu, kRelu: negative_slope. kHardShrink, kSoftShrink, kThreshold:
  // threshold. kSquareplus: b.
  double a = 0;
  // kRelu: max_value, or infinity. kThreshold: value.
  double b = 0;
  // kRelu: threshold.
  double c = 0;
};

// y[i] = function(x[i]); x and y may be the same. NaN gives NaN, except for kThreshold, which
// returns `value` for it as Keras does. Instantiated for float and double.
template <typename T>
void Apply(const FunctionSpec& spec, const T* x, int64_t size, T* y);

// A rough estimate of the CPU cycles per element.
int64_t CyclesPerElement(Function function);

}  // namespace continual_transformers

#endif  // CONTINUAL_TRANSFORMERS_ATTENTION_ACTIVATIONS_H_
