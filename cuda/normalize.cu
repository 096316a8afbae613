#include <cstdint>

#include "cc/attention/step_types.h"
#include "cuda/block_sum.cuh"
#include "cuda/launch.cuh"
#include "cuda/normalize.h"
#include "cuda/row_norm.cuh"

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
  const RowNorm<T> row = MeasureRow(p.norm, x, size);
  for (int i = threadIdx.x; i < size; i += kBlockSumThreads) y[i] = row.Of(p.norm, x, i);
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
