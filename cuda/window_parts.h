// How many parts the windows of a launch of attention are cut into. A block of threads takes each
// part of a query's window, and the last block to arrive merges them (PartsMerger).

#ifndef CONTINUAL_TRANSFORMERS_CUDA_WINDOW_PARTS_H_
#define CONTINUAL_TRANSFORMERS_CUDA_WINDOW_PARTS_H_

#include <cstdint>

namespace continual_transformers {

// Returns the number of parts that keeps a GPU with this many multiprocessors busy.
int64_t PlanWindowParts(int64_t queries, int64_t window, int multiprocessors);

// Returns a number of queries above which PlanWindowParts() always returns 1.
int64_t MostCutQueries(int multiprocessors);

// Returns how many numbers the parts of so many queries take, and so where those of the next query
// begin; see PartsMerger.
constexpr int64_t PartsSize(int64_t queries, int64_t window_parts, int64_t value_dim) {
  return window_parts > 1 ? queries * window_parts * (value_dim + 2) : 0;
}

}  // namespace continual_transformers

#endif  // CONTINUAL_TRANSFORMERS_CUDA_WINDOW_PARTS_H_
