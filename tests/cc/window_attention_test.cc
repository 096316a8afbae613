// Tests attention among the rows of a window against softmax in long double, on every target.

#include "cc/attention/window_attention.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "cc/attention/targets.h"
#include "gtest/gtest.h"

namespace continual_transformers {
namespace {

struct Sizes {
  int64_t queries, rows, heads, key_dim, value_dim;
};

class WindowAttentionTest : public ::testing::TestWithParam<Target> {
 protected:
  void SetUp() override { ASSERT_EQ(UseTarget(NameOf(GetParam())), ""); }
  void TearDown() override { UseTarget(""); }

  template <typename T>
  std::vector<T> Numbers(int64_t size) {
    std::normal_distribution<double> normal;
    std::vector<T> x(size);
    for (T& number : x) number = static_cast<T>(normal(random_));
    return x;
  }

  // Rows before `first_row` are NaN, and so are the values of a later row, `poisoned`, if there is
  // one. `logit_scale` sets the magnitude of the logits. Everything begins at an odd element.
  template <typename T>
  void Check(const Sizes& z, int64_t first_row, int64_t band, bool causal, double logit_scale,
             double bound, int64_t poisoned = -1) {
    SCOPED_TRACE("Nq " + std::to_string(z.queries) + " N " + std::to_string(z.rows) + " H " +
                 std::to_string(z.heads) + " D " + std::to_string(z.key_dim) + " Dv " +
                 std::to_string(z.value_dim) + " from " + std::to_string(first_row) + " band " +
                 std::to_string(band) + (causal ? " causal" : ""));
    const T nan = std::numeric_limits<T>::quiet_NaN();
    const int64_t key_size = z.heads * z.key_dim, value_size = z.heads * z.value_dim;
    const std::vector<T> query = Numbers<T>(z.queries * key_size + 1);
    std::vector<T> key = Numbers<T>(z.rows * key_size + 1);
    std::vector<T> value = Numbers<T>(z.rows * value_size + 1);
    std::fill_n(key.begin(), first_row * key_size + 1, nan);
    std::fill_n(value.begin(), first_row * value_size + 1, nan);
    if (poisoned >= 0) std::fill_n(value.begin() + poisoned * value_size + 1, value_size, nan);
    WindowAttentionParams<T> p = {};
    p.query = query.data() + 1;
    p.key = key.data() + 1;
    p.value = value.data() + 1;
    p.queries = z.queries;
    p.rows = z.rows;
    p.heads = z.heads;
    p.key_dim = z.key_dim;
    p.value_dim = z.value_dim;
    p.scale = static_cast<T>(logit_scale / std::sqrt(static_cast<double>(z.key_dim)));
    p.first_row = first_row;
    p.band = band;
    p.causal = causal;
    std::vector<T> scratch(p.ScratchSize() + 1, nan);
    std::vector<T> output(z.queries * value_size + 2, nan);
    p.scratch = scratch.data();
    p.output = output.data() + 1;
    WindowAttention(p, 0, z.heads);
    ASSERT_TRUE(std::isnan(output.front()) && std::isnan(output.back()));
    ASSERT_TRUE(std::isnan(scratch.back()));
    const std::vector<T> whole = output;
    std::fill(output.begin(), output.end(), nan);
    for (int64_t h = z.heads; h-- > 0;) WindowAttention(p, h, h + 1);
    for (int64_t i = 0; i < z.queries; ++i) {
      for (int64_t h = 0; h < z.heads; ++h) {
        const std::vector<long double> expected = Expected(p, i, h);
        for (int64_t c = 0; c < z.value_dim; ++c) {
          const int64_t at = i * value_size + h * z.value_dim + c;
          ASSERT_EQ(std::isnan(p.output[at]), std::isnan(expected[c])) << i << " " << h;
          if (std::isnan(expected[c])) continue;
          ASSERT_NEAR(p.output[at], static_cast<double>(expected[c]), bound) << i << " " << h;
          // One by one, RingAttention sums in another order with fewer heads.
          const double apart = p.IsInBlocks() ? 0 : bound;
          ASSERT_NEAR(p.output[at], whole[at + 1], apart) << "heads apart differ from together";
        }
      }
    }
  }

