// Dense layers, x W + b, with a kernel that its owner may change at any time, so it cannot be
// packed for good. For the few rows of one step, the time is that of reading the weights once. For
// the many rows of many streams, panels are copied in each call and multiplied by packed_dense.h.

#ifndef CONTINUAL_TRANSFORMERS_ATTENTION_DENSE_H_
#define CONTINUAL_TRANSFORMERS_ATTENTION_DENSE_H_

#include <cstdint>

namespace continual_transformers {

// T is the compute type, W the type of the kernel: T, or BFloat16 with float.
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

// The output's columns are divided among threads in blocks of this size.
constexpr int64_t kDenseColumns = 64;

inline int64_t DenseTasks(int64_t outputs) { return (outputs + kDenseColumns - 1) / kDenseColumns; }

// A rough estimate of the CPU cycles per task.
template <typename T, typename W>
int64_t DenseCyclesPerTask(const Dense<T, W>& dense);

// Computes column blocks begin, ..., end - 1. Every split of them over threads gives the same bits.
// Instantiated for the weight types of step_types.h.
template <typename T, typename W>
void TakeDenseTasks(const Dense<T, W>& dense, int64_t begin, int64_t end);

}  // namespace continual_transformers

#endif  // CONTINUAL_TRANSFORMERS_ATTENTION_DENSE_H_
