#include "cc/session/device.h"

#include <continual_transformers.h>
#include <dlfcn.h>
#include <unistd.h>

#include <cstdlib>
#include <memory>
#include <string>
#include <utility>

#include "cc/session/cpu_executor.h"
#include "cc/session/error.h"

namespace continual_transformers {
namespace {

class Cpu final : public Device {
 public:
  std::shared_ptr<BlockMemory> memory() const override { return memory_; }
  std::shared_ptr<const Executor> NewExecutor(std::shared_ptr<const ModelFile> file,
                                              const ExecutorOptions& options) const override {
    return std::make_shared<const CpuExecutor>(std::move(file), options);
  }

 private:
  const std::shared_ptr<BlockMemory> memory_ = std::make_shared<HostMemory>();
};

constexpr char kCudaLibrary[] = "libcontinual_transformers_cuda.so";
// Names another file in its place.
constexpr char kCudaLibraryVariable[] = "CONTINUAL_TRANSFORMERS_CUDA_LIBRARY";

std::string PathOfCudaLibrary() {
  if (const char* path = std::getenv(kCudaLibraryVariable); path != nullptr && *path != '\0') {
    return path;
  }
  Dl_info info;
  if (dladdr(reinterpret_cast<const void*>(&ct_version), &info) == 0) return kCudaLibrary;
  const std::string own = info.dli_fname;
  const std::string folder = own.substr(0, own.rfind('/') + 1);
  // The package continual-transformers-tf-cuda has it. A build from source puts it beside this
  // library.
  const std::string packaged = folder + "../continual_transformers_tf_cuda/" + kCudaLibrary;
  return access(packaged.c_str(), R_OK) == 0 ? packaged : folder + kCudaLibrary;
}

NewCudaDevice* LoadCudaLibrary() {
  const std::string path = PathOfCudaLibrary();
  // It is never closed: CUDA's runtime does not bear it.
  void* const library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    throw Error(
        ErrorCode::kInvalidArgument,
        std::string("a session on a GPU needs the library of its kernels, which could not "
                    "be loaded: ") +
            dlerror() +
            "; build the package with CONTINUAL_TRANSFORMERS_CUDA=1 and an nvcc, or install the "
            "wheel continual-transformers-tf-cuda that `make wheel` makes, or name the "
            "library's path in " +
            kCudaLibraryVariable);
  }
  void* const function = dlsym(library, kNewCudaDevice);
  if (function == nullptr) {
    throw Error(ErrorCode::kInvalidArgument, path + " has no sessions on a GPU: name a " +
                                                 kCudaLibrary + " in " + kCudaLibraryVariable);
  }
  return reinterpret_cast<NewCudaDevice*>(function);
}

}  // namespace

int CudaNumber(const std::string& name) {
  const std::string prefix = "cuda:";
  if (name.rfind(prefix, 0) != 0) return -1;
  const std::string digits = name.substr(prefix.size());
  if (digits.empty() || digits.size() > 4 ||
      digits.find_first_not_of("0123456789") != std::string::npos) {
    return -1;
  }
  return std::stoi(digits);
}

std::shared_ptr<const Device> OpenDevice(const std::string& name) {
  if (name == "cpu") return std::make_shared<const Cpu>();
  const int number = CudaNumber(name);
  if (number < 0) {
    throw Error(
        ErrorCode::kInvalidArgument,
        "Expected device to be \"cpu\", or \"cuda:0\" for the first GPU, but got \"" + name + "\"");
  }
  return std::shared_ptr<const Device>(LoadCudaLibrary()(number, ct_version()));
}

}  // namespace continual_transformers
