// Adds the rows of a table to those of a step, by the streams' positions.

#ifndef CONTINUAL_TRANSFORMERS_CUDA_SESSION_POSITIONAL_EACH_H_
#define CONTINUAL_TRANSFORMERS_CUDA_SESSION_POSITIONAL_EACH_H_

#include <cuda_runtime.h>

#include <cstdint>

namespace continual_transformers {

// i is an element of the output.
struct PositionalEach {
  char* const* blocks;
  const int64_t* positions;
  const float *x, *table;
  float* y;
  int64_t table_rows, start, offset_at, columns, rows;
  __device__ void operator()(int64_t i) const {
    const int64_t m = i / (rows * columns), row = i / columns % rows;
    const int64_t offset = *reinterpret_cast<const int64_t*>(blocks[m] + offset_at);
    // The offset may come from a copied state, so any value is possible.
    int64_t at = (start % table_rows + offset % table_rows +
                  (positions[m] % table_rows * rows + row) % table_rows) %
                 table_rows;
    if (at < 0) at += table_rows;
    y[i] = x[i] + table[at * columns + i % columns];
  }
};

}  // namespace continual_transformers

#endif  // CONTINUAL_TRANSFORMERS_CUDA_SESSION_POSITIONAL_EACH_H_
