// One step of a whole multi-head attention layer on a GPU, in three launches: projections,
// attention (single_output.h), projection back. For few rows, where the weights' bytes are what it
// costs; where rows are many, matrix products of a library's are faster.

#ifndef CONTINUAL_TRANSFORMERS_CUDA_CO_SI_MHA_STEP_H_
#define CONTINUAL_TRANSFORMERS_CUDA_CO_SI_MHA_STEP_H_

#include <cuda_runtime.h>

#include <cstdint>

#include "cc/attention/co_si_mha_step.h"

namespace continual_transformers {

// Every pointer is to device memory. `attention.streams` may be null: row m is then stream m.
template <typename T, typename C, typename W>
struct DeviceCoSiMhaStep : CoSiMhaStep<T, C, W> {
  int64_t num_held;        // S; see DeviceSingleOutputParams
  int64_t* next_position;  // [S], the positions again, for the launch to advance; null: they stay
  const T* residual;       // [M, output_features], added to the result; null: none
  int multiprocessors;     // Of the GPU.
  // ScratchBytes() of them, 16-byte aligned, with whatever is there; and arrivals, NumArrivals() of
  // them, zeros before the first launch and again after each.
  void* scratch;
  uint32_t* arrivals;

  int64_t ScratchBytes() const;
  int64_t NumArrivals() const;
};

// Why no kernel takes these sizes; null where one does.
template <typename T, typename C, typename W>
const char* RefusesCoSiMhaStep(const DeviceCoSiMhaStep<T, C, W>& step);

// Takes the step, and advances the positions. Instantiated for the step types of step_types.h.
template <typename T, typename C, typename W>
cudaError_t LaunchCoSiMhaStep(const DeviceCoSiMhaStep<T, C, W>& step, cudaStream_t stream);

}  // namespace continual_transformers

#endif  // CONTINUAL_TRANSFORMERS_CUDA_CO_SI_MHA_STEP_H_
