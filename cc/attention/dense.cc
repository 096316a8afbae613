#include "cc/attention/dense.h"

#include <algorithm>
#include <cstdint>
#include <memory>

#include "cc/attention/packed_dense.h"
#include "cc/attention/step_types.h"
#include "cc/attention/targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cc/attention/dense.cc"
#include "hwy/foreach_target.h"
// Must follow foreach_target.h: otherwise these are compiled for one target only.
#include "cc/attention/vector_math-inl.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace continual_transformers {
namespace HWY_NAMESPACE {

// From this many rows on, panels of the kernel are copied, and the rows share them.
constexpr int64_t kFewRows = 4;

// For one or two rows at a time. Reads the kernel in memory order, several rows at once, while the
// output stays in the nearest cache.
template <typename T, typename W>
class FewRows {
 public:
  explicit FewRows(const Dense<T, W>& dense) : dense_(dense) {}

  void Columns(int64_t begin, int64_t end) const {
    for (int64_t m = 0; m < dense_.rows; ++m) {
      T* output = dense_.output + m * dense_.outputs;
      if (dense_.bias == nullptr) {
        std::fill(output + begin, output + end, T(0));
      } else {
        std::copy(dense_.bias + begin, dense_.bias + end, output + begin);
      }
    }
    for (int64_t first = begin; first < end; first += kTile) {
      const int64_t last = std::min(end, first + kTile);
      int64_t i = 0;
      for (; i + 4 <= dense_.inputs; i += 4) {
        AddRows<4, true>(0, i, first, last);
        for (int64_t m = 1; m < dense_.rows; ++m) AddRows<4, false>(m, i, first, last);
      }
      for (; i < dense_.inputs; ++i) {
        for (int64_t m = 0; m < dense_.rows; ++m) AddRows<1, false>(m, i, first, last);
      }
    }
  }

 private:
  using D = hn::ScalableTag<T>;
  using V = hn::Vec<D>;
  static constexpr int64_t kLanes = hn::Lanes(D());
  static constexpr int64_t kTile = 1024;
  // How far ahead in a row of the kernel to prefetch. The hardware prefetcher sees four rows as
  // four streams, and starts over for each. Median times of four kernels of 4 MB, relative to a
  // plain read (AVX2, Zen 3): 1.0; without prefetching 1.3, and by eight rows 1.1. Alternatives
  // that lost: prefetching the next rows instead, 1.1 by four and 1.6 by eight; sums that stay in
  // registers while all rows pass, 1.7; and for two or three rows of the output, every vector of
  // the kernel at once.
  static constexpr int64_t kAheadBytes = 1024, kLineBytes = 64;
  static constexpr int64_t kLine = std::max<int64_t>(kLanes, kLineBytes / sizeof(W));

  // output[m] += input[m][i] * kernel[i] over kRows rows from i on; kRows is 4 or 1.
  template <int kRows, bool kPrefetch>
  void AddRows(int64_t m, int64_t i, int64_t first, int64_t last) const {
    const D d;
    const T* HWY_RESTRICT x = dense_.input + m * dense_.inputs + i;
    const W* HWY_RESTRICT w = dense_.kernel + i * dense_.outputs;
    const int64_t stride = dense_.outputs;
    T* HWY_RESTRICT y = dense_.output + m * dense_.outputs;
    V scale[kRows];
    for (int r = 0; r < kRows; ++r) scale[r] = hn::Set(d, x[r]);
    const auto add = [&](int64_t c) HWY_ATTR {
      V sum = hn::LoadU(d, y + c);
      for (int r = 0; r < kRows; ++r) {
        sum = hn::MulAdd(scale[r], LoadWide(d, w + r * stride + c), sum);
      }
      hn::StoreU(sum, d, y + c);
    };
    int64_t c = first;
    for (; c + kLine <= last; c += kLine) {
      if constexpr (kPrefetch) {
        for (int r = 0; r < kRows; ++r) {
          __builtin_prefetch(reinterpret_cast<const char*>(w + r * stride + c) + kAheadBytes);
        }
      }
      for (int64_t lane = 0; lane < kLine; lane += kLanes) add(c + lane);
    }
    for (; c + kLanes <= last; c += kLanes) add(c);
    if (c < last) {
      const size_t rest = last - c;
      V sum = hn::LoadN(d, y + c, rest);
      for (int r = 0; r < kRows; ++r) {
        sum = hn::MulAdd(scale[r], LoadWideN(d, w + r * stride + c, rest), sum);
      }
      hn::StoreN(sum, d, y + c, rest);
    }
  }

