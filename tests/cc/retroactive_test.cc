// Tests the kernel on raw pointers against a reference in double that keeps each stream's whole
// history.

#include "cc/attention/retroactive.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <tuple>
#include <vector>

#include "cc/attention/params.h"
#include "cc/attention/targets.h"
#include "gtest/gtest.h"

namespace continual_transformers {
namespace {

struct Sizes {
  int64_t window, key_dim, value_dim;
  int64_t heads = 2;
  bool row_major = false;  // rings [S, N, H, D]
};

// A buffer of NaN, aligned only to its element, with a NaN on either side.
template <typename T>
class Unaligned {
 public:
  explicit Unaligned(int64_t size) : data_(size + 2, std::numeric_limits<T>::quiet_NaN()) {}
  T* data() { return data_.data() + 1; }
  T& operator[](int64_t i) { return data_[i + 1]; }
  bool Intact() const { return std::isnan(data_.front()) && std::isnan(data_.back()); }
  bool SameBits(const Unaligned& other) const {
    return std::memcmp(data_.data(), other.data_.data(), data_.size() * sizeof(T)) == 0;
  }

 private:
  std::vector<T> data_;
};

// The streams' state and history. About one step in five has no key, and holds NaN.
template <typename T>
class Streams {
 public:
  Streams(const Sizes& sizes, int64_t held)
      : z(sizes),
        position(held),
        query(held * z.heads * z.window * z.key_dim),
        key(held * z.heads * z.window * z.key_dim),
        value(held * z.heads * z.window * z.value_dim),
        key_mask(held * z.window),
        softmax(held * z.heads * 4 * z.window),
        weighted_sum(held * z.heads * z.window * z.value_dim),
        made_with(held * 2),
        history_(held) {}

  // Draws `steps` steps of `streams`. Params() then takes them, once or more.
  void Draw(const std::vector<int32_t>& streams, int64_t steps) {
    streams_ = streams;
    steps_ = steps;
    const int64_t rows = streams.size() * steps * z.heads;
    new_query_ = Unaligned<T>(rows * z.key_dim);
    new_key_ = Unaligned<T>(rows * z.key_dim);
    new_value_ = Unaligned<T>(rows * z.value_dim);
    output_ = Unaligned<T>(rows * z.window * z.value_dim);
    new_key_mask_.assign(streams.size() * steps, 1);
    for (size_t i = 0; i < new_key_mask_.size(); ++i) {
      const bool has_key = random_() % 5 != 0;
      new_key_mask_[i] = has_key;
      for (int64_t j = 0; j < z.heads * z.key_dim; ++j) {
        new_query_[i * z.heads * z.key_dim + j] = Normal();
        new_key_[i * z.heads * z.key_dim + j] = has_key ? Normal() : Nan();
      }
      for (int64_t j = 0; j < z.heads * z.value_dim; ++j) {
        new_value_[i * z.heads * z.value_dim + j] = has_key ? Normal() : Nan();
      }
    }
  }

  RetroactiveParams<T> Params() {
    RetroactiveParams<T> p = {};
    const int64_t t = steps_, h = z.heads;
    const auto strides = [&](int64_t size) { return Strides{t * h * size, h * size, size}; };
    p.query = new_query_.data();
    p.key = new_key_.data();
    p.value = new_value_.data();
    p.query_strides = p.key_strides = strides(z.key_dim);
    p.value_strides = strides(z.value_dim);
    p.key_mask = reinterpret_cast<bool*>(new_key_mask_.data());
    p.query_cache = query.data();
    p.key_cache = key.data();
    p.value_cache = value.data();
    const auto ring = z.row_major ? RowMajorRing : HeadMajorRing;
    p.query_cache_strides = p.key_cache_strides = ring(h, z.window, z.key_dim);
    p.value_cache_strides = ring(h, z.window, z.value_dim);
    p.key_mask_cache = reinterpret_cast<bool*>(key_mask.data());
    p.position = position.data();
    p.streams = streams_.data();
    p.softmax = softmax.data();
    p.weighted_sum = weighted_sum.data();
    p.made_with = made_with.data();
    p.output = output_.data();
    p.output_strides = strides(z.window * z.value_dim);
    p.output_row_stride = z.value_dim;
    p.num_streams = streams_.size();
    p.num_steps = t;
    p.num_heads = h;
    p.window = z.window;
    p.key_dim = z.key_dim;
    p.value_dim = z.value_dim;
    p.scale = T(1) / std::sqrt(T(z.key_dim));
    p.update_state = true;
    return p;
  }

