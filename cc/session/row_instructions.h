// Nodes of a plan that compute each row from that row only, element by element or along an axis.

#ifndef CONTINUAL_TRANSFORMERS_SESSION_ROW_INSTRUCTIONS_H_
#define CONTINUAL_TRANSFORMERS_SESSION_ROW_INSTRUCTIONS_H_

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <numeric>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "cc/attention/activations.h"
#include "cc/attention/elementwise.h"
#include "cc/session/error.h"
#include "cc/session/instruction.h"

namespace continual_transformers {

// Calls f(frame), at an estimated number of cycles per row. For nodes that need no class of their
// own.
template <class F>
class RowsInstruction : public Instruction {
 public:
  RowsInstruction(int64_t cycles_a_row, F f) : cycles_a_row_(cycles_a_row), f_(std::move(f)) {}
  void Run(const Frame& frame) const override { f_(frame); }
  int64_t Cycles(int64_t rows) const override { return 50 + rows * cycles_a_row_; }

 private:
  const int64_t cycles_a_row_;
  const F f_;
};

template <class F>
std::unique_ptr<Instruction> MakeRows(int64_t cycles_a_row, F f) {
  return std::make_unique<RowsInstruction<F>>(cycles_a_row, std::move(f));
}

template <typename T>
std::unique_ptr<Instruction> MakeActivation(const ActivationSpec& spec, int input, int output,
                                            int64_t size) {
  return MakeRows(size * CyclesPerElement(spec.kind), [=](const Frame& frame) {
    Apply(spec, frame.Rows<T>(input), frame.rows() * size, frame.Rows<T>(output));
  });
}

// x if it is not negative, else alpha * x.
template <typename T>
std::unique_ptr<Instruction> MakePRelu(std::vector<T> alpha, int input, int output) {
  const int64_t size = alpha.size();
  return MakeRows(size, [=, alpha = std::move(alpha)](const Frame& frame) {
    const T* x = frame.Rows<T>(input);
    T* y = frame.Rows<T>(output);
    for (int64_t r = 0; r < frame.rows(); ++r, x += size, y += size) {
      for (int64_t i = 0; i < size; ++i) y[i] = x[i] < 0 ? alpha[i] * x[i] : x[i];
    }
  });
}

// x * scale + offset, along the last axis.
template <typename T>
std::unique_ptr<Instruction> MakeAffine(std::vector<T> scale, std::vector<T> offset, int input,
                                        int output, int64_t size) {
  const int64_t columns = scale.size();
  return MakeRows(
      size, [=, scale = std::move(scale), offset = std::move(offset)](const Frame& frame) {
        const T* x = frame.Rows<T>(input);
        T* y = frame.Rows<T>(output);
        for (int64_t r = 0; r < frame.rows() * (size / columns); ++r, x += columns, y += columns) {
          for (int64_t i = 0; i < columns; ++i) y[i] = x[i] * scale[i] + offset[i];
        }
      });
}

// One axis of a row: the number of elements before, along and after it.
struct Axis {
  int64_t outer, size, inner;
};

inline Axis AxisOf(const std::vector<int64_t>& shape, int64_t axis) {
  Axis found = {1, shape[axis], 1};
  for (int64_t i = 0; i < axis; ++i) found.outer *= shape[i];
  for (size_t i = axis + 1; i < shape.size(); ++i) found.inner *= shape[i];
  return found;
}

// `x` and `y` have `size` elements, `stride` apart.
template <typename T>
void SoftmaxOf(const T* x, int64_t size, int64_t stride, bool log, T* y) {
  T max = -std::numeric_limits<T>::infinity();
  for (int64_t i = 0; i < size; ++i) {
    if (x[i * stride] > max) max = x[i * stride];  // The exponential keeps a NaN.
  }
  T sum = 0;
  for (int64_t i = 0; i < size; ++i) {
    const T e = std::exp(x[i * stride] - max);
    sum += e;
    y[i * stride] = log ? x[i * stride] - max : e;
  }
  if (log) {
    const T log_sum = std::log(sum);
    for (int64_t i = 0; i < size; ++i) y[i * stride] -= log_sum;
  } else {
    for (int64_t i = 0; i < size; ++i) y[i * stride] /= sum;
  }
}

// Sparsemax (Martins & Astudillo 2016, arXiv 1602.02068) as Keras 3.15 computes it: its threshold
// uses all cumulative sums of the support, where the paper uses the last. A model must be served as
// it was trained. `sorted` is scratch of `size`.
template <typename T>
void SparsemaxOf(const T* x, int64_t size, int64_t stride, T* sorted, T* y) {
  bool has_nan = false;
  for (int64_t i = 0; i < size; ++i) {
    sorted[i] = x[i * stride];
    has_nan |= std::isnan(sorted[i]);
  }
  if (has_nan) {  // NaN cannot be sorted.
    for (int64_t i = 0; i < size; ++i) y[i * stride] = std::numeric_limits<T>::quiet_NaN();
    return;
  }
  std::sort(sorted, sorted + size, [](T a, T b) { return a > b; });
  T sum = 0, sums = 0;
  int64_t support = 0;
  for (int64_t i = 0; i < size; ++i) {
    sum += sorted[i];
    if (1 + (i + 1) * sorted[i] > sum) {
      sums += sum;
      ++support;
    }
  }
  const T threshold = (sums - 1) / support;
  for (int64_t i = 0; i < size; ++i) y[i * stride] = std::max(x[i * stride] - threshold, T(0));
}

template <typename T>
class SoftmaxInstruction : public Instruction {
 public:
  SoftmaxInstruction(const std::string& function, const Axis& axis, int input, int output)
      : log_(function == "log_softmax"),
        sparse_(function == "sparsemax"),
        axis_(axis),
        input_(input),
        output_(output) {}

