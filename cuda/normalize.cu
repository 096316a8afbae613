#include <cmath>
#include <cstdint>

#include "cc/attention/step_types.h"
#include "cuda/block_sum.cuh"
#include "cuda/launch.cuh"
#include "cuda/normalize.h"

namespace continual_transformers {
namespace {

template <typename T>
__global__ void __launch_bounds__(kBlockSumThreads)
    NormalizeKernel(const __grid_constant__ DeviceNormalizeParams<T> p) {
  ReleaseNext();
  WaitForPrevious();
  const T* const x = p.x + blockIdx.x * p.size;
  T* const y = p.y + blockIdx.x * p.size;
  const int size = static_cast<int>(p.size);
  // The row is read three times and not kept, because it has any size. It is in L1.
  T sum = T(0), squares = T(0);
  for (int i = threadIdx.x; i < size; i += kBlockSumThreads) sum += x[i];
  const T mean = SumOverBlock(sum) / size;
  for (int i = threadIdx.x; i < size; i += kBlockSumThreads)
    squares += (x[i] - mean) * (x[i] - mean);
  const T factor = T(1) / std::sqrt(SumOverBlock(squares) / size + p.norm.epsilon);
  for (int i = threadIdx.x; i < size; i += kBlockSumThreads) {
    y[i] = (x[i] - mean) * factor * p.norm.scale[i] + p.norm.offset[i];
  }
}

}  // namespace

template <typename T>
cudaError_t LaunchNormalize(const DeviceNormalizeParams<T>& params, cudaStream_t stream) {
  return Launch(NormalizeKernel<T>, params.rows, kBlockSumThreads, params.overlap, stream, params);
}

#define INSTANTIATE(T) \
  template cudaError_t LaunchNormalize<T>(const DeviceNormalizeParams<T>&, cudaStream_t);
CONTINUAL_TRANSFORMERS_FOR_COMPUTE_TYPES(INSTANTIATE)
#undef INSTANTIATE

}  // namespace continual_transformers
