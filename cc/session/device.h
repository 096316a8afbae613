// The device that a session runs on: the processor, or a GPU. The GPU's part is in a separate
// library, which is loaded only when a GPU is asked for.

#ifndef CONTINUAL_TRANSFORMERS_SESSION_DEVICE_H_
#define CONTINUAL_TRANSFORMERS_SESSION_DEVICE_H_

#include <memory>
#include <string>

#include "cc/session/block_memory.h"
#include "cc/session/executor.h"
#include "cc/session/model_file.h"

namespace continual_transformers {

class Device {
 public:
  virtual ~Device() = default;

  // The memory of the blocks that this device's executors step.
  virtual std::shared_ptr<BlockMemory> memory() const = 0;
  // Throws Error if the plan cannot run here with these options.
  virtual std::shared_ptr<const Executor> NewExecutor(std::shared_ptr<const ModelFile> file,
                                                      const ExecutorOptions& options) const = 0;
};

// Returns N of the device "cuda:N", or -1 for other names.
int CudaNumber(const std::string& name);

// `name`: "cpu", or "cuda:0" and so on. Throws Error (kInvalidArgument) with the cure if there is
// no such device, or if it cannot be used.
std::shared_ptr<const Device> OpenDevice(const std::string& name);

// The one function that libcontinual_transformers_cuda.so exports. It makes the device "cuda:N".
// `version` is that of the caller: the two libraries share C++ classes, so they must be of one
// build. It throws Error as OpenDevice does.
using NewCudaDevice = Device*(int number, const char* version);
constexpr char kNewCudaDevice[] = "continual_transformers_cuda_device";

}  // namespace continual_transformers

#endif  // CONTINUAL_TRANSFORMERS_SESSION_DEVICE_H_
