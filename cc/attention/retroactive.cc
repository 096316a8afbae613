#include "cc/attention/retroactive.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>

#include "cc/attention/params.h"
#include "cc/attention/retroactive_rule.h"
#include "cc/attention/ring_attention.h"
#include "cc/attention/step_types.h"
#include "cc/attention/targets.h"

#ifndef CONTINUAL_TRANSFORMERS_ATTENTION_RETROACTIVE_CC_ONCE_
#define CONTINUAL_TRANSFORMERS_ATTENTION_RETROACTIVE_CC_ONCE_
namespace continual_transformers {

template <typename T>
MadeWith MadeWithOf(const RetroactiveParams<T>& params, int64_t position) {
  if (params.recompute) return {0, 0};
  const int64_t order = kFirstOrderOnCpu + static_cast<int>(TargetInUse());
  return {ArithmeticOf(order, position), static_cast<double>(params.scale)};
}

// A task's working memory, not initialized. The next task uses it again.
template <typename T>
struct Scratch {
  Scratch(const RetroactiveParams<T>& p, uintptr_t memory) {
    const int64_t n = p.window, d = p.key_dim, dv = p.value_dim;
    fresh_value = Take<double>(&memory, dv);
    leaving_value = Take<double>(&memory, dv);
    fresh_weights = Take<double>(&memory, n);
    leaving_weights = Take<double>(&memory, n);
    normalizers = Take<double>(&memory, n);
    inexact = Take<int64_t>(&memory, n);
    // DotsOfOne and DotsOfTwo may write as far past the last logit as RingAttention.
    fresh_logits = Take<T>(&memory, RingAttentionLogits(n));
    leaving_logits = Take<T>(&memory, RingAttentionLogits(n));
    leaving_key = Take<T>(&memory, d);
    key_mask = Take<bool>(&memory, n);
    if (!p.update_state) {
      ring = Take<T>(&memory, n * (2 * d + dv));
      sums = Take<double>(&memory, n * (4 + dv));
    }
    end = memory;
  }

  T *fresh_logits, *leaving_logits, *leaving_key;
  double *fresh_value, *leaving_value;
  double *fresh_weights, *leaving_weights, *normalizers;  // of each row
  bool* key_mask;  // The stream's, as of the step. Its heads share it.
  // Rows that must be computed exactly, at most all.
  int64_t* inexact;
  int64_t num_inexact = 0;
  // A copy of the state, for a call that does not update it.
  T* ring = nullptr;
  double* sums = nullptr;
  uintptr_t end;

 private:
  template <typename U>
  static U* Take(uintptr_t* address, int64_t count) {
    U* const taken = reinterpret_cast<U*>(*address);
    *address += (count * sizeof(U) + sizeof(double) - 1) / sizeof(double) * sizeof(double);
    return taken;
  }
};

}  // namespace continual_transformers
#endif  // CONTINUAL_TRANSFORMERS_ATTENTION_RETROACTIVE_CC_ONCE_

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cc/attention/retroactive.cc"
#include "hwy/foreach_target.h"
// Must follow foreach_target.h: otherwise these are compiled for one target only.
#include "cc/attention/retroactive_row-inl.h"
#include "cc/attention/vector_math-inl.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace continual_transformers {
namespace HWY_NAMESPACE {

// The ring of one head of one stream.
template <typename T>
struct HeadRing {
  T* rows;
  int64_t stride;

  T* operator[](int64_t row) const { return rows + row * stride; }
};

// The state of one head of one stream.
template <typename T>
struct HeadState {
  HeadRing<T> query;
  HeadRing<T> key;
  HeadRing<T> value;
  RowsState rows;
  double* weighted_sum;
};

template <typename T>
class RetroactiveHead {
 public:
  RetroactiveHead(const RetroactiveParams<T>& params, int64_t pair, Scratch<T>* scratch)
      : p_(params), s_(*scratch), m_(pair / params.num_heads), h_(pair % params.num_heads) {
    const int64_t stream = params.streams[m_], n = params.window;
    const int64_t pair_held = stream * params.num_heads + h_;
    const auto ring = [&](T* base, const Strides& strides) {
      return HeadRing<T>{base + stream * strides.stream + h_ * strides.head, strides.step};
    };
    position_ = params.position[stream];
    double* softmax = params.softmax + pair_held * 4 * n;
    state_ = {ring(params.query_cache, params.query_cache_strides),
              ring(params.key_cache, params.key_cache_strides),
              ring(params.value_cache, params.value_cache_strides),
              {softmax, softmax + n, softmax + 2 * n, softmax + 3 * n},
              params.weighted_sum + pair_held * n * params.value_dim};
    if (!params.update_state) CopyState();
    std::copy_n(params.key_mask_cache + stream * n, n, Mask());
    const MadeWith now = MadeWithOf(params, params.position[stream]);
    const double* then = params.made_with + 2 * stream;
    exact_ = then[0] == now.arithmetic && then[1] == now.scale;
  }

