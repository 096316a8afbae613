#include "cc/attention/ring_cache.h"

#include <cstdint>
#include <vector>

#include "gtest/gtest.h"

namespace continual_transformers {
namespace {

TEST(FindRingSpansTest, GivesTheRowOfEveryStepInOrder) {
  for (int64_t window : {1, 2, 3, 16, 17}) {
    for (int64_t first_step = 0; first_step < 3 * window; ++first_step) {
      for (int64_t steps = 0; steps <= window; ++steps) {
        const RingSpans spans = FindRingSpans(first_step, steps, window);
        std::vector<int64_t> rows;
        for (const RingSpan& span : {spans.before_wrap, spans.after_wrap}) {
          ASSERT_GE(span.rows, 0);
          for (int64_t i = 0; i < span.rows; ++i) rows.push_back(span.first_row + i);
        }
        ASSERT_EQ(static_cast<int64_t>(rows.size()), steps);
        for (int64_t i = 0; i < steps; ++i) EXPECT_EQ(rows[i], (first_step + i) % window);
      }
    }
  }
}

TEST(FindRingSpansTest, CountsStepsBeyond32Bits) {
  const int64_t far = (int64_t{1} << 40) * 10 + 7;
  const RingSpans spans = FindRingSpans(far, 5, 10);
  EXPECT_EQ(spans.before_wrap.first_row, 7);
  EXPECT_EQ(spans.before_wrap.rows, 3);
  EXPECT_EQ(spans.after_wrap.first_row, 0);
  EXPECT_EQ(spans.after_wrap.rows, 2);
}

TEST(PartOfTest, PartsFollowEachOther) {
  const RingSpans spans = {{5, 7}, {0, 4}};
  for (int64_t begin = 0; begin <= 11; ++begin) {
    for (int64_t end = begin; end <= 11; ++end) {
      const RingSpans part = PartOf(spans, begin, end);
      std::vector<int64_t> rows;
      for (const RingSpan& span : {part.before_wrap, part.after_wrap}) {
        ASSERT_GE(span.rows, 0);
        for (int64_t i = 0; i < span.rows; ++i) rows.push_back(span.first_row + i);
      }
      ASSERT_EQ(static_cast<int64_t>(rows.size()), end - begin);
      for (int64_t i = begin; i < end; ++i) EXPECT_EQ(rows[i - begin], i < 7 ? 5 + i : i - 7);
    }
  }
}

}  // namespace
}  // namespace continual_transformers
