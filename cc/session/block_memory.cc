#include "cc/session/block_memory.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <cstring>
#include <string>

namespace continual_transformers {

int64_t HostMemory::Granularity() const {
  static const int64_t bytes = sysconf(_SC_PAGESIZE);
  return bytes;
}

char* HostMemory::Map(int64_t bytes, std::string* refusal) {
  void* const base =
      mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (base == MAP_FAILED) {
    *refusal = std::string("(") + std::strerror(errno) +
               "): close streams, or raise the limit (ulimit -v, vm.overcommit_memory)";
    return nullptr;
  }
#ifdef MADV_NOHUGEPAGE
  // With huge pages, one step would fill a whole page with zeros, and so take memory for streams
  // that were never stepped.
  madvise(base, bytes, MADV_NOHUGEPAGE);
#endif
  return static_cast<char*>(base);
}

bool HostMemory::Unmap(char* base, int64_t slab_bytes, int64_t count) {
  // munmap fails if the system cannot record another hole. Then at least free the memory.
  if (munmap(base, count * slab_bytes) == 0) return true;
  madvise(base, count * slab_bytes, MADV_DONTNEED);
  return false;
}

void HostMemory::Touch(char* begin, char* end) {
#ifndef MADV_POPULATE_WRITE
  constexpr int MADV_POPULATE_WRITE = 23;
#endif
  const int64_t page = Granularity();
  char* const first = reinterpret_cast<char*>(reinterpret_cast<uintptr_t>(begin) / page * page);
  if (madvise(first, (end - first + page - 1) / page * page, MADV_POPULATE_WRITE) == 0) return;
  // Linux before 5.14 does not know the flag. The pages at both ends may be shared with neighbours,
  // so this writes nothing outside the range.
  for (char* i = first; i < end; i += page) {
    volatile char* const byte = std::max(i, begin);
    *byte = *byte;
  }
}

void HostMemory::Zero(char* at, int64_t bytes) { std::memset(at, 0, bytes); }

void HostMemory::CopyIn(const void* from, int64_t bytes, char* to) { std::memcpy(to, from, bytes); }

void HostMemory::CopyOut(const char* from, int64_t bytes, void* to) {
  std::memcpy(to, from, bytes);
}

}  // namespace continual_transformers
