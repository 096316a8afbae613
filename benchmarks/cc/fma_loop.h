// The other half of a step's bound: the speed of multiply-adds when nothing is read.

#ifndef CONTINUAL_TRANSFORMERS_BENCHMARKS_FMA_LOOP_H_
#define CONTINUAL_TRANSFORMERS_BENCHMARKS_FMA_LOOP_H_

#include <cstdint>

namespace continual_transformers {

struct FmaLoopResult {
  int64_t multiply_adds;  // of float32
  float sum;              // keeps the compiler from removing them
};

// Multiplies and adds in registers, `rounds` times, with whole vectors of the target in use.
FmaLoopResult FmaLoop(int64_t rounds);

}  // namespace continual_transformers

#endif  // CONTINUAL_TRANSFORMERS_BENCHMARKS_FMA_LOOP_H_
