#include "cc/attention/single_output.h"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "cc/attention/online_softmax.h"
#include "cc/attention/params.h"
#include "cc/attention/ring_attention.h"
#include "cc/attention/ring_cache.h"
#include "cc/attention/rows.h"
#include "cc/attention/step_types.h"
#include "cc/attention/targets.h"

#ifndef CONTINUAL_TRANSFORMERS_ATTENTION_SINGLE_OUTPUT_CC_ONCE_
#define CONTINUAL_TRANSFORMERS_ATTENTION_SINGLE_OUTPUT_CC_ONCE_
namespace continual_transformers {

// Returns whether a call needs the columns of its windows in order, oldest first. A plain softmax
// does not.
template <typename T, typename C>
bool IsChronological(const SingleOutputParams<T, C>& params) {
  return params.mask != nullptr || params.scores != nullptr || params.window_key != nullptr ||
         params.window_parts > 1;
}

// Returns whether the heads of a row are next to each other, in the rings and in the steps of the
// call. (The rows of a single head are contiguous in rings of either order, and are better read as
// WindowPass prefetches them.)
template <typename T, typename C>
bool HasAdjacentHeads(const SingleOutputParams<T, C>& p) {
  return p.num_heads > 1 && p.key_cache_strides.head == p.key_dim &&
         p.value_cache_strides.head == p.value_dim && p.query_strides.head == p.key_dim &&
         p.key_strides.head == p.key_dim && p.value_strides.head == p.value_dim &&
         p.output_strides.head == p.value_dim;
}

// Returns whether each head's steps use a copy of its ring, with its rows next to each other. In a
// row-major ring, rows of one head are often a large power of two of bytes apart, so a near cache
// can hold only few of them. Used in place, N=512 H=4 D=128 T=50 took 4.6 times as long.
template <typename T, typename C>
bool CopiesRings(const SingleOutputParams<T, C>& p) {
  constexpr int64_t kStepsWorthCopying = 8, kNearBytes = 1 << 20;
  if (p.num_steps < kStepsWorthCopying || p.key_cache_strides.step == p.key_dim) return false;
  const int64_t bytes = p.num_heads * p.window * (p.key_dim + p.value_dim) * sizeof(C);
  return IsChronological(p) || bytes > kNearBytes;
}

template <typename T, typename C>
int64_t HeadsPerTask(const SingleOutputParams<T, C>& params) {
  return std::max<int64_t>(1, params.heads_per_task);
}

}  // namespace continual_transformers
#endif  // CONTINUAL_TRANSFORMERS_ATTENTION_SINGLE_OUTPUT_CC_ONCE_

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cc/attention/single_output.cc"
#include "hwy/foreach_target.h"
// Must follow foreach_target.h: otherwise these are compiled for one target only.
#include "cc/attention/window_pass-inl.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace continual_transformers {
namespace HWY_NAMESPACE {

// Working memory of a task, kept from one task to the next.
template <typename T, typename C>
struct Scratch {
  std::vector<char> key_mask;  // the stream's at this step; its heads share it
  std::vector<C> overwritten;  // ring rows to restore after a call that does not update the state
  std::vector<T> logits;       // of heads that are attended to together
  std::vector<C> keys;         // a copy of one head's ring
  std::vector<C> values;
};

// The steps of one head of one stream, or of several heads next to each other.
template <typename T, typename C>
class HeadStepper {
 public:
  HeadStepper(const SingleOutputParams<T, C>& params, int64_t pair, int64_t heads = 1)
      : p_(params),
        pair_(pair),
        m_(pair / params.num_heads),
        h_(pair % params.num_heads),
        heads_(heads),
        key_size_(heads * params.key_dim),
        value_size_(heads * params.value_dim) {
    position_ = params.position[params.streams[m_]];
    const int64_t steps = params.num_steps;
    UseRing();
    input_rows_ = {At(params.key, params.key_strides),
                   params.key_strides.step,
                   At(params.value, params.value_strides),
                   params.value_strides.step,
                   params.key_mask == nullptr ? nullptr : params.key_mask + m_ * steps,
                   steps};
  }

