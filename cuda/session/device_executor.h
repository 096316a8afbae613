// The executor for a GPU. A step of M streams becomes a CUDA graph once, and is replayed: one
// launch a step, however deep the model is.

#ifndef CONTINUAL_TRANSFORMERS_CUDA_SESSION_DEVICE_EXECUTOR_H_
#define CONTINUAL_TRANSFORMERS_CUDA_SESSION_DEVICE_EXECUTOR_H_

#include <cstdint>
#include <memory>
#include <vector>

#include "cc/session/executor.h"
#include "cc/session/model_file.h"
#include "cuda/session/device_memory.h"
#include "cuda/session/device_plan.h"

namespace continual_transformers {

class DeviceExecutor final : public Executor {
 public:
  // Throws Error if a node or dtype of the plan has no kernel.
  DeviceExecutor(std::shared_ptr<const ModelFile> file, const ExecutorOptions& options,
                 std::shared_ptr<const Gpu> gpu);

  std::unique_ptr<Arena> NewArena() const override;
  void Step(const StepCall& call, Arena* arena) const override;
  int64_t EstimatedNanoseconds(int64_t streams, int64_t steps) const override;
  int64_t weights_bytes() const override { return compiled_.weights_bytes; }
  void BeginProfile(Arena* arena) const override;
  std::vector<ProfileEntry> EndProfile(Arena* arena) const override;

 private:
  const std::shared_ptr<const Gpu> gpu_;
  const DevicePlan compiled_;
};

}  // namespace continual_transformers

#endif  // CONTINUAL_TRANSFORMERS_CUDA_SESSION_DEVICE_EXECUTOR_H_
