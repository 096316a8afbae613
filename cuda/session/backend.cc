// The function of this library that the core library calls (cc/session/device.h), and some for
// benchmarks/gpu/session_benchmark.py.

#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <utility>

#include "cc/session/device.h"
#include "cc/session/error.h"
#include "cuda/session/device_arena.h"
#include "cuda/session/device_executor.h"
#include "cuda/session/device_memory.h"
#include "cuda/session/step_ends.h"
#include "include/continual_transformers.h"

namespace continual_transformers {
namespace {

#define TEXT(x) #x
#define TEXT_OF(x) TEXT(x)
constexpr char kVersion[] =
    TEXT_OF(CT_VERSION_MAJOR) "." TEXT_OF(CT_VERSION_MINOR) "." TEXT_OF(CT_VERSION_PATCH);
#undef TEXT_OF
#undef TEXT

class CudaDevice final : public Device {
 public:
  explicit CudaDevice(int number)
      : gpu_(std::make_shared<const Gpu>(number)), memory_(std::make_shared<GpuBlockMemory>(gpu_)) {
    const Gpu::Use use(*gpu_);
    const cudaError_t error = ProbeKernels();
    if (error == cudaSuccess) return;
    static_cast<void>(cudaGetLastError());
    throw Error(ErrorCode::kInvalidArgument,
                "the kernels of this library do not run on \"cuda:" + std::to_string(number) +
                    "\" (" + cudaGetErrorName(error) +
                    "): build them for its compute capability, or install a newer driver");
  }

  std::shared_ptr<BlockMemory> memory() const override { return memory_; }
  std::shared_ptr<const Executor> NewExecutor(std::shared_ptr<const ModelFile> file,
                                              const ExecutorOptions& options) const override {
    return std::make_shared<const DeviceExecutor>(std::move(file), options, gpu_);
  }

 private:
  const std::shared_ptr<const Gpu> gpu_;
  const std::shared_ptr<BlockMemory> memory_;
};

}  // namespace
}  // namespace continual_transformers

extern "C" __attribute__((visibility("default"))) continual_transformers::Device*
continual_transformers_cuda_device(int number, const char* version) {
  namespace ct = continual_transformers;
  if (std::strcmp(version, ct::kVersion) != 0) {
    throw ct::Error(ct::ErrorCode::kInvalidArgument,
                    std::string("the library of GPU kernels is of version ") + ct::kVersion +
                        ", and sessions are of version " + version +
                        ": build or install both together");
  }
  return new ct::CudaDevice(number);
}

extern "C" __attribute__((visibility("default"))) void continual_transformers_cuda_set_overlap(
    int overlap) {
  continual_transformers::DeviceArena::may_overlap = overlap != 0;
}

extern "C" __attribute__((visibility("default"))) void continual_transformers_cuda_set_persist(
    int persist) {
  continual_transformers::DeviceArena::may_persist = persist != 0;
}

extern "C" __attribute__((visibility("default"))) int64_t
continual_transformers_cuda_persistent_graphs() {
  return continual_transformers::DeviceArena::persistent_graphs;
}
