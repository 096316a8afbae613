// Continual single-output attention on a GPU, in one launch; see cc/attention/single_output.h.

#ifndef CONTINUAL_TRANSFORMERS_CUDA_SINGLE_OUTPUT_H_
#define CONTINUAL_TRANSFORMERS_CUDA_SINGLE_OUTPUT_H_

#include <cuda_runtime.h>

#include <cstdint>

#include "cc/attention/host_device.h"
#include "cc/attention/params.h"
#include "cuda/window_parts.h"

namespace continual_transformers {

// All pointers are to device memory, which the host never reads. So a step can be captured in a
// CUDA graph and replayed while streams advance. `parts` is [M, H, T, window_parts, Dv + 2]. Unlike
// on the CPU, windows with parts can also have several steps, scores and window_key.
template <typename T, typename C>
struct DeviceSingleOutputParams : SingleOutputParams<T, C> {
  // S. A stream outside [0, S), or with a position below 0, changes no state, and its outputs are
  // NaN. The kernel does not check for a stream that is named twice: that is a race on its state.
  // `streams` may be null: then row m is stream m.
  int64_t num_held;
  // The positions, which the launch advances if update_state is true. Null: they stay.
  int64_t* next_position;  // [S]
  int64_t* steps_taken;    // [M], positions after this call; null: not wanted
  // If false, the row's query attends to nothing: its output and scores are zeros. Null: all true.
  const bool* query_mask;  // [M]
  // Counts the blocks that have arrived. Zeros before the first launch; each launch leaves zeros.
  uint32_t* arrivals;  // [NumArrivals()]
  // Whether this kernel may begin before the kernel before it on the stream has ended: programmatic
  // dependent launch. GPUs older than compute capability 9.0 do not do that.
  bool overlap;

  CONTINUAL_TRANSFORMERS_HOST_DEVICE int64_t NumQueries() const {
    return this->num_streams * this->num_heads * this->num_steps;
  }
  int64_t NumArrivals() const { return NumQueries() + this->num_streams * (this->num_heads + 1); }
  int64_t NumParts() const { return PartsSize(NumQueries(), this->window_parts, this->value_dim); }
};

// Returns the reason why no kernel takes these sizes, or null if one does.
template <typename T, typename C>
const char* RefusesSingleOutput(const DeviceSingleOutputParams<T, C>& params);

// Instantiated for the cache types of step_types.h. Sizes that RefusesSingleOutput names give
// cudaErrorInvalidValue.
template <typename T, typename C>
cudaError_t LaunchSingleOutput(const DeviceSingleOutputParams<T, C>& params, cudaStream_t stream);

}  // namespace continual_transformers

#endif  // CONTINUAL_TRANSFORMERS_CUDA_SINGLE_OUTPUT_H_
