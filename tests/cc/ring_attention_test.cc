// Tests one query over rows of all heads against softmax in double, on every target.

#include "cc/attention/ring_attention.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
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

struct Sizes {
  int64_t rows, heads, key_dim, value_dim;
  int64_t group = 1;      // query heads for each head of keys and values
  bool has_bias = false;  // on the logits
  double soft_cap = 0;    // 0: none
  bool far = false;       // rows without gaps, which are prefetched
};

class RingAttentionTest : public ::testing::TestWithParam<Target> {
 protected:
  void SetUp() override { ASSERT_EQ(UseTarget(NameOf(GetParam())), ""); }
  void TearDown() override { UseTarget(""); }

  // Rows outside the spans are NaN. `logit_scale` sets the magnitude of the logits.
  template <typename T, typename C>
  void Check(const Sizes& z, const RingSpans& spans, bool masked, double logit_scale,
             double bound) {
    SCOPED_TRACE("N " + std::to_string(z.rows) + " H " + std::to_string(z.heads) + " D " +
                 std::to_string(z.key_dim) + " Dv " + std::to_string(z.value_dim) + " spans " +
                 std::to_string(spans.before_wrap.first_row) + "+" +
                 std::to_string(spans.before_wrap.rows) + " " +
                 std::to_string(spans.after_wrap.rows) + " group " + std::to_string(z.group));
    std::normal_distribution<double> normal;
    const int64_t query_size = z.heads * z.key_dim, output_size = z.heads * z.value_dim;
    const int64_t key_size = query_size / z.group, value_size = output_size / z.group;
    const int64_t key_stride = key_size + (z.far ? 0 : 3);
    const int64_t value_stride = value_size + (z.far ? 0 : 1);
    const T nan = std::numeric_limits<T>::quiet_NaN();
    std::vector<T> query(query_size + 1), key(z.rows * key_stride + 1, nan);
    std::vector<T> value(z.rows * value_stride + 1, nan), output(output_size + 2, nan);
    // The bias of a row is at (row + bias_first) mod bias_rows.
    const int64_t bias_rows = z.rows + 2, bias_first = 2 * z.rows / 3;
    std::vector<T> bias(z.heads * bias_rows);
    for (T& b : bias) b = normal(random_);
    const std::unique_ptr<bool[]> mask(new bool[z.rows]());
    for (T& q : query) q = normal(random_);
    std::vector<int64_t> rows;
    for (const RingSpan& span : {spans.before_wrap, spans.after_wrap}) {
      for (int64_t i = 0; i < span.rows; ++i) rows.push_back(span.first_row + i);
    }
    for (int64_t row : rows) {
      mask[row] = !masked || random_() % 3 != 0;
      for (int64_t i = 0; i < key_size; ++i) key[row * key_stride + i + 1] = normal(random_);
      for (int64_t i = 0; i < value_size; ++i) {
        value[row * value_stride + i + 1] = mask[row] ? static_cast<T>(normal(random_)) : nan;
      }
      if (!mask[row]) key[row * key_stride + 1] = nan;
    }
    std::vector<C> keys(key.size()), values(value.size());
    // Those of int8. The scale of a row that is not attended to is NaN, like its numbers.
    std::vector<T> key_scales(z.rows, nan), value_scales(z.rows, nan);
    if constexpr (std::is_same_v<C, int8_t>) {
      for (int64_t row : rows) {
        const int64_t key_at = row * key_stride + 1, value_at = row * value_stride + 1;
        Quantize(&key[key_at], key_size, &keys[key_at], &key_scales[row]);
        Quantize(&value[value_at], value_size, &values[value_at], &value_scales[row]);
      }
    } else if constexpr (std::is_same_v<T, C>) {
      keys = key;
      values = value;
    } else {
      Narrow(key.data(), static_cast<int64_t>(key.size()), keys.data());
      Narrow(value.data(), static_cast<int64_t>(value.size()), values.data());
    }
    const double scale = logit_scale / std::sqrt(static_cast<double>(z.key_dim));
    std::vector<T> logits(z.heads * RingAttentionLogits(rows.size()) + 1, nan);
    RingAttentionParams<T, C> p = {};
    p.query = query.data() + 1;
    p.key = keys.data() + 1;
    p.key_stride = key_stride;
    p.value = values.data() + 1;
    p.value_stride = value_stride;
    p.key_scale = key_scales.data();
    p.value_scale = value_scales.data();
    p.key_mask = masked ? mask.get() : nullptr;
    p.spans = spans;
    p.output = output.data() + 1;
    p.soft_cap = static_cast<T>(z.soft_cap);
    p.bias = z.has_bias ? bias.data() : nullptr;
    p.bias_rows = bias_rows;
    p.bias_first = bias_first;
    p.heads = z.heads;
    p.key_heads = z.heads / z.group;
    p.key_dim = z.key_dim;
    p.value_dim = z.value_dim;
    p.scale = static_cast<T>(scale);
    p.logits = logits.data();
    std::vector<OnlineSoftmax<T>> softmax(z.heads);
    p.softmax = softmax.data();
    p.far = z.far;
    p.next_key = z.far ? p.key : nullptr;
    RingAttention(p, 0, z.heads);
    ASSERT_TRUE(std::isnan(output.front()) && std::isnan(output.back()));
    ASSERT_TRUE(std::isnan(logits.back()));
    const std::vector<T> whole = output;
    for (int64_t h = z.heads; h-- > 0;) RingAttention(p, h, h + 1);
    double largest = 0, worst = 0;
    for (int64_t h = 0; h < z.heads; ++h) {
      std::vector<double> expected(z.value_dim, 0), weights;
      double max = -std::numeric_limits<double>::infinity(), sum = 0;
      for (int64_t row : rows) {
        double logit = 0;
        for (int64_t d = 0; d < z.key_dim; ++d) {
          logit += static_cast<double>(p.query[h * z.key_dim + d]) *
                   Widen(p.key[row * key_stride + h / z.group * z.key_dim + d]);
        }
        if constexpr (std::is_same_v<C, int8_t>) logit *= key_scales[row];
        logit *= static_cast<double>(p.scale);
        if (z.soft_cap > 0) logit = z.soft_cap * std::tanh(logit / z.soft_cap);
        if (z.has_bias) logit += bias[h * bias_rows + (row + bias_first) % bias_rows];
        weights.push_back(mask[row] ? logit : -std::numeric_limits<double>::infinity());
        max = std::max(max, weights.back());
      }
      for (double& weight : weights)
        sum += weight = std::isinf(weight) ? 0 : std::exp(weight - max);
      // An error of a logit is one of the denominator, in proportion.
      if (sum == 0) {
        EXPECT_EQ(softmax[h].max, max);
      } else {
        EXPECT_NEAR(softmax[h].max, max, bound * std::max(1.0, std::abs(max)));
      }
      EXPECT_NEAR(softmax[h].denominator, sum, 10 * bound * sum);
      for (size_t i = 0; i < rows.size(); ++i) {
        double weight = weights[i] / sum;
        if constexpr (std::is_same_v<C, int8_t>) weight *= value_scales[rows[i]];
        for (int64_t d = 0; weights[i] != 0 && d < z.value_dim; ++d) {
          expected[d] +=
              weight * Widen(p.value[rows[i] * value_stride + h / z.group * z.value_dim + d]);
        }
      }
      for (int64_t d = 0; d < z.value_dim; ++d) {
        largest = std::max(largest, std::abs(expected[d]));
        worst = std::max(worst, std::abs(expected[d] - p.output[h * z.value_dim + d]));
        worst = std::max(worst, std::abs(expected[d] - whole[h * z.value_dim + d + 1]));
        ASSERT_FALSE(std::isnan(p.output[h * z.value_dim + d]));
      }
    }
    EXPECT_LE(worst, bound * std::max(largest, 1e-30));
  }

