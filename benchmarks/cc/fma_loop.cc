#include "benchmarks/cc/fma_loop.h"

#include <cstddef>
#include <cstdint>

#include "cc/attention/targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "benchmarks/cc/fma_loop.cc"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace continual_transformers {
namespace HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

FmaLoopResult MultiplyAdd(int64_t rounds) {
  const hn::ScalableTag<float> d;
  // Two units with a latency of four or five cycles each need at least ten operations in flight.
  constexpr int kAccumulators = 12;
  constexpr int kUnrolled = 4;
  const auto factor = hn::Set(d, 0.999f), term = hn::Set(d, 0.001f);
  hn::Vec<decltype(d)> sum[kAccumulators];
  for (int i = 0; i < kAccumulators; ++i) sum[i] = hn::Set(d, static_cast<float>(i));
  for (int64_t round = 0; round < rounds; ++round) {
    for (int u = 0; u < kUnrolled; ++u) {
      for (auto& s : sum) s = hn::MulAdd(s, factor, term);
    }
  }
  for (int i = 1; i < kAccumulators; ++i) sum[0] = hn::Add(sum[0], sum[i]);
  const int64_t lanes = hn::Lanes(d);
  return {rounds * kUnrolled * kAccumulators * lanes, hn::GetLane(hn::SumOfLanes(d, sum[0]))};
}

}  // namespace HWY_NAMESPACE
}  // namespace continual_transformers
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace continual_transformers {

FmaLoopResult FmaLoop(int64_t rounds) { CONTINUAL_TRANSFORMERS_DISPATCH(MultiplyAdd, rounds); }

}  // namespace continual_transformers
#endif  // HWY_ONCE