 private:
  template <typename T>
  static std::vector<long double> Expected(const WindowAttentionParams<T>& p, int64_t i,
                                           int64_t h) {
    std::vector<long double> expected(p.value_dim, 0), logits;
    const int64_t row = p.rows - p.queries + i;
    std::vector<int64_t> rows;
    for (int64_t n = p.first_row; n < p.rows; ++n) {
      if (p.causal && n > row) continue;
      if (p.band > 0 && std::abs(n - row) >= p.band) continue;
      rows.push_back(n);
      long double logit = 0;
      for (int64_t d = 0; d < p.key_dim; ++d) {
        logit += static_cast<long double>(p.query[(i * p.heads + h) * p.key_dim + d]) *
                 p.key[(n * p.heads + h) * p.key_dim + d];
      }
      logits.push_back(logit * p.scale);
    }
    long double max = -std::numeric_limits<long double>::infinity(), sum = 0;
    for (const long double logit : logits) max = std::max(max, logit);
    for (long double& logit : logits) sum += logit = std::exp(logit - max);
    for (size_t k = 0; k < rows.size(); ++k) {
      for (int64_t c = 0; c < p.value_dim; ++c) {
        expected[c] += logits[k] / sum * p.value[(rows[k] * p.heads + h) * p.value_dim + c];
      }
    }
    return expected;
  }

  std::mt19937 random_;
};

TEST_P(WindowAttentionTest, EqualsSoftmax) {
  for (int64_t rows : {1, 2, 3, 16, 17, 64, 120}) {
    for (int64_t queries : {int64_t{1}, int64_t{3}, int64_t{4}, int64_t{9}, rows}) {
      if (queries > rows) continue;
      for (const auto& [key_dim, value_dim] :
           {std::pair{1, 1}, {12, 12}, {16, 33}, {24, 8}, {33, 16}, {64, 70}}) {
        for (bool causal : {false, true}) {
          Check<float>({queries, rows, 2, key_dim, value_dim}, 0, 0, causal, 1, 5e-6);
        }
      }
      Check<double>({queries, rows, 3, 5, 7}, 0, 0, true, 1, 1e-13);
    }
  }
}

TEST_P(WindowAttentionTest, OfABandAndOfTakenRowsOnly) {
  for (int64_t first_row : {0, 1, 15, 16, 29, 33, 34}) {
    for (int64_t band : {0, 1, 2, 5, 40}) {
      for (bool causal : {false, true}) {
        Check<float>({34, 34, 2, 8, 12}, first_row, band, causal, 1, 5e-6);
        Check<double>({6, 34, 1, 3, 4}, first_row, band, causal, 1, 1e-13);
      }
    }
  }
}

TEST_P(WindowAttentionTest, LargeLogits) {
  Check<float>({20, 20, 2, 16, 16}, 0, 0, false, 1e4, 2e-2);
  Check<double>({20, 20, 2, 16, 16}, 0, 0, false, 1e4, 1e-10);
}

TEST_P(WindowAttentionTest, ANaNReachesOnlyTheQueriesOfItsRow) {
  for (int64_t poisoned : {0, 5, 10, 18}) {
    Check<float>({19, 19, 2, 8, 9}, 0, 0, true, 1, 5e-6, poisoned);
    Check<float>({19, 19, 2, 8, 17}, 0, 3, false, 1, 5e-6, poisoned);
    Check<double>({19, 19, 1, 8, 5}, 2, 3, true, 1, 1e-13, poisoned);
  }
}

INSTANTIATE_TEST_SUITE_P(Targets, WindowAttentionTest, ::testing::ValuesIn(AvailableTargets()),
                         [](const auto& info) { return NameOf(info.param); });

}  // namespace
}  // namespace continual_transformers