  // Lets the steps of a single head use a copy of its ring.
  void UseCopy(Scratch<T, C>* scratch) {
    const int64_t d = p_.key_dim, dv = p_.value_dim, filled = std::min(position_, p_.window);
    scratch->keys.resize(p_.window * d);
    scratch->values.resize(p_.window * dv);
    C *keys = scratch->keys.data(), *values = scratch->values.data();
    for (int64_t row = 0; row < filled; ++row) {
      std::copy_n(key_ring_ + row * ring_rows_.key_stride, d, keys + row * d);
      std::copy_n(value_ring_ + row * ring_rows_.value_stride, dv, values + row * dv);
    }
    SetRings(keys, d, values, dv);
    copied_ = true;
  }

  // Takes all steps. Each one writes its row, then attends to all filled rows as one span.
  void Run(Scratch<T, C>* scratch) {
    const int64_t window = p_.window;
    char* key_mask = scratch->key_mask.data();
    std::memcpy(key_mask, ring_rows_.key_mask, window);
    Rows<C> rows = ring_rows_;
    rows.key_mask = reinterpret_cast<const bool*>(key_mask);
    // Each row is overwritten for the first time within the first N steps.
    const int64_t first_of_rows = std::min(p_.num_steps, window);
    if (!p_.update_state && !copied_) SaveRows(first_of_rows, scratch->overwritten.data());
    for (int64_t t = 0; t < p_.num_steps; ++t) {
      WriteRow(t);
      key_mask[(position_ + t) % window] =
          input_rows_.key_mask == nullptr || input_rows_.key_mask[t];
      const Rows<C> filled = rows.From(0, std::min(position_ + t + 1, window));
      if (HasAdjacentHeads(p_) && !copied_ && std::memchr(key_mask, 0, filled.count) == nullptr) {
        AttendTogether(t, filled, scratch->logits.data());
      } else {
        for (int64_t h = 0; h < heads_; ++h) AttendAlone(t, h, filled);
      }
    }
    if (copied_ && p_.update_state) WriteRing();
    if (!copied_ && !p_.update_state) RestoreRows(first_of_rows, scratch->overwritten.data());
  }

  // Takes all steps with the columns of their windows in order. Reads older steps from the ring and
  // this call's steps from its inputs, and writes the ring last. So the rows that this call
  // overwrites still exist for its first queries.
  void RunInOrder() {
    for (int64_t t = 0; t < p_.num_steps; ++t) {
      WindowPass<T, C> pass = Pass(t, At(p_.output, p_.output_strides, t));
      pass.Finish(Attend(&pass, t, 0, p_.window), p_.window);
    }
    if (p_.window_key != nullptr) CopyWindows();
    if (p_.update_state) WriteRing();
  }

  // Takes one part of the window of the only step.
  void RunPart(int64_t part) {
    T* state = Part(part);
    WindowPass<T, C> pass = Pass(0, state);
    Attend(&pass, 0, part * p_.window / p_.window_parts, (part + 1) * p_.window / p_.window_parts);
    state[p_.value_dim] = pass.softmax().max;
    state[p_.value_dim + 1] = pass.softmax().denominator;
  }

  void MergeParts() {
    const int64_t size = p_.value_dim;
    T* output = At(p_.output, p_.output_strides, 0);
    std::fill_n(output, size, T(0));
    OnlineSoftmax<T> softmax;
    for (int64_t part = 0; part < p_.window_parts; ++part) {
      const T* state = Part(part);
      const auto factors = softmax.Merge({state[size], state[size + 1]});
      for (int64_t d = 0; d < size; ++d) {
        output[d] = output[d] * factors.own + state[d] * factors.others;
      }
    }
    const T normalizer = softmax.Normalizer();
    for (int64_t d = 0; d < size; ++d) output[d] *= normalizer;
    if (p_.update_state) WriteRing();
  }

