// Layer normalization of a row, by a block of kBlockSumThreads threads.

#ifndef CONTINUAL_TRANSFORMERS_CUDA_ROW_NORM_CUH_
#define CONTINUAL_TRANSFORMERS_CUDA_ROW_NORM_CUH_

#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>

#include "cc/attention/elementwise.h"
#include "cuda/block_sum.cuh"
#include "cuda/normalize.h"

namespace continual_transformers {

template <typename T>
struct RowNorm {
  T mean, factor;

  // The normalized element i.
  __device__ T Of(const LayerNorm<T>& norm, const T* row, int i) const {
    return (row[i] - mean) * factor * norm.scale[i] + norm.offset[i];
  }
};

// All threads of the block call it. It reads the row twice and does not keep it, because rows have
// any size. The row is in L1.
template <typename T>
__device__ RowNorm<T> MeasureRow(const LayerNorm<T>& norm, const T* row, int size) {
  T sum = T(0), squares = T(0);
  for (int i = threadIdx.x; i < size; i += kBlockSumThreads) sum += row[i];
  const T mean = SumOverBlock(sum) / size;
  for (int i = threadIdx.x; i < size; i += kBlockSumThreads) {
    squares += (row[i] - mean) * (row[i] - mean);
  }
  return {mean, T(1) / std::sqrt(SumOverBlock(squares) / size + norm.epsilon)};
}

// Normalizes one of the rows. All threads of the block call it.
template <typename T>
__device__ void NormalizeRow(const DeviceNormalizeParams<T>& p, int64_t row) {
  const T* const x = p.x + row * p.size;
  T* const y = p.y + row * p.size;
  const int size = static_cast<int>(p.size);
  const RowNorm<T> of_row = MeasureRow(p.norm, x, size);
  for (int i = threadIdx.x; i < size; i += kBlockSumThreads) y[i] = of_row.Of(p.norm, x, i);
}

}  // namespace continual_transformers

#endif  // CONTINUAL_TRANSFORMERS_CUDA_ROW_NORM_CUH_
