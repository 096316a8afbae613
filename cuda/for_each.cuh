// Launches of one thread for each of many like things.

#ifndef CONTINUAL_TRANSFORMERS_CUDA_FOR_EACH_CUH_
#define CONTINUAL_TRANSFORMERS_CUDA_FOR_EACH_CUH_

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/launch.cuh"

namespace continual_transformers {

constexpr int kMostThreadsOfForEach = 256;

template <typename F>
struct ForEachParams {
  F f;
  int64_t count;
};

template <typename F>
__global__ void __launch_bounds__(kMostThreadsOfForEach)
    ForEachKernel(const __grid_constant__ ForEachParams<F> p) {
  ReleaseNext();
  WaitForPrevious();
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < p.count) p.f(i);
}

// Calls f(i) for i = 0, ..., count - 1, in any order. F is a struct of plain data with a
// `__device__ void operator()(int64_t i) const`. `overlap`: see Launch().
template <typename F>
cudaError_t ForEach(int64_t count, const F& f, bool overlap, cudaStream_t stream) {
  // A few things need no more than whole warps.
  const int64_t threads =
      count < kMostThreadsOfForEach ? (count + 31) / 32 * 32 : kMostThreadsOfForEach;
  if (count == 0) return cudaSuccess;
  return Launch(ForEachKernel<F>, (count + threads - 1) / threads, static_cast<int>(threads),
                overlap, stream, ForEachParams<F>{f, count});
}

}  // namespace continual_transformers

#endif  // CONTINUAL_TRANSFORMERS_CUDA_FOR_EACH_CUH_
