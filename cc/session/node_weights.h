// The weights of a plan's nodes as numbers, for the compilers of all devices.

#ifndef CONTINUAL_TRANSFORMERS_SESSION_NODE_WEIGHTS_H_
#define CONTINUAL_TRANSFORMERS_SESSION_NODE_WEIGHTS_H_

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "cc/attention/half.h"
#include "cc/session/error.h"
#include "cc/session/model_file.h"
#include "cc/session/plan.h"

namespace continual_transformers {

template <typename From, typename T>
void CopyElements(const Tensor& tensor, std::vector<T>* to) {
  const char* from = static_cast<const char*>(tensor.data);
  for (size_t i = 0; i < to->size(); ++i) {
    From x;
    std::memcpy(&x, from + i * sizeof(From), sizeof(From));  // The tensor may be unaligned.
    if constexpr (std::is_arithmetic_v<From>) {
      (*to)[i] = static_cast<T>(x);
    } else {
      (*to)[i] = static_cast<T>(Widen(x));
    }
  }
}

template <typename T>
std::vector<T> ElementsOf(const Tensor& tensor) {
  std::vector<T> elements(tensor.elements());
  switch (tensor.dtype) {
    case DType::kFloat32:
      CopyElements<float>(tensor, &elements);
      break;
    case DType::kFloat64:
      CopyElements<double>(tensor, &elements);
      break;
    case DType::kBFloat16:
      CopyElements<BFloat16>(tensor, &elements);
      break;
    case DType::kFloat16:
      CopyElements<Float16>(tensor, &elements);
      break;
    case DType::kInt32:
      CopyElements<int32_t>(tensor, &elements);
      break;
    case DType::kInt64:
      CopyElements<int64_t>(tensor, &elements);
      break;
    case DType::kBool:
      CopyElements<bool>(tensor, &elements);
      break;
    case DType::kInt8:
      throw Error(ErrorCode::kInternal, "a tensor of a model file is int8");
  }
  return elements;
}

// The numbers of x * scale + offset, along the last axis.
template <typename T>
struct Affine {
  std::vector<T> scale, offset;
};

// Returns the numbers of an `affine` or `batch_norm` node.
template <typename T>
Affine<T> AffineOf(const ModelFile& file, const Node& node) {
  const auto weight = [&](const char* name) -> const Tensor& {
    return file.tensor(node.weights.at(name));
  };
  if (node.op == Op::kAffine) {
    return {ElementsOf<T>(weight("scale")), ElementsOf<T>(weight("offset"))};
  }
  const std::vector<double> mean = ElementsOf<double>(weight("mean"));
  const std::vector<double> variance = ElementsOf<double>(weight("variance"));
  const auto doubles = [&](const char* name, double otherwise) {
    return node.weights.count(name) > 0 ? ElementsOf<double>(weight(name))
                                        : std::vector<double>(mean.size(), otherwise);
  };
  const std::vector<double> gamma = doubles("gamma", 1), beta = doubles("beta", 0);
  Affine<T> affine;
  for (size_t i = 0; i < mean.size(); ++i) {
    const double scale = gamma[i] / std::sqrt(variance[i] + node.Number("epsilon"));
    affine.scale.push_back(static_cast<T>(scale));
    affine.offset.push_back(static_cast<T>(beta[i] - mean[i] * scale));
  }
  return affine;
}

}  // namespace continual_transformers

#endif  // CONTINUAL_TRANSFORMERS_SESSION_NODE_WEIGHTS_H_