  template <typename T, typename C>
  void CheckSizes(double bound) {
    for (int64_t dim : {1, 3, 8, 12, 16, 24, 32, 33, 64, 128}) {
      for (int64_t rows : {1, 2, 7, 8, 9, 16, 17, 64, 120}) {
        const Sizes z = {rows, 3, dim, rows % 2 == 0 ? dim : dim + 5};
        Check<T, C>(z, {{0, rows}, {0, 0}}, false, 1, bound);
        Check<T, C>(z, {{0, rows}, {0, 0}}, true, 1, bound);
        const int64_t after = rows / 3;
        Check<T, C>(z, {{after + 1, rows - after - 1}, {0, after}}, dim % 2 == 0, 1, bound);
      }
    }
    Check<T, C>({1000, 2, 16, 16}, {{0, 1000}, {0, 0}}, true, 1, bound);
    Check<T, C>({17, 70, 12, 12}, {{0, 17}, {0, 0}}, false, 1, bound);  // more heads than a pass
    for (int64_t heads : {1, 2, 4, 5, 8, 11, 16}) {
      Check<T, C>({33, heads, 16, 16}, {{0, 33}, {0, 0}}, false, 1, bound);
    }
    for (int64_t group : {1, 2, 3, 4, 8, 9}) {
      for (int64_t dim : {1, 8, 12, 16, 32, 64, 100, 128}) {
        Check<T, C>({17, 2 * group, dim, dim, group, true}, {{0, 17}, {0, 0}}, true, 1, bound);
        Check<T, C>({20, 3 * group, dim, dim + 3, group}, {{9, 11}, {0, 7}}, false, 1, bound);
      }
    }
    Check<T, C>({40, 3, 16, 16, 1, true}, {{9, 31}, {0, 7}}, true, 1, bound);
    Check<T, C>({17, 140, 12, 12, 35, true}, {{0, 17}, {0, 0}}, false, 1, bound);
    for (int64_t rows : {1, 7, 16, 33}) {
      Check<T, C>({rows, 3, 16, 16, 1, false, 0.7}, {{0, rows}, {0, 0}}, true, 1, bound);
      Check<T, C>({rows, 4, 12, 12, 2, true, 5}, {{0, rows}, {0, 0}}, false, 10, 2 * bound);
    }
    const auto far = [](int64_t rows, int64_t heads, int64_t key_dim, int64_t value_dim,
                        int64_t group) {
      return Sizes{rows, heads, key_dim, value_dim, group, false, 0, true};
    };
    for (int64_t rows : {1, 9, 64, 300}) {  // The longest are summed in parts.
      for (int64_t group : {1, 2}) {
        Check<T, C>(far(rows, 4, 64, 64, group), {{0, rows}, {0, 0}}, false, 1, bound);
        Check<T, C>(far(rows, 4, 12, 33, group), {{0, rows}, {0, 0}}, true, 1, bound);
        const int64_t after = rows / 3;
        const RingSpans wrapped = {{after + 1, rows - after - 1}, {0, after}};
        Check<T, C>(far(rows, 4, 65, 64, group), wrapped, false, 1, bound);
      }
    }
  }

