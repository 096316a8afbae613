#include "cuda/session/device_memory.h"

#include <cuda.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <utility>

#include "cc/session/error.h"

namespace continual_transformers {
namespace {

std::string Described(cudaError_t error) {
  return std::string(cudaGetErrorName(error)) + ", " + cudaGetErrorString(error);
}

template <typename F>
F DriverFunction(const char* name) {
  void* function = nullptr;
#if CUDART_VERSION >= 12050
  Check(cudaGetDriverEntryPointByVersion(name, &function, 12000, cudaEnableDefault),
        "looking for the driver's functions");
#else
  Check(cudaGetDriverEntryPoint(name, &function, cudaEnableDefault),
        "looking for the driver's functions");
#endif
  if (function == nullptr) {
    throw Error(ErrorCode::kInvalidArgument,
                std::string("the driver has no function ") + name + ": install a newer driver");
  }
  return reinterpret_cast<F>(function);
}

// Functions of the driver. This library does not link it, because it also loads without one.
struct Driver {
  static const Driver& Get() {
    static const Driver driver;
    return driver;
  }
  const decltype(&cuDeviceGet) device_get = DriverFunction<decltype(&cuDeviceGet)>("cuDeviceGet");
  const decltype(&cuDevicePrimaryCtxRetain) retain =
      DriverFunction<decltype(&cuDevicePrimaryCtxRetain)>("cuDevicePrimaryCtxRetain");
  const decltype(&cuCtxPushCurrent) push =
      DriverFunction<decltype(&cuCtxPushCurrent)>("cuCtxPushCurrent");
  const decltype(&cuCtxPopCurrent) pop =
      DriverFunction<decltype(&cuCtxPopCurrent)>("cuCtxPopCurrent");
};

// The errors of the driver have the same numbers as those of the runtime.
void CheckDriver(CUresult error, const char* doing) {
  Check(static_cast<cudaError_t>(error), doing);
}

// CUDA gives larger allocations in multiples of 2 MiB.
constexpr int64_t kRounding = 2 << 20;
constexpr int64_t kLargestRest = 1 << 20;
constexpr int64_t kLargestAllocation = 64 << 20;

// Returns the bytes that an allocation of `bytes` takes.
int64_t AsAllocated(int64_t bytes) {
  return bytes <= kLargestRest ? bytes : (bytes + kRounding - 1) / kRounding * kRounding;
}

Error NoGpu(int number, const std::string& why) {
  return Error(ErrorCode::kInvalidArgument,
               "there is no device \"cuda:" + std::to_string(number) + "\": " + why);
}

}  // namespace

Gpu::Gpu(int number) : number_(number), process_(getpid()) {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error == cudaErrorInsufficientDriver) {
    throw NoGpu(number,
                "the driver is missing, or older than the CUDA version that the kernels were built "
                "with: install a newer driver, or, if this machine has no NVIDIA GPU, leave out "
                "device=");
  }
  if (error == cudaErrorNoDevice || (error == cudaSuccess && count == 0)) {
    throw NoGpu(number, "this machine has no GPU that CUDA can use: leave out device=");
  }
  if (error != cudaSuccess) throw NoGpu(number, "CUDA cannot be used: " + Described(error));
  if (number >= count) {
    throw NoGpu(number, "there are " + std::to_string(count) + " GPUs, counted from 0");
  }
  Check(cudaDeviceGetAttribute(&multiprocessors_, cudaDevAttrMultiProcessorCount, number),
        "counting the GPU's multiprocessors");
  CUdevice device;
  CheckDriver(Driver::Get().device_get(&device, number), "choosing the GPU");
  CheckDriver(Driver::Get().retain(&context_, device), "making the GPU's context");
}

bool Gpu::IsOfThisProcess() const { return getpid() == process_; }