  void Run() {
    for (int64_t t = 0; t < p_.num_steps; ++t) TakeStep(t);
  }

 private:
  bool* Mask() { return s_.key_mask; }

  template <typename U>
  U* At(U* base, const Strides& strides, int64_t t) const {
    return base + m_ * strides.stream + h_ * strides.head + t * strides.step;
  }

  void CopyState() {
    const HeadState<T> real = state_;
    T* ring = s_.ring;
    double* sums = s_.sums;
    const int64_t n = p_.window, d = p_.key_dim, dv = p_.value_dim;
    state_ = {{ring, d},
              {ring + n * d, d},
              {ring + 2 * n * d, dv},
              {sums, sums + n, sums + 2 * n, sums + 3 * n},
              sums + 4 * n};
    for (int64_t i = 0; i < n; ++i) {
      std::copy_n(real.query[i], d, state_.query[i]);
      std::copy_n(real.key[i], d, state_.key[i]);
      std::copy_n(real.value[i], dv, state_.value[i]);
    }
    std::copy_n(real.rows.reference, 4 * n, state_.rows.reference);
    std::copy_n(real.weighted_sum, n * dv, state_.weighted_sum);
  }

  void TakeStep(int64_t t) {
    const int64_t n = p_.window, d = p_.key_dim, dv = p_.value_dim;
    const int64_t step = position_ + t;
    row_ = step % n;
    filled_ = std::min(step + 1, n);
    output_ = At(p_.output, p_.output_strides, t);
    for (int64_t column = 0; column < n - filled_; ++column) {
      std::fill_n(output_ + column * p_.output_row_stride, dv, T(0));
    }

    T* key = state_.key[row_];
    T* value = state_.value[row_];
    had_key_ = step >= n && Mask()[row_];
    has_key_ = p_.key_mask == nullptr || p_.key_mask[m_ * p_.num_steps + t];
    std::fill_n(s_.leaving_value, dv, 0);
    std::fill_n(s_.fresh_value, dv, 0);
    if (had_key_) {
      std::copy_n(key, d, s_.leaving_key);
      std::copy_n(value, dv, s_.leaving_value);
    }
    std::copy_n(At(p_.query, p_.query_strides, t), d, state_.query[row_]);
    std::copy_n(At(p_.key, p_.key_strides, t), d, key);
    std::copy_n(At(p_.value, p_.value_strides, t), dv, value);
    Mask()[row_] = has_key_;
    if (has_key_) std::copy_n(value, dv, s_.fresh_value);

    if (p_.recompute) return Recompute();
    s_.num_inexact = 0;
    NoteInexact(row_);
    if (exact_ && AllFinite(s_.leaving_value, dv)) {
      UpdateRows();
    } else {
      // An infinity or NaN that leaves has spoiled every sum that it was in.
      for (int64_t i = 0; i < filled_; ++i) {
        if (i != row_) NoteInexact(i);
      }
    }
    for (int64_t i = 0; i < s_.num_inexact; ++i) ComputeExactly(s_.inexact[i]);
    exact_ = true;
  }

  // The output of the query at index i of the ring.
  T* OutputOf(int64_t i) const {
    const int64_t age = i <= row_ ? row_ - i : row_ - i + p_.window;
    return output_ + (p_.window - 1 - age) * p_.output_row_stride;
  }

  static double Normalizer(double denominator) { return denominator == 0 ? 0 : 1 / denominator; }

  static bool AllFinite(const double* x, int64_t size) {
    double zero = 0;  // Infinity and NaN times 0 are NaN.
    for (int64_t i = 0; i < size; ++i) zero += x[i] * 0;
    return zero == 0;
  }

  void NoteInexact(int64_t row) { s_.inexact[s_.num_inexact++] = row; }

