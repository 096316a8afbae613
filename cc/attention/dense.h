// Dense layers: x W + b, for the few rows of a step, where the weights are read once and that is
// the time it takes, and for the many rows of many streams.

#ifndef CONTINUAL_TRANSFORMERS_ATTENTION_DENSE_H_
#define CONTINUAL_TRANSFORMERS_ATTENTION_DENSE_H_

#include <cstdint>

namespace continual_transformers {

// T is what is computed in, W what the kernel is kept in: T, or under float BFloat16.
template <typename T, typename W = T>
struct Dense {
  const T* input;   // [M, inputs]
  const W* kernel;  // [inputs, outputs]
  const T* bias;    // [outputs]; null: none
  T* output;        // [M, outputs]
  int64_t rows;     // M
  int64_t inputs;
  int64_t outputs;
};

// The columns of the output are shared out in blocks of so many.
constexpr int64_t kDenseColumns = 64;

inline int64_t DenseTasks(int64_t outputs) { return (outputs + kDenseColumns - 1) / kDenseColumns; }

// Roughly what a task costs, in CPU cycles.
template <typename T, typename W>
int64_t DenseCyclesPerTask(const Dense<T, W>& dense);

// Computes column blocks begin, ..., end - 1: any split of them over threads gives the same bits.
// Instantiated for (T, W) of (float, float), (float, BFloat16) and (double, double).
template <typename T, typename W>
void TakeDenseTasks(const Dense<T, W>& dense, int64_t begin, int64_t end);

}  // namespace continual_transformers

#endif  // CONTINUAL_TRANSFORMERS_ATTENTION_DENSE_H_
