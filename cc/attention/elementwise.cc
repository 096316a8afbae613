#include "cc/attention/elementwise.h"

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "cc/attention/half.h"
#include "cc/attention/int8.h"
#include "cc/attention/step_types.h"
#include "cc/attention/targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cc/attention/elementwise.cc"
#include "hwy/foreach_target.h"
// Must follow foreach_target.h: otherwise these are compiled for one target only.
#include "cc/attention/vector_math-inl.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace continual_transformers {
namespace HWY_NAMESPACE {

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

void QuantizeAll(const float* from, int64_t size, int8_t* to, float* scale) {
  const hn::ScalableTag<float> d;
  const hn::RebindToSigned<decltype(d)> integers;
  const hn::Rebind<int8_t, decltype(d)> narrow;
  constexpr int64_t kLanes = hn::Lanes(d);
  auto largest = hn::Zero(d), zero = hn::Zero(d);
  for (int64_t i = 0; i < size; i += kLanes) {
    const auto x = hn::LoadN(d, from + i, std::min(kLanes, size - i));
    largest = hn::Max(largest, hn::Abs(x));
    zero = hn::MulAdd(x, hn::Zero(d), zero);  // Infinity and NaN times 0 are NaN.
  }
  const float most = hn::ReduceMax(d, largest);
  *scale = hn::ReduceSum(d, zero) == 0 ? most / kMostInt8 : NAN;
  // The reciprocal of a smaller number could be infinite.
  const bool is_zero = !(most > 1e-35f);
  const auto factor = hn::Set(d, is_zero ? 0 : kMostInt8 / most);
  for (int64_t i = 0; i < size; i += kLanes) {
    const size_t count = std::min(kLanes, size - i);
    const auto x = hn::Mul(hn::LoadN(d, from + i, count), factor);
    hn::StoreN(hn::DemoteTo(narrow, hn::ConvertTo(integers, hn::Round(x))), narrow, to + i, count);
  }
}

template <typename T>
void MultiplyAll(T* x, const T* factor, int64_t size) {
  for (int64_t i = 0; i < size; ++i) x[i] *= factor[i];
}

template <typename T>
void AddAll(T* x, const T* other, int64_t size) {
  for (int64_t i = 0; i < size; ++i) x[i] += other[i];
}

// Returns the sum over a row of f(x, lanes), without the lanes past the end of the row.
template <typename T, class F>
HWY_INLINE T SumOver(const T* x, int64_t size, const F& f) {
  const hn::ScalableTag<T> d;
  constexpr int64_t kLanes = hn::Lanes(d);
  auto sum = hn::Zero(d);
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) sum = hn::Add(sum, f(d, hn::LoadU(d, x + i)));
  if (i < size) {
    const auto rest = f(d, hn::LoadN(d, x + i, size - i));
    sum = hn::Add(sum, hn::IfThenElseZero(hn::FirstN(d, size - i), rest));
  }
  return hn::ReduceSum(d, sum);
}

template <typename T>
void NormalizeAll(const LayerNorm<T>& norm, const T* x, int64_t rows, int64_t size, T* y) {
  const hn::ScalableTag<T> d;
  constexpr int64_t kLanes = hn::Lanes(d);
  const hn::CappedTag<T, 1> one;
  const T share = T(1) / static_cast<T>(size);
  for (int64_t row = 0; row < rows; ++row, x += size, y += size) {
    const T mean = SumOver(x, size, [](auto, auto v) HWY_ATTR { return v; }) * share;
    // The mean of squares minus the square of the mean would cancel.
    const auto centre = hn::Set(d, mean);
    const T variance = SumOver(x, size,
                               [centre](auto, auto v) HWY_ATTR {
                                 const auto centred = hn::Sub(v, centre);
                                 return hn::Mul(centred, centred);
                               }) *
                       share;
    // Uses the vector instruction: std::sqrt may be a call that checks for errors.
    const auto deviation = hn::Sqrt(hn::Set(one, variance + norm.epsilon));
    const auto factor = hn::Set(d, hn::GetLane(hn::Div(hn::Set(one, T(1)), deviation)));
    const auto normalize = [&](auto v, auto scale, auto offset) HWY_ATTR {
      return hn::MulAdd(hn::Mul(hn::Sub(v, centre), factor), scale, offset);
    };
    int64_t i = 0;
    for (; i + kLanes <= size; i += kLanes) {
      hn::StoreU(normalize(hn::LoadU(d, x + i), hn::LoadU(d, norm.scale + i),
                           hn::LoadU(d, norm.offset + i)),
                 d, y + i);
    }
    if (i < size) {
      const size_t rest = size - i;
      hn::StoreN(normalize(hn::LoadN(d, x + i, rest), hn::LoadN(d, norm.scale + i, rest),
                           hn::LoadN(d, norm.offset + i, rest)),
                 d, y + i, rest);
    }
  }
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

void Quantize(const float* from, int64_t size, int8_t* to, float* scale) {
  CONTINUAL_TRANSFORMERS_DISPATCH(QuantizeAll, from, size, to, scale);
}

template <typename T>
void Multiply(T* x, const T* factor, int64_t size) {
  CONTINUAL_TRANSFORMERS_DISPATCH(MultiplyAll, x, factor, size);
}

template <typename T>
void Add(T* x, const T* other, int64_t size) {
  CONTINUAL_TRANSFORMERS_DISPATCH(AddAll, x, other, size);
}

template <typename T>
void Normalize(const LayerNorm<T>& norm, const T* x, int64_t rows, int64_t size, T* y) {
  CONTINUAL_TRANSFORMERS_DISPATCH(NormalizeAll, norm, x, rows, size, y);
}

template void Narrow<float, BFloat16>(const float*, int64_t, BFloat16*);
template void Narrow<float, Float16>(const float*, int64_t, Float16*);
#define INSTANTIATE(T)                              \
  template void Multiply<T>(T*, const T*, int64_t); \
  template void Add<T>(T*, const T*, int64_t);      \
  template void Normalize<T>(const LayerNorm<T>&, const T*, int64_t, int64_t, T*);
CONTINUAL_TRANSFORMERS_FOR_COMPUTE_TYPES(INSTANTIATE)
#undef INSTANTIATE

}  // namespace continual_transformers
#endif  // HWY_ONCE