 private:
  void UseRing() {
    const int64_t stream = p_.streams[m_];
    const Strides &keys = p_.key_cache_strides, &values = p_.value_cache_strides;
    SetRings(p_.key_cache + stream * keys.stream + h_ * keys.head, keys.step,
             p_.value_cache + stream * values.stream + h_ * values.head, values.step);
    copied_ = false;
  }

  void SetRings(C* keys, int64_t key_stride, C* values, int64_t value_stride) {
    key_ring_ = keys;
    value_ring_ = values;
    ring_rows_ = {
        keys,     key_stride, values, value_stride, p_.key_mask_cache + p_.streams[m_] * p_.window,
        p_.window};
  }

  template <typename U>
  U* At(U* base, const Strides& strides, int64_t t = 0) const {
    if (base == nullptr) return nullptr;
    return base + m_ * strides.stream + h_ * strides.head + t * strides.step;
  }

  T* Part(int64_t part) const {
    return p_.parts + (pair_ * p_.window_parts + part) * (p_.value_dim + 2);
  }

  WindowPass<T, C> Pass(int64_t t, T* output) const {
    return {At(p_.query, p_.query_strides, t), p_, At(p_.mask, p_.mask_strides, t),
            At(p_.scores, p_.scores_strides, t), output};
  }

  // Attends with the queries of step t to rows of which all have a key.
  void AttendTogether(int64_t t, const Rows<C>& rows, T* logits) const {
    RingAttentionParams<T, C> together = {};
    together.query = At(p_.query, p_.query_strides, t);
    together.key = rows.key;
    together.key_stride = rows.key_stride;
    together.value = rows.value;
    together.value_stride = rows.value_stride;
    together.spans = {{0, rows.count}, {0, 0}};
    together.output = At(p_.output, p_.output_strides, t);
    together.heads = together.key_heads = heads_;
    together.key_dim = p_.key_dim;
    together.value_dim = p_.value_dim;
    together.scale = p_.scale;
    together.logits = logits;
    RingAttention(together, 0, heads_);
  }

  // Attends with one head's query of step t.
  void AttendAlone(int64_t t, int64_t head, Rows<C> rows) const {
    rows.key += head * p_.key_cache_strides.head;
    rows.value += head * p_.value_cache_strides.head;
    T* output = At(p_.output, p_.output_strides, t) + head * p_.output_strides.head;
    const T* query = At(p_.query, p_.query_strides, t) + head * p_.query_strides.head;
    WindowPass<T, C> pass(query, p_, nullptr, nullptr, output);
    pass.Attend(rows, 0);
    pass.Finish(0, p_.window);
  }

  // Attends with step t's query to columns [begin, end) of its window. Returns the first column
  // that holds a step.
  int64_t Attend(WindowPass<T, C>* pass, int64_t t, int64_t begin, int64_t end) const {
    // Column c is step first + c. Steps below 0 were never taken. Steps from position_ on are this
    // call's own.
    const int64_t first = position_ + t - (p_.window - 1);
    const int64_t filled = std::max<int64_t>(0, -first);
    const int64_t own = std::max<int64_t>(0, position_ - first);
    const int64_t old_begin = std::max(begin, filled), old_end = std::min(end, own);
    int64_t column = old_begin;
    if (old_begin < old_end) {
      const RingSpans old = FindRingSpans(first + old_begin, old_end - old_begin, p_.window);
      for (const RingSpan& span : {old.before_wrap, old.after_wrap}) {
        pass->Attend(ring_rows_.From(span.first_row, span.rows), column);
        column += span.rows;
      }
    }
    const int64_t own_begin = std::max(begin, own);
    if (own_begin < end) {
      pass->Attend(input_rows_.From(first + own_begin - position_, end - own_begin), own_begin);
    }
    return filled;
  }

