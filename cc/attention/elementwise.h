// What happens to single elements, or single rows, between a layer's products.

#ifndef CONTINUAL_TRANSFORMERS_ATTENTION_ELEMENTWISE_H_
#define CONTINUAL_TRANSFORMERS_ATTENTION_ELEMENTWISE_H_

#include <cstdint>

namespace continual_transformers {

// to[i] = from[i] in what a ring keeps, rounded to the nearest, ties to even. Instantiated for
// (T, C) of (float, BFloat16) and (float, Float16).
template <typename T, typename C>
void Narrow(const T* from, int64_t size, C* to);

// x[i] = 1 / (1 + exp(-x[i])). Instantiated, as the others, for float and double.
template <typename T>
void Sigmoid(T* x, int64_t size);

// x[i] *= factor[i].
template <typename T>
void Multiply(T* x, const T* factor, int64_t size);

}  // namespace continual_transformers

#endif  // CONTINUAL_TRANSFORMERS_ATTENTION_ELEMENTWISE_H_
