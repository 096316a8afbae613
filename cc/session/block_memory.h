// The memory of stream blocks: a processor's own, or a GPU's. A block has the same layout in both.

#ifndef CONTINUAL_TRANSFORMERS_SESSION_BLOCK_MEMORY_H_
#define CONTINUAL_TRANSFORMERS_SESSION_BLOCK_MEMORY_H_

#include <cstdint>
#include <string>

namespace continual_transformers {

// Several threads may call it at once. Only it may touch the bytes at an address that it gave out:
// the host may be unable to.
class BlockMemory {
 public:
  virtual ~BlockMemory() = default;

  // The size of a slab is a multiple of this.
  virtual int64_t Granularity() const = 0;
  // Makes a slab that is at least 64-byte aligned. Returns null if there is no memory for it, and
  // then says in `refusal` why, and what to do.
  virtual char* Map(int64_t bytes, std::string* refusal) = 0;
  // Gives back `count` slabs that follow one another. Returns false if the slabs must be kept, to
  // be used again.
  virtual bool Unmap(char* base, int64_t slab_bytes, int64_t count) = 0;
  // Makes the first use of [begin, end) faster, if that needs anything. Keeps the contents.
  virtual void Touch(char* begin, char* end) = 0;

  // Each of these is done when it returns. They throw Error if the GPU has failed.
  virtual void Zero(char* at, int64_t bytes) = 0;
  virtual void CopyIn(const void* from, int64_t bytes, char* to) = 0;
  virtual void CopyOut(const char* from, int64_t bytes, void* to) = 0;
};

// The memory of the process.
class HostMemory final : public BlockMemory {
 public:
  int64_t Granularity() const override;
  char* Map(int64_t bytes, std::string* refusal) override;
  bool Unmap(char* base, int64_t slab_bytes, int64_t count) override;
  void Touch(char* begin, char* end) override;
  void Zero(char* at, int64_t bytes) override;
  void CopyIn(const void* from, int64_t bytes, char* to) override;
  void CopyOut(const char* from, int64_t bytes, void* to) override;
};

}  // namespace continual_transformers

#endif  // CONTINUAL_TRANSFORMERS_SESSION_BLOCK_MEMORY_H_
