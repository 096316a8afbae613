#include "cc/attention/packed_dense.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <type_traits>

#include "cc/attention/elementwise.h"
#include "cc/attention/int8.h"
#include "cc/attention/step_types.h"
#include "cc/attention/targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cc/attention/packed_dense.cc"
#include "hwy/foreach_target.h"
// Must follow foreach_target.h: otherwise these are compiled for one target only.
#include "cc/attention/vector_math-inl.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace continual_transformers {
namespace HWY_NAMESPACE {

// One panel of the output.
template <typename T, typename W>
class Panel {
 public:
  explicit Panel(const DensePanel<T, W>& panel)
      : inputs_(panel.inputs),
        outputs_(panel.outputs),
        rows_(panel.rows),
        columns_(panel.columns),
        width_(panel.width()),
        w_(panel.kernel),
        scale_(panel.scale),
        bias_(panel.bias),
        x_(panel.input),
        residual_(panel.residual),
        y_(panel.output) {}

  void Multiply() const {
    int64_t row = 0;
    // The last eight rows are twice four. Six and two took 1.1 times as long (AVX3).
    for (; rows_ - row >= kManyRows && rows_ - row != 8; row += kManyRows) {
      Columns<kManyRows, kManyVectors, 1>(row);
    }
    if (rows_ - row == 8) {
      Columns<4, kManyVectors, 1>(row);
      row += 4;
    }
    switch (rows_ - row) {
      case 5:
        return Columns<5, kManyVectors, 1>(row);
      case 4:
        return Columns<4, kManyVectors, 1>(row);
      case 3:
        return Columns<3, kManyVectors, 1>(row);
      case 2:
        return Columns<2, kTwoVectors, 1>(row);
      case 1:
        return Columns<1, kOneVectors, kOneChains>(row);
    }
  }

 private:
  using D = hn::ScalableTag<T>;
  using V = hn::Vec<D>;
  static constexpr int64_t kLanes = hn::Lanes(D());
  static constexpr bool kScaled = std::is_same_v<W, int8_t>;
  static constexpr bool kManyRegisters = HWY_TARGET == HWY_AVX3 || !HWY_ARCH_X86;
  // Sums that fit in registers: 6 rows x 4 vectors with 32 registers, 6 x 2 with 16.
  static constexpr int kManyRows = 6;
  static constexpr int kManyVectors = kManyRegisters ? 4 : 2;
  static constexpr int kTwoVectors = 4;
  // A single row needs eight chains of sums, so that no addition waits for another, and reads its
  // panel in whole lines. Of four vectors, even and odd inputs have separate sums. Eight vectors of
  // a narrow kernel took 1.4 to 1.8 times as long: with their sums they need more than 16
  // registers.
  static constexpr int kOneVectors =
      std::min<int64_t>(std::is_same_v<T, W> ? 8 : 4, kPanelColumns / kLanes);
  static constexpr int kOneChains = 8 / kOneVectors;
  // Whether two vectors of columns are the even columns and the odd ones until they are stored. One
  // row then took 0.7 of the time (AVX2).
  template <int kVectors>
  static constexpr bool kEvenOdd = std::is_same_v<W, BFloat16> && kVectors % 2 == 0;

  // kRows rows of all columns, kVectors vectors of columns at a time.
  template <int kRows, int kVectors, int kChains>
  void Columns(int64_t row) const {
    int64_t c = 0;
    for (; c + kVectors * kLanes <= width_; c += kVectors * kLanes) {
      Block<kRows, kVectors, kChains>(row, c);
    }
    if constexpr (kVectors > 1) {
      // The rest of a narrow panel. Each loop over vectors has a constant bound.
      constexpr int kHalf = kVectors / 2;
      for (; c + kHalf * kLanes <= width_; c += kHalf * kLanes) {
        Block<kRows, kHalf, kChains>(row, c);
      }
      for (; c < width_; c += kLanes) Block<kRows, 1, kChains>(row, c);
    }
  }

