// Tests the kernel on raw pointers against a reference in double that keeps each stream's whole
// history.

#include "cc/attention/single_output.h"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <string>
#include <tuple>
#include <vector>

#include "cc/attention/half.h"
#include "cc/attention/targets.h"
#include "gtest/gtest.h"
#include "tests/cc/single_output_case.h"

namespace continual_transformers {
namespace {

#define ON(TARGET)                                                               \
  Kernel<float, float, Target::TARGET>, Kernel<float, BFloat16, Target::TARGET>, \
      Kernel<float, Float16, Target::TARGET>, Kernel<double, double, Target::TARGET>
#if defined(__x86_64__)
using Types = ::testing::Types<ON(kAvx3), ON(kAvx2), ON(kSse2)>;
#else
using Types = ::testing::Types<ON(kNeon)>;
#endif
TYPED_TEST_SUITE(SingleOutputTest, Types);

TYPED_TEST(SingleOutputTest, Grid) {
  for (int64_t n : {1, 2, 3, 16, 17, 64, 65, 120}) {
    for (int64_t d : {1, 7, 12, 15, 16, 17, 24, 33, 64, 128}) {
      for (int64_t t : {int64_t{1}, int64_t{2}, n, n + 5}) {
        // Long calls of wide windows take most of the time, so they have fewer sizes.
        if (n > 17 && t > 2 && d != 7 && d != 16 && d != 33) continue;
        const Sizes sizes = {n, d, d == 16 ? d : d / 2 + 3, t};
        SCOPED_TRACE("N " + std::to_string(n) + " D " + std::to_string(d) + " T " +
                     std::to_string(t));
        for (bool in_order : {true, false}) {
          typename TestFixture::OneCall call(sizes, {0, 1, n - 1, n, n + 1, 2 * n + 3},
                                             {4, 0, 3, 1, 5, 2});
          const auto params = in_order ? call.Params() : call.ParamsWithoutOrder();
          SingleOutputAttention(params, 0, params.num_streams * params.num_heads);
          FinishSingleOutput(params);
          call.Check(this->kBound);
          if (this->HasFatalFailure()) return;
        }
      }
    }
  }
}

TYPED_TEST(SingleOutputTest, RingsOfAnyStrides) {
  for (int64_t n : {1, 3, 17, 70}) {
    for (int64_t t : {int64_t{1}, int64_t{2}, n + 5}) {
      for (bool in_order : {true, false}) {
        Sizes sizes = {n, 33, 24, t, /*heads=*/3};
        const std::vector<int64_t> positions = {0, n - 1, n, 2 * n + 3};
        typename TestFixture::OneCall expected(sizes, positions, {3, 0, 2});
        for (Layout layout : {Layout::kHeadMajor, Layout::kRowMajor, Layout::kBlocks}) {
          sizes.layout = layout;
          typename TestFixture::OneCall call(sizes, positions, {3, 0, 2});
          auto& made = layout == Layout::kHeadMajor ? expected : call;
          const auto p = in_order ? made.Params() : made.ParamsWithoutOrder();
          SingleOutputAttention(p, 0, 9);
          FinishSingleOutput(p);
          made.Check(this->kBound);
          if (this->HasFatalFailure()) return;
          EXPECT_TRUE(made.SameOutput(expected));
        }
      }
    }
  }
}

// Row-major rings, whose heads are attended to together.
TYPED_TEST(SingleOutputTest, HeadsOfARowTogether) {
  for (Layout layout : {Layout::kRowMajor, Layout::kBlocks}) {
    for (int64_t n : {1, 2, 17, 70}) {
      for (int64_t heads : {2, 3, 9}) {
        for (int64_t d : {7, 16, 33}) {
          for (int64_t t : {int64_t{1}, int64_t{3}, n + 5}) {
            SCOPED_TRACE("N " + std::to_string(n) + " H " + std::to_string(heads) + " D " +
                         std::to_string(d) + " T " + std::to_string(t));
            Sizes sizes = {n, d, d == 16 ? d : d / 2 + 3, t, heads, layout};
            for (bool gaps : {false, true}) {
              sizes.gaps = gaps;
              typename TestFixture::OneCall call(sizes, {0, 1, n - 1, n, 2 * n + 3}, {4, 0, 3, 1});
              auto p = gaps ? call.Params() : call.ParamsWithoutOrder();
              const SingleOutputPlan plan = PlanSingleOutput(p, 1);
              EXPECT_EQ(plan.heads_per_task, heads);
              EXPECT_EQ(plan.tasks, 4);
              p.heads_per_task = plan.heads_per_task;
              SingleOutputAttention(p, 2, 4);
              SingleOutputAttention(p, 0, 2);
              FinishSingleOutput(p);
              call.Check(this->kBound);
              if (this->HasFatalFailure()) return;
            }
          }
        }
      }
    }
  }
}

// Fewer streams than threads: a task takes some of the heads, the last one perhaps fewer.
TYPED_TEST(SingleOutputTest, HeadsOfARowInGroups) {
  Sizes sizes = {1000, 64, 64, 4, /*heads=*/5, Layout::kRowMajor};
  sizes.gaps = false;
  const auto call = [&] { return typename TestFixture::OneCall(sizes, {2900}, {0}); };
  auto whole = call(), peek = call();
  auto p = whole.ParamsWithoutOrder(), q = peek.ParamsWithoutOrder();
  const SingleOutputPlan plan = PlanSingleOutput(p, 3);
  EXPECT_EQ(plan.heads_per_task, 2);
  EXPECT_EQ(plan.tasks, 3);
  EXPECT_EQ(PlanSingleOutput(p, 100).tasks, 5);
  p.heads_per_task = q.heads_per_task = plan.heads_per_task;
  q.update_state = false;
  for (int64_t task : {2, 0, 1}) {
    SingleOutputAttention(p, task, task + 1);
    SingleOutputAttention(q, task, task + 1);
  }
  FinishSingleOutput(p);
  FinishSingleOutput(q);
  EXPECT_TRUE(peek.SameState(call()));
  EXPECT_TRUE(peek.SameOutput(whole));
  whole.Check(this->kBound);
}

// Large row-major rings: the steps of a head use a copy of its ring.
TYPED_TEST(SingleOutputTest, ManyStepsOfLargeWindows) {
  Sizes sizes = {1500, 96, 80, 9, /*heads=*/2, Layout::kRowMajor};
  for (bool gaps : {false, true}) {
    sizes.gaps = gaps;
    const auto call = [&] { return typename TestFixture::OneCall(sizes, {4000, 4}, {1, 0}); };
    auto real = call(), peek = call();
    auto p = real.ParamsWithoutOrder(), q = peek.ParamsWithoutOrder();
    EXPECT_EQ(PlanSingleOutput(p, 1).tasks, 4);
    q.update_state = false;
    for (const auto* params : {&p, &q}) {
      SingleOutputAttention(*params, 0, 4);
      FinishSingleOutput(*params);
    }
    EXPECT_TRUE(peek.SameState(call()));
    EXPECT_TRUE(peek.SameOutput(real));
    real.Check(this->kBound);
  }
}

TYPED_TEST(SingleOutputTest, AnySplitOfTheTasksGivesTheSameBits) {
  const Sizes sizes = {17, 12, 9, 3, /*heads=*/3};
  for (bool in_order : {true, false}) {
    typename TestFixture::OneCall whole(sizes, {20, 5, 0}, {2, 0});
    typename TestFixture::OneCall split(sizes, {20, 5, 0}, {2, 0});
    const auto p = in_order ? whole.Params() : whole.ParamsWithoutOrder();
    const auto q = in_order ? split.Params() : split.ParamsWithoutOrder();
    SingleOutputAttention(p, 0, 6);
    for (const auto& [begin, end] : {std::tuple(4, 6), std::tuple(0, 1), std::tuple(1, 4)}) {
      SingleOutputAttention(q, begin, end);
    }
    FinishSingleOutput(p);
    FinishSingleOutput(q);
    EXPECT_TRUE(whole.SameOutput(split));
    EXPECT_TRUE(whole.SameState(split));
    split.Check(this->kBound);
  }
}

// T steps in one call give the same bits as T calls of one step.
TYPED_TEST(SingleOutputTest, StepsInOneCallAreAsManyCalls) {
  constexpr int64_t kSteps = 9, kHeads = 2, kDim = 12;
  const Sizes sizes = {5, kDim, kDim, kSteps, kHeads};
  for (int64_t position : {0, 3, 5, 13}) {
    typename TestFixture::OneCall together(sizes, {position}, {0});
    typename TestFixture::OneCall apart(sizes, {position}, {0});
    const auto p = together.ParamsWithoutOrder();
    SingleOutputAttention(p, 0, kHeads);
    FinishSingleOutput(p);
    auto q = apart.ParamsWithoutOrder();
    q.num_steps = 1;
    for (int64_t t = 0; t < kSteps; ++t) {
      const int64_t now = position + t;
      q.position = &now;
      SingleOutputAttention(q, 0, kHeads);
      FinishSingleOutput(q);
      q.query += q.query_strides.step;
      q.key += q.key_strides.step;
      q.value += q.value_strides.step;
      q.output += q.output_strides.step;
      ++q.key_mask;
    }
    EXPECT_TRUE(together.SameOutput(apart));
    EXPECT_TRUE(together.SameState(apart));
  }
}

TYPED_TEST(SingleOutputTest, PartsOfWindowsMerge) {
  for (int64_t n : {1, 2, 3, 16, 17, 64, 65, 120, 1000}) {
    for (int64_t parts : {2, 3, 7}) {
      const Sizes sizes = {n, 12, 33, 1};
      SCOPED_TRACE("N " + std::to_string(n) + " parts " + std::to_string(parts));
      const auto call = [&] {
        return typename TestFixture::OneCall(sizes, {0, 1, n - 1, n, n + 1, 2 * n + 3},
                                             {4, 0, 3, 1, 5, 2});
      };
      auto real = call(), peek = call();
      for (bool peeks : {false, true}) {
        auto params = (peeks ? peek : real).ParamsInParts(parts);
        params.update_state = !peeks;
        const int64_t tasks = params.num_streams * params.num_heads * parts;
        SingleOutputAttention(params, tasks / 3, tasks);
        SingleOutputAttention(params, 0, tasks / 3);
        FinishSingleOutput(params);
      }
      real.Check(this->kBound);
      EXPECT_TRUE(peek.SameState(call()));
      EXPECT_TRUE(peek.SameOutput(real));
      if (this->HasFatalFailure()) return;
    }
  }
}

TYPED_TEST(SingleOutputTest, WhereAWindowIsCutIntoParts) {
  typename TestFixture::OneCall call({100'000, 4, 4, 1, /*heads=*/1}, {9}, {0});
  auto p = call.Params();
  p.scores = nullptr;
  p.window_key = nullptr;
  EXPECT_EQ(PlanSingleOutput(p, 1).window_parts, 1);
  EXPECT_EQ(PlanSingleOutput(p, 4).window_parts, 4);
  EXPECT_EQ(PlanSingleOutput(p, 4).tasks, 4);
  p.num_heads = 4;  // 4 heads are enough tasks for 4 threads
  EXPECT_EQ(PlanSingleOutput(p, 4).window_parts, 1);
  p.num_heads = 1;
  p.scores = p.output;  // scores need their window in one piece
  EXPECT_EQ(PlanSingleOutput(p, 4).window_parts, 1);
}

TYPED_TEST(SingleOutputTest, PeekingLeavesTheRings) {
  for (int64_t n : {1, 5, 17}) {
    for (int64_t t : {int64_t{1}, n, n + 3}) {
      for (bool in_order : {true, false}) {
        for (Layout layout : {Layout::kHeadMajor, Layout::kRowMajor, Layout::kBlocks}) {
          const Sizes sizes = {n, 4, 6, t, /*heads=*/2, layout};
          const auto call = [&] {
            return typename TestFixture::OneCall(sizes, {0, n - 1, n, n + 4}, {3, 0, 1, 2});
          };
          auto real = call(), peek = call();
          auto p = in_order ? peek.Params() : peek.ParamsWithoutOrder();
          p.update_state = false;
          SingleOutputAttention(p, 0, 8);
          FinishSingleOutput(p);
          EXPECT_TRUE(peek.SameState(call()));
          const auto q = in_order ? real.Params() : real.ParamsWithoutOrder();
          SingleOutputAttention(q, 0, 8);
          FinishSingleOutput(q);
          EXPECT_TRUE(peek.SameOutput(real));
          EXPECT_FALSE(real.SameState(peek));
        }
      }
    }
  }
}

TYPED_TEST(SingleOutputTest, AMaskBroadcastsByStridesOfZero) {
  const Sizes sizes = {6, 4, 4, 2};
  typename TestFixture::OneCall call(sizes, {9}, {0});
  auto p = call.Params();
  const bool mask[6] = {true, false, true, true, false, true};
  p.mask = mask;
  p.mask_strides = {0, 0, 0};
  p.key_mask = nullptr;
  std::fill_n(p.key_mask_cache, 6, true);
  std::fill_n(p.key_cache, 2 * 6 * 4, Exactly<typename TypeParam::Cache>(1));
  std::fill_n(const_cast<typename TypeParam::Cache*>(p.key), 2 * 2 * 4,
              Exactly<typename TypeParam::Cache>(2));
  SingleOutputAttention(p, 0, 2);
  for (int row = 0; row < 4; ++row) {
    double sum = 0;
    for (int c = 0; c < 6; ++c) {
      EXPECT_EQ(p.scores[row * 6 + c] > 0, mask[c]);
      sum += p.scores[row * 6 + c];
    }
    EXPECT_NEAR(sum, 1, 1e-6);
  }
}

// A mask for all heads is read once for the heads that are attended to together.
TYPED_TEST(SingleOutputTest, AMaskForHeadsTogether) {
  constexpr int64_t kWindow = 19, kHeads = 3;
  const Sizes sizes = {kWindow, 16, 12, 4, kHeads, Layout::kRowMajor};
  const std::vector<int64_t> positions = {7, 50};
  bool mask[kHeads * kWindow];
  for (int64_t i = 0; i < kHeads * kWindow; ++i) mask[i] = i % kWindow % 4 != 1;
  typename TestFixture::OneCall together(sizes, positions, {1, 0});
  typename TestFixture::OneCall alone(sizes, positions, {1, 0});
  auto p = together.Params(), q = alone.Params();
  p.mask = q.mask = mask;
  p.mask_strides = {0, 0, 0};
  q.mask_strides = {0, 0, kWindow};  // the same for each head
  EXPECT_EQ(PlanSingleOutput(p, 1).heads_per_task, kHeads);
  EXPECT_EQ(PlanSingleOutput(q, 1).heads_per_task, 1);
  p.heads_per_task = kHeads;
  SingleOutputAttention(p, 0, 2);
  SingleOutputAttention(q, 0, 2 * kHeads);
  for (int64_t i = 0; i < 2 * kHeads * 4 * kWindow; ++i) {
    ASSERT_NEAR(p.scores[i], q.scores[i], this->kBound);
    if (!mask[i % kWindow]) {
      ASSERT_EQ(p.scores[i], 0);
    }
  }
  for (int64_t i = 0; i < 2 * kHeads * 4 * 12; ++i) {
    ASSERT_NEAR(p.output[i], q.output[i], this->kBound);
  }
}

TYPED_TEST(SingleOutputTest, NothingAttendedGivesZeros) {
  const Sizes sizes = {6, 4, 3, 1};
  typename TestFixture::OneCall call(sizes, {9}, {0});
  auto p = call.Params();
  const bool mask[6] = {};
  p.mask = mask;
  p.mask_strides = {0, 0, 0};
  SingleOutputAttention(p, 0, 2);
  for (int i = 0; i < 6; ++i) EXPECT_EQ(p.output[i], 0);
  for (int i = 0; i < 12; ++i) EXPECT_EQ(p.scores[i], 0);
}

}  // namespace
}  // namespace continual_transformers