Gpu::Use::Use(const Gpu& gpu) {
  if (!gpu.IsOfThisProcess()) {
    throw Error(
        ErrorCode::kInvalidArgument,
        "a session on a GPU works only in the process that made it, and this is a forked "
        "one. CUDA works in a child only if its parent never used it: start the process with "
        "spawn, or make no session on a GPU before the fork");
  }
  // cudaSetDevice could not undo itself: it makes a context on the GPU that it chooses, and the
  // thread may have had none.
  CheckDriver(Driver::Get().push(gpu.context_), "choosing the GPU");
}

Gpu::Use::~Use() {
  CUcontext ours;
  static_cast<void>(Driver::Get().pop(&ours));
}

void Check(cudaError_t error, const char* doing) {
  if (error == cudaSuccess) return;
  static_cast<void>(cudaGetLastError());  // An error that is not for good is over with this one.
  throw Error(
      ErrorCode::kInternal,
      std::string("the GPU failed while ") + doing + " (" + Described(error) +
          "): the streams of this call may be damaged; make a new session, in a new process "
          "if CUDA refuses further work in this one, and put back earlier copies of its "
          "streams");
}

GpuBytes::GpuBytes(std::shared_ptr<const Gpu> gpu, Kind kind, int64_t bytes,
                   const std::string& what)
    : gpu_(std::move(gpu)), kind_(kind) {
  const size_t size = static_cast<size_t>(std::max<int64_t>(bytes, 1));
  void* data = nullptr;
  const cudaError_t error =
      kind == Kind::kDevice ? cudaMalloc(&data, size) : cudaMallocHost(&data, size);
  if (error == cudaErrorMemoryAllocation) {
    static_cast<void>(cudaGetLastError());
    throw Error(ErrorCode::kTooManyStreams,
                std::string("the ") + (kind == Kind::kDevice ? "GPU" : "system") +
                    " has no memory for the " + std::to_string(bytes) + " bytes of " + what +
                    ": close streams, or step fewer at a time");
  }
  Check(error, "giving memory");
  data_ = static_cast<char*>(data);
  bytes_ = bytes;
}

GpuBytes& GpuBytes::operator=(GpuBytes&& other) noexcept {
  std::swap(gpu_, other.gpu_);
  std::swap(kind_, other.kind_);
  std::swap(data_, other.data_);
  std::swap(bytes_, other.bytes_);
  return *this;
}

GpuBytes::~GpuBytes() {
  if (data_ == nullptr) return;
  gpu_->Free([this] {
    static_cast<void>(kind_ == Kind::kDevice ? cudaFree(data_) : cudaFreeHost(data_));
  });
}

GpuStream::GpuStream(std::shared_ptr<const Gpu> gpu) : gpu_(std::move(gpu)) {
  const Gpu::Use use(*gpu_);
  // It does not wait for the default stream, which other libraries use.
  Check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "making a stream");
}

GpuStream::~GpuStream() {
  gpu_->Free([this] { static_cast<void>(cudaStreamDestroy(stream_)); });
}

void GpuStream::WaitForDefaultStream() const {
  cudaEvent_t event;
  Check(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "making an event");
  const cudaError_t recorded = cudaEventRecord(event, cudaStreamLegacy);
  const cudaError_t waits =
      recorded == cudaSuccess ? cudaStreamWaitEvent(stream_, event, 0) : recorded;
  static_cast<void>(cudaEventDestroy(event));  // CUDA keeps it until nothing waits for it.
  Check(waits, "waiting for the caller's arrays");
}

bool IsOnGpu(const void* data, int gpu) {
  cudaPointerAttributes attributes;
  Check(cudaPointerGetAttributes(&attributes, data), "looking at the caller's arrays");
  if (attributes.type == cudaMemoryTypeDevice && attributes.device != gpu) {
    throw Error(ErrorCode::kInvalidArgument,
                "an array is on GPU " + std::to_string(attributes.device) + ", expected GPU " +
                    std::to_string(gpu) + ", which the session is on");
  }
  return attributes.type == cudaMemoryTypeDevice || attributes.type == cudaMemoryTypeManaged;
}

