// The sum of a number of each thread of a block.

#ifndef CONTINUAL_TRANSFORMERS_CUDA_BLOCK_SUM_CUH_
#define CONTINUAL_TRANSFORMERS_CUDA_BLOCK_SUM_CUH_

#include <cuda_runtime.h>

#include "cuda/warp.cuh"

namespace continual_transformers {

constexpr int kBlockSumThreads = 256;

// Returns the sum over a block of kBlockSumThreads threads, to all of them.
template <typename T>
__device__ T SumOverBlock(T x) {
  constexpr int kWarpsOfBlock = kBlockSumThreads / kLanesPerWarp;
  __shared__ T sums[kWarpsOfBlock];
#pragma unroll
  for (int distance = kLanesPerWarp / 2; distance > 0; distance /= 2) {
    x += OfLaneAcross(x, distance);
  }
  __syncthreads();  // until the sums of an earlier call have been read
  if (threadIdx.x % kLanesPerWarp == 0) sums[threadIdx.x / kLanesPerWarp] = x;
  __syncthreads();
  x = T(0);
#pragma unroll
  for (int warp = 0; warp < kWarpsOfBlock; ++warp) x += sums[warp];
  return x;
}

}  // namespace continual_transformers

#endif  // CONTINUAL_TRANSFORMERS_CUDA_BLOCK_SUM_CUH_
