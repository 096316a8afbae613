// What happens to single elements, or single rows, between a layer's products.

#ifndef CONTINUAL_TRANSFORMERS_ATTENTION_ELEMENTWISE_H_
#define CONTINUAL_TRANSFORMERS_ATTENTION_ELEMENTWISE_H_

#include <cstdint>

namespace continual_transformers {

// to[i] = from[i] in what a ring keeps, rounded to the nearest, ties to even. Instantiated for
// (T, C) of (float, BFloat16) and (float, Float16).
template <typename T, typename C>
void Narrow(const T* from, int64_t size, C* to);

// x[i] *= factor[i]. Instantiated, as the others, for float and double.
template <typename T>
void Multiply(T* x, const T* factor, int64_t size);

// x[i] += other[i].
template <typename T>
void Add(T* x, const T* other, int64_t size);

// What layer normalization multiplies and adds, [size] each.
template <typename T>
struct LayerNorm {
  const T* scale;
  const T* offset;
  T epsilon;
};

// Each row of y [rows, size] is that of x, less its mean, over its standard deviation (of variance
// plus epsilon), scaled and offset. x and y may be the same.
template <typename T>
void Normalize(const LayerNorm<T>& norm, const T* x, int64_t rows, int64_t size, T* y);

}  // namespace continual_transformers

#endif  // CONTINUAL_TRANSFORMERS_ATTENTION_ELEMENTWISE_H_
