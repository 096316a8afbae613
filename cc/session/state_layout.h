// The layout of a stream block: where each node's state lies. See docs/model_file.md.

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

// Key and value rings are in `cache_dtype`; int8 has a scale for each row. Throws Error if a block
// would exceed 2^40 bytes.
StateLayout LayOut(const Plan& plan, DType cache_dtype);

int64_t BytesOf(const StateEntry& entry);

}  // namespace continual_transformers

#endif  // CONTINUAL_TRANSFORMERS_SESSION_STATE_LAYOUT_H_
