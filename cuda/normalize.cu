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
  NormalizeRow(p, blockIdx.x);
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