  // Updates all rows but the newest: the new key enters and the oldest leaves. Collects the rows
  // for which that is not exact enough. The newest row and those are updated too, because that is
  // faster than to test each row, and then computed exactly.
  void UpdateRows() {
    T* HWY_RESTRICT fresh = s_.fresh_logits;
    T* HWY_RESTRICT leaving = s_.leaving_logits;
    const T* fresh_key = state_.key[row_];
    const HeadRing<T>& queries = state_.query;
    const double* references = state_.rows.reference;
    if (had_key_) {
      DotsOfTwo(fresh_key, s_.leaving_key, queries.rows, queries.stride, filled_, p_.key_dim,
                p_.scale, fresh, leaving);
      WeighAgainstReferences(references, filled_, leaving);
    } else {
      DotsOfOne(fresh_key, queries.rows, queries.stride, filled_, p_.key_dim, p_.scale, fresh);
      std::fill_n(leaving, filled_, T(0));
    }
    if (has_key_) {
      WeighAgainstReferences(references, filled_, fresh);
    } else {
      std::fill_n(fresh, filled_, T(0));
    }
    const int64_t dv = p_.value_dim;
    const Exchange<T> weights = {fresh,
                                 leaving,
                                 MagnitudeOf(s_.fresh_value, dv),
                                 MagnitudeOf(s_.leaving_value, dv),
                                 has_key_,
                                 kLeastOfPeak<T>,
                                 kMostWeight};
    s_.num_inexact =
        ExchangeWeights(weights, state_.rows, filled_, s_.fresh_weights, s_.leaving_weights,
                        s_.normalizers, row_, s_.inexact, s_.num_inexact);
    // The rows after the newest in the ring are the older ones.
    ExchangeValuesOf(row_ + 1, filled_);
    ExchangeValuesOf(0, row_);
  }

  void ExchangeValuesOf(int64_t begin, int64_t end) {
    if (begin >= end) return;
    const ExchangedValues values = {s_.fresh_weights + begin, s_.leaving_weights + begin,
                                    s_.normalizers + begin, s_.fresh_value, s_.leaving_value};
    ExchangeValues(values, end - begin, p_.value_dim, state_.weighted_sum + begin * p_.value_dim,
                   p_.output_row_stride, OutputOf(begin));
  }

  void ComputeExactly(int64_t i) {
    T* HWY_RESTRICT weights = s_.fresh_logits;
    const bool* mask = Mask();
    constexpr T kNotAttended = -std::numeric_limits<T>::infinity();
    DotsOfOne(state_.query[i], state_.key.rows, state_.key.stride, filled_, p_.key_dim, p_.scale,
              weights);
    for (int64_t j = 0; j < filled_; ++j) weights[j] = mask[j] ? weights[j] : kNotAttended;
    const T max = Largest(weights, filled_);
    const T reference = max == kNotAttended ? T(0) : max;
    const double denominator = WeighAgainst(reference, filled_, weights);
    const double magnitude =
        SumValues(state_.value.rows, state_.value.stride, p_.value_dim, weights, mask, filled_,
                  Normalizer(denominator), state_.weighted_sum + i * p_.value_dim, OutputOf(i));
    state_.rows.reference[i] = reference;
    state_.rows.denominator[i] = denominator;
    state_.rows.magnitude[i] = magnitude;
    const hn::CappedTag<double, 1> one;
    state_.rows.peaks[i] =
        hn::GetLane(PackPeaks(one, hn::Set(one, denominator), hn::Set(one, magnitude)));
  }

  // Computes the outputs without the state of their softmax, as single-output attention does.
  void Recompute() {
    RingAttentionParams<T> params = {};
    params.key = state_.key.rows;
    params.key_stride = state_.key.stride;
    params.value = state_.value.rows;
    params.value_stride = state_.value.stride;
    params.key_mask = std::memchr(Mask(), 0, filled_) == nullptr ? nullptr : Mask();
    params.spans = {{0, filled_}, {0, 0}};
    params.heads = params.key_heads = 1;
    params.key_dim = p_.key_dim;
    params.value_dim = p_.value_dim;
    params.scale = p_.scale;
    params.logits = s_.fresh_logits;
    for (int64_t i = 0; i < filled_; ++i) {
      params.query = state_.query[i];
      params.output = OutputOf(i);
      RingAttention(params, 0, 1);
    }
  }

