// Blocks that wait for nobody: the last of those that share a piece of work does what needs all.

#ifndef CONTINUAL_TRANSFORMERS_CUDA_ARRIVAL_CUH_
#define CONTINUAL_TRANSFORMERS_CUDA_ARRIVAL_CUH_

#include <cuda_runtime.h>

#include <cstdint>

namespace continual_transformers {

// To be called by all threads of a block. True for the last of `count` blocks that call it with
// this counter, to which everything is visible that the others wrote before they called. The
// counter is zero before the first and after the last.
__device__ inline bool ArrivesLast(uint32_t* counter, uint32_t count) {
  __shared__ bool is_last;
  __threadfence();
  __syncthreads();
  if (count == 1) return true;
  if (threadIdx.x == 0) {
    is_last = atomicAdd(counter, 1u) == count - 1;
    if (is_last) *counter = 0;
  }
  __syncthreads();
  __threadfence();
  return is_last;
}

}  // namespace continual_transformers

#endif  // CONTINUAL_TRANSFORMERS_CUDA_ARRIVAL_CUH_
