// The emulator's device memory; see cuda_runtime.h. It is a range of addresses that the host cannot
// touch, except while a kernel or a copy runs. So code that reads device memory on the host fails
// here as it does with a GPU. Memory begins as 0xff bytes: NaN in every floating type. So do the
// guards after each allocation, which must still be so when it is freed.
//
// Tests of single kernels have no such memory. They give kernels the host's.

#ifndef CONTINUAL_TRANSFORMERS_TESTS_GPU_EMULATOR_EMULATED_MEMORY_H_
#define CONTINUAL_TRANSFORMERS_TESTS_GPU_EMULATOR_EMULATED_MEMORY_H_

#include <sys/mman.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>

namespace cuda_emulator {

// Only one kernel or copy runs at a time, also from several threads: threadIdx and the others are
// global.
inline std::recursive_mutex running;

class DeviceMemory {
 public:
  static DeviceMemory& Get() {
    static DeviceMemory* memory = new DeviceMemory;
    return *memory;
  }

  // Returns null if there is no room. `running` must be held.
  void* Allocate(size_t bytes) {
    // As CUDA does, in multiples of 2 MiB from 1 MiB on.
    const size_t multiple = bytes > size_t{1} << 20 ? size_t{2} << 20 : kAlignment;
    const size_t taken = (bytes + multiple - 1) / multiple * multiple;
    const size_t size = taken + kAlignment;  // with the guard
    // The first gap that is large enough.
    size_t at = 0;
    for (const auto& [begin, length] : allocated_) {
      if (begin - at >= size) break;
      at = begin + length;
    }
    if (at + size > room_) return nullptr;
    allocated_[at] = size;
    asked_[at] = bytes;
    taken_ += taken;
    if (at + size > used_) used_ = (at + size + kPage - 1) / kPage * kPage;
    Open();
    std::memset(base_ + at, 0xff, size);
    Close();
    return base_ + at;
  }

  void Free(void* data) {
    if (data == nullptr) return;
    const size_t at = static_cast<char*>(data) - base_;
    const auto found = allocated_.find(at);
    if (found == allocated_.end()) Stop("memory is freed that was not allocated");
    Open();
    for (size_t i = asked_[at]; i < found->second; ++i) {
      if (base_[at + i] != '\xff') Stop("something was written behind an allocation");
    }
    Close();
    taken_ -= found->second - kAlignment;
    allocated_.erase(found);
    asked_.erase(at);
  }

  // The bytes that all allocations take.
  size_t allocated() const { return taken_; }

  bool Has(const void* data) const {
    const char* const at = static_cast<const char*>(data);
    return at >= base_ && at < base_ + kMostRoom;
  }

  // Sets how much memory the device has.
  void SetRoom(size_t bytes) { room_ = bytes; }

  // Lets the host touch the memory, until Close() was called as often.
  void Open() {
    if (depth_++ == 0) Protect(PROT_READ | PROT_WRITE);
  }
  void Close() {
    if (--depth_ == 0) Protect(PROT_NONE);
  }

 private:
  static constexpr size_t kMostRoom = size_t{1} << 36, kPage = 4096, kAlignment = 256;

  DeviceMemory() {
    void* const base =
        mmap(nullptr, kMostRoom, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (base == MAP_FAILED) Stop("there are no addresses for device memory");
    base_ = static_cast<char*>(base);
  }

  void Protect(int how) {
    if (used_ != 0 && mprotect(base_, used_, how) != 0) Stop("mprotect failed");
  }

  [[noreturn]] static void Stop(const char* why) {
    std::fprintf(stderr, "CUDA emulator: %s\n", why);
    std::abort();
  }

  char* base_;
  size_t room_ = kMostRoom;
  size_t used_ = 0, taken_ = 0;
  int depth_ = 0;
  // The bytes of each allocation, by its beginning: with its guard, and as they were asked for.
  std::map<size_t, size_t> allocated_, asked_;
};

// During its life, its thread is the only one that works on the device, and may touch its memory.
class Work {
 public:
  Work() : lock_(running) { DeviceMemory::Get().Open(); }
  ~Work() { DeviceMemory::Get().Close(); }
  Work(const Work&) = delete;
  Work& operator=(const Work&) = delete;

 private:
  const std::lock_guard<std::recursive_mutex> lock_;
};

}  // namespace cuda_emulator

#endif  // CONTINUAL_TRANSFORMERS_TESTS_GPU_EMULATOR_EMULATED_MEMORY_H_
