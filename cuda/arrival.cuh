// Blocks that share a piece of work and do not wait for each other: the last to arrive does what
// needs the work of all.

#ifndef CONTINUAL_TRANSFORMERS_CUDA_ARRIVAL_CUH_
#define CONTINUAL_TRANSFORMERS_CUDA_ARRIVAL_CUH_

#include <cuda_runtime.h>

#include <cstdint>

namespace continual_transformers {

// Returns whether the thread is the last of `count` that arrive at this counter, which is zero
// before the first and after the last. It does not order memory accesses: it is for a thread that
// only has to know that the others have read what it will overwrite.
__device__ inline bool ThreadArrivesLast(uint32_t* counter, uint32_t count) {
  if (count == 1) return true;
  if (atomicAdd(counter, 1u) != count - 1) return false;
  *counter = 0;
  return true;
}

// The same for blocks. All threads of a block call it. The last block sees everything that the
// other blocks wrote before they called.
__device__ inline bool ArrivesLast(uint32_t* counter, uint32_t count) {
  __shared__ bool is_last;
  __syncthreads();
  if (threadIdx.x == 0) {
    // The fences of one thread are enough: the barriers order the other threads' accesses.
    __threadfence();
    is_last = ThreadArrivesLast(counter, count);
    __threadfence();
  }
  __syncthreads();
  return is_last;
}

}  // namespace continual_transformers

#endif  // CONTINUAL_TRANSFORMERS_CUDA_ARRIVAL_CUH_