  const RetroactiveParams<T>& p_;
  Scratch<T>& s_;
  const int64_t m_;
  const int64_t h_;
  HeadState<T> state_;
  int64_t position_;
  bool exact_;  // whether the rows' softmax can be updated
  // The current step: its row, the number of rows after it, whether it has a key, whether the
  // leaving step had one, and where its outputs go.
  int64_t row_ = 0;
  int64_t filled_ = 0;
  bool has_key_ = false;
  bool had_key_ = false;
  T* output_ = nullptr;
};

template <typename T>
void TakeRetroactiveTasks(const RetroactiveParams<T>& params, int64_t begin, int64_t end) {
  if (begin >= end) return;
  std::unique_ptr<char[]> own;
  char* memory = params.scratch;
  if (memory == nullptr) {
    own.reset(new char[RetroactiveScratchBytes(params)]);
    memory = own.get();
  }
  Scratch<T> scratch(params, reinterpret_cast<uintptr_t>(memory));
  for (int64_t task = begin; task < end; ++task) {
    RetroactiveHead<T>(params, task, &scratch).Run();
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace continual_transformers
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace continual_transformers {

template <typename T>
bool RecomputingIsFaster(const RetroactiveParams<T>& params) {
  // Microseconds of an update and of recomputing, for one head in float, D = Dv = 64 (AVX2, one
  // thread of an AMD EPYC; //benchmarks:retroactive_benchmark; docs/co_re_mha.md has other sizes).
  // The update has become faster since, 1.1 to 1.4 times at N = 8 and 16. N = 1 to 3 were not
  // measured again:
  //   N           1     2     3     4     8    16    64   120   512  1000
  //   update    0.38  0.44  0.47  0.49  0.63  0.92   2.8   5.0    23    43
  //   recompute 0.31  0.41  0.53  0.65   1.1   2.8    26   109  1866  7779
  // A window of one row has nothing to update. With two rows, recomputing is a tenth faster if the
  // rows have many floats, and slower otherwise.
  const bool many_floats = sizeof(T) == 4 && params.key_dim + params.value_dim >= 128;
  return params.window == 1 || (params.window == 2 && many_floats);
}

template <typename T>
int64_t RetroactiveScratchBytes(const RetroactiveParams<T>& params) {
  return Scratch<T>(params, 0).end;
}

template <typename T>
int64_t RetroactiveCyclesPerTask(const RetroactiveParams<T>& params) {
  // From the same measurement: about 1,000 cycles a step, plus about 2 per number in each row's
  // sums. A recomputed row takes what single-output attention takes.
  const int64_t n = params.window, size = params.key_dim + params.value_dim;
  const int64_t row = params.recompute ? n * (8 + size * sizeof(T) / 24) : 40 + size;
  return params.num_steps * (1000 + n * row);
}

template <typename T>
void RetroactiveAttention(const RetroactiveParams<T>& params, int64_t begin, int64_t end) {
  CONTINUAL_TRANSFORMERS_DISPATCH(TakeRetroactiveTasks, params, begin, end);
}

template <typename T>
void FinishRetroactive(const RetroactiveParams<T>& params) {
  if (!params.update_state) return;
  const int64_t steps = params.num_steps, window = params.window;
  for (int64_t m = 0; m < params.num_streams; ++m) {
    const int64_t stream = params.streams[m], position = params.position[stream];
    bool* ring = params.key_mask_cache + stream * window;
    for (int64_t t = std::max<int64_t>(0, steps - window); t < steps; ++t) {
      ring[(position + t) % window] = params.key_mask == nullptr || params.key_mask[m * steps + t];
    }
    const MadeWith now = MadeWithOf(params, position + steps);
    params.made_with[2 * stream] = now.arithmetic;
    params.made_with[2 * stream + 1] = now.scale;
  }
}

#define INSTANTIATE(T)                                                                  \
  template bool RecomputingIsFaster<T>(const RetroactiveParams<T>&);                    \
  template int64_t RetroactiveScratchBytes<T>(const RetroactiveParams<T>&);             \
  template int64_t RetroactiveCyclesPerTask<T>(const RetroactiveParams<T>&);            \
  template void RetroactiveAttention<T>(const RetroactiveParams<T>&, int64_t, int64_t); \
  template void FinishRetroactive<T>(const RetroactiveParams<T>&);
CONTINUAL_TRANSFORMERS_FOR_COMPUTE_TYPES(INSTANTIATE)
#undef INSTANTIATE

}  // namespace continual_transformers
#endif  // HWY_ONCE
