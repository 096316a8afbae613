// Tests the operations between a layer's products against long double, on every target.

#include "cc/attention/elementwise.h"

#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <vector>

#include "cc/attention/targets.h"
#include "gtest/gtest.h"

namespace continual_transformers {
namespace {

class ElementwiseTest : public ::testing::TestWithParam<Target> {
 protected:
  void SetUp() override { ASSERT_EQ(UseTarget(NameOf(GetParam())), ""); }
  void TearDown() override { UseTarget(""); }

  // Returns one number more than asked for. It is NaN, and no one may read or write it.
  template <typename T>
  std::vector<T> Numbers(int64_t size) {
    std::normal_distribution<double> normal(0, 3);
    std::vector<T> x(size + 1);
    for (int64_t i = 0; i < size; ++i) x[i] = static_cast<T>(normal(random_));
    x[size] = std::numeric_limits<T>::quiet_NaN();
    return x;
  }

  template <typename T>
  void CheckProductAndSum() {
    for (int64_t size = 0; size < 70; ++size) {
      const std::vector<T> x = Numbers<T>(size);
      std::vector<T> product = x, sum = x;
      Multiply(product.data(), x.data(), size);
      Add(sum.data(), x.data(), size);
      for (int64_t i = 0; i < size; ++i) {
        EXPECT_EQ(product[i], x[i] * x[i]);
        EXPECT_EQ(sum[i], 2 * x[i]);
      }
      for (const auto& y : {product, sum}) EXPECT_TRUE(std::isnan(y[size]));
    }
  }

  template <typename T>
  void CheckNormalize(double bound) {
    for (int64_t size : {1, 2, 3, 7, 8, 9, 16, 17, 33, 64, 130}) {
      constexpr int64_t kRows = 3;
      const std::vector<T> x = Numbers<T>(kRows * size), scale = Numbers<T>(size),
                           offset = Numbers<T>(size);
      const LayerNorm<T> norm = {scale.data(), offset.data(), T(1e-3)};
      std::vector<T> y = x;
      Normalize(norm, y.data(), kRows, size, y.data());  // in place
      EXPECT_TRUE(std::isnan(y[kRows * size]));
      for (int64_t row = 0; row < kRows; ++row) {
        const T* v = x.data() + row * size;
        long double mean = 0, variance = 0;
        for (int64_t i = 0; i < size; ++i) mean += v[i] / static_cast<long double>(size);
        for (int64_t i = 0; i < size; ++i) variance += (v[i] - mean) * (v[i] - mean) / size;
        for (int64_t i = 0; i < size; ++i) {
          const long double exact =
              (v[i] - mean) / std::sqrt(variance + norm.epsilon) * scale[i] + offset[i];
          EXPECT_NEAR(y[row * size + i], static_cast<double>(exact), bound) << size;
        }
      }
    }
  }

  std::mt19937 random_{7};
};

TEST_P(ElementwiseTest, ProductAndSum) {
  CheckProductAndSum<float>();
  CheckProductAndSum<double>();
}

TEST_P(ElementwiseTest, Normalize) {
  CheckNormalize<float>(2e-5);
  CheckNormalize<double>(1e-13);
}

INSTANTIATE_TEST_SUITE_P(Targets, ElementwiseTest, ::testing::ValuesIn(AvailableTargets()),
                         [](const auto& info) { return NameOf(info.param); });

}  // namespace
}  // namespace continual_transformers