  const Dense<T, W>& dense_;
};

// For many rows. Copies panels of the kernel, widens them, and multiplies them as packed ones.
template <typename T, typename W>
void MultiplyCopies(const Dense<T, W>& dense, int64_t begin, int64_t end) {
  const hn::ScalableTag<T> d;
  constexpr int64_t kLanes = hn::Lanes(d);
  // As wide as the sums of several rows that fit in registers, so that a copy stays in a near
  // cache.
  constexpr int64_t kVectors = HWY_TARGET == HWY_AVX3 || !HWY_ARCH_X86 ? 4 : 2;
  constexpr int64_t kColumns = std::max(kPanelStep, kVectors * kLanes);
  // Not initialized: a panel is written before it is read.
  const std::unique_ptr<T[]> copy(new T[dense.inputs * kColumns]);
  for (int64_t column = begin; column < end; column += kColumns) {
    DensePanel<T, T> panel = {};
    panel.kernel = copy.get();
    panel.bias = dense.bias == nullptr ? nullptr : dense.bias + column;
    panel.input = dense.input;
    panel.output = dense.output + column;
    panel.rows = dense.rows;
    panel.inputs = dense.inputs;
    panel.outputs = dense.outputs;
    panel.columns = std::min(kColumns, end - column);
    T* to = copy.get();
    const W* w = dense.kernel + column;
    if (panel.columns == kColumns) {
      for (int64_t i = 0; i < dense.inputs; ++i, w += dense.outputs, to += kColumns) {
        for (int64_t c = 0; c < kColumns; c += kLanes) hn::StoreU(LoadWide(d, w + c), d, to + c);
      }
    } else {
      const int64_t width = panel.width();
      for (int64_t i = 0; i < dense.inputs; ++i, w += dense.outputs, to += width) {
        for (int64_t c = 0; c < width; c += kLanes) {
          const int64_t rest = std::max<int64_t>(0, std::min(kLanes, panel.columns - c));
          hn::StoreU(LoadWideN(d, w + c, rest), d, to + c);
        }
      }
    }
    MultiplyPanel(panel);
  }
}

template <typename T, typename W>
void MultiplyColumns(const Dense<T, W>& dense, int64_t begin, int64_t end) {
  if (dense.rows == 0) return;
  if (dense.rows < kFewRows) {
    FewRows<T, W>(dense).Columns(begin, end);
  } else {
    MultiplyCopies(dense, begin, end);
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace continual_transformers
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace continual_transformers {

template <typename T, typename W>
int64_t DenseCyclesPerTask(const Dense<T, W>& dense) {
  // For one row: the time to read the kernel from beyond the first cache, 16 bytes a cycle. For
  // many rows: the time to multiply, 8 products a cycle.
  const int64_t products = dense.inputs * kDenseColumns;
  return products * static_cast<int64_t>(sizeof(W)) / 16 + products * dense.rows / 8;
}

template <typename T, typename W>
void TakeDenseTasks(const Dense<T, W>& dense, int64_t begin, int64_t end) {
  const int64_t last = std::min(end * kDenseColumns, dense.outputs);
  CONTINUAL_TRANSFORMERS_DISPATCH(MultiplyColumns, dense, begin * kDenseColumns, last);
}

#define INSTANTIATE(T, W)                                        \
  template int64_t DenseCyclesPerTask<T, W>(const Dense<T, W>&); \
  template void TakeDenseTasks<T, W>(const Dense<T, W>&, int64_t, int64_t);
CONTINUAL_TRANSFORMERS_FOR_WEIGHT_TYPES(INSTANTIATE)
#undef INSTANTIATE

}  // namespace continual_transformers
#endif  // HWY_ONCE
