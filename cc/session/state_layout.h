// Where in a stream block each node's state lies; see docs/model_file.md.

#ifndef CONTINUAL_TRANSFORMERS_SESSION_STATE_LAYOUT_H_
#define CONTINUAL_TRANSFORMERS_SESSION_STATE_LAYOUT_H_

#include <cstdint>
#include <vector>

#include "cc/session/executor.h"
#include "cc/session/plan.h"

namespace continual_transformers {

struct StateLayout {
  std::vector<StateEntry> entries;
  int64_t block_bytes;
};

// With rings of keys and values in `cache_dtype`. Throws Error for a block of more than 2^40 bytes.
StateLayout LayOut(const Plan& plan, DType cache_dtype);

int64_t BytesOf(const StateEntry& entry);

}  // namespace continual_transformers

#endif  // CONTINUAL_TRANSFORMERS_SESSION_STATE_LAYOUT_H_