  void CopyWindows() const {
    const int64_t rows = p_.window - 1;
    CopyWindow(key_ring_, ring_rows_.key_stride, p_.key_dim, position_, p_.window,
               p_.window_key + pair_ * rows * p_.key_dim);
    CopyWindow(value_ring_, ring_rows_.value_stride, p_.value_dim, position_, p_.window,
               p_.window_value + pair_ * rows * p_.value_dim);
  }

  // The ring row of this call's step t.
  C* KeyRow(int64_t t) const {
    return key_ring_ + (position_ + t) % p_.window * ring_rows_.key_stride;
  }
  C* ValueRow(int64_t t) const {
    return value_ring_ + (position_ + t) % p_.window * ring_rows_.value_stride;
  }

  void WriteRow(int64_t t) const {
    std::copy_n(input_rows_.key + t * input_rows_.key_stride, key_size_, KeyRow(t));
    std::copy_n(input_rows_.value + t * input_rows_.value_stride, value_size_, ValueRow(t));
  }

  void WriteRing() {
    UseRing();
    for (int64_t t = std::max<int64_t>(0, p_.num_steps - p_.window); t < p_.num_steps; ++t) {
      WriteRow(t);
    }
  }

  void SaveRows(int64_t steps, C* saved) const {
    for (int64_t t = 0; t < steps; ++t) {
      saved = std::copy_n(KeyRow(t), key_size_, saved);
      saved = std::copy_n(ValueRow(t), value_size_, saved);
    }
  }

  void RestoreRows(int64_t steps, const C* saved) const {
    for (int64_t t = 0; t < steps; ++t, saved += key_size_ + value_size_) {
      std::copy_n(saved, key_size_, KeyRow(t));
      std::copy_n(saved + key_size_, value_size_, ValueRow(t));
    }
  }

