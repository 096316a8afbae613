// See cuda_runtime.h.

#ifndef CONTINUAL_TRANSFORMERS_TESTS_GPU_EMULATOR_CUDA_FP16_H_
#define CONTINUAL_TRANSFORMERS_TESTS_GPU_EMULATOR_CUDA_FP16_H_

#include <cstdint>
#include <cstring>

using __half = _Float16;

inline __half __ushort_as_half(uint16_t bits) {
  __half x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}
inline uint16_t __half_as_ushort(__half x) {
  uint16_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}
inline float __half2float(__half x) { return static_cast<float>(x); }
inline __half __float2half_rn(float x) { return static_cast<__half>(x); }

#endif  // CONTINUAL_TRANSFORMERS_TESTS_GPU_EMULATOR_CUDA_FP16_H_
