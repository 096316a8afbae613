// The layout of device memory that the launches of one step share.

#ifndef CONTINUAL_TRANSFORMERS_CUDA_SCRATCH_H_
#define CONTINUAL_TRANSFORMERS_CUDA_SCRATCH_H_

#include <cstdint>

namespace continual_transformers {

// With null, it only counts the bytes.
class ScratchLayout {
 public:
  explicit ScratchLayout(void* begin) : begin_(reinterpret_cast<uintptr_t>(begin)) {}

  // Returns room for this many elements. It is 16-byte aligned if the beginning is.
  template <typename U>
  U* Take(int64_t elements) {
    constexpr int64_t kAlignment = 16;
    U* const taken = reinterpret_cast<U*>(begin_ + bytes_);
    bytes_ +=
        (elements * static_cast<int64_t>(sizeof(U)) + kAlignment - 1) / kAlignment * kAlignment;
    return taken;
  }

  int64_t bytes() const { return bytes_; }

 private:
  const uintptr_t begin_;
  int64_t bytes_ = 0;
};

}  // namespace continual_transformers

#endif  // CONTINUAL_TRANSFORMERS_CUDA_SCRATCH_H_
