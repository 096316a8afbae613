#include "cc/attention/row_products.h"

#include <algorithm>
#include <cstdint>

#include "cc/attention/step_types.h"
#include "cc/attention/targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cc/attention/row_products.cc"
#include "hwy/foreach_target.h"
// Must follow foreach_target.h: otherwise these are compiled for one target only.
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace continual_transformers {
namespace HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

// The products of kRows rows of x with kVectors vectors of columns of w. If `count` is not 0, only
// the first `count` columns are there, less than one vector of them.
template <int kRows, int kVectors, typename T>
HWY_INLINE void MultiplyBlock(const T* HWY_RESTRICT x, const T* HWY_RESTRICT w, int64_t depth,
                              int64_t columns, size_t count, T* HWY_RESTRICT y) {
  const hn::ScalableTag<T> d;
  constexpr int64_t kLanes = hn::Lanes(d);
  hn::Vec<decltype(d)> sums[kRows][kVectors];
  CONTINUAL_TRANSFORMERS_UNROLL
  for (auto& row : sums) {
    CONTINUAL_TRANSFORMERS_UNROLL
    for (auto& sum : row) sum = hn::Zero(d);
  }
  for (int64_t i = 0; i < depth; ++i, w += columns) {
    CONTINUAL_TRANSFORMERS_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      const auto factors = count > 0 ? hn::LoadN(d, w, count) : hn::LoadU(d, w + v * kLanes);
      CONTINUAL_TRANSFORMERS_UNROLL
      for (int r = 0; r < kRows; ++r) {
        sums[r][v] = hn::MulAdd(hn::Set(d, x[r * depth + i]), factors, sums[r][v]);
      }
    }
  }
  CONTINUAL_TRANSFORMERS_UNROLL
  for (int r = 0; r < kRows; ++r) {
    CONTINUAL_TRANSFORMERS_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      if (count > 0) {
        hn::StoreN(sums[r][v], d, y + r * columns, count);
      } else {
        hn::StoreU(sums[r][v], d, y + r * columns + v * kLanes);
      }
    }
  }
}

template <int kRows, typename T>
HWY_INLINE void MultiplyRows(const T* x, const T* w, int64_t depth, int64_t columns, T* y) {
  constexpr int64_t kLanes = hn::Lanes(hn::ScalableTag<T>());
  int64_t c = 0;
  for (; c + 2 * kLanes <= columns; c += 2 * kLanes) {
    MultiplyBlock<kRows, 2>(x, w + c, depth, columns, 0, y + c);
  }
  for (; c < columns; c += kLanes) {
    const int64_t rest = columns - c;
    MultiplyBlock<kRows, 1>(x, w + c, depth, columns, rest < kLanes ? rest : 0, y + c);
  }
}

// The sum of x[i] * w[i].
template <typename T>
HWY_INLINE T Dot(const T* HWY_RESTRICT x, const T* HWY_RESTRICT w, int64_t size) {
  const hn::ScalableTag<T> d;
  constexpr int64_t kLanes = hn::Lanes(d);
  auto sum = hn::Zero(d);
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) {
    sum = hn::MulAdd(hn::LoadU(d, x + i), hn::LoadU(d, w + i), sum);
  }
  if (i < size) {  // LoadN gives zeros beyond the end.
    sum = hn::MulAdd(hn::LoadN(d, x + i, size - i), hn::LoadN(d, w + i, size - i), sum);
  }
  return hn::ReduceSum(d, sum);
}

template <typename T>
void Multiply(const T* x, const T* w, int64_t rows, int64_t depth, int64_t columns, T* y) {
  if (columns == 1) {
    for (int64_t r = 0; r < rows; ++r) y[r] = Dot(x + r * depth, w, depth);
    return;
  }
  for (; rows >= 4; rows -= 4, x += 4 * depth, y += 4 * columns) {
    MultiplyRows<4>(x, w, depth, columns, y);
  }
  for (; rows > 0; --rows, x += depth, y += columns) MultiplyRows<1>(x, w, depth, columns, y);
}

// Adds kRows weighted rows. The rows are read in memory order, several at once, while y stays in
// the nearest cache: sums in registers would jump from row to row.
template <int kRows, typename T>
HWY_INLINE void AddRows(const T* const* rows, const T* kernel, int64_t size, T* HWY_RESTRICT y) {
  const hn::ScalableTag<T> d;
  constexpr int64_t kLanes = hn::Lanes(d);
  int64_t c = 0;
  for (; c + kLanes <= size; c += kLanes) {
    auto sum = hn::LoadU(d, y + c);
    CONTINUAL_TRANSFORMERS_UNROLL
    for (int r = 0; r < kRows; ++r) {
      sum = hn::MulAdd(hn::LoadU(d, rows[r] + c), hn::LoadU(d, kernel + r * size + c), sum);
    }
    hn::StoreU(sum, d, y + c);
  }
  if (c < size) {
    const size_t rest = size - c;
    auto sum = hn::LoadN(d, y + c, rest);
    for (int r = 0; r < kRows; ++r) {
      const auto factor = hn::LoadN(d, kernel + r * size + c, rest);
      sum = hn::MulAdd(hn::LoadN(d, rows[r] + c, rest), factor, sum);
    }
    hn::StoreN(sum, d, y + c, rest);
  }
}

template <typename T>
void AddAllRows(const T* const* rows, const T* kernel, int64_t count, int64_t size, T* y) {
  int64_t i = 0;
  for (; i + 4 <= count; i += 4) AddRows<4>(rows + i, kernel + i * size, size, y);
  for (; i < count; ++i) AddRows<1>(rows + i, kernel + i * size, size, y);
}

}  // namespace HWY_NAMESPACE
}  // namespace continual_transformers
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace continual_transformers {

template <typename T>
void MultiplyMatrices(const T* x, const T* w, int64_t rows, int64_t depth, int64_t columns, T* y) {
  CONTINUAL_TRANSFORMERS_DISPATCH(Multiply, x, w, rows, depth, columns, y);
}

template <typename T>
void AddWeightedRows(const T* const* rows, const T* kernel, int64_t count, int64_t size, T* y) {
  CONTINUAL_TRANSFORMERS_DISPATCH(AddAllRows, rows, kernel, count, size, y);
}

#define INSTANTIATE(T)                                                                  \
  template void MultiplyMatrices<T>(const T*, const T*, int64_t, int64_t, int64_t, T*); \
  template void AddWeightedRows<T>(const T* const*, const T*, int64_t, int64_t, T*);
CONTINUAL_TRANSFORMERS_FOR_COMPUTE_TYPES(INSTANTIATE)
#undef INSTANTIATE

}  // namespace continual_transformers
#endif  // HWY_ONCE
