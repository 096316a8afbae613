// The lower bound that a step is measured against: a plain vector loop that reads the same bytes.

#ifndef CONTINUAL_TRANSFORMERS_ATTENTION_READ_LOOP_H_
#define CONTINUAL_TRANSFORMERS_ATTENTION_READ_LOOP_H_

#include <cstddef>

namespace continual_transformers {

// Returns the exclusive or of the bytes, read by whole vectors of the target in use. The last
// bytes, fewer than eight vectors, are skipped.
unsigned char ReadLoop(const void* data, size_t bytes);

}  // namespace continual_transformers

#endif  // CONTINUAL_TRANSFORMERS_ATTENTION_READ_LOOP_H_
