// Tests the vector functions on every target: the exponential against the C library's in a wider
// type, widened 16-bit numbers against those of half.h.

#include <algorithm>
#include <cctype>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "cc/attention/targets.h"
#include "gtest/gtest.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "tests/cc/vector_math_test.cc"
#include "hwy/foreach_target.h"
// Must follow foreach_target.h: otherwise these are compiled for one target only.
#include "cc/attention/vector_math-inl.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace continual_transformers {
namespace HWY_NAMESPACE {

// In place, for a size that is a multiple of 64.
template <typename T>
void ExpAll(std::vector<T>* x) {
  const hn::ScalableTag<T> d;
  for (size_t i = 0; i < x->size(); i += hn::Lanes(d)) {
    hn::StoreU(ExpOfNonPositive(d, hn::LoadU(d, x->data() + i)), d, x->data() + i);
  }
}

template <typename T>
void NormalTailAll(std::vector<T>* x) {
  const hn::ScalableTag<T> d;
  for (size_t i = 0; i < x->size(); i += hn::Lanes(d)) {
    hn::StoreU(NormalTail(d, hn::LoadU(d, x->data() + i)), d, x->data() + i);
  }
}

// `out` has a size that is a multiple of 64.
template <typename C>
void WidenAll(const std::vector<C>& in, std::vector<float>* out) {
  const hn::ScalableTag<float> d;
  for (size_t i = 0; i < in.size(); i += hn::Lanes(d)) {
    hn::StoreU(LoadWide(d, in.data() + i), d, out->data() + i);
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace continual_transformers
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace continual_transformers {
namespace {

template <typename T>
void ExpOnTarget(std::vector<T>* x) {
  CONTINUAL_TRANSFORMERS_DISPATCH(ExpAll, x);
}

template <typename T>
std::vector<T> Exp(std::vector<T> x) {
  const size_t size = x.size();
  x.resize((size + 63) / 64 * 64);
  ExpOnTarget(&x);
  x.resize(size);
  return x;
}

template <typename T>
void NormalTailOnTarget(std::vector<T>* x) {
  CONTINUAL_TRANSFORMERS_DISPATCH(NormalTailAll, x);
}

// The largest relative error over [0, end), where results are normal.
template <typename T>
double LargestErrorOfNormalTail(double end) {
  std::vector<T> xs;
  for (int i = 0; i < 640'000; ++i) xs.push_back(static_cast<T>(end * i / 640'000));
  std::vector<T> got = xs;
  NormalTailOnTarget(&got);
  double largest = 0;
  for (size_t i = 0; i < xs.size(); ++i) {
    const long double exact = std::erfc(std::sqrt(0.5L) * xs[i]) / 2;
    largest = std::max(largest, static_cast<double>(std::abs(got[i] / exact - 1)));
  }
  return largest;
}

template <typename C>
void WidenOnTarget(const std::vector<C>& in, std::vector<float>* out) {
  CONTINUAL_TRANSFORMERS_DISPATCH(WidenAll, in, out);
}

// Checks every value of C, including infinities and NaNs with any payload.
template <typename C>
void ExpectEveryValueIsWidened() {
  std::vector<C> every(1 << 16);
  for (size_t i = 0; i < every.size(); ++i) every[i].bits = static_cast<uint16_t>(i);
  std::vector<float> wide(every.size());
  WidenOnTarget(every, &wide);
  for (size_t i = 0; i < every.size(); ++i) {
    const float exact = Widen(every[i]);
    if (std::isnan(exact)) {
      EXPECT_TRUE(std::isnan(wide[i])) << i;
    } else {
      EXPECT_EQ(BitsOfFloat(wide[i]), BitsOfFloat(exact)) << i;
    }
  }
}

// With fused multiply-add, 1.2 would do.
constexpr double kBound = 1.4;

class VectorMathTest : public ::testing::TestWithParam<Target> {
 protected:
  void SetUp() override { ASSERT_EQ(UseTarget(NameOf(GetParam())), ""); }
  void TearDown() override { UseTarget(""); }
};

// The largest distance between results and exact values, in units in the last place of the exact
// ones, over x whose exponential is normal. Below that, results must be 0.
template <typename Wide, typename T>
double LargestError(const std::vector<T>& xs, T lowest) {
  const std::vector<T> got = Exp(xs);
  double largest = 0;
  for (size_t i = 0; i < xs.size(); ++i) {
    if (xs[i] < lowest) {
      if (got[i] != 0) return std::numeric_limits<double>::infinity();
      continue;
    }
    const Wide exact = std::exp(static_cast<Wide>(xs[i]));
    const Wide unit = std::ldexp(Wide(1), std::ilogb(exact) + 1 - std::numeric_limits<T>::digits);
    largest = std::max(largest, static_cast<double>(std::abs(got[i] - exact) / unit));
  }
  return largest;
}

TEST_P(VectorMathTest, ExpOfFloats) {
  std::vector<float> xs;
  const float end = -110;
  uint32_t last;
  std::memcpy(&last, &end, 4);
  // From -0 down, past where the result would be subnormal: every 97th float.
  for (uint32_t bits = 0x80000000u; bits <= last; bits += 97) xs.push_back(FloatOfBits(bits));
  for (uint32_t bits = last; bits < 0xff800000u; bits += 997) xs.push_back(FloatOfBits(bits));
  EXPECT_LT(LargestError<double>(xs, -87.3365f), kBound);
}

TEST_P(VectorMathTest, ExpOfDoubles) {
  std::vector<double> xs;
  for (int i = 0; i <= 2'000'000; ++i) xs.push_back(-i * 3.6e-4);
  for (int i = 0; i <= 1'000'000; ++i) xs.push_back(-std::exp2(-60 + i * 7e-5));
  EXPECT_LT(LargestError<long double>(xs, -708.396), kBound);
}

TEST_P(VectorMathTest, ExpOfWhatIsNoNumber) {
  const float infinity = std::numeric_limits<float>::infinity();
  const std::vector<float> got = Exp<float>({-infinity, std::nanf(""), 0.0f, -0.0f, -1e38f});
  EXPECT_EQ(got[0], 0);
  EXPECT_TRUE(std::isnan(got[1]));
  EXPECT_EQ(got[2], 1);
  EXPECT_EQ(got[3], 1);
  EXPECT_EQ(got[4], 0);
  EXPECT_EQ(Exp<double>({-std::numeric_limits<double>::infinity()})[0], 0);
  EXPECT_TRUE(std::isnan(Exp<double>({std::nan("")})[0]));
}

TEST_P(VectorMathTest, NormalTail) {
  EXPECT_LT(LargestErrorOfNormalTail<float>(5.6), 2e-6);
  EXPECT_LT(LargestErrorOfNormalTail<float>(12), 1e-5);  // x^2 / 2 is off by 4e-6
  EXPECT_LT(LargestErrorOfNormalTail<double>(5.6), 1e-14);
  EXPECT_LT(LargestErrorOfNormalTail<double>(35), 2e-13);
  std::vector<float> special(64, 0);
  special[1] = std::numeric_limits<float>::infinity();
  special[2] = std::nanf("");
  special[3] = 1e30f;
  NormalTailOnTarget(&special);
  EXPECT_NEAR(special[0], 0.5, 1e-7);
  EXPECT_EQ(special[1], 0);
  EXPECT_TRUE(std::isnan(special[2]));
  EXPECT_EQ(special[3], 0);
}

TEST_P(VectorMathTest, EveryHalfIsWidened) {
  ExpectEveryValueIsWidened<BFloat16>();
  ExpectEveryValueIsWidened<Float16>();
}

INSTANTIATE_TEST_SUITE_P(Targets, VectorMathTest, ::testing::ValuesIn(AvailableTargets()),
                         [](const auto& info) { return NameOf(info.param); });

TEST(TargetsTest, ANameMayBeInLowerCase) {
  const Target before = TargetInUse();
  std::string name = NameOf(AvailableTargets().back());
  std::transform(name.begin(), name.end(), name.begin(), ::tolower);
  EXPECT_EQ(UseTarget(name), "");
  EXPECT_EQ(TargetInUse(), AvailableTargets().back());
  UseTarget("");
  EXPECT_EQ(TargetInUse(), before);
}

TEST(TargetsTest, ANameThatIsNoneIsRefused) {
  const Target before = TargetInUse();
  const std::string error = UseTarget("AVX1024");
  EXPECT_NE(error.find("but got AVX1024"), std::string::npos) << error;
  for (const Target target : AvailableTargets()) {
    EXPECT_NE(error.find(NameOf(target)), std::string::npos) << error;
  }
  EXPECT_EQ(TargetInUse(), before);
}

}  // namespace
}  // namespace continual_transformers
#endif  // HWY_ONCE
