// Launches kernels, and lets them overlap.

#ifndef CONTINUAL_TRANSFORMERS_CUDA_LAUNCH_CUH_
#define CONTINUAL_TRANSFORMERS_CUDA_LAUNCH_CUH_

#include <cuda_runtime.h>

#include <cstdint>
#include <limits>

#include "cuda/graph_builder.h"

namespace continual_transformers {

// With `overlap`, the kernel may begin while the kernel before it on the stream, or in the graph of
// a GraphBuilder, still runs (programmatic dependent launch). Then each of its threads must call
// WaitForPrevious(): before it writes anything, and before it reads what another launch writes.
// The caller sets `overlap` only if CanOverlap().
template <typename Params>
cudaError_t Launch(void (*kernel)(Params), int64_t blocks, int threads, bool overlap,
                   cudaStream_t stream, const Params& params) {
  if (blocks == 0) return cudaSuccess;
  if (blocks > std::numeric_limits<int32_t>::max()) return cudaErrorInvalidConfiguration;
  const dim3 grid(static_cast<unsigned>(blocks)), block(threads);
  if (GraphBuilder* const builder = GraphBuilder::Current()) {
    return builder->Add(kernel, grid, block, overlap, params);
  }
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = overlap ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, params);
}

// The architectures that this is compiled for, in ascending order: 900 is compute capability 9.0.
#ifdef __CUDA_ARCH_LIST__
constexpr int kArchitectures[] = {__CUDA_ARCH_LIST__};
#else
constexpr int kArchitectures[] = {900};  // the emulator
#endif

// Returns whether this thread's GPU has programmatic dependent launch, and the kernels were
// compiled for it. Older code, which runs on such a GPU from its PTX, has no WaitForPrevious().
inline bool CanOverlap() {
  constexpr int kNewest = kArchitectures[sizeof(kArchitectures) / sizeof(int) - 1];
  int device, major;
  return kNewest >= 900 && cudaGetDevice(&device) == cudaSuccess &&
         cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
         major >= 9;
}

// Lets the next kernel begin as soon as there is room for it.
__device__ inline void ReleaseNext() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Waits until all kernels before this one have ended and their writes are visible. The GPU itself
// waits only for the kernel right before. But that one ends only after its own wait, and so on, if
// no kernel leaves the wait out.
__device__ inline void WaitForPrevious() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#elif !defined(__CUDACC__)
  cudaGridDependencySynchronize();  // the emulator's
#endif
}

// Kernels prefetch no more than so many bytes together: L2 would lose them before they are read. A
// guess; GPUs that overlap launches have 50 MB and more.
constexpr int64_t kMostPrefetchedBytes = 16 << 20;

// Fetches bytes into L2. It may be called before WaitForPrevious(): all multiprocessors share L2,
// so a later write by another kernel is seen there.
__device__ inline void PrefetchIntoL2(const void* data, int64_t bytes) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  // The copy engine takes multiples of 16 bytes. The rest on either side is not fetched.
  constexpr uint32_t kAtOnce = 1 << 16;
  uint64_t begin = (reinterpret_cast<uint64_t>(data) + 15) / 16 * 16;
  const uint64_t end = (reinterpret_cast<uint64_t>(data) + bytes) / 16 * 16;
  for (; begin < end; begin += kAtOnce) {
    const uint32_t size = end - begin < kAtOnce ? static_cast<uint32_t>(end - begin) : kAtOnce;
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(
                     __cvta_generic_to_global(reinterpret_cast<const void*>(begin))),
                 "r"(size)
                 : "memory");
  }
#else
  (void)data, (void)bytes;
#endif
}

// Fetches the cache line at `data`.
__device__ inline void PrefetchLineIntoL2(const void* data) {
#ifdef __CUDA_ARCH__
  asm volatile("prefetch.global.L2 [%0];" ::"l"(__cvta_generic_to_global(data)));
#else
  (void)data;
#endif
}

}  // namespace continual_transformers

#endif  // CONTINUAL_TRANSFORMERS_CUDA_LAUNCH_CUH_
