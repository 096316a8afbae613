// The executor for the processor. Kernels, packed weights and arena offsets are chosen when it is
// made. A step allocates nothing and checks no types.

#ifndef CONTINUAL_TRANSFORMERS_SESSION_CPU_EXECUTOR_H_
#define CONTINUAL_TRANSFORMERS_SESSION_CPU_EXECUTOR_H_

#include <cstdint>
#include <memory>
#include <vector>

#include "cc/session/executor.h"
#include "cc/session/model_file.h"

namespace continual_transformers {

class CpuExecutor final : public Executor {
 public:
  // Throws Error if the plan cannot run with these options.
  CpuExecutor(std::shared_ptr<const ModelFile> file, const ExecutorOptions& options);
  ~CpuExecutor() override;

  std::unique_ptr<Arena> NewArena() const override;
  void Step(const StepCall& call, Arena* arena) const override;
  int64_t EstimatedNanoseconds(int64_t streams, int64_t steps) const override;
  int64_t weights_bytes() const override;  // of the packed weights
  void BeginProfile(Arena* arena) const override;
  std::vector<ProfileEntry> EndProfile(Arena* arena) const override;

 private:
  class Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace continual_transformers

#endif  // CONTINUAL_TRANSFORMERS_SESSION_CPU_EXECUTOR_H_
