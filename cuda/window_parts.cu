#include <algorithm>
#include <cstdint>

#include "cuda/partial_attention.cuh"
#include "cuda/window_parts.h"

namespace continual_transformers {
namespace {

constexpr int64_t kMostWaves = 8;

// The blocks that run at once.
int64_t Resident(int multiprocessors) {
  return int64_t{kBlocksPerMultiprocessor<float>} * multiprocessors;
}

}  // namespace

int64_t PlanWindowParts(int64_t queries, int64_t window, int multiprocessors) {
  // A part with fewer rows than a block reads at a time would be cheaper than merging it. The time
  // of a call is that of its waves of blocks, and a block takes as long as its rows, plus beginning
  // and merging it, which is counted as this many rows. That is a guess, which no GPU has measured.
  constexpr int64_t kRowsPerPart = 64;
  if (queries < 1) return 1;
  const int64_t resident = Resident(multiprocessors);
  const auto cost = [=](int64_t parts) {
    const int64_t waves = (queries * parts + resident - 1) / resident;
    return waves * ((window + parts - 1) / parts + kRowsPerPart);
  };
  int64_t best = 1;
  for (int64_t waves = 1; waves <= kMostWaves; ++waves) {
    // The most parts that fit into these waves.
    const int64_t parts = std::min(waves * resident / queries, window / kRowsPerPart);
    if (parts > 1 && cost(parts) < cost(best)) best = parts;
  }
  return best;
}

// Two parts for each of more queries would take more than kMostWaves, so they get one.
int64_t MostCutQueries(int multiprocessors) { return kMostWaves * Resident(multiprocessors) / 2; }

}  // namespace continual_transformers
