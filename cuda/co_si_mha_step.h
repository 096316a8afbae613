// One step of a multi-head attention layer on a GPU, in three launches: projections, attention
// (single_output.h), output projection. It is for few rows, where reading the weights takes the
// time. For many rows, a library's matrix products are faster.

#ifndef CONTINUAL_TRANSFORMERS_CUDA_CO_SI_MHA_STEP_H_
#define CONTINUAL_TRANSFORMERS_CUDA_CO_SI_MHA_STEP_H_

#include <cuda_runtime.h>

#include <cstdint>

#include "cc/attention/co_si_mha_step.h"

namespace continual_transformers {

// All pointers are to device memory. `attention.streams` may be null: then row m is stream m.
template <typename T, typename C, typename W>
struct DeviceCoSiMhaStep : CoSiMhaStep<T, C, W> {
  int64_t num_held;         // S; see DeviceSingleOutputParams
  int64_t* next_position;   // [S], the positions, which the launch advances; null: they stay
  const T* residual;        // [M, output_features], added to the result; null: none
  int multiprocessors;      // of the GPU
  void* scratch;            // ScratchBytes(), 16-byte aligned, not initialized
  uint32_t* arrivals;       // [NumArrivals()], zeros before the first launch; each leaves zeros
  bool may_overlap = true;  // false: no launch overlaps another, to measure what that gains

  int64_t ScratchBytes() const;
  int64_t NumArrivals() const;
};

// Returns the reason why no kernel takes this step, or null if one does.
template <typename T, typename C, typename W>
const char* RefusesCoSiMhaStep(const DeviceCoSiMhaStep<T, C, W>& step);

// Takes the step, and advances the positions. Instantiated for the step types of step_types.h.
template <typename T, typename C, typename W>
cudaError_t LaunchCoSiMhaStep(const DeviceCoSiMhaStep<T, C, W>& step, cudaStream_t stream);

}  // namespace continual_transformers

#endif  // CONTINUAL_TRANSFORMERS_CUDA_CO_SI_MHA_STEP_H_