  void Run(const Frame& frame) const override {
    const T* x = frame.Rows<T>(input_);
    T* y = frame.Rows<T>(output_);
    const int64_t outer = frame.rows() * axis_.outer, block = axis_.size * axis_.inner;
    for (int64_t o = 0; o < outer; ++o) {
      for (int64_t i = 0; i < axis_.inner; ++i) {
        const int64_t at = o * block + i;
        if (sparse_) {
          T* sorted = reinterpret_cast<T*>(frame.scratch);
          SparsemaxOf(x + at, axis_.size, axis_.inner, sorted, y + at);
        } else {
          SoftmaxOf(x + at, axis_.size, axis_.inner, log_, y + at);
        }
      }
    }
  }

  int64_t Cycles(int64_t rows) const override {
    return rows * axis_.outer * axis_.size * axis_.inner * 20;
  }
  int64_t ScratchBytes() const override { return axis_.size * static_cast<int64_t>(sizeof(T)); }

 private:
  const bool log_, sparse_;
  const Axis axis_;
  const int input_, output_;
};

// An operand is a plan value, or a constant that is the same in every row.
template <typename T>
struct Operand {
  int value;  // used if `constant` is null
  const T* constant = nullptr;
};

template <typename T, class F>
std::unique_ptr<Instruction> MakeBinary(const Operand<T>& a, const Operand<T>& b, int output,
                                        int64_t size, int64_t cycles, F f) {
  return MakeRows(size * cycles, [=](const Frame& frame) {
    const T* x = a.constant == nullptr ? frame.Rows<T>(a.value) : a.constant;
    const T* y = b.constant == nullptr ? frame.Rows<T>(b.value) : b.constant;
    T* z = frame.Rows<T>(output);
    if (a.constant == nullptr && b.constant == nullptr) {
      for (int64_t i = 0; i < frame.rows() * size; ++i) z[i] = f(x[i], y[i]);
      return;
    }
    for (int64_t r = 0; r < frame.rows(); ++r, z += size) {
      for (int64_t i = 0; i < size; ++i) z[i] = f(x[i], y[i]);
      if (a.constant == nullptr) x += size;
      if (b.constant == nullptr) y += size;
    }
  });
}

template <typename T>
std::unique_ptr<Instruction> MakeBinary(const std::string& function, const Operand<T>& a,
                                        const Operand<T>& b, int output, int64_t size) {
  const auto make = [&](int64_t cycles, auto f) {
    return MakeBinary<T>(a, b, output, size, cycles, f);
  };
  if (function == "add") return make(1, [](T x, T y) { return x + y; });
  if (function == "subtract") return make(1, [](T x, T y) { return x - y; });
  if (function == "multiply") return make(1, [](T x, T y) { return x * y; });
  if (function == "divide") return make(2, [](T x, T y) { return x / y; });
  // A NaN in either operand gives NaN.
  if (function == "maximum") {
    return make(1, [](T x, T y) { return x > y || std::isnan(x) ? x : y; });
  }
  if (function == "minimum") {
    return make(1, [](T x, T y) { return x < y || std::isnan(x) ? x : y; });
  }
  if (function == "power") return make(60, [](T x, T y) { return std::pow(x, y); });
  // Comparisons give 1 or 0. NaN is unequal to everything, and neither greater nor smaller.
  if (function == "equal") return make(1, [](T x, T y) { return static_cast<T>(x == y); });
  if (function == "not_equal") return make(1, [](T x, T y) { return static_cast<T>(x != y); });
  if (function == "greater") return make(1, [](T x, T y) { return static_cast<T>(x > y); });
  if (function == "greater_equal") return make(1, [](T x, T y) { return static_cast<T>(x >= y); });
  if (function == "arctan2") return make(60, [](T x, T y) { return std::atan2(x, y); });
  if (function == "hypot") return make(20, [](T x, T y) { return std::hypot(x, y); });
  if (function == "fmod") return make(40, [](T x, T y) { return std::fmod(x, y); });
  if (function == "mod") {  // It has the sign of y, where fmod has that of x.
    return make(40, [](T x, T y) {
      const T rest = std::fmod(x, y);
      return rest != 0 && (rest < 0) != (y < 0) ? rest + y : rest;
    });
  }
  if (function == "logaddexp") {
    return make(60, [](T x, T y) {
      const T difference = x - y;
      if (std::isnan(difference)) return x + y;  // Two equal infinities, or a NaN.
      return std::max(x, y) + std::log1p(std::exp(-std::abs(difference)));
    });
  }
  throw Error(ErrorCode::kBadModelFile, "Expected a binary function, but got " + function);
}

// x where the condition is true, else y.
template <typename T>
std::unique_ptr<Instruction> MakeWhere(int condition, int x, int y, int output, int64_t size) {
  return MakeRows(size, [=](const Frame& frame) {
    const bool* first = frame.Rows<bool>(condition);
    const T *a = frame.Rows<T>(x), *b = frame.Rows<T>(y);
    T* to = frame.Rows<T>(output);
    for (int64_t i = 0; i < frame.rows() * size; ++i) to[i] = first[i] ? a[i] : b[i];
  });
}

// Normalizes each row to mean 0 and standard deviation 1.
template <typename T>
std::unique_ptr<Instruction> MakeLayerNorm(std::vector<T> gamma, std::vector<T> beta,
                                           double epsilon, int input, int output,
                                           int64_t rows_a_step) {
  const int64_t size = gamma.size();
  return MakeRows(rows_a_step * (60 + size), [=, gamma = std::move(gamma),
                                              beta = std::move(beta)](const Frame& frame) {
    const LayerNorm<T> norm = {gamma.data(), beta.data(), static_cast<T>(epsilon)};
    Normalize(norm, frame.Rows<T>(input), frame.rows() * rows_a_step, size, frame.Rows<T>(output));
  });
}

// `rms`: divides by the root of the mean of squares plus epsilon. Otherwise divides by the root of
// the sum of squares, which is at least epsilon.
template <typename T>
std::unique_ptr<Instruction> MakeScaleNorm(bool rms, std::vector<T> gamma, std::vector<T> beta,
                                           double epsilon, int input, int output,
                                           int64_t rows_a_step) {
  const int64_t size = gamma.size();
  return MakeRows(rows_a_step * (60 + 2 * size),
                  [=, gamma = std::move(gamma), beta = std::move(beta)](const Frame& frame) {
                    const T* x = frame.Rows<T>(input);
                    T* y = frame.Rows<T>(output);
                    for (int64_t r = 0; r < frame.rows() * rows_a_step; ++r, x += size, y += size) {
                      T sum = 0;
                      for (int64_t i = 0; i < size; ++i) sum += x[i] * x[i];
                      const T least = static_cast<T>(epsilon);
                      const T square = rms ? sum / size + least : sum < least ? least : sum;
                      const T factor = 1 / std::sqrt(square);
                      for (int64_t i = 0; i < size; ++i) y[i] = x[i] * factor * gamma[i] + beta[i];
                    }
                  });
}

// The index of the first largest or smallest element along an axis; a NaN counts as either.
template <typename T>
std::unique_ptr<Instruction> MakeFirstExtreme(bool largest, const Axis& axis, int input,
                                              int output) {
  return MakeRows(2 * axis.outer * axis.size * axis.inner, [=](const Frame& frame) {
    const T* x = frame.Rows<T>(input);
    T* y = frame.Rows<T>(output);
    for (int64_t o = 0; o < frame.rows() * axis.outer; ++o, x += axis.size * axis.inner) {
      for (int64_t j = 0; j < axis.inner; ++j) {
        int64_t found = 0;
        for (int64_t i = 1; i < axis.size; ++i) {
          const T a = x[i * axis.inner + j], best = x[found * axis.inner + j];
          if ((largest ? a > best : a < best) || (std::isnan(a) && !std::isnan(best))) found = i;
        }
        *y++ = static_cast<T>(found);
      }
    }
  });
}

template <typename T>
std::unique_ptr<Instruction> MakeReduce(const std::string& function, const Axis& axis, int input,
                                        int output) {
  const int64_t size = axis.outer * axis.size * axis.inner;
  const auto make = [&](auto add, bool mean) {
    return MakeRows(size, [=](const Frame& frame) {
      const T* x = frame.Rows<T>(input);
      T* y = frame.Rows<T>(output);
      for (int64_t o = 0; o < frame.rows() * axis.outer; ++o) {
        std::copy_n(x, axis.inner, y);
        x += axis.inner;
        for (int64_t i = 1; i < axis.size; ++i, x += axis.inner) {
          for (int64_t j = 0; j < axis.inner; ++j) y[j] = add(y[j], x[j]);
        }
        for (int64_t j = 0; mean && j < axis.inner; ++j) y[j] /= static_cast<T>(axis.size);
        y += axis.inner;
      }
    });
  };
  if (function == "sum" || function == "mean") {
    return make([](T a, T b) { return a + b; }, function == "mean");
  }
  if (function == "max") {
    return make([](T a, T b) { return b > a || std::isnan(b) ? b : a; }, false);
  }
  if (function == "min") {
    return make([](T a, T b) { return b < a || std::isnan(b) ? b : a; }, false);
  }
  if (function == "product") return make([](T a, T b) { return a * b; }, false);
  if (function == "argmax" || function == "argmin") {
    return MakeFirstExtreme<T>(function == "argmax", axis, input, output);
  }
  throw Error(ErrorCode::kBadModelFile, "Expected a reduction, but got " + function);
}

// The sums or products of all elements up to each along an axis.
template <typename T>
std::unique_ptr<Instruction> MakeCumulative(const std::string& function, const Axis& axis,
                                            int input, int output) {
  const bool product = function == "product";
  return MakeRows(axis.outer * axis.size * axis.inner, [=](const Frame& frame) {
    const T* x = frame.Rows<T>(input);
    T* y = frame.Rows<T>(output);
    for (int64_t o = 0; o < frame.rows() * axis.outer; ++o) {
      std::copy_n(x, axis.inner, y);
      for (int64_t i = axis.inner; i < axis.size * axis.inner; ++i) {
        const T before = y[i - axis.inner];
        y[i] = product ? before * x[i] : before + x[i];
      }
      x += axis.size * axis.inner;
      y += axis.size * axis.inner;
    }
  });
}

// Sorts along an axis. Equal elements keep their order, and NaN counts as the largest number.
template <typename T>
class SortInstruction : public Instruction {
 public:
  SortInstruction(bool indices, bool descending, const Axis& axis, int input, int output)
      : indices_(indices), descending_(descending), axis_(axis), input_(input), output_(output) {}

