// The first and the last kernel of a step on a GPU.

#ifndef CONTINUAL_TRANSFORMERS_CUDA_SESSION_STEP_ENDS_H_
#define CONTINUAL_TRANSFORMERS_CUDA_SESSION_STEP_ENDS_H_

#include <cuda_runtime.h>

#include "cuda/session/device_frame.h"
#include "cuda/session/mailbox.h"

namespace continual_transformers {

// i is a stream.
struct AdvanceEach {
  int64_t* positions;
  __device__ void operator()(int64_t i) const { ++positions[i]; }
};

// Takes what a step needs out of the mailbox. All later kernels of the step begin only after it:
// before they wait, they may read what it writes.
NodeKernels TakeInputs(const TakeInputsEach& inputs);

// Puts the outputs of a step into the mailbox, or into arrays on the GPU, and adds 1 to the
// positions.
NodeKernels DeliverOutputs(const DeliverOutputsEach& outputs);

// Adds 1 to the frame's positions, so that the same launches can take the next step.
NodeKernels AdvancePositions();

// Returns whether the GPU in use can run launches that overlap.
bool CanOverlapSteps();

// Returns an error if the GPU in use cannot run the kernels of this library.
cudaError_t ProbeKernels();

}  // namespace continual_transformers

#endif  // CONTINUAL_TRANSFORMERS_CUDA_SESSION_STEP_ENDS_H_
