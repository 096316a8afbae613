// Tests small products of matrices and weighted sums of rows against long double, on every target.

#include "cc/attention/row_products.h"

#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <vector>

#include "cc/attention/targets.h"
#include "gtest/gtest.h"

namespace continual_transformers {
namespace {

class RowProductsTest : public ::testing::TestWithParam<Target> {
 protected:
  void SetUp() override { ASSERT_EQ(UseTarget(NameOf(GetParam())), ""); }
  void TearDown() override { UseTarget(""); }

  // Returns one number more than asked for. It is NaN, and no one may read or write it.
  template <typename T>
  std::vector<T> Numbers(int64_t size) {
    std::normal_distribution<double> normal(0, 1);
    std::vector<T> x(size + 1);
    for (int64_t i = 0; i < size; ++i) x[i] = static_cast<T>(normal(random_));
    x[size] = std::numeric_limits<T>::quiet_NaN();
    return x;
  }

  template <typename T>
  void CheckMatrices(double bound) {
    for (int64_t rows : {1, 3, 4, 5, 9}) {
      for (int64_t depth : {1, 2, 7, 8, 16, 33}) {
        for (int64_t columns : {1, 2, 3, 7, 8, 15, 16, 17, 31, 32, 33, 70}) {
          const std::vector<T> x = Numbers<T>(rows * depth), w = Numbers<T>(depth * columns);
          std::vector<T> y = Numbers<T>(rows * columns);
          MultiplyMatrices(x.data(), w.data(), rows, depth, columns, y.data());
          EXPECT_TRUE(std::isnan(y[rows * columns]));
          for (int64_t r = 0; r < rows; ++r) {
            for (int64_t c = 0; c < columns; ++c) {
              long double sum = 0, size = 0;
              for (int64_t i = 0; i < depth; ++i) {
                const long double product =
                    static_cast<long double>(x[r * depth + i]) * w[i * columns + c];
                sum += product;
                size += std::abs(product);
              }
              ASSERT_NEAR(y[r * columns + c], static_cast<double>(sum),
                          bound * static_cast<double>(size))
                  << rows << " " << depth << " " << columns;
            }
          }
        }
      }
    }
  }

  template <typename T>
  void CheckRows(double bound) {
    for (int64_t count : {0, 1, 3, 4, 5, 9}) {
      for (int64_t size : {1, 2, 7, 8, 9, 15, 16, 17, 33, 70}) {
        std::vector<std::vector<T>> rows;
        std::vector<const T*> pointers;
        for (int64_t i = 0; i < count; ++i) rows.push_back(Numbers<T>(size));
        for (const std::vector<T>& row : rows) pointers.push_back(row.data());
        const std::vector<T> kernel = Numbers<T>(count * size), before = Numbers<T>(size);
        std::vector<T> y = before;
        AddWeightedRows(pointers.data(), kernel.data(), count, size, y.data());
        EXPECT_TRUE(std::isnan(y[size]));
        for (int64_t c = 0; c < size; ++c) {
          long double sum = before[c], most = std::abs(before[c]);
          for (int64_t i = 0; i < count; ++i) {
            const long double product = static_cast<long double>(rows[i][c]) * kernel[i * size + c];
            sum += product;
            most += std::abs(product);
          }
          ASSERT_NEAR(y[c], static_cast<double>(sum), bound * static_cast<double>(most))
              << count << " " << size;
        }
      }
    }
  }

 private:
  std::mt19937 random_;
};

TEST_P(RowProductsTest, MultipliesMatrices) {
  CheckMatrices<float>(2e-6);
  CheckMatrices<double>(4e-15);
}

TEST_P(RowProductsTest, AddsWeightedRows) {
  CheckRows<float>(1e-6);
  CheckRows<double>(2e-15);
}

INSTANTIATE_TEST_SUITE_P(Targets, RowProductsTest, ::testing::ValuesIn(AvailableTargets()),
                         [](const auto& info) { return NameOf(info.param); });

}  // namespace
}  // namespace continual_transformers
