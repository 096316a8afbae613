// Tests x W + b against sums in double, on every target.

#include "cc/attention/dense.h"

#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "cc/attention/elementwise.h"
#include "cc/attention/half.h"
#include "cc/attention/targets.h"
#include "gtest/gtest.h"

namespace continual_transformers {
namespace {

template <typename W>
W Rounded(double x) {
  return static_cast<W>(x);
}
template <>
BFloat16 Rounded<BFloat16>(double x) {
  return {static_cast<uint16_t>(BitsOfFloat(static_cast<float>(x)) >> 16)};
}

class DenseTest : public ::testing::TestWithParam<Target> {
 protected:
  void SetUp() override { ASSERT_EQ(UseTarget(NameOf(GetParam())), ""); }
  void TearDown() override { UseTarget(""); }

  // Computes in one piece and in three, which must give the same bits. The element after each
  // buffer's end is NaN, and must stay so.
  template <typename T, typename W>
  void Check(int64_t rows, int64_t inputs, int64_t outputs, bool use_bias, double bound) {
    SCOPED_TRACE("M " + std::to_string(rows) + " " + std::to_string(inputs) + " x " +
                 std::to_string(outputs));
    std::normal_distribution<double> normal;
    const T nan = std::numeric_limits<T>::quiet_NaN();
    std::vector<T> x(rows * inputs + 1, nan), bias(outputs + 1, nan);
    std::vector<T> y(rows * outputs + 1, nan), parts = y;
    std::vector<W> w(inputs * outputs + 1, Rounded<W>(nan));
    for (int64_t i = 0; i < rows * inputs; ++i) x[i] = normal(random_);
    for (int64_t i = 0; i < inputs * outputs; ++i) w[i] = Rounded<W>(normal(random_));
    for (int64_t i = 0; i < outputs; ++i) bias[i] = normal(random_);
    Dense<T, W> dense = {x.data(), w.data(), use_bias ? bias.data() : nullptr, y.data(), rows,
                         inputs,   outputs};
    const int64_t tasks = DenseTasks(outputs);
    TakeDenseTasks(dense, 0, tasks);
    dense.output = parts.data();
    TakeDenseTasks(dense, tasks / 2, tasks);
    TakeDenseTasks(dense, 0, tasks / 3);
    TakeDenseTasks(dense, tasks / 3, tasks / 2);
    for (int64_t m = 0; m < rows; ++m) {
      for (int64_t o = 0; o < outputs; ++o) {
        double expected = use_bias ? bias[o] : 0, scale = 1;
        for (int64_t i = 0; i < inputs; ++i) {
          const double product = x[m * inputs + i] * static_cast<double>(Widen(w[i * outputs + o]));
          expected += product;
          scale += std::abs(product);
        }
        ASSERT_NEAR(y[m * outputs + o], expected, bound * scale);
        ASSERT_EQ(y[m * outputs + o], parts[m * outputs + o]);
      }
    }
    EXPECT_TRUE(std::isnan(y.back()) && std::isnan(parts.back()));
  }

  std::mt19937 random_{3};
};

TEST_P(DenseTest, Grid) {
  for (int64_t rows : {0, 1, 2, 3, 4, 5, 7, 8, 33}) {
    for (int64_t inputs : {1, 7, 8, 33, 128}) {
      for (int64_t outputs : {1, 15, 16, 17, 63, 64, 65, 200, 1100}) {
        const bool use_bias = (rows + inputs) % 2 == 0;
        Check<float, float>(rows, inputs, outputs, use_bias, 1e-6);
        Check<float, BFloat16>(rows, inputs, outputs, use_bias, 1e-6);
        Check<double, double>(rows, inputs, outputs, use_bias, 1e-15);
        if (HasFatalFailure()) return;
      }
    }
  }
}

TEST_P(DenseTest, NarrowRoundsToTheNearestEven) {
  // A unit at 1 is 2^-7 in bfloat16, and 2^-10 in half.
  const std::vector<float> x = {1,     1 + 0x1p-8f, 1 + 0x1.8p-7f, -1 - 0x1.1p-8f,
                                3e38f, 0,           -0.0f,         INFINITY};
  const std::vector<uint16_t> expected = {0x3f80, 0x3f80, 0x3f82, 0xbf81,
                                          0x7f62, 0,      0x8000, 0x7f80};
  std::vector<BFloat16> narrow(x.size());
  Narrow(x.data(), static_cast<int64_t>(x.size()), narrow.data());
  for (size_t i = 0; i < x.size(); ++i) EXPECT_EQ(narrow[i].bits, expected[i]) << x[i];

  const std::vector<float> y = {1, 1 + 0x1p-11f, 1 + 0x1.8p-10f, -1 - 0x1.1p-11f, 0x1p-24f, 65504};
  const std::vector<uint16_t> halves = {0x3c00, 0x3c00, 0x3c02, 0xbc01, 0x0001, 0x7bff};
  std::vector<Float16> half(y.size());
  Narrow(y.data(), static_cast<int64_t>(y.size()), half.data());
  for (size_t i = 0; i < y.size(); ++i) EXPECT_EQ(half[i].bits, halves[i]) << y[i];
}

TEST_P(DenseTest, QuantizeRoundsToTheNearestEven) {
  for (int64_t size : {1, 2, 3, 7, 8, 15, 16, 17, 33}) {
    // All halves, so that ties are rounded.
    std::vector<float> x(size + 1, NAN);
    for (int64_t i = 0; i < size; ++i) x[i] = static_cast<float>(i - size / 2) / 2;
    x[size - 1] = -63.5f;
    std::vector<int8_t> y(size + 1, 77);
    float scale = 0;
    Quantize(x.data(), size, y.data(), &scale);
    EXPECT_EQ(scale, 0.5f);
    for (int64_t i = 0; i < size; ++i) EXPECT_EQ(y[i], std::nearbyint(2 * x[i]));
    EXPECT_EQ(y[size], 77);
  }
  const float inf = INFINITY;
  for (const std::vector<float>& row : {std::vector<float>{1, NAN, 2}, {1, inf}, {-inf, 3}}) {
    std::vector<int8_t> y(row.size());
    float scale = 0;
    Quantize(row.data(), static_cast<int64_t>(row.size()), y.data(), &scale);
    EXPECT_TRUE(std::isnan(scale));
  }
  for (float tiny : {0.0f, -0.0f, 1e-44f, 1e-37f}) {
    const float row[2] = {tiny, -tiny};
    int8_t y[2];
    float scale = NAN;
    Quantize(row, 2, y, &scale);
    EXPECT_LE(std::abs(static_cast<float>(y[0]) * scale - tiny), 1e-35f);
  }
}

INSTANTIATE_TEST_SUITE_P(Targets, DenseTest, ::testing::ValuesIn(AvailableTargets()),
                         [](const auto& info) { return NameOf(info.param); });

}  // namespace
}  // namespace continual_transformers
