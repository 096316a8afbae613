// The 16-bit floating-point types that a ring may hold. Kernels only widen them to float. The code
// that projects a step writes them, and the ring stores the bits.

#ifndef CONTINUAL_TRANSFORMERS_ATTENTION_HALF_H_
#define CONTINUAL_TRANSFORMERS_ATTENTION_HALF_H_

#include <cstdint>
#include <cstring>

namespace continual_transformers {

// The upper half of a float: 8 bits of exponent, 7 of mantissa.
struct BFloat16 {
  uint16_t bits;
};

// IEEE 754 binary16: 5 bits of exponent, 10 of mantissa.
struct Float16 {
  uint16_t bits;
};

inline float FloatOfBits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}

inline uint32_t BitsOfFloat(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}

// Widen converts an element of a ring to the compute type. An int8 has still to be scaled.
inline float Widen(int8_t x) { return x; }
inline float Widen(float x) { return x; }
inline double Widen(double x) { return x; }
inline float Widen(BFloat16 x) { return FloatOfBits(static_cast<uint32_t>(x.bits) << 16); }

// Has no branch, so that loops vectorize. Does no arithmetic on subnormal floats, which
// TensorFlow's threads flush to zero.
inline float Widen(Float16 x) {
  const uint32_t magnitude = x.bits & 0x7fffu;
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  // Moves the exponent to its place in a float and rebiases it. The highest exponent (infinity,
  // NaN) stays the highest.
  const uint32_t special = magnitude >= 0x7c00u ? 0x7f800000u : 0u;
  const uint32_t normal = ((magnitude << 13) + (uint32_t{127 - 15} << 23)) | special;
  const uint32_t subnormal =
      BitsOfFloat(static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f);
  return FloatOfBits((magnitude < 0x400u ? subnormal : normal) | sign);
}

}  // namespace continual_transformers

#endif  // CONTINUAL_TRANSFORMERS_ATTENTION_HALF_H_
