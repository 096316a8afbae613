#include "cc/attention/online_softmax.h"

#include <cmath>
#include <limits>
#include <vector>

#include "gtest/gtest.h"

namespace continual_transformers {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// Feeds logits in blocks of `block`; gives the probability-weighted sum of the logits' indices.
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
