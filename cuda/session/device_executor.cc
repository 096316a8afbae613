#include "cuda/session/device_executor.h"

#include <algorithm>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "cuda/session/device_arena.h"

namespace continual_transformers {
namespace {

// Guesses, not measured.
constexpr double kNanosecondsANode = 2000;
constexpr double kStreamsAtOnce = 64;

DevicePlan Compile(const Executor& executor, const std::shared_ptr<const Gpu>& gpu) {
  const Gpu::Use use(*gpu);
  return CompileForGpu(executor.file(), executor.options(), executor.state(), gpu);
}

}  // namespace

DeviceExecutor::DeviceExecutor(std::shared_ptr<const ModelFile> file,
                               const ExecutorOptions& options, std::shared_ptr<const Gpu> gpu)
    : Executor(std::move(file), options), gpu_(std::move(gpu)), compiled_(Compile(*this, gpu_)) {}

std::unique_ptr<Arena> DeviceExecutor::NewArena() const {
  return std::make_unique<DeviceArena>(plan(), compiled_, gpu_);
}

void DeviceExecutor::Step(const StepCall& call, Arena* arena) const {
  const Gpu::Use use(*gpu_);
  static_cast<DeviceArena*>(arena)->Step(call);
}

int64_t DeviceExecutor::EstimatedNanoseconds(int64_t streams, int64_t steps) const {
  if (streams == 0) return 0;
  const double nodes = static_cast<double>(compiled_.entries.size());
  const double rounds = 1 + static_cast<double>(streams) / kStreamsAtOnce;
  return static_cast<int64_t>(
      std::min(kNanosecondsANode * nodes * rounds * static_cast<double>(steps), 9e18));
}

void DeviceExecutor::BeginProfile(Arena* arena) const {
  static_cast<DeviceArena*>(arena)->BeginProfile();
}

std::vector<Executor::ProfileEntry> DeviceExecutor::EndProfile(Arena* arena) const {
  const std::vector<double>& seconds = static_cast<DeviceArena*>(arena)->EndProfile();
  std::vector<ProfileEntry> entries;
  for (size_t i = 0; i < compiled_.entries.size(); ++i) {
    entries.push_back({compiled_.entries[i].name, compiled_.entries[i].op, seconds[i]});
  }
  return entries;
}

}  // namespace continual_transformers
