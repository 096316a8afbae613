// Layer normalization of rows on a GPU.

#ifndef CONTINUAL_TRANSFORMERS_CUDA_NORMALIZE_H_
#define CONTINUAL_TRANSFORMERS_CUDA_NORMALIZE_H_

#include <cuda_runtime.h>

#include <cstdint>

#include "cc/attention/elementwise.h"

namespace continual_transformers {

// The parameters of Normalize() in cc/attention/elementwise.h.
template <typename T>
struct DeviceNormalizeParams {
  LayerNorm<T> norm;
  const T* x;  // [rows, size]
  T* y;        // [rows, size]; may be x, but may not overlap it otherwise
  int64_t rows;
  int64_t size;
  bool overlap;  // see DeviceSingleOutputParams
};

// Instantiated for the compute types of step_types.h.
template <typename T>
cudaError_t LaunchNormalize(const DeviceNormalizeParams<T>& params, cudaStream_t stream);

}  // namespace continual_transformers

#endif  // CONTINUAL_TRANSFORMERS_CUDA_NORMALIZE_H_