  template <int kRows, int kVectors, int kChains>
  HWY_INLINE void Block(int64_t row, int64_t c) const {
    const D d;
    constexpr bool kBiasLast = kScaled || kEvenOdd<kVectors>;
    const T* HWY_RESTRICT x[kRows];
    CONTINUAL_TRANSFORMERS_UNROLL
    for (int r = 0; r < kRows; ++r) x[r] = x_ + (row + r) * inputs_;
    // All loops over these are unrolled. Otherwise the compiler keeps them in memory.
    V sum[kChains][kRows][kVectors];
    CONTINUAL_TRANSFORMERS_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      // Sums that are not those of their columns yet get the bias at the end.
      const V first = kBiasLast ? hn::Zero(d) : Bias(c + v * kLanes);
      CONTINUAL_TRANSFORMERS_UNROLL
      for (int r = 0; r < kRows; ++r) {
        sum[0][r][v] = first;
        CONTINUAL_TRANSFORMERS_UNROLL
        for (int chain = 1; chain < kChains; ++chain) sum[chain][r][v] = hn::Zero(d);
      }
    }
    const W* HWY_RESTRICT w = w_ + c;
    int64_t i = 0;
    for (; i + kChains <= inputs_; i += kChains) {
      CONTINUAL_TRANSFORMERS_UNROLL
      for (int chain = 0; chain < kChains; ++chain, w += width_) {
        V kernel[kVectors];
        LoadKernel<kVectors>(w, kernel);
        CONTINUAL_TRANSFORMERS_UNROLL
        for (int r = 0; r < kRows; ++r) {
          const V value = hn::Set(d, x[r][i + chain]);
          CONTINUAL_TRANSFORMERS_UNROLL
          for (int v = 0; v < kVectors; ++v) {
            sum[chain][r][v] = hn::MulAdd(value, kernel[v], sum[chain][r][v]);
          }
        }
      }
    }
    for (; i < inputs_; ++i, w += width_) {
      V kernel[kVectors];
      LoadKernel<kVectors>(w, kernel);
      CONTINUAL_TRANSFORMERS_UNROLL
      for (int r = 0; r < kRows; ++r) {
        const V value = hn::Set(d, x[r][i]);
        CONTINUAL_TRANSFORMERS_UNROLL
        for (int v = 0; v < kVectors; ++v) {
          sum[0][r][v] = hn::MulAdd(value, kernel[v], sum[0][r][v]);
        }
      }
    }
    CONTINUAL_TRANSFORMERS_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const int64_t at = (row + r) * outputs_;
      V totals[kVectors];
      CONTINUAL_TRANSFORMERS_UNROLL
      for (int v = 0; v < kVectors; ++v) {
        totals[v] = sum[0][r][v];
        CONTINUAL_TRANSFORMERS_UNROLL
        for (int chain = 1; chain < kChains; ++chain) {
          totals[v] = hn::Add(totals[v], sum[chain][r][v]);
        }
      }
      if constexpr (kEvenOdd<kVectors>) {
        CONTINUAL_TRANSFORMERS_UNROLL
        for (int v = 0; v < kVectors; v += 2) FromEvenOdd(d, &totals[v], &totals[v + 1]);
      }
      CONTINUAL_TRANSFORMERS_UNROLL
      for (int v = 0; v < kVectors; ++v) {
        V total = totals[v];
        const int64_t column = c + v * kLanes;
        if constexpr (kScaled) {
          total = hn::MulAdd(total, hn::LoadU(d, scale_ + column), Bias(column));
        } else if constexpr (kBiasLast) {
          total = hn::Add(total, Bias(column));
        }
        if (residual_ != nullptr) {
          total = hn::Add(total, LoadColumns(residual_ + at, column));
        }
        if (column + kLanes <= columns_) {
          hn::StoreU(total, d, y_ + at + column);
        } else if (column < columns_) {
          hn::StoreN(total, d, y_ + at + column, columns_ - column);
        }
      }
    }
  }

  // Loads kVectors vectors of columns, in the order that kEvenOdd says.
  template <int kVectors>
  static HWY_INLINE void LoadKernel(const W* HWY_RESTRICT w, V* kernel) {
    const D d;
    if constexpr (kEvenOdd<kVectors>) {
      CONTINUAL_TRANSFORMERS_UNROLL
      for (int v = 0; v < kVectors; v += 2) {
        LoadEvenOdd(d, w + v * kLanes, &kernel[v], &kernel[v + 1]);
      }
    } else {
      CONTINUAL_TRANSFORMERS_UNROLL
      for (int v = 0; v < kVectors; ++v) kernel[v] = LoadWide(d, w + v * kLanes);
    }
  }

  HWY_INLINE V Bias(int64_t column) const {
    return bias_ == nullptr ? hn::Zero(D()) : LoadColumns(bias_, column);
  }

  // Loads the columns from `column` on. Reads zeros past the end of the output's row, where the
  // panel may be wider.
  HWY_INLINE V LoadColumns(const T* p, int64_t column) const {
    const D d;
    if (column + kLanes <= columns_) return hn::LoadU(d, p + column);
    return column < columns_ ? hn::LoadN(d, p + column, columns_ - column) : hn::Zero(d);
  }

  const int64_t inputs_, outputs_, rows_;
  const int64_t columns_, width_;
  const W* w_;
  const T* scale_;
  const T* bias_;
  const T* x_;
  const T* residual_;
  T* y_;
};

template <typename T, typename W>
void MultiplyOne(const DensePanel<T, W>& panel) {
  Panel<T, W>(panel).Multiply();
}

