// Products of small matrices that a step computes itself, and weighted sums of rows.

#ifndef CONTINUAL_TRANSFORMERS_ATTENTION_ROW_PRODUCTS_H_
#define CONTINUAL_TRANSFORMERS_ATTENTION_ROW_PRODUCTS_H_

#include <cstdint>

namespace continual_transformers {

// Writes x [rows, depth] times w [depth, columns] to y [rows, columns]. For matrices that fit in
// the nearest caches: w is read once for every four rows. Instantiated, like the function below,
// for the compute types of step_types.h.
template <typename T>
void MultiplyMatrices(const T* x, const T* w, int64_t rows, int64_t depth, int64_t columns, T* y);

// y[c] += rows[i][c] * kernel[i * size + c], for all of the `count` rows.
template <typename T>
void AddWeightedRows(const T* const* rows, const T* kernel, int64_t count, int64_t size, T* y);

}  // namespace continual_transformers

#endif  // CONTINUAL_TRANSFORMERS_ATTENTION_ROW_PRODUCTS_H_
