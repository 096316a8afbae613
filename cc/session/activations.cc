#include "cc/session/activations.h"

#include <limits>
#include <map>
#include <string>

#include "cc/session/error.h"

namespace continual_transformers {

namespace {

Activation KindOf(const std::string& name, const Node& node) {
  static const std::map<std::string, Activation> activations = {
      {"absolute", Activation::kAbsolute},
      {"arccos", Activation::kArccos},
      {"arccosh", Activation::kArccosh},
      {"arcsin", Activation::kArcsin},
      {"arcsinh", Activation::kArcsinh},
      {"arctan", Activation::kArctan},
      {"arctanh", Activation::kArctanh},
      {"cbrt", Activation::kCbrt},
      {"ceil", Activation::kCeil},
      {"celu", Activation::kCelu},
      {"cos", Activation::kCos},
      {"cosh", Activation::kCosh},
      {"elu", Activation::kElu},
      {"erf", Activation::kErf},
      {"erfc", Activation::kErfc},
      {"expm1", Activation::kExpm1},
      {"exponential", Activation::kExponential},
      {"floor", Activation::kFloor},
      {"gelu", Activation::kGelu},
      {"gelu_tanh", Activation::kGeluTanh},
      {"hard_shrink", Activation::kHardShrink},
      {"hard_sigmoid", Activation::kHardSigmoid},
      {"hard_silu", Activation::kHardSilu},
      {"hard_tanh", Activation::kHardTanh},
      {"leaky_relu", Activation::kLeakyRelu},
      {"linear", Activation::kLinear},
      {"log", Activation::kLog},
      {"log1p", Activation::kLog1p},
      {"log_sigmoid", Activation::kLogSigmoid},
      {"mish", Activation::kMish},
      {"negative", Activation::kNegative},
      {"reciprocal", Activation::kReciprocal},
      {"relu", Activation::kRelu},
      {"relu6", Activation::kRelu},
      {"round", Activation::kRound},
      {"rsqrt", Activation::kRsqrt},
      {"selu", Activation::kSelu},
      {"sigmoid", Activation::kSigmoid},
      {"sign", Activation::kSign},
      {"silu", Activation::kSilu},
      {"sin", Activation::kSin},
      {"sinc", Activation::kSinc},
      {"sinh", Activation::kSinh},
      {"soft_shrink", Activation::kSoftShrink},
      {"softplus", Activation::kSoftplus},
      {"softsign", Activation::kSoftsign},
      {"sparse_plus", Activation::kSparsePlus},
      {"sparse_sigmoid", Activation::kSparseSigmoid},
      {"sqrt", Activation::kSqrt},
      {"square", Activation::kSquare},
      {"squareplus", Activation::kSquareplus},
      {"tan", Activation::kTan},
      {"tanh", Activation::kTanh},
      {"tanh_shrink", Activation::kTanhShrink},
      {"threshold", Activation::kThreshold},
      {"trunc", Activation::kTrunc},
  };
  const auto found = activations.find(name);
  if (found == activations.end()) {
    throw Error(ErrorCode::kBadModelFile, node.name + ": there is no activation " + name);
  }
  return found->second;
}

}  // namespace

ActivationSpec ActivationNamed(const std::string& name, const Node& node) {
  ActivationSpec spec;
  spec.kind = KindOf(name, node);
  if (spec.kind == Activation::kRelu) spec = PlainRelu();
  if (name == "relu6") spec.b = 6;
  return spec;
}

ActivationSpec ActivationOf(const Node& node) {
  const std::string& name = node.Text("function");
  ActivationSpec spec = ActivationNamed(name, node);
  switch (spec.kind) {
    case Activation::kCelu:
    case Activation::kElu:
      spec.a = node.Number("alpha");
      break;
    case Activation::kLeakyRelu:
      spec.a = node.Number("negative_slope");
      break;
    case Activation::kHardShrink:
    case Activation::kSoftShrink:
      spec.a = node.Number("threshold");
      break;
    case Activation::kThreshold:
      spec.a = node.Number("threshold");
      spec.b = node.Number("value");
      break;
    case Activation::kSquareplus:
      spec.a = node.Number("b");
      break;
    case Activation::kRelu:
      if (name == "relu6") break;
      spec.a = node.Number("negative_slope");
      spec.b = node.IsNull("max_value") ? std::numeric_limits<double>::infinity()
                                        : node.Number("max_value");
      spec.c = node.Number("threshold");
      break;
    default:
      break;
  }
  return spec;
}

}  // namespace continual_transformers
