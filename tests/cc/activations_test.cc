// Every element-wise function against its definition in double, on every target.

#include "cc/attention/activations.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <string>
#include <vector>

#include "cc/attention/targets.h"
#include "gtest/gtest.h"

namespace continual_transformers {
namespace {

struct Case {
  const char* name;
  ActivationSpec spec;
  std::function<double(double)> expected;
  bool positive = false;  // defined only for positive numbers
  double largest = 1000;  // the largest magnitude: beyond it the function's own formula cancels
  double smallest = 1e-6;
};

double Softplus(double x) { return std::max(x, 0.0) + std::log1p(std::exp(-std::abs(x))); }

std::vector<Case> Cases() {
  const auto clip = [](double x, double a, double b) { return std::min(std::max(x, a), b); };
  const auto elu = [](double x, double a) { return x > 0 ? x : a * std::expm1(x); };
  const double infinity = std::numeric_limits<double>::infinity();
  using F = Activation;
  return {
      {"absolute", {F::kAbsolute}, [](double x) { return std::abs(x); }},
      {"arccos", {F::kArccos}, [](double x) { return std::acos(x); }, false, 1},
      {"arccosh", {F::kArccosh}, [](double x) { return std::acosh(x); }, true, 1000, 1},
      {"arcsin", {F::kArcsin}, [](double x) { return std::asin(x); }, false, 1},
      {"arcsinh", {F::kArcsinh}, [](double x) { return std::asinh(x); }},
      {"arctan", {F::kArctan}, [](double x) { return std::atan(x); }},
      {"arctanh", {F::kArctanh}, [](double x) { return std::atanh(x); }, false, 1},
      {"cbrt", {F::kCbrt}, [](double x) { return std::cbrt(x); }},
      {"ceil", {F::kCeil}, [](double x) { return std::ceil(x); }},
      {"celu", {F::kCelu, 2}, [](double x) { return x > 0 ? x : 2 * std::expm1(x / 2); }},
      {"cos", {F::kCos}, [](double x) { return std::cos(x); }},
      {"cosh", {F::kCosh}, [](double x) { return std::cosh(x); }},
      {"elu", {F::kElu, 0.7}, [=](double x) { return elu(x, 0.7); }},
      {"erf", {F::kErf}, [](double x) { return std::erf(x); }},
      {"erfc", {F::kErfc}, [](double x) { return std::erfc(x); }},
      {"expm1", {F::kExpm1}, [](double x) { return std::expm1(x); }},
      {"exponential", {F::kExponential}, [](double x) { return std::exp(x); }},
      {"floor", {F::kFloor}, [](double x) { return std::floor(x); }},
      {"gelu", {F::kGelu}, [](double x) { return 0.5 * x * std::erfc(-x * std::sqrt(0.5)); }},
      {"gelu_tanh",
       {F::kGeluTanh},
       [](double x) {
         return 0.5 * x * (1 + std::tanh(std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
       }},
      {"hard_shrink", {F::kHardShrink, 0.5}, [](double x) { return std::abs(x) > 0.5 ? x : 0; }},
      {"hard_sigmoid", {F::kHardSigmoid}, [=](double x) { return clip(x + 3, 0, 6) / 6; }},
      {"hard_silu", {F::kHardSilu}, [=](double x) { return x * clip(x + 3, 0, 6) / 6; }},
      {"hard_tanh", {F::kHardTanh}, [=](double x) { return clip(x, -1, 1); }},
      {"leaky_relu", {F::kLeakyRelu, 0.2}, [](double x) { return x < 0 ? 0.2 * x : x; }},
      {"linear", {F::kLinear}, [](double x) { return x; }},
      {"log", {F::kLog}, [](double x) { return std::log(x); }, true},
      {"log1p", {F::kLog1p}, [](double x) { return std::log1p(x); }, true},
      {"log_sigmoid", {F::kLogSigmoid}, [](double x) { return -Softplus(-x); }},
      {"mish", {F::kMish}, [](double x) { return x * std::tanh(Softplus(x)); }},
      {"negative", {F::kNegative}, [](double x) { return -x; }},
      {"reciprocal", {F::kReciprocal}, [](double x) { return 1 / x; }, true},
      {"relu", {F::kRelu, 0, infinity, 0}, [](double x) { return std::max(x, 0.0); }},
      {"relu with all its numbers",
       {F::kRelu, 0.1, 3, 0.5},
       [](double x) { return x >= 3     ? 3
                             : x >= 0.5 ? x
                                        : 0.1 * (x - 0.5); }},
      {"round", {F::kRound}, [](double x) { return std::nearbyint(x); }},
      {"rsqrt", {F::kRsqrt}, [](double x) { return 1 / std::sqrt(x); }, true},
      {"selu",
       {F::kSelu},
       [=](double x) { return 1.0507009873554805 * elu(x, 1.6732632423543772); }},
      {"sigmoid", {F::kSigmoid}, [](double x) { return 1 / (1 + std::exp(-x)); }},
      {"sign", {F::kSign}, [](double x) { return x > 0   ? 1
                                                 : x < 0 ? -1
                                                         : 0; }},
      {"silu", {F::kSilu}, [](double x) { return x / (1 + std::exp(-x)); }},
      {"sin", {F::kSin}, [](double x) { return std::sin(x); }},
      {"sinc", {F::kSinc}, [](double x) { return x == 0 ? 1 : std::sin(M_PI * x) / (M_PI * x); }},
      {"sinh", {F::kSinh}, [](double x) { return std::sinh(x); }},
      {"soft_shrink",
       {F::kSoftShrink, 0.5},
       [](double x) { return x > 0.5    ? x - 0.5
                             : x < -0.5 ? x + 0.5
                                        : 0; }},
      {"softplus", {F::kSoftplus}, [](double x) { return Softplus(x); }},
      {"softsign", {F::kSoftsign}, [](double x) { return x / (1 + std::abs(x)); }},
      {"sparse_plus",
       {F::kSparsePlus},
       [](double x) { return x <= -1  ? 0
                             : x >= 1 ? x
                                      : (x + 1) * (x + 1) / 4; }},
      {"sparse_sigmoid",
       {F::kSparseSigmoid},
       [](double x) { return x <= -1  ? 0
                             : x >= 1 ? 1
                                      : (x + 1) / 2; }},
      {"sqrt", {F::kSqrt}, [](double x) { return std::sqrt(x); }, true},
      {"square", {F::kSquare}, [](double x) { return x * x; }},
      {"squareplus",
       {F::kSquareplus, 4},
       [](double x) { return (x + std::sqrt(x * x + 4)) / 2; },
       false,
       80},
      {"tan", {F::kTan}, [](double x) { return std::tan(x); }, false, 1},
      {"tanh", {F::kTanh}, [](double x) { return std::tanh(x); }},
      {"tanh_shrink", {F::kTanhShrink}, [](double x) { return x - std::tanh(x); }},
      {"trunc", {F::kTrunc}, [](double x) { return std::trunc(x); }},
      {"threshold", {F::kThreshold, 0.3, -1}, [](double x) { return x > 0.3 ? x : -1; }},
  };
}

class ActivationsTest : public ::testing::TestWithParam<Target> {
 protected:
  void SetUp() override { ASSERT_EQ(UseTarget(NameOf(GetParam())), ""); }
  void TearDown() override { UseTarget(""); }

  // `bound` is relative to the larger of the result and the part of the argument that cancels in
  // it.
  template <typename T>
  void Check(double bound) {
    for (const Case& c : Cases()) {
      SCOPED_TRACE(c.name);
      std::vector<T> x;
      for (double magnitude = c.smallest; magnitude < c.largest; magnitude *= 1.07) {
        x.push_back(static_cast<T>(magnitude));
        if (!c.positive) x.push_back(static_cast<T>(-magnitude));
      }
      if (!c.positive) x.push_back(0);
      std::vector<T> y(x.size() + 1, T(7));
      Apply(c.spec, x.data(), static_cast<int64_t>(x.size()), y.data());
      EXPECT_EQ(y.back(), T(7));
      for (size_t i = 0; i < x.size(); ++i) {
        const double expected = c.expected(x[i]);
        if (std::isinf(static_cast<T>(expected))) {
          ASSERT_EQ(y[i], static_cast<T>(expected)) << "of " << x[i];
          continue;
        }
        // Differences such as x - tanh(x) keep the error of what is subtracted.
        const double scale = std::max(std::abs(expected), std::min(1.0, std::abs(double{x[i]})));
        ASSERT_NEAR(y[i], expected, bound * scale) << "of " << x[i];
      }
      // Computing in place, and in pieces of any length, gives the same numbers.
      std::vector<T> again = x;
      Apply(c.spec, again.data(), 3, again.data());
      Apply(c.spec, again.data() + 3, static_cast<int64_t>(again.size()) - 3, again.data() + 3);
      for (size_t i = 0; i < x.size(); ++i) ASSERT_EQ(again[i], y[i]);
      T nan = std::numeric_limits<T>::quiet_NaN();
      Apply(c.spec, &nan, 1, &nan);
      if (c.spec.kind == Activation::kThreshold) {
        EXPECT_EQ(nan, T(-1));
      } else {
        EXPECT_TRUE(std::isnan(nan));
      }
    }
  }
};

TEST_P(ActivationsTest, Float) { Check<float>(5e-6); }
TEST_P(ActivationsTest, Double) { Check<double>(1e-13); }

// Near 0, where exponentials cancel, tanh keeps its relative accuracy.
TEST_P(ActivationsTest, TanhIsExactNearZero) {
  for (double x = 1e-12; x < 1; x *= 1.3) {
    ActivationSpec spec;
    spec.kind = Activation::kTanh;
    float narrow;
    double wide;
    const float x32 = static_cast<float>(x);
    Apply(spec, &x32, 1, &narrow);
    Apply(spec, &x, 1, &wide);
    EXPECT_NEAR(narrow / std::tanh(static_cast<double>(x32)), 1, 5e-7) << x;
    EXPECT_NEAR(wide / std::tanh(x), 1, 5e-15) << x;
  }
}

INSTANTIATE_TEST_SUITE_P(Targets, ActivationsTest, ::testing::ValuesIn(AvailableTargets()),
                         [](const auto& info) { return std::string(NameOf(info.param)); });

}  // namespace
}  // namespace continual_transformers
