// Memory, streams and errors of a GPU.

#ifndef CONTINUAL_TRANSFORMERS_CUDA_SESSION_DEVICE_MEMORY_H_
#define CONTINUAL_TRANSFORMERS_CUDA_SESSION_DEVICE_MEMORY_H_

#include <cuda_runtime.h>

#include <cstdint>
#include <list>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "cc/session/block_memory.h"
#include "cc/session/error.h"

struct CUctx_st;  // of CUDA's driver

namespace continual_transformers {

// A GPU, as this process sees it. A forked child cannot use its parent's: CUDA refuses it.
class Gpu {
 public:
  // Throws Error with the cure if there is no such GPU, or the driver does not fit.
  explicit Gpu(int number);

  int number() const { return number_; }
  int multiprocessors() const { return multiprocessors_; }
  bool IsOfThisProcess() const;

  // Makes it this thread's GPU for a while. Throws Error in a forked child.
  class Use {
   public:
    explicit Use(const Gpu& gpu);
    ~Use();
    Use(const Use&) = delete;
    Use& operator=(const Use&) = delete;
  };

  // Calls free() with this GPU in use: for destructors. A forked child leaves its parent's things
  // alone.
  template <typename F>
  void Free(const F& free) const {
    if (!IsOfThisProcess()) return;
    try {
      const Use use(*this);
      free();
    } catch (const Error&) {  // The GPU has failed, and nothing can be freed.
    }
  }

 private:
  const int number_;
  const int process_;  // its id
  int multiprocessors_;
  // The context that CUDA's runtime uses too. It lasts as long as the process.
  CUctx_st* context_;
};

// Throws Error (kInternal) that says what failed. CUDA's errors are for good in most cases.
void Check(cudaError_t error, const char* doing);

// Memory that is freed with this object. The GPU must be in use when it is made.
class GpuBytes {
 public:
  enum class Kind { kDevice, kPinnedHost };

  GpuBytes() = default;
  // Throws Error (kTooManyStreams) if there is not enough; `what` it is for.
  GpuBytes(std::shared_ptr<const Gpu> gpu, Kind kind, int64_t bytes, const std::string& what);
  ~GpuBytes();
  GpuBytes(GpuBytes&& other) noexcept { *this = std::move(other); }
  GpuBytes& operator=(GpuBytes&& other) noexcept;

  char* get() const { return data_; }
  int64_t bytes() const { return bytes_; }

 private:
  std::shared_ptr<const Gpu> gpu_;
  Kind kind_ = Kind::kDevice;
  char* data_ = nullptr;
  int64_t bytes_ = 0;
};

// A CUDA stream, on which work is done in order.
class GpuStream {
 public:
  explicit GpuStream(std::shared_ptr<const Gpu> gpu);
  ~GpuStream();
  GpuStream(const GpuStream&) = delete;
  GpuStream& operator=(const GpuStream&) = delete;

  cudaStream_t get() const { return stream_; }
  // Lets later work on this stream wait for the work that the default stream has by now.
  void WaitForDefaultStream() const;

 private:
  const std::shared_ptr<const Gpu> gpu_;
  cudaStream_t stream_ = nullptr;
};

// Returns whether an address is of this GPU's memory, or of memory that both can touch. Throws
// Error for another GPU's.
bool IsOnGpu(const void* data, int gpu);

// The memory of stream blocks. Slabs lie anywhere, because kernels know blocks by their addresses.
// So nothing limits how many there are, and slabs come and go without moving any.
//
// Slabs lie in allocations of up to 64 MiB: CUDA rounds each one up to a multiple of 2 MiB. The
// first has one slab, and the next ones are as large as all before them together. So a few streams
// take little, and with many less than a thirtieth of the memory is lost by rounding.
class GpuBlockMemory final : public BlockMemory {
 public:
  explicit GpuBlockMemory(std::shared_ptr<const Gpu> gpu);

  int64_t Granularity() const override { return 256; }
  char* Map(int64_t bytes, std::string* refusal) override;
  bool Unmap(char* base, int64_t slab_bytes, int64_t count) override;
  void Touch(char*, char*) override {}
  void Zero(char* at, int64_t bytes) override;
  void CopyIn(const void* from, int64_t bytes, char* to) override;
  void CopyOut(const char* from, int64_t bytes, void* to) override;

 private:
  struct Allocation {
    char* base;
    int64_t bytes, slab_bytes;
    std::vector<char*> free;  // slabs

    int64_t slabs() const { return bytes / slab_bytes; }
  };

  // Returns an allocation with room for a slab, or null if there is no memory. `mutex_` is held.
  Allocation* Allocate(int64_t slab_bytes);
  void Copy(void* to, const void* from, int64_t bytes, cudaMemcpyKind kind);

  const std::shared_ptr<const Gpu> gpu_;
  const GpuStream stream_;
  std::mutex mutex_;
  std::list<Allocation> allocations_;  // the oldest first; each has a slab that is in use
};

}  // namespace continual_transformers

#endif  // CONTINUAL_TRANSFORMERS_CUDA_SESSION_DEVICE_MEMORY_H_
