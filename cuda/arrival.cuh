// Blocks that wait for nobody: the last of those that share a piece of work does what needs all.

#ifndef CONTINUAL_TRANSFORMERS_CUDA_ARRIVAL_CUH_
#define CONTINUAL_TRANSFORMERS_CUDA_ARRIVAL_CUH_

#include <cuda_runtime.h>

#include <cstdint>

namespace continual_transformers {

// Whether the thread is the last of `count` that arrive at this counter, which is zero before the
// first and after the last. It orders nothing: for a thread that only has to know that the others
// have read what it is about to overwrite.
__device__ inline bool ThreadArrivesLast(uint32_t* counter, uint32_t count) {
  if (count == 1) return true;
  if (atomicAdd(counter, 1u) != count - 1) return false;
  *counter = 0;
  return true;
}

// The same of blocks, called by all their threads: and to the last one everything is visible that
// the others wrote before they called.
__device__ inline bool ArrivesLast(uint32_t* counter, uint32_t count) {
  __shared__ bool is_last;
  __syncthreads();
  if (threadIdx.x == 0) {
    // One thread's fences are enough for what the barriers show it of the others.
    __threadfence();
    is_last = ThreadArrivesLast(counter, count);
    __threadfence();
  }
  __syncthreads();
  return is_last;
}

}  // namespace continual_transformers

#endif  // CONTINUAL_TRANSFORMERS_CUDA_ARRIVAL_CUH_