GpuBlockMemory::GpuBlockMemory(std::shared_ptr<const Gpu> gpu)
    : gpu_(std::move(gpu)), stream_(gpu_) {}

char* GpuBlockMemory::Map(int64_t bytes, std::string* refusal) {
  const Gpu::Use use(*gpu_);
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto fits = [bytes](const Allocation& a) {
    return a.slab_bytes == bytes && !a.free.empty();
  };
  // The oldest: the newer ones become empty sooner.
  const auto found = std::find_if(allocations_.begin(), allocations_.end(), fits);
  Allocation* const from = found != allocations_.end() ? &*found : Allocate(bytes);
  if (from == nullptr) {
    *refusal = "(the GPU's memory is full): close streams";
    return nullptr;
  }
  char* const slab = from->free.back();
  from->free.pop_back();
  return slab;
}

GpuBlockMemory::Allocation* GpuBlockMemory::Allocate(int64_t slab_bytes) {
  int64_t allocated = 0;
  for (const Allocation& allocation : allocations_) allocated += allocation.bytes;
  int64_t slabs = std::max<int64_t>(std::min(allocated, kLargestAllocation) / slab_bytes, 1);
  for (;; slabs /= 2) {  // Where there is no room for many slabs, there may be for one.
    if (slabs == 0) return nullptr;
    const int64_t bytes = AsAllocated(slabs * slab_bytes);
    void* base = nullptr;
    const cudaError_t error = cudaMalloc(&base, static_cast<size_t>(bytes));
    if (error == cudaErrorMemoryAllocation) {
      static_cast<void>(cudaGetLastError());
      continue;
    }
    Check(error, "giving memory for streams");
    allocations_.push_back({static_cast<char*>(base), bytes, slab_bytes, {}});
    Allocation* const made = &allocations_.back();
    for (int64_t i = made->slabs(); i-- > 0;) made->free.push_back(made->base + i * slab_bytes);
    return made;
  }
}

bool GpuBlockMemory::Unmap(char* base, int64_t slab_bytes, int64_t count) {
  if (!gpu_->IsOfThisProcess()) return true;  // A child leaves its parent's memory alone.
  const std::lock_guard<std::mutex> lock(mutex_);
  for (int64_t i = 0; i < count; ++i) {
    char* const slab = base + i * slab_bytes;
    const auto of = std::find_if(allocations_.begin(), allocations_.end(), [slab](const auto& a) {
      return std::less_equal<char*>()(a.base, slab) && std::less<char*>()(slab, a.base + a.bytes);
    });
    of->free.push_back(slab);
    if (static_cast<int64_t>(of->free.size()) < of->slabs()) continue;
    gpu_->Free([&of] { static_cast<void>(cudaFree(of->base)); });
    allocations_.erase(of);
  }
  return true;
}

void GpuBlockMemory::Zero(char* at, int64_t bytes) {
  const Gpu::Use use(*gpu_);
  Check(cudaMemsetAsync(at, 0, static_cast<size_t>(bytes), stream_.get()), "clearing a stream");
  Check(cudaStreamSynchronize(stream_.get()), "clearing a stream");
}

void GpuBlockMemory::CopyIn(const void* from, int64_t bytes, char* to) {
  Copy(to, from, bytes, cudaMemcpyHostToDevice);
}

void GpuBlockMemory::CopyOut(const char* from, int64_t bytes, void* to) {
  Copy(to, from, bytes, cudaMemcpyDeviceToHost);
}

void GpuBlockMemory::Copy(void* to, const void* from, int64_t bytes, cudaMemcpyKind kind) {
  if (bytes == 0) return;
  const Gpu::Use use(*gpu_);
  Check(cudaMemcpyAsync(to, from, static_cast<size_t>(bytes), kind, stream_.get()),
        "copying a stream");
  Check(cudaStreamSynchronize(stream_.get()), "copying a stream");
}

}  // namespace continual_transformers
