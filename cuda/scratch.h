// Device memory that the launches of one step share, laid out piece after piece.

#ifndef CONTINUAL_TRANSFORMERS_CUDA_SCRATCH_H_
#define CONTINUAL_TRANSFORMERS_CUDA_SCRATCH_H_

#include <cstdint>

namespace continual_transformers {

// Built on null, it tells how many bytes there must be.
class ScratchLayout {
 public:
  explicit ScratchLayout(void* begin) : begin_(reinterpret_cast<uintptr_t>(begin)) {}

  // Room for so many, 16-byte aligned where the beginning is.
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
