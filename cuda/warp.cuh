// Exchanges between the lanes of a warp.

#ifndef CONTINUAL_TRANSFORMERS_CUDA_WARP_CUH_
#define CONTINUAL_TRANSFORMERS_CUDA_WARP_CUH_

#include <cuda_runtime.h>

namespace continual_transformers {

constexpr int kLanesPerWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// Returns the value of the lane whose number differs in this one bit. All lanes call it.
template <typename T>
__device__ T OfLaneAcross(T value, int distance) {
  return __shfl_xor_sync(kAllLanes, value, distance);
}

// Returns the sum of a number of each of kLanes successive lanes, to all of them. All lanes of the
// warp call it.
template <int kLanes, typename T>
__device__ T SumOverLanes(T x) {
#pragma unroll
  for (int distance = kLanes / 2; distance > 0; distance /= 2) x += OfLaneAcross(x, distance);
  return x;
}

}  // namespace continual_transformers

#endif  // CONTINUAL_TRANSFORMERS_CUDA_WARP_CUH_