  std::mt19937 random_{1};
};

TEST_P(RingAttentionTest, Float) { CheckSizes<float, float>(5e-6); }
TEST_P(RingAttentionTest, BFloat16) { CheckSizes<float, BFloat16>(5e-6); }
TEST_P(RingAttentionTest, Float16) { CheckSizes<float, Float16>(5e-6); }
TEST_P(RingAttentionTest, Int8) { CheckSizes<float, int8_t>(5e-6); }
TEST_P(RingAttentionTest, Double) { CheckSizes<double, double>(1e-12); }

TEST_P(RingAttentionTest, LargeLogits) {
  for (double scale : {1e-4, 30.0, 1e4}) {
    // A logit of s has an error of about s roundings, and its weight the same relative error.
    Check<float, float>({64, 2, 16, 16}, {{0, 64}, {0, 0}}, false, scale, 5e-6 * (1 + scale));
    Check<double, double>({64, 2, 16, 16}, {{0, 64}, {0, 0}}, false, scale, 1e-12 * (1 + scale));
  }
}

TEST_P(RingAttentionTest, NothingToAttendToGivesZeros) {
  constexpr int64_t kRows = 9, kSize = 6;
  const std::vector<float> rows(kRows * kSize, 0.0f), query(kSize, 1.0f);
  std::vector<float> output(kSize, 7.0f), logits(2 * RingAttentionLogits(kRows));
  const bool mask[kRows] = {};
  RingAttentionParams<float> p = {};
  p.query = query.data();
  p.key = p.value = rows.data();
  p.key_stride = p.value_stride = kSize;
  p.key_mask = mask;
  p.spans = {{0, kRows}, {0, 0}};
  p.output = output.data();
  p.heads = p.key_heads = 2;
  p.key_dim = p.value_dim = 3;
  p.scale = 1;
  p.logits = logits.data();
  RingAttention(p, 0, 2);
  for (float value : output) EXPECT_EQ(value, 0.0f);
}

TEST_P(RingAttentionTest, NanOfAHeadStaysInIt) {
  constexpr int64_t kRows = 20, kDim = 16, kSize = 2 * kDim;
  std::vector<float> keys(kRows * kSize, 0.5f);
  const std::vector<float> values(kRows * kSize, 1.0f), query(kSize, 1.0f);
  keys[3 * kSize + kDim] = std::numeric_limits<float>::quiet_NaN();
  std::vector<float> output(kSize), logits(2 * RingAttentionLogits(kRows));
  RingAttentionParams<float> p = {};
  p.query = query.data();
  p.key = keys.data();
  p.value = values.data();
  p.key_stride = p.value_stride = kSize;
  p.spans = {{0, kRows}, {0, 0}};
  p.output = output.data();
  p.heads = p.key_heads = 2;
  p.key_dim = p.value_dim = kDim;
  p.scale = 1;
  p.logits = logits.data();
  RingAttention(p, 0, 2);
  for (int64_t i = 0; i < kDim; ++i) {
    EXPECT_NEAR(output[i], 1.0f, 1e-6f);
    EXPECT_TRUE(std::isnan(output[kDim + i]));
  }
}

INSTANTIATE_TEST_SUITE_P(Targets, RingAttentionTest, ::testing::ValuesIn(AvailableTargets()),
                         [](const auto& info) { return std::string(NameOf(info.param)); });

}  // namespace
}  // namespace continual_transformers
