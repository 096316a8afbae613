// Element-wise and row-wise operations between a layer's products.

#ifndef CONTINUAL_TRANSFORMERS_ATTENTION_ELEMENTWISE_H_
#define CONTINUAL_TRANSFORMERS_ATTENTION_ELEMENTWISE_H_

#include <cstdint>

namespace continual_transformers {

// Converts to the type of a ring, rounding to nearest, ties to even. Instantiated for (T, C) of
// (float, BFloat16) and (float, Float16).
template <typename T, typename C>
void Narrow(const T* from, int64_t size, C* to);

// Converts a row to int8 with a scale: to[i] times the scale is from[i], give or take half a scale.
// A row with an infinity or NaN has the scale NaN.
void Quantize(const float* from, int64_t size, int8_t* to, float* scale);

// x[i] *= factor[i]. Instantiated, like the functions below, for the compute types of step_types.h.
template <typename T>
void Multiply(T* x, const T* factor, int64_t size);

// x[i] += other[i].
template <typename T>
void Add(T* x, const T* other, int64_t size);

// The scale and offset of layer normalization, [size] each.
template <typename T>
struct LayerNorm {
  const T* scale;
  const T* offset;
  T epsilon;
};

// Normalizes each row of x [rows, size] to y: subtracts its mean, divides by its standard deviation
// (of the variance plus epsilon), scales and offsets. x and y may be the same.
template <typename T>
void Normalize(const LayerNorm<T>& norm, const T* x, int64_t rows, int64_t size, T* y);

}  // namespace continual_transformers

#endif  // CONTINUAL_TRANSFORMERS_ATTENTION_ELEMENTWISE_H_
