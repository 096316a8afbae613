// When the sums of retroactive attention may be updated, and when a row is computed exactly instead
// (retroactive.h says why). The kernels of the CPU and those in cuda/ share these numbers.

#ifndef CONTINUAL_TRANSFORMERS_ATTENTION_RETROACTIVE_RULE_H_
#define CONTINUAL_TRANSFORMERS_ATTENTION_RETROACTIVE_RULE_H_

#include <cstdint>

namespace continual_transformers {

// A logit further above its reference than this is recomputed instead. e^60 is far from overflow in
// float, and in double the sums of such weights are as exact as any.
constexpr double kMostAboveReference = 60;
constexpr double kMostWeight = 1.142007389815684e26;  // e^kMostAboveReference

// The remainder of a subtraction is exact enough down to this fraction of the sums' peak. The sums
// are off by at most about 2 N 2^-53 of the peak, 2e-13 for N = 1000, and by about 1e-14 in
// practice. A bound of 5e-6 leaves much room for that, and one of 1e-12 little.
template <typename T>
constexpr double kLeastOfPeak = sizeof(T) == 4 ? 0x1p-20 : 0x1p-5;

// The contents of RetroactiveParams::made_with. 0, 0 is for rows without a softmax, and for new
// streams.
struct MadeWith {
  double arithmetic;
  double scale;
};

// The orders in which kernels sum a logit. They decide the bits of a weight, so sums can only be
// updated in the order in which they were made. Change all of these numbers when an order changes:
// files may hold old state. All are below kOrdersOfSums.
constexpr int64_t kOrdersOfSums = 64;
constexpr int64_t kFirstOrderOnCpu = 5;  // plus the number of the target
constexpr int64_t kVectorOrderOnGpu = 62;
constexpr int64_t kScalarOrderOnGpu = 63;

// Returns what describes the sums of a stream after `position` steps. The arithmetic is one number
// for two things: the order of sums and the position. If a model's step fails after this layer, it
// has changed the sums, but not the position. The two then do not match, and the next step computes
// the sums again.
constexpr double ArithmeticOf(int64_t order, int64_t position) {
  return static_cast<double>(order) + static_cast<double>(kOrdersOfSums) * position;
}

}  // namespace continual_transformers

#endif  // CONTINUAL_TRANSFORMERS_ATTENTION_RETROACTIVE_RULE_H_
