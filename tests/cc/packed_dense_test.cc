// Tests x W + b + residual with a packed kernel against sums in double, on every target.

#include "cc/attention/packed_dense.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <string>
#include <type_traits>
#include <vector>

#include "cc/attention/elementwise.h"
#include "cc/attention/half.h"
#include "cc/attention/targets.h"
#include "gtest/gtest.h"

namespace continual_transformers {
namespace {

class PackedDenseTest : public ::testing::TestWithParam<Target> {
 protected:
  void SetUp() override { ASSERT_EQ(UseTarget(NameOf(GetParam())), ""); }
  void TearDown() override { UseTarget(""); }

  // Computes in one piece and panel by panel, which must give the same bits. Buffers begin at an
  // odd element. The elements before and after them are NaN, and must stay so.
  template <typename T, typename W>
  void Check(int64_t rows, int64_t inputs, int64_t outputs, bool use_bias, bool use_residual,
             double bound) {
    SCOPED_TRACE("M " + std::to_string(rows) + " " + std::to_string(inputs) + " x " +
                 std::to_string(outputs));
    std::normal_distribution<double> normal;
    const T nan = std::numeric_limits<T>::quiet_NaN();
    std::vector<T> x(rows * inputs + 2, nan), bias(outputs + 2, nan);
    std::vector<T> y(rows * outputs + 2, nan), parts = y, residual = y;
    std::vector<T> w(inputs * outputs);
    for (int64_t i = 0; i < rows * inputs; ++i) x[i + 1] = normal(random_);
    for (T& weight : w) weight = normal(random_);
    for (int64_t i = 0; i < outputs; ++i) bias[i + 1] = normal(random_);
    for (int64_t i = 0; i < rows * outputs; ++i) residual[i + 1] = normal(random_);
    std::vector<double> kept(w.begin(), w.end());
    if constexpr (std::is_same_v<W, int8_t>) {
      for (int64_t o = 0; o < outputs; ++o) {
        double largest = 0;
        for (int64_t i = 0; i < inputs; ++i) {
          largest = std::max(largest, std::abs(kept[i * outputs + o]));
        }
        const float scale = static_cast<float>(largest) / 127;
        for (int64_t i = 0; i < inputs; ++i) {
          double& weight = kept[i * outputs + o];
          const double rounded = std::nearbyint(static_cast<float>(weight) / scale) * scale;
          ASSERT_LE(std::abs(rounded - weight), 0.501 * scale);
          weight = rounded;
        }
      }
    } else if constexpr (!std::is_same_v<T, W>) {
      std::vector<W> narrow(w.size());
      Narrow(w.data(), static_cast<int64_t>(w.size()), narrow.data());
      for (size_t i = 0; i < w.size(); ++i) kept[i] = Widen(narrow[i]);
    }
    const PackedKernel<T, W> kernel(w.data(), inputs, outputs);
    PackedDense<T, W> dense = {&kernel,      use_bias ? bias.data() + 1 : nullptr,
                               x.data() + 1, use_residual ? residual.data() + 1 : nullptr,
                               y.data() + 1, rows};
    TakePackedDense(dense, 0, kernel.panels());
    dense.output = parts.data() + 1;
    for (int64_t panel = kernel.panels(); panel-- > 0;) TakePackedDense(dense, panel, panel + 1);
    for (int64_t m = 0; m < rows; ++m) {
      for (int64_t o = 0; o < outputs; ++o) {
        double expected = use_bias ? bias[o + 1] : 0, scale = 1;
        for (int64_t i = 0; i < inputs; ++i) {
          const double product = x[m * inputs + i + 1] * kept[i * outputs + o];
          expected += product;
          scale += std::abs(product);
        }
        if (use_residual) expected += residual[m * outputs + o + 1];
        ASSERT_NEAR(y[m * outputs + o + 1], expected, bound * scale);
        ASSERT_EQ(y[m * outputs + o + 1], parts[m * outputs + o + 1]);
      }
    }
    EXPECT_TRUE(std::isnan(y.front()) && std::isnan(y.back()));
    EXPECT_TRUE(std::isnan(parts.front()) && std::isnan(parts.back()));
  }

  template <typename T, typename W>
  void CheckAll(double bound) {
    for (int64_t rows : {0, 1, 2, 3, 4, 5, 6, 7, 8, 13, 14, 64}) {
      for (int64_t inputs : {1, 2, 3, 17, 64}) {
        for (int64_t outputs : {1, 7, 8, 15, 16, 17, 33, 48, 63, 64, 65, 130}) {
          Check<T, W>(rows, inputs, outputs, outputs % 3 != 0, inputs % 2 == 0, bound);
        }
      }
    }
  }

  std::mt19937 random_{1};
};

TEST_P(PackedDenseTest, Float) { CheckAll<float, float>(1e-6); }
TEST_P(PackedDenseTest, BFloat16) { CheckAll<float, BFloat16>(1e-6); }
TEST_P(PackedDenseTest, Int8) { CheckAll<float, int8_t>(1e-6); }
TEST_P(PackedDenseTest, Double) { CheckAll<double, double>(4e-15); }

TEST_P(PackedDenseTest, WideLayers) {
  Check<float, float>(1, 1024, 192, true, false, 1e-6);
  Check<float, float>(6, 513, 1000, true, true, 1e-6);
}

// A column of zeros has the scale 0. NaN and infinity spoil only their own column.
TEST_P(PackedDenseTest, ColumnsInInt8ThatHaveNoScale) {
  constexpr int64_t kInputs = 3, kOutputs = 5;
  std::vector<float> w(kInputs * kOutputs, 1.0f);
  for (int64_t i = 0; i < kInputs; ++i) {
    w[i * kOutputs + 1] = 0;
    w[i * kOutputs + 4] = 1e-44f;
  }
  w[kOutputs + 2] = std::numeric_limits<float>::quiet_NaN();
  w[kOutputs + 3] = std::numeric_limits<float>::infinity();
  const PackedKernel<float, int8_t> kernel(w.data(), kInputs, kOutputs);
  const std::vector<float> x(kInputs, 2.0f);
  std::vector<float> y(kOutputs);
  TakePackedDense<float, int8_t>({&kernel, nullptr, x.data(), nullptr, y.data(), 1}, 0, 1);
  EXPECT_NEAR(y[0], 6, 1e-5);
  EXPECT_EQ(y[1], 0);
  EXPECT_TRUE(std::isnan(y[2]));
  EXPECT_FALSE(std::isfinite(y[3]));
  EXPECT_LT(std::abs(y[4]), 1e-40);
}

// The output may overwrite the residual.
TEST_P(PackedDenseTest, InPlaceResidual) {
  constexpr int64_t kRows = 7, kSize = 70;
  std::vector<float> w(kSize * kSize, 0.01f), x(kRows * kSize, 1.0f), y(kRows * kSize, 2.0f);
  const PackedKernel<float> kernel(w.data(), kSize, kSize);
  const PackedDense<float> dense = {&kernel, nullptr, x.data(), y.data(), y.data(), kRows};
  TakePackedDense(dense, 0, kernel.panels());
  for (float value : y) ASSERT_NEAR(value, 2.7f, 1e-5f);
}

INSTANTIATE_TEST_SUITE_P(Targets, PackedDenseTest, ::testing::ValuesIn(AvailableTargets()),
                         [](const auto& info) { return std::string(NameOf(info.param)); });

}  // namespace
}  // namespace continual_transformers
