// Continual single-output attention on a GPU: what cc/attention/single_output.h does, in one
// launch.

#ifndef CONTINUAL_TRANSFORMERS_CUDA_SINGLE_OUTPUT_H_
#define CONTINUAL_TRANSFORMERS_CUDA_SINGLE_OUTPUT_H_

#include <cuda_runtime.h>

#include <cstdint>

#include "cc/attention/host_device.h"
#include "cc/attention/params.h"

namespace continual_transformers {

// Every pointer is to device memory, which the host never looks at: so a step can be captured in a
// CUDA graph and replayed while the streams age. `parts` holds a query's parts at
// [M, H, T, window_parts, Dv + 2], and any number of steps, scores and window_key go with parts.
template <typename T, typename C>
struct DeviceSingleOutputParams : SingleOutputParams<T, C> {
  // S. A stream outside [0, S), or whose position is below 0, touches no state; its outputs are
  // NaN. Which streams there are nobody else checks: one named twice is a race on its state.
  // `streams` may be null: row m is then stream m.
  int64_t num_held;
  // The positions again, for the launch to advance with update_state. Null: the caller does it.
  int64_t* next_position;  // [S]
  int64_t* steps_taken;    // [M], the positions after this call; null: not wanted
  // Rows whose queries attend to nothing, and whose outputs and scores are zeros; null: none.
  const bool* query_mask;  // [M]
  // Zeros before the first launch, and zeros again after each: who has arrived, so that the last
  // block does what needs all.
  uint32_t* arrivals;  // [NumArrivals()]
  // The kernel before this one on the stream lets this one begin before it has ended (programmatic
  // dependent launch, from compute capability 9.0 on; elsewhere without effect).
  bool overlap;

  CONTINUAL_TRANSFORMERS_HOST_DEVICE int64_t NumQueries() const {
    return this->num_streams * this->num_heads * this->num_steps;
  }
  int64_t NumArrivals() const { return NumQueries() + this->num_streams * (this->num_heads + 1); }
  int64_t NumParts() const {
    return this->window_parts > 1 ? NumQueries() * this->window_parts * (this->value_dim + 2) : 0;
  }
};

// Into how many parts to cut windows so that a GPU of so many multiprocessors is busy: what
// window_parts is to be.
int64_t PlanWindowParts(int64_t queries, int64_t window, int multiprocessors);

// Why no kernel takes these sizes; null where one does.
template <typename T, typename C>
const char* RefusesSingleOutput(const DeviceSingleOutputParams<T, C>& params);

// Instantiated for the cache types of step_types.h. Sizes that RefusesSingleOutput names give
// cudaErrorInvalidValue.
template <typename T, typename C>
cudaError_t LaunchSingleOutput(const DeviceSingleOutputParams<T, C>& params, cudaStream_t stream);

}  // namespace continual_transformers

#endif  // CONTINUAL_TRANSFORMERS_CUDA_SINGLE_OUTPUT_H_
