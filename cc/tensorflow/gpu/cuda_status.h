// What CUDA says, as what TensorFlow's users see.

#ifndef CONTINUAL_TRANSFORMERS_TENSORFLOW_GPU_CUDA_STATUS_H_
#define CONTINUAL_TRANSFORMERS_TENSORFLOW_GPU_CUDA_STATUS_H_

#include <cuda_runtime.h>

#include "absl/status/status.h"

namespace continual_transformers {

// What `error` says of `what` was being done, and what is to be done about it. CUDA forgets the
// error, so that no later call, whoever makes it, is taken to have failed.
absl::Status CudaStatus(cudaError_t error, const char* what);

}  // namespace continual_transformers

#endif  // CONTINUAL_TRANSFORMERS_TENSORFLOW_GPU_CUDA_STATUS_H_