template <typename T, typename W>
void MultiplyPanels(const PackedDense<T, W>& dense, int64_t begin, int64_t end) {
  const PackedKernel<T, W>& kernel = *dense.kernel;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t column = i * kPanelColumns;
    const auto from = [column](auto* p) { return p == nullptr ? nullptr : p + column; };
    Panel<T, W>({kernel.panel(i), from(kernel.scale()), from(dense.bias), dense.input,
                 from(dense.residual), dense.output + column, dense.rows, kernel.inputs(),
                 kernel.outputs(), std::min(kPanelColumns, kernel.outputs() - column)})
        .Multiply();
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace continual_transformers
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace continual_transformers {
namespace {

// The number of elements in all panels.
int64_t PackedSize(int64_t inputs, int64_t outputs) {
  return inputs * ((outputs + kPanelStep - 1) / kPanelStep * kPanelStep);
}

}  // namespace

template <typename T, typename W>
void PackedKernel<T, W>::Free::operator()(void* p) const {
  std::free(p);
}

template <typename T, typename W>
PackedKernel<T, W>::PackedKernel(const T* kernel, int64_t inputs, int64_t outputs)
    : inputs_(inputs), outputs_(outputs) {
  const size_t size = (bytes() + 63) / 64 * 64;
  data_.reset(static_cast<W*>(std::aligned_alloc(64, std::max<size_t>(64, size))));
  if (data_ == nullptr) throw std::bad_alloc();
  std::memset(static_cast<void*>(data_.get()), 0, size);
  if constexpr (std::is_same_v<W, int8_t>) SetScales(kernel);
  for (int64_t i = 0; i < panels(); ++i) {
    const int64_t column = i * kPanelColumns;
    const int64_t columns = std::min(kPanelColumns, outputs - column);
    const int64_t width = (columns + kPanelStep - 1) / kPanelStep * kPanelStep;
    W* to = data_.get() + column * inputs;
    for (int64_t row = 0; row < inputs; ++row) {
      const T* from = kernel + row * outputs + column;
      if constexpr (std::is_same_v<T, W>) {
        std::copy_n(from, columns, to + row * width);
      } else if constexpr (std::is_same_v<W, int8_t>) {
        for (int64_t c = 0; c < columns; ++c) {
          to[row * width + c] = Quantized(from[c], scale_[column + c]);
        }
      } else {
        Narrow(from, columns, to + row * width);
      }
    }
  }
}

template <typename T, typename W>
void PackedKernel<T, W>::SetScales(const T* kernel) {
  scale_.assign(panels() * kPanelColumns, T(0));
  for (int64_t row = 0; row < inputs_; ++row) {
    for (int64_t column = 0; column < outputs_; ++column) {
      const T magnitude = std::abs(kernel[row * outputs_ + column]);
      T& largest = scale_[column];
      // NaN replaces any number, and stays.
      if (!(magnitude <= largest) && !std::isnan(largest)) largest = magnitude;
    }
  }
  for (T& scale : scale_) scale /= kMostInt8;
}

template <typename T, typename W>
int64_t PackedKernel<T, W>::bytes() const {
  return PackedSize(inputs_, outputs_) * static_cast<int64_t>(sizeof(W)) +
         static_cast<int64_t>(scale_.size() * sizeof(T));
}

template <typename T, typename W>
int64_t PackedDenseCyclesPerPanel(const PackedDense<T, W>& dense) {
  // For one row: the time to read the kernel from beyond the first cache, 32 bytes a cycle. For
  // many rows: the time to multiply, 16 products a cycle.
  const int64_t products =
      dense.kernel->inputs() * std::min(kPanelColumns, dense.kernel->outputs());
  return products * static_cast<int64_t>(sizeof(W)) / 32 + products * dense.rows / 16;
}

template <typename T, typename W>
void TakePackedDense(const PackedDense<T, W>& dense, int64_t begin, int64_t end) {
  CONTINUAL_TRANSFORMERS_DISPATCH(MultiplyPanels, dense, begin, end);
}

template <typename T, typename W>
void MultiplyPanel(const DensePanel<T, W>& panel) {
  CONTINUAL_TRANSFORMERS_DISPATCH(MultiplyOne, panel);
}

#define INSTANTIATE(T, W)                                                     \
  template void MultiplyPanel<T, W>(const DensePanel<T, W>&);                 \
  template class PackedKernel<T, W>;                                          \
  template int64_t PackedDenseCyclesPerPanel<T, W>(const PackedDense<T, W>&); \
  template void TakePackedDense<T, W>(const PackedDense<T, W>&, int64_t, int64_t);
CONTINUAL_TRANSFORMERS_FOR_PACKED_TYPES(INSTANTIATE)
#undef INSTANTIATE

}  // namespace continual_transformers
#endif  // HWY_ONCE
