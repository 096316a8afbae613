// The end of a step on a GPU.

#ifndef CONTINUAL_TRANSFORMERS_CUDA_SESSION_ADVANCE_H_
#define CONTINUAL_TRANSFORMERS_CUDA_SESSION_ADVANCE_H_

#include <cuda_runtime.h>

#include "cuda/session/device_frame.h"

namespace continual_transformers {

// Adds 1 to the frame's positions, so that the same launches can take the next step.
cudaError_t AdvancePositions(const DeviceFrame& frame, cudaStream_t stream);

// Returns whether the GPU in use can run launches that overlap.
bool CanOverlapSteps();

// Returns an error if the GPU in use cannot run the kernels of this library.
cudaError_t ProbeKernels();

}  // namespace continual_transformers

#endif  // CONTINUAL_TRANSFORMERS_CUDA_SESSION_ADVANCE_H_