  void Take(const RetroactiveParams<T>& p) {
    RetroactiveAttention(p, 0, p.num_streams * p.num_heads);
    FinishRetroactive(p);
    if (!p.update_state) return;
    for (int32_t stream : streams_) position[stream] += p.num_steps;
  }

  // Adds the drawn steps to the streams' history, and compares the outputs after each.
  void Check(double bound) {
    for (size_t m = 0; m < streams_.size(); ++m) {
      auto& history = history_[streams_[m]];
      for (int64_t t = 0; t < steps_; ++t) {
        const int64_t row = m * steps_ + t;
        Step step = {{}, {}, {}, bool(new_key_mask_[row])};
        for (int64_t i = 0; i < z.heads * z.key_dim; ++i) {
          step.query.push_back(new_query_[row * z.heads * z.key_dim + i]);
          step.key.push_back(new_key_[row * z.heads * z.key_dim + i]);
        }
        for (int64_t i = 0; i < z.heads * z.value_dim; ++i) {
          step.value.push_back(new_value_[row * z.heads * z.value_dim + i]);
        }
        history.push_back(step);
        for (int64_t h = 0; h < z.heads; ++h) CheckRows(history, row, h, bound);
      }
    }
    EXPECT_TRUE(new_query_.Intact() && new_key_.Intact() && new_value_.Intact() &&
                output_.Intact() && query.Intact() && key.Intact() && value.Intact() &&
                softmax.Intact() && weighted_sum.Intact());
  }

  bool SameState(const Streams& other) const {
    return query.SameBits(other.query) && key.SameBits(other.key) && value.SameBits(other.value) &&
           softmax.SameBits(other.softmax) && weighted_sum.SameBits(other.weighted_sum) &&
           key_mask == other.key_mask && made_with == other.made_with;
  }
  bool SameOutput(const Streams& other) const { return output_.SameBits(other.output_); }

  const Sizes z;
  std::vector<int64_t> position;
  Unaligned<T> query, key, value;
  std::vector<char> key_mask;
  Unaligned<double> softmax, weighted_sum;
  std::vector<double> made_with;

 private:
  struct Step {
    std::vector<double> query, key, value;
    bool has_key;
  };

  static T Nan() { return std::numeric_limits<T>::quiet_NaN(); }
  T Normal() { return T(normal_(random_)); }

  void CheckRows(const std::vector<Step>& history, int64_t row, int64_t h, double bound) {
    const int64_t end = history.size(), begin = std::max<int64_t>(0, end - z.window);
    T* output = output_.data() + (row * z.heads + h) * z.window * z.value_dim;
    for (int64_t c = 0; c < z.window; ++c) {
      std::vector<double> expected(z.value_dim);
      const int64_t at = end - z.window + c;  // the step of the query
      double denominator = 0;
      for (int64_t p = begin; at >= 0 && p < end; ++p) {
        if (!history[p].has_key) continue;
        double logit = 0;
        for (int64_t d = 0; d < z.key_dim; ++d) {
          logit += history[at].query[h * z.key_dim + d] * history[p].key[h * z.key_dim + d];
        }
        const double weight = std::exp(logit / std::sqrt(static_cast<double>(z.key_dim)));
        denominator += weight;
        for (int64_t d = 0; d < z.value_dim; ++d) {
          expected[d] += weight * history[p].value[h * z.value_dim + d];
        }
      }
      for (int64_t d = 0; d < z.value_dim; ++d) {
        ASSERT_NEAR(output[c * z.value_dim + d], denominator == 0 ? 0 : expected[d] / denominator,
                    bound)
            << "row " << c << " after " << end << " steps";
      }
    }
  }

