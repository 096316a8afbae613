// Elements that are moved and never computed with: only their size matters.

#ifndef CONTINUAL_TRANSFORMERS_CUDA_SESSION_ELEMENT_SIZE_H_
#define CONTINUAL_TRANSFORMERS_CUDA_SESSION_ELEMENT_SIZE_H_

#include <cstdint>

namespace continual_transformers {

// Calls f with an unsigned integer of 1, 4 or 8 bytes: the sizes of the dtypes of plan values in a
// model of float32.
template <typename F>
auto WithElement(int64_t bytes, const F& f) {
  return bytes == 1 ? f(uint8_t{}) : bytes == 4 ? f(uint32_t{}) : f(uint64_t{});
}

}  // namespace continual_transformers

#endif  // CONTINUAL_TRANSFORMERS_CUDA_SESSION_ELEMENT_SIZE_H_
