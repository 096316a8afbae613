// One step of M streams, on which the launches of a plan's nodes work.

#ifndef CONTINUAL_TRANSFORMERS_CUDA_SESSION_DEVICE_FRAME_H_
#define CONTINUAL_TRANSFORMERS_CUDA_SESSION_DEVICE_FRAME_H_

#include <cuda_runtime.h>

#include <cstdint>
#include <functional>

namespace continual_transformers {

// All pointers are to device memory, except `values` itself. The host never reads what they point
// to, so launches can be nodes of a graph and replayed for other streams and positions.
struct DeviceFrame {
  int64_t streams;           // M
  char* const* blocks;       // [M], the streams' blocks
  const int64_t* positions;  // [M], steps taken before this one
  const bool* key_mask;      // [M], whether the caller marks no gap
  uint32_t* arrivals;        // counters, zeros before and after each launch; see arrival.cuh
  char* const* values;       // of the host: where each plan value's M rows lie, and each scratch
  // Whether a launch may begin while the one before it still runs; see Launch(). Before it waits, a
  // kernel may read weights, and `blocks` and `positions`: no kernel of a node writes them.
  bool overlap;

  template <typename T>
  T* Rows(int value) const {
    return reinterpret_cast<T*>(values[value]);
  }
  // The same, or null if there is no such value.
  template <typename T>
  T* RowsOrNull(int value) const {
    return value < 0 ? nullptr : Rows<T>(value);
  }
};

class Phases;

// The kernels of a node.
struct NodeKernels {
  NodeKernels() = default;
  template <typename F>
  NodeKernels(const F& launch) : launch(launch) {}  // NOLINT: a lambda becomes a node

  // Launches them, all by Launch(): a GraphBuilder knows of no other work.
  std::function<cudaError_t(const DeviceFrame& frame, cudaStream_t stream)> launch;
  // Adds the work of `launch` to a persistent kernel, for a step of one stream. Null: it has no
  // phase for it.
  std::function<void(const DeviceFrame& frame, Phases* phases)> phase;
};

}  // namespace continual_transformers

#endif  // CONTINUAL_TRANSFORMERS_CUDA_SESSION_DEVICE_FRAME_H_