  std::vector<int32_t> streams_;
  int64_t steps_ = 0;
  std::mt19937 random_{7};
  std::normal_distribution<double> normal_;
  Unaligned<T> new_query_{0}, new_key_{0}, new_value_{0}, output_{0};
  std::vector<char> new_key_mask_;
  std::vector<std::vector<Step>> history_;
};

// The compute type and the target.
template <typename T, Target target>
struct Kernel {
  using Compute = T;
  static constexpr Target kTarget = target;
};

template <typename K>
class RetroactiveTest : public ::testing::Test {
 public:
  using OneStreams = Streams<typename K::Compute>;
  static constexpr double kBound = sizeof(typename K::Compute) == 4 ? 5e-6 : 1e-13;

  void SetUp() override {
    const std::string error = UseTarget(NameOf(K::kTarget));
    if (!error.empty()) GTEST_SKIP() << error;
  }
  void TearDown() override { UseTarget(""); }
};

#define ON(TARGET) Kernel<float, Target::TARGET>, Kernel<double, Target::TARGET>
#if defined(__x86_64__)
using Types = ::testing::Types<ON(kAvx3), ON(kAvx2), ON(kSse2)>;
#else
using Types = ::testing::Types<ON(kNeon)>;
#endif
TYPED_TEST_SUITE(RetroactiveTest, Types);

TYPED_TEST(RetroactiveTest, Grid) {
  for (bool recompute : {false, true}) {
    for (int64_t n : {1, 2, 3, 16, 17, 33}) {
      for (int64_t d : {1, 7, 12, 15, 16, 17, 24, 33, 64, 128}) {
        if (n > 17 && d > 24) continue;
        const Sizes sizes = {n, d, d == 16 ? d : d / 2 + 3};
        SCOPED_TRACE("N " + std::to_string(n) + " D " + std::to_string(d) +
                     (recompute ? " recompute" : ""));
        typename TestFixture::OneStreams streams(sizes, 4);
        for (int64_t t : {int64_t{1}, int64_t{2}, n, n + 5}) {
          streams.Draw(t == 2 ? std::vector<int32_t>{3, 1} : std::vector<int32_t>{1, 0, 3}, t);
          auto params = streams.Params();
          params.recompute = recompute;
          streams.Take(params);
          streams.Check(this->kBound);
          if (this->HasFatalFailure()) return;
        }
      }
    }
  }
}

TYPED_TEST(RetroactiveTest, RingsOfEitherOrderGiveTheSameBits) {
  for (bool recompute : {false, true}) {
    for (int64_t n : {1, 2, 5, 17}) {
      for (int64_t d : {3, 16, 33}) {
        const Sizes sizes = {n, d, d + 2, /*heads=*/3};
        Sizes transposed = sizes;
        transposed.row_major = true;
        typename TestFixture::OneStreams head_major(sizes, 3), row_major(transposed, 3);
        for (int64_t t : {int64_t{1}, n, n + 5, int64_t{2}}) {
          head_major.Draw({2, 0}, t);
          row_major.Draw({2, 0}, t);
          for (bool update_state : {false, true}) {
            for (auto* streams : {&head_major, &row_major}) {
              auto p = streams->Params();
              p.recompute = recompute;
              p.update_state = update_state;
              const auto before = *streams;
              streams->Take(p);
              EXPECT_TRUE(update_state || streams->SameState(before));
            }
            EXPECT_TRUE(row_major.SameOutput(head_major));
          }
          row_major.Check(this->kBound);
          if (this->HasFatalFailure()) return;
        }
      }
    }
  }
}

TYPED_TEST(RetroactiveTest, AnySplitOfTheTasksGivesTheSameBits) {
  const Sizes sizes = {17, 12, 9, /*heads=*/3};
  typename TestFixture::OneStreams whole(sizes, 3), split(sizes, 3);
  for (int64_t t : {20, 3}) {
    whole.Draw({2, 0}, t);
    split.Draw({2, 0}, t);
    whole.Take(whole.Params());
    const auto p = split.Params();
    for (const auto& [begin, end] : {std::tuple(4, 6), std::tuple(0, 1), std::tuple(1, 4)}) {
      RetroactiveAttention(p, begin, end);
    }
    split.Take([&p] {  // Without heads, a call does only what follows the tasks.
      auto none = p;
      none.num_heads = 0;
      return none;
    }());
    EXPECT_TRUE(whole.SameState(split));
    EXPECT_TRUE(whole.SameOutput(split));
  }
}

TYPED_TEST(RetroactiveTest, PeekingLeavesTheState) {
  const Sizes sizes = {5, 4, 6};
  for (bool recompute : {false, true}) {
    typename TestFixture::OneStreams streams(sizes, 2);
    for (int64_t t : {3, 1, 7}) {
      streams.Draw({1}, t);
      auto p = streams.Params();
      p.recompute = recompute;
      p.update_state = false;
      const auto before = streams;
      streams.Take(p);
      EXPECT_TRUE(streams.SameState(before));
      const auto peeked = streams;
      p.update_state = true;
      streams.Take(p);
      EXPECT_TRUE(streams.SameOutput(peeked));
      streams.Check(this->kBound);
    }
  }
}

// Weights that another target computed, or that come from a file, may differ in the last bits from
// those that this arithmetic would subtract.
TYPED_TEST(RetroactiveTest, RowsOfAnotherArithmeticAreComputedAnew) {
  typename TestFixture::OneStreams streams({6, 24, 6}, 1);
  for (int round = 0; round < 12; ++round) {
    streams.Draw({0}, 2);
    auto p = streams.Params();
    p.recompute = round % 3 == 2;
    if (round % 4 == 1) {
      streams.made_with[0] += 1;
      std::fill_n(p.softmax, 2 * 4 * 6, 3e30);  // this arithmetic cannot use it
      std::fill_n(p.weighted_sum, 2 * 6 * 6, 3e30);
    }
    streams.Take(p);
    streams.Check(this->kBound);
    if (this->HasFatalFailure()) return;
  }
}

// While a key or value is NaN or infinite, so are the outputs. Then none is.
TYPED_TEST(RetroactiveTest, WhatIsNotFiniteLeavesWithItsStep) {
  using T = typename TypeParam::Compute;
  for (const T bad : {std::numeric_limits<T>::quiet_NaN(), std::numeric_limits<T>::infinity()}) {
    for (bool in_key : {false, true}) {
      const int64_t n = 19;
      typename TestFixture::OneStreams streams({n, 8, 6}, 1);
      for (int64_t t = 0; t < 3 * n; ++t) {
        streams.Draw({0}, 1);
        auto p = streams.Params();
        const bool has_key = true;
        p.key_mask = &has_key;
        std::vector<T> ones(2 * 8, 1);
        p.query = p.key = p.value = ones.data();
        std::vector<T> spoiled = ones;
        spoiled[3] = bad;
        if (t == n + 4) (in_key ? p.key : p.value) = spoiled.data();
        streams.Take(p);
        for (int64_t i = 0; t >= 2 * n + 4 && i < n * 6; ++i) EXPECT_EQ(p.output[i], 1);
        EXPECT_TRUE(t != 2 * n || !std::isfinite(p.output[in_key ? 0 : 3]));
      }
    }
  }
}

// A value that is far larger than the others leaves nothing behind.
TYPED_TEST(RetroactiveTest, AHugeValueLeavesNothingBehind) {
  using T = typename TypeParam::Compute;
  const int64_t n = 17;
  typename TestFixture::OneStreams streams({n, 8, 8}, 1);
  for (int64_t t = 0; t < 2 * n + 9; ++t) {
    streams.Draw({0}, 1);
    auto p = streams.Params();
    const bool has_key = true;
    p.key_mask = &has_key;
    std::vector<T> ones(2 * 8, 1), huge(2 * 8, T(1e20));
    p.query = p.key = p.value = ones.data();
    if (t == n) p.value = huge.data();
    streams.Take(p);
    for (int64_t i = 0; t >= 2 * n && i < n * 8; ++i) EXPECT_EQ(p.output[i], 1) << t;
  }
}

TYPED_TEST(RetroactiveTest, NoKeyGivesZeros) {
  typename TestFixture::OneStreams streams({4, 3, 5}, 1);
  streams.Draw({0}, 9);
  auto p = streams.Params();
  const bool none[9] = {};
  p.key_mask = none;
  streams.Take(p);
  for (int i = 0; i < 9 * 2 * 4 * 5; ++i) EXPECT_EQ(p.output[i], 0);
}

}  // namespace
}  // namespace continual_transformers
