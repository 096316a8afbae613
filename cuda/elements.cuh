// Elements in memory, and in the type that kernels compute with.

#ifndef CONTINUAL_TRANSFORMERS_CUDA_ELEMENTS_CUH_
#define CONTINUAL_TRANSFORMERS_CUDA_ELEMENTS_CUH_

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "cc/attention/half.h"
#include "cc/attention/params.h"

namespace continual_transformers {

constexpr int kVectorBytes = 16;

__device__ inline float ToCompute(float x) { return x; }
__device__ inline double ToCompute(double x) { return x; }
__device__ inline float ToCompute(BFloat16 x) {
  return __uint_as_float(static_cast<uint32_t>(x.bits) << 16);
}
__device__ inline float ToCompute(Float16 x) { return __half2float(__ushort_as_half(x.bits)); }

// The elements that a thread loads with one instruction.
template <typename C, int kElements>
class alignas(sizeof(C) * kElements) Vector {
 public:
  __device__ auto Get(int i) const { return ToCompute(elements_[i]); }

 private:
  C elements_[kElements];
};

// Two elements of 16 bits stay in one register until they are used.
template <int kElements>
struct alignas(2 * kElements) Words {
  static_assert(kElements % 2 == 0);
  __device__ uint16_t Bits(int i) const {
    return static_cast<uint16_t>(i % 2 == 0 ? words[i / 2] : words[i / 2] >> 16);
  }
  uint32_t words[kElements / 2];
};
template <typename C, int kElements>
class WordVector : Words<kElements> {
 public:
  __device__ float Get(int i) const { return ToCompute(C{this->Bits(i)}); }
};
template <>
class Vector<BFloat16, 4> : public WordVector<BFloat16, 4> {};
template <>
class Vector<BFloat16, 8> : public WordVector<BFloat16, 8> {};
template <>
class Vector<Float16, 4> : public WordVector<Float16, 4> {};
template <>
class Vector<Float16, 8> : public WordVector<Float16, 8> {};

// Rounds to the nearest, ties to even.
template <typename C, typename T>
__device__ C ToStored(T x);
template <>
__device__ inline float ToStored<float, float>(float x) {
  return x;
}
template <>
__device__ inline double ToStored<double, double>(double x) {
  return x;
}
template <>
__device__ inline BFloat16 ToStored<BFloat16, float>(float x) {
  // Reads the bits from its struct. Before compute capability 8.0, the functions for them exist
  // only from CUDA 12.2 on.
  return {static_cast<__nv_bfloat16_raw>(__float2bfloat16_rn(x)).x};
}
template <>
__device__ inline Float16 ToStored<Float16, float>(float x) {
  return {__half_as_ushort(__float2half_rn(x))};
}

// Returns whether vectors of so many bytes can be loaded from `data`, and from every multiple of
// `stride` elements after it.
template <typename C>
bool IsAligned(const C* data, int64_t stride, int bytes = kVectorBytes) {
  return reinterpret_cast<uintptr_t>(data) % bytes == 0 &&
         stride * static_cast<int64_t>(sizeof(C)) % bytes == 0;
}

// The same for all rows that these strides lead to.
template <typename C>
bool IsAligned(const C* data, const Strides& strides, int bytes = kVectorBytes) {
  return IsAligned(data, strides.stream, bytes) && IsAligned(data, strides.step, bytes) &&
         IsAligned(data, strides.head, bytes);
}

}  // namespace continual_transformers

#endif  // CONTINUAL_TRANSFORMERS_CUDA_ELEMENTS_CUH_
