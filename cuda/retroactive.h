// Continual retroactive attention on a GPU; see cc/attention/retroactive.h. A step is two launches,
// and one more advances the positions.

#ifndef CONTINUAL_TRANSFORMERS_CUDA_RETROACTIVE_H_
#define CONTINUAL_TRANSFORMERS_CUDA_RETROACTIVE_H_

#include <cuda_runtime.h>

#include <cstdint>

#include "cc/attention/params.h"

namespace continual_transformers {

// Returns whether recomputing all rows of a window is expected to take less time on a GPU than
// updating their sums. An update reads a row's query, and reads and writes its sums in double. The
// two keys are the same for all rows. Recomputing reads N keys and values for each row, most of
// them from a cache. The limit is a guess for few streams, which no GPU has measured. It is the
// same for any number of streams: if calls of a stream updated and recomputed in turn, each update
// would have to compute all sums again. For many streams with short windows, choose
// algorithm="update".
constexpr bool RecomputingIsFasterOnGpu(int64_t window) { return window < 128; }

// Rows of a window, and three more such numbers of its softmax, are counted in 32 bits.
constexpr int64_t kLongestRetroactiveWindow = int64_t{1} << 29;

// All pointers are to device memory, which the host never reads. `scratch` is not used.
template <typename T>
struct DeviceRetroactiveParams : RetroactiveParams<T> {
  // S. A stream outside [0, S), or with a position below 0, changes no state, and its outputs are
  // NaN. The kernel does not check for a stream that is named twice: that is a race on its state.
  // `streams` may be null: then row m is stream m.
  int64_t num_held;
  // The positions, which the launch advances if update_state is true. Null: they stay.
  int64_t* next_position;  // [S]
  int64_t* steps_taken;    // [M], positions after this call; null: not wanted
};

// Returns the reason why no kernel takes these sizes, or null if one does.
template <typename T>
const char* RefusesRetroactive(const DeviceRetroactiveParams<T>& params);

// Instantiated for the compute types of step_types.h. Sizes that RefusesRetroactive names give
// cudaErrorInvalidValue. Several steps that do not update the state are recomputed.
template <typename T>
cudaError_t LaunchRetroactive(const DeviceRetroactiveParams<T>& params, cudaStream_t stream);

}  // namespace continual_transformers

#endif  // CONTINUAL_TRANSFORMERS_CUDA_RETROACTIVE_H_
