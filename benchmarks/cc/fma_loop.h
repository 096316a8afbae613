// The other half of a step's bound: how fast multiply-adds can be where nothing is read.

#ifndef CONTINUAL_TRANSFORMERS_BENCHMARKS_FMA_LOOP_H_
#define CONTINUAL_TRANSFORMERS_BENCHMARKS_FMA_LOOP_H_

#include <cstdint>

namespace continual_transformers {

struct FmaLoopResult {
  int64_t multiply_adds;  // Of float32.
  float sum;              // So that none is left out.
};

// Multiplies and adds in registers, `rounds` times, with whole vectors of the target in use.
FmaLoopResult FmaLoop(int64_t rounds);

}  // namespace continual_transformers

#endif  // CONTINUAL_TRANSFORMERS_BENCHMARKS_FMA_LOOP_H_
