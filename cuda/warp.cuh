// What the lanes of a warp do together.

#ifndef CONTINUAL_TRANSFORMERS_CUDA_WARP_CUH_
#define CONTINUAL_TRANSFORMERS_CUDA_WARP_CUH_

#include <cuda_runtime.h>

namespace continual_transformers {

constexpr int kLanesPerWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// The value of the lane whose number differs in this one bit. To be called by all lanes.
template <typename T>
__device__ T OfLaneAcross(T value, int distance) {
  return __shfl_xor_sync(kAllLanes, value, distance);
}

}  // namespace continual_transformers

#endif  // CONTINUAL_TRANSFORMERS_CUDA_WARP_CUH_
