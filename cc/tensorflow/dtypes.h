// TensorFlow's names for the types of step_types.h.

#ifndef CONTINUAL_TRANSFORMERS_TENSORFLOW_DTYPES_H_
#define CONTINUAL_TRANSFORMERS_TENSORFLOW_DTYPES_H_

#include "cc/attention/half.h"
#include "tensorflow/core/framework/tensor.h"
#include "tensorflow/core/framework/types.h"

namespace continual_transformers {

// The type with the same bits in TensorFlow.
template <typename C>
struct TensorFlowType {
  using type = C;
};
template <>
struct TensorFlowType<BFloat16> {
  using type = Eigen::bfloat16;
};
template <>
struct TensorFlowType<Float16> {
  using type = Eigen::half;
};
template <typename C>
constexpr tensorflow::DataType kDataType =
    tensorflow::DataTypeToEnum<typename TensorFlowType<C>::type>::value;

template <typename C>
C* Data(tensorflow::Tensor* tensor) {
  return reinterpret_cast<C*>(tensor->flat<typename TensorFlowType<C>::type>().data());
}
template <typename C>
const C* Data(const tensorflow::Tensor& tensor) {
  return reinterpret_cast<const C*>(tensor.flat<typename TensorFlowType<C>::type>().data());
}

}  // namespace continual_transformers

#endif  // CONTINUAL_TRANSFORMERS_TENSORFLOW_DTYPES_H_