  void Run(const Frame& frame) const override {
    const T* x = frame.Rows<T>(input_);
    T* y = frame.Rows<T>(output_);
    int64_t* order = reinterpret_cast<int64_t*>(frame.scratch);
    for (int64_t o = 0; o < frame.rows() * axis_.outer; ++o) {
      for (int64_t i = 0; i < axis_.inner; ++i) {
        const int64_t at = o * axis_.size * axis_.inner + i;
        const auto element = [&](int64_t k) { return x[at + k * axis_.inner]; };
        std::iota(order, order + axis_.size, 0);
        // With the index as the last criterion: std::stable_sort would allocate.
        std::sort(order, order + axis_.size, [&](int64_t a, int64_t b) {
          const T first = element(a), second = element(b);
          return Before(first, second) || (!Before(second, first) && a < b);
        });
        for (int64_t k = 0; k < axis_.size; ++k) {
          y[at + k * axis_.inner] = indices_ ? static_cast<T>(order[k]) : element(order[k]);
        }
      }
    }
  }

  int64_t Cycles(int64_t rows) const override {
    return rows * axis_.outer * axis_.inner * axis_.size * 100;
  }
  int64_t ScratchBytes() const override {
    return axis_.size * static_cast<int64_t>(sizeof(int64_t));
  }

