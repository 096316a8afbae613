// A plan for a GPU: its nodes as launches, and its weights in the GPU's memory.

#ifndef CONTINUAL_TRANSFORMERS_CUDA_SESSION_DEVICE_PLAN_H_
#define CONTINUAL_TRANSFORMERS_CUDA_SESSION_DEVICE_PLAN_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "cc/session/executor.h"
#include "cc/session/model_file.h"
#include "cc/session/plan.h"
#include "cuda/session/device_frame.h"
#include "cuda/session/device_memory.h"

namespace continual_transformers {

struct DevicePlan {
  struct Entry {
    NodeKernels kernels;
    std::string name, op;  // of its nodes, joined by " + "
  };
  std::vector<Entry> entries;  // in execution order

  // One per plan value: the value whose rows it shares; itself, except after a reshape.
  std::vector<int> storage;
  // One per plan value: the bytes of a row. 0: it shares another's rows.
  std::vector<int64_t> row_bytes;
  // The bytes of each scratch in a step of M streams. Scratches are numbered after the plan values.
  std::vector<std::function<int64_t(int64_t streams)>> scratch_bytes;
  // How many counters a launch needs at most (DeviceFrame::arrivals).
  int64_t arrivals = 0;

  DType cache_dtype;  // of attention's rings

  std::vector<GpuBytes> weights;
  int64_t weights_bytes = 0;
};

// `state` is the layout of a block. The GPU must be in use. Throws Error, which names what has no
// kernel.
DevicePlan CompileForGpu(const ModelFile& file, const ExecutorOptions& options,
                         const std::vector<StateEntry>& state, std::shared_ptr<const Gpu> gpu);

}  // namespace continual_transformers

#endif  // CONTINUAL_TRANSFORMERS_CUDA_SESSION_DEVICE_PLAN_H_
