// See cuda_runtime.h.

#ifndef CONTINUAL_TRANSFORMERS_TESTS_GPU_EMULATOR_CUDA_BF16_H_
#define CONTINUAL_TRANSFORMERS_TESTS_GPU_EMULATOR_CUDA_BF16_H_

#include <cmath>
#include <cstdint>
#include <cstring>

struct __nv_bfloat16_raw {
  unsigned short x;
};
struct __nv_bfloat16 {
  uint16_t bits;
  operator __nv_bfloat16_raw() const { return {bits}; }
};

inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  if (std::isnan(x)) return {0x7fff};
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

#endif  // CONTINUAL_TRANSFORMERS_TESTS_GPU_EMULATOR_CUDA_BF16_H_
