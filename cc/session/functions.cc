#include "cc/session/functions.h"

#include <limits>
#include <map>
#include <string>

#include "cc/session/error.h"

namespace continual_transformers {

FunctionSpec FunctionOf(const Node& node) {
  static const std::map<std::string, Function> functions = {
      {"absolute", Function::kAbsolute},
      {"celu", Function::kCelu},
      {"cos", Function::kCos},
      {"elu", Function::kElu},
      {"exponential", Function::kExponential},
      {"gelu", Function::kGelu},
      {"gelu_tanh", Function::kGeluTanh},
      {"hard_shrink", Function::kHardShrink},
      {"hard_sigmoid", Function::kHardSigmoid},
      {"hard_silu", Function::kHardSilu},
      {"hard_tanh", Function::kHardTanh},
      {"leaky_relu", Function::kLeakyRelu},
      {"linear", Function::kLinear},
      {"log", Function::kLog},
      {"log1p", Function::kLog1p},
      {"log_sigmoid", Function::kLogSigmoid},
      {"mish", Function::kMish},
      {"negative", Function::kNegative},
      {"reciprocal", Function::kReciprocal},
      {"relu", Function::kRelu},
      {"relu6", Function::kRelu},
      {"rsqrt", Function::kRsqrt},
      {"selu", Function::kSelu},
      {"sigmoid", Function::kSigmoid},
      {"sign", Function::kSign},
      {"silu", Function::kSilu},
      {"sin", Function::kSin},
      {"soft_shrink", Function::kSoftShrink},
      {"softplus", Function::kSoftplus},
      {"softsign", Function::kSoftsign},
      {"sparse_plus", Function::kSparsePlus},
      {"sparse_sigmoid", Function::kSparseSigmoid},
      {"sqrt", Function::kSqrt},
      {"square", Function::kSquare},
      {"squareplus", Function::kSquareplus},
      {"tanh", Function::kTanh},
      {"tanh_shrink", Function::kTanhShrink},
      {"threshold", Function::kThreshold},
  };
  const std::string& name = node.Text("function");
  const auto found = functions.find(name);
  if (found == functions.end()) {
    throw Error(ErrorCode::kBadModelFile, node.name + ": there is no activation " + name);
  }
  FunctionSpec spec;
  spec.function = found->second;
  switch (spec.function) {
    case Function::kCelu:
    case Function::kElu:
      spec.a = node.Number("alpha");
      break;
    case Function::kLeakyRelu:
      spec.a = node.Number("negative_slope");
      break;
    case Function::kHardShrink:
    case Function::kSoftShrink:
      spec.a = node.Number("threshold");
      break;
    case Function::kThreshold:
      spec.a = node.Number("threshold");
      spec.b = node.Number("value");
      break;
    case Function::kSquareplus:
      spec.a = node.Number("b");
      break;
    case Function::kRelu:
      if (name == "relu6") {
        spec.b = 6;
        break;
      }
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