  const SingleOutputParams<T, C>& p_;
  const int64_t pair_;
  const int64_t m_;
  const int64_t h_;  // the first head
  const int64_t heads_;
  const int64_t key_size_;
  const int64_t value_size_;
  C* key_ring_;
  C* value_ring_;
  int64_t position_;
  Rows<C> ring_rows_;
  bool copied_ = false;  // whether the rings are a copy
  Rows<C> input_rows_;
};

template <typename T, typename C>
void TakeTasks(const SingleOutputParams<T, C>& params, int64_t begin, int64_t end) {
  const bool in_order = IsChronological(params), copies = CopiesRings(params);
  const int64_t together = HeadsPerTask(params);
  Scratch<T, C> scratch;
  if (!in_order && begin < end) {
    scratch.key_mask.resize(params.window);
    if (!params.update_state) {
      scratch.overwritten.resize(std::min(params.num_steps, params.window) * together *
                                 (params.key_dim + params.value_dim));
    }
    if (HasAdjacentHeads(params)) {
      scratch.logits.resize(together * RingAttentionLogits(params.window));
    }
  }
  for (int64_t task = begin; task < end; ++task) {
    if (!in_order) {
      const int64_t per_stream = (params.num_heads + together - 1) / together;
      const int64_t m = task / per_stream, h = task % per_stream * together;
      const int64_t heads = std::min(together, params.num_heads - h);
      HeadStepper<T, C> stepper(params, m * params.num_heads + h, heads);
      if (copies) stepper.UseCopy(&scratch);
      stepper.Run(&scratch);
      continue;
    }
    HeadStepper<T, C> head(params, task / params.window_parts);
    if (copies) head.UseCopy(&scratch);
    if (params.window_parts == 1) {
      head.RunInOrder();
    } else {
      head.RunPart(task % params.window_parts);
    }
  }
}

template <typename T, typename C>
void MergeTasks(const SingleOutputParams<T, C>& params) {
  const int64_t pairs = params.num_streams * params.num_heads;
  for (int64_t pair = 0; pair < pairs; ++pair) HeadStepper<T, C>(params, pair).MergeParts();
}

}  // namespace HWY_NAMESPACE
}  // namespace continual_transformers
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace continual_transformers {

template <typename T, typename C>
SingleOutputPlan PlanSingleOutput(const SingleOutputParams<T, C>& params, int64_t threads) {
  // Measured with AVX-512 on an AMD Zen 4, windows in cache: 12, 23 and 43 cycles per row of float
  // for D = Dv = 12, 64 and 128; 55 for 64 if windows come from memory. With SSE2 it is about three
  // times as much, so threads are then used later than would be best.
  const int64_t bytes = (params.key_dim + params.value_dim) * sizeof(C);
  const int64_t per_row = 8 + bytes / 24;
  const int64_t pairs = params.num_streams * params.num_heads;
  const int64_t cycles = params.num_steps * params.window * per_row;
  // At D = 64 about 25,000 cycles, much more than the cost of calling a task and merging its part.
  constexpr int64_t kRowsPerPart = 1024;
  int64_t parts = 1;
  if (pairs > 0 && pairs < threads && params.num_steps == 1 && params.scores == nullptr &&
      params.window_key == nullptr) {
    parts =
        std::max<int64_t>(1, std::min((threads + pairs - 1) / pairs, params.window / kRowsPerPart));
  }
  const bool alone = IsChronological(params) || CopiesRings(params) || !HasAdjacentHeads(params);
  if (alone || parts > 1) {
    return {parts, pairs * parts, cycles / parts, 1};
  }
  // A task reads whole rows if there are streams enough for the threads, or too little work for
  // several.
  constexpr int64_t kCyclesWorthThreads = 250'000;
  const int64_t heads = params.num_heads, streams = params.num_streams;
  int64_t groups = 1;
  if (streams > 0 && streams < threads && pairs * cycles >= kCyclesWorthThreads) {
    groups = std::min(heads, (threads + streams - 1) / streams);
  }
  const int64_t together = (heads + groups - 1) / groups;
  return {1, streams * ((heads + together - 1) / together), cycles * together, together};
}

template <typename T, typename C>
void SingleOutputAttention(const SingleOutputParams<T, C>& params, int64_t begin, int64_t end) {
  CONTINUAL_TRANSFORMERS_DISPATCH(TakeTasks, params, begin, end);
}

template <typename T, typename C>
void FinishSingleOutput(const SingleOutputParams<T, C>& params) {
  const int64_t steps = params.num_steps, window = params.window;
  if (params.window_parts > 1) {
    [&params] { CONTINUAL_TRANSFORMERS_DISPATCH(MergeTasks, params); }();
  }
  for (int64_t m = 0; m < params.num_streams; ++m) {
    const int64_t stream = params.streams[m], position = params.position[stream];
    bool* ring = params.key_mask_cache + stream * window;
    if (params.window_key_mask != nullptr) {
      CopyWindow<bool>(ring, 1, 1, position, window, params.window_key_mask + m * (window - 1));
    }
    if (!params.update_state) continue;
    for (int64_t t = std::max<int64_t>(0, steps - window); t < steps; ++t) {
      ring[(position + t) % window] = params.key_mask == nullptr || params.key_mask[m * steps + t];
    }
  }
}

#define INSTANTIATE(T, C)                                                                       \
  template SingleOutputPlan PlanSingleOutput<T, C>(const SingleOutputParams<T, C>&, int64_t);   \
  template void SingleOutputAttention<T, C>(const SingleOutputParams<T, C>&, int64_t, int64_t); \
  template void FinishSingleOutput<T, C>(const SingleOutputParams<T, C>&);
CONTINUAL_TRANSFORMERS_FOR_CACHE_TYPES(INSTANTIATE)
#undef INSTANTIATE

}  // namespace continual_transformers
#endif  // HWY_ONCE