 private:
  bool Before(T a, T b) const { return descending_ ? Less(b, a) : Less(a, b); }
  static bool Less(T a, T b) { return a < b || (std::isnan(b) && !std::isnan(a)); }

  const bool indices_, descending_;
  const Axis axis_;
  const int input_, output_;
};

template <typename From, typename To>
std::unique_ptr<Instruction> MakeCast(int input, int output, int64_t size) {
  return MakeRows(size, [=](const Frame& frame) {
    const From* x = frame.Rows<From>(input);
    To* y = frame.Rows<To>(output);
    for (int64_t i = 0; i < frame.rows() * size; ++i) {
      if constexpr (std::is_same_v<To, bool>) {
        y[i] = x[i] != From(0);
      } else if constexpr (std::is_floating_point_v<From> && std::is_integral_v<To>) {
        // C++ leaves these conversions undefined. As on x86, NaN and numbers out of range give the
        // smallest integer.
        const bool fits = x[i] >= static_cast<From>(std::numeric_limits<To>::min()) &&
                          x[i] < -static_cast<From>(std::numeric_limits<To>::min());
        y[i] = fits ? static_cast<To>(x[i]) : std::numeric_limits<To>::min();
      } else {
        y[i] = static_cast<To>(x[i]);
      }
    }
  });
}

// Writes whether any element differs from `number`, or whether all do.
template <typename T>
std::unique_ptr<Instruction> MakeNotEqual(double number, bool any, int input, int output,
                                          int64_t size) {
  if constexpr (std::is_integral_v<T>) {
    // Converting a number that T cannot represent is undefined. Every element differs from it.
    // NOLINTNEXTLINE(bugprone-integer-division): half of T's range, rounded down, is meant.
    constexpr double kEnd = 2.0 * (std::numeric_limits<T>::max() / 2 + 1);
    const bool has = number >= static_cast<double>(std::numeric_limits<T>::min()) &&
                     number < kEnd && number == std::floor(number);
    if (!has) {
      return MakeRows(1, [=](const Frame& frame) {
        std::fill_n(frame.Rows<bool>(output), frame.rows(), size > 0 || !any);
      });
    }
  }
  return MakeRows(size, [=](const Frame& frame) {
    const T* x = frame.Rows<T>(input);
    bool* y = frame.Rows<bool>(output);
    for (int64_t r = 0; r < frame.rows(); ++r, x += size) {
      const int64_t differ =
          std::count_if(x, x + size, [&](T v) { return v != static_cast<T>(number); });
      y[r] = any ? differ > 0 : differ == size;
    }
  });
}

template <typename T>
std::unique_ptr<Instruction> MakeMasked(int input, int mask, int output, int64_t size) {
  return MakeRows(size, [=](const Frame& frame) {
    const T* x = frame.Rows<T>(input);
    const bool* keep = frame.Rows<bool>(mask);
    T* y = frame.Rows<T>(output);
    for (int64_t r = 0; r < frame.rows(); ++r, x += size, y += size) {
      if (keep[r]) {
        std::copy_n(x, size, y);
      } else {
        std::fill_n(y, size, T(0));
      }
    }
  });
}

// Looks up rows of a table. Executor::Check has checked the indices before the step.
template <typename T, typename Index>
std::unique_ptr<Instruction> MakeEmbedding(std::vector<T> table, int64_t columns, int input,
                                           int output, int64_t size) {
  return MakeRows(size * columns / 8 + 20, [=, table = std::move(table)](const Frame& frame) {
    const Index* x = frame.Rows<Index>(input);
    T* y = frame.Rows<T>(output);
    for (int64_t i = 0; i < frame.rows() * size; ++i, y += columns) {
      std::memcpy(y, table.data() + x[i] * columns, columns * sizeof(T));
    }
  });
}

}  // namespace continual_transformers

#endif  // CONTINUAL_TRANSFORMERS_SESSION_ROW_INSTRUCTIONS_H_
