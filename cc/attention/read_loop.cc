#include "cc/attention/read_loop.h"

#include <cstddef>
#include <cstdint>

#include "cc/attention/targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cc/attention/read_loop.cc"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace continual_transformers {
namespace HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

unsigned char Read(const void* data, size_t bytes) {
  const hn::ScalableTag<uint8_t> d;
  constexpr size_t kLanes = hn::Lanes(d);
  const uint8_t* p = static_cast<const uint8_t*>(data);
  hn::Vec<decltype(d)> sum[8];
  for (auto& s : sum) s = hn::Zero(d);
  for (size_t i = 0; i + 8 * kLanes <= bytes; i += 8 * kLanes) {
    for (int v = 0; v < 8; ++v) sum[v] = hn::Xor(sum[v], hn::LoadU(d, p + i + v * kLanes));
  }
  for (int v = 1; v < 8; ++v) sum[0] = hn::Xor(sum[0], sum[v]);
  return hn::GetLane(sum[0]);
}

}  // namespace HWY_NAMESPACE
}  // namespace continual_transformers
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace continual_transformers {

unsigned char ReadLoop(const void* data, size_t bytes) {
  CONTINUAL_TRANSFORMERS_DISPATCH(Read, data, bytes);
}

}  // namespace continual_transformers
#endif  // HWY_ONCE
