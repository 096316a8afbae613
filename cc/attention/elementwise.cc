#include "cc/attention/elementwise.h"

#include <algorithm>
#include <cstdint>

#include "cc/attention/half.h"
#include "cc/attention/targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cc/attention/elementwise.cc"
#include "hwy/foreach_target.h"
// After foreach_target.h, or they would be there for one target only.
#include "cc/attention/vector_math-inl.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace continual_transformers {
namespace HWY_NAMESPACE {

// Replaces x[i] by f(vector of x) for a vector of lanes at a time.
template <typename T, class F>
HWY_INLINE void Transform(T* x, int64_t size, const F& f) {
  const hn::ScalableTag<T> d;
  constexpr int64_t kLanes = hn::Lanes(d);
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) hn::StoreU(f(d, hn::LoadU(d, x + i), i), d, x + i);
  if (i < size) hn::StoreN(f(d, hn::LoadN(d, x + i, size - i), i), d, x + i, size - i);
}

template <typename T, typename C>
void NarrowAll(const T* from, int64_t size, C* to) {
  const hn::ScalableTag<T> d;
  const hn::Rebind<typename HighwayType<C>::type, decltype(d)> narrow;
  const hn::Rebind<uint16_t, decltype(d)> bits;
  constexpr int64_t kLanes = hn::Lanes(d);
  for (int64_t i = 0; i < size; i += kLanes) {
    const size_t count = std::min(kLanes, size - i);
    const auto lanes = hn::DemoteTo(narrow, hn::LoadN(d, from + i, count));
    hn::StoreN(hn::BitCast(bits, lanes), bits, reinterpret_cast<uint16_t*>(to + i), count);
  }
}

template <typename T>
void SigmoidAll(T* x, int64_t size) {
  Transform(x, size, [](auto d, auto v, int64_t) HWY_ATTR {
    const auto one = hn::Set(d, T(1));
    // exp of what is not positive cannot overflow.
    const auto e = ExpOfNonPositive(d, hn::Neg(hn::Abs(v)));
    return hn::Div(hn::IfThenElse(hn::Lt(v, hn::Zero(d)), e, one), hn::Add(one, e));
  });
}

template <typename T>
void MultiplyAll(T* x, const T* factor, int64_t size) {
  for (int64_t i = 0; i < size; ++i) x[i] *= factor[i];
}

}  // namespace HWY_NAMESPACE
}  // namespace continual_transformers
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace continual_transformers {

template <typename T, typename C>
void Narrow(const T* from, int64_t size, C* to) {
  CONTINUAL_TRANSFORMERS_DISPATCH(NarrowAll, from, size, to);
}

template <typename T>
void Sigmoid(T* x, int64_t size) {
  CONTINUAL_TRANSFORMERS_DISPATCH(SigmoidAll, x, size);
}

template <typename T>
void Multiply(T* x, const T* factor, int64_t size) {
  CONTINUAL_TRANSFORMERS_DISPATCH(MultiplyAll, x, factor, size);
}

template void Narrow<float, BFloat16>(const float*, int64_t, BFloat16*);
template void Narrow<float, Float16>(const float*, int64_t, Float16*);
template void Sigmoid<float>(float*, int64_t);
template void Sigmoid<double>(double*, int64_t);
template void Multiply<float>(float*, const float*, int64_t);
template void Multiply<double>(double*, const double*, int64_t);

}  // namespace continual_transformers
#endif  // HWY_ONCE
