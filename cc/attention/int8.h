// Numbers in 8 bits: a whole number from -127 to 127 times a scale that many numbers share.

#ifndef CONTINUAL_TRANSFORMERS_ATTENTION_INT8_H_
#define CONTINUAL_TRANSFORMERS_ATTENTION_INT8_H_

#include <cmath>
#include <cstdint>

namespace continual_transformers {

// The largest magnitude of a group of numbers is this many scales.
constexpr float kMostInt8 = 127;

// Returns x / scale, rounded to even. 0 if the scale is 0, infinite or NaN: products with such a
// scale are then 0 or NaN, as they should be.
inline int8_t Quantized(float x, float scale) {
  const float quotient = x / scale;
  return std::abs(quotient) <= 2 * kMostInt8 ? static_cast<int8_t>(std::nearbyint(quotient)) : 0;
}

}  // namespace continual_transformers

#endif  // CONTINUAL_TRANSFORMERS_ATTENTION_INT8_H_
