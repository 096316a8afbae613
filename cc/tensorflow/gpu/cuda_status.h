// CUDA's errors as TensorFlow's.

#ifndef CONTINUAL_TRANSFORMERS_TENSORFLOW_GPU_CUDA_STATUS_H_
#define CONTINUAL_TRANSFORMERS_TENSORFLOW_GPU_CUDA_STATUS_H_

#include <cuda_runtime.h>

#include "absl/status/status.h"

namespace continual_transformers {

// Returns the status for an error of CUDA, with `what` was being done and the cure. Clears CUDA's
// last error, so that no later call seems to have failed.
absl::Status CudaStatus(cudaError_t error, const char* what);

}  // namespace continual_transformers

#endif  // CONTINUAL_TRANSFORMERS_TENSORFLOW_GPU_CUDA_STATUS_H_
