#include "cc/attention/online_softmax.h"

#include <cmath>
#include <limits>
#include <vector>

#include "gtest/gtest.h"

namespace continual_transformers {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// Feeds logits in blocks of `block`. Returns the probability-weighted sum of the logits' indices.
double WeightedIndex(const std::vector<double>& logits, size_t block) {
  OnlineSoftmax<double> softmax;
  double sum = 0;
  for (size_t first = 0; first < logits.size(); first += block) {
    const size_t last = std::min(logits.size(), first + block);
    double max = -kInfinity;
    for (size_t i = first; i < last; ++i) max = std::max(max, logits[i]);
    sum *= softmax.Raise(max);
    for (size_t i = first; i < last; ++i) {
      const double weight = softmax.Weight(logits[i]);
      softmax.denominator += weight;
      sum += weight * i;
    }
  }
  return sum * softmax.Normalizer();
}

TEST(OnlineSoftmaxTest, AnyBlockingGivesTheSoftmaxOfTheWhole) {
  const std::vector<double> logits = {0.5, -3, 700, 699, -1e4, 701.5, 0};
  double sum = 0, denominator = 0;
  for (size_t i = 0; i < logits.size(); ++i) {
    denominator += std::exp(logits[i] - 701.5);
    sum += i * std::exp(logits[i] - 701.5);
  }
  for (size_t block = 1; block <= logits.size(); ++block) {
    EXPECT_NEAR(WeightedIndex(logits, block), sum / denominator, 1e-14) << "blocks of " << block;
  }
}

TEST(OnlineSoftmaxTest, MergedHalvesAreTheWhole) {
  const std::vector<double> logits = {0.5, -3, 700, 699, -kInfinity, 701.5, 0};
  for (size_t middle = 0; middle <= logits.size(); ++middle) {
    OnlineSoftmax<double> whole, half[2];
    double sum = 0, part[2] = {};
    for (size_t i = 0; i < logits.size(); ++i) {
      const auto add = [&](OnlineSoftmax<double>* softmax, double* to) {
        *to *= softmax->Raise(logits[i]);
        softmax->denominator += softmax->Weight(logits[i]);
        *to += softmax->Weight(logits[i]) * i;
      };
      add(&whole, &sum);
      add(&half[i >= middle], &part[i >= middle]);
    }
    const auto factors = half[0].Merge(half[1]);
    EXPECT_EQ(half[0].max, whole.max);
    EXPECT_NEAR(half[0].denominator, whole.denominator, 1e-14);
    EXPECT_NEAR(part[0] * factors.own + part[1] * factors.others, sum, 1e-14);
  }
}

TEST(OnlineSoftmaxTest, EmptyGivesZero) {
  OnlineSoftmax<float> softmax;
  EXPECT_EQ(softmax.Normalizer(), 0.0f);
}

TEST(OnlineSoftmaxTest, MinusInfinityBeforeFiniteLogitsHasNoWeight) {
  EXPECT_EQ(WeightedIndex({-kInfinity, -kInfinity, -kInfinity, 5.0}, 2), 3.0);
  EXPECT_EQ(WeightedIndex({-kInfinity, -kInfinity}, 1), 0.0);
}

TEST(OnlineSoftmaxTest, NanIsNotHidden) {
  EXPECT_TRUE(std::isnan(WeightedIndex({1.0, std::nan(""), 2.0}, 1)));
  EXPECT_TRUE(std::isnan(WeightedIndex({std::nan("")}, 1)));
}

}  // namespace
}  // namespace continual_transformers
