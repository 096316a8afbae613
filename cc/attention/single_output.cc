#include "cc/attention/single_output.h"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#include "cc/attention/online_softmax.h"
#include "cc/attention/params.h"
#include "cc/attention/ring_attention.h"
#include "cc/attention/ring_cache.h"
#include "cc/attention/step_types.h"

namespace continual_transformers {
namespace {

// Returns whether heads can be attended to together: they are next to each other, in the rings and
// in the steps of the call, and have the same mask.
template <typename T, typename C>
bool CanTakeHeadsTogether(const SingleOutputParams<T, C>& p) {
  return p.key_cache_strides.head == p.key_dim && p.value_cache_strides.head == p.value_dim &&
         p.query_strides.head == p.key_dim && p.key_strides.head == p.key_dim &&
         p.value_strides.head == p.value_dim && p.output_strides.head == p.value_dim &&
         (p.mask == nullptr || p.mask_strides.head == 0);
}

// Returns whether each head's steps use a copy of its ring, with its rows next to each other. In a
// row-major ring, rows of one head are often a large power of two of bytes apart, so a near cache
// can hold only few of them. Used in place, N=512 H=4 D=128 T=50 took 4.6 times as long.
template <typename T, typename C>
bool CopiesRings(const SingleOutputParams<T, C>& p) {
  constexpr int64_t kStepsWorthCopying = 8, kNearBytes = 1 << 20;
  return p.num_steps >= kStepsWorthCopying && p.key_cache_strides.step != p.key_dim &&
         p.num_heads * p.window * (p.key_dim + p.value_dim) * int64_t{sizeof(C)} > kNearBytes;
}

template <typename T, typename C>
int64_t HeadsPerTask(const SingleOutputParams<T, C>& params) {
  return std::max<int64_t>(1, params.heads_per_task);
}

// Copies the N - 1 steps before `position` from a ring to `window`, oldest first. The ring's rows
// have `size` elements and are `stride` apart. Steps that were never taken become zeros.
template <typename U>
void CopyWindow(const U* ring, int64_t stride, int64_t size, int64_t position, int64_t rows,
                U* window) {
  const int64_t taken = std::min(position, rows - 1);
  const RingSpans spans = FindRingSpans(position - taken, taken, rows);
  window = std::fill_n(window, (rows - 1 - taken) * size, U{});
  for (const RingSpan& span : {spans.before_wrap, spans.after_wrap}) {
    for (int64_t i = 0; i < span.rows; ++i) {
      window = std::copy_n(ring + (span.first_row + i) * stride, size, window);
    }
  }
}

// Working memory of a task, kept from one task to the next. Not initialized. Has no memory that the
// call does not need, because an allocation takes a tenth of the time of a small step.
template <typename T, typename C>
struct Scratch {
  explicit Scratch(const SingleOutputParams<T, C>& p)
      : logits_memory(new T[HeadsPerTask(p) * RingAttentionLogits(p.window) + kLine]),
        logits(logits_memory.get()),
        masks(new bool[p.mask == nullptr ? p.window : 2 * p.window]),
        key_mask(masks.get()),
        attended(key_mask + p.window) {
    // Otherwise each vector of 64 bytes would be in two lines.
    while (reinterpret_cast<uintptr_t>(logits) % 64 != 0) ++logits;
    if (p.scores != nullptr || p.window_parts > 1) softmax.resize(HeadsPerTask(p));
    const int64_t rows = std::min(p.num_steps, p.window);
    if (!p.update_state) overwritten.resize(rows * HeadsPerTask(p) * (p.key_dim + p.value_dim));
    if (!CopiesRings(p)) return;
    keys.resize(p.window * p.key_dim);
    values.resize(p.window * p.value_dim);
  }

  static constexpr int64_t kLine = 64 / sizeof(T);
  std::unique_ptr<T[]> logits_memory;
  T* logits;
  std::vector<OnlineSoftmax<T>> softmax;  // empty: not wanted
  std::unique_ptr<bool[]> masks;
  bool* key_mask;              // the stream's at this step; its heads share it
  bool* attended;              // with a mask: the rows that have a key and are not masked
  std::vector<C> overwritten;  // ring rows to restore after a call that does not update the state
  std::vector<C> keys;         // a copy of one head's ring
  std::vector<C> values;
};

// The steps of one head of one stream, or of several heads next to each other.
template <typename T, typename C>
class HeadStepper {
 public:
  HeadStepper(const SingleOutputParams<T, C>& params, int64_t pair, int64_t heads,
              Scratch<T, C>* scratch)
      : p_(params),
        s_(*scratch),
        pair_(pair),
        m_(pair / params.num_heads),
        h_(pair % params.num_heads),
        heads_(heads),
        key_size_(heads * params.key_dim),
        value_size_(heads * params.value_dim),
        position_(params.position[params.streams[m_]]) {
    UseRing();
  }

  // Takes all steps. Each one writes its row, then attends to all filled rows as one span.
  void Run() {
    if (p_.window_key != nullptr) CopyWindows();
    const bool copies = CopiesRings(p_);
    if (copies) UseCopy();
    // Each row is overwritten for the first time within the first N steps.
    const int64_t first_of_rows = std::min(p_.num_steps, p_.window);
    const bool restores = !copies && !p_.update_state;
    if (restores) SaveRows(first_of_rows);
    CopyKeyMask();
    for (int64_t t = 0; t < p_.num_steps; ++t) {
      WriteRow(t);
      const RingSpan filled = {0, std::min(position_ + t + 1, p_.window)};
      Attend(t, filled, At(p_.output, p_.output_strides, t));
      if (p_.scores != nullptr) PutScores(t);
    }
    if (restores) RestoreRows(first_of_rows);
    if (copies && p_.update_state) WriteRing();
  }

  // Takes one part of the window of the only step. The part that has the step's row writes it.
  void RunPart(int64_t part) {
    const int64_t filled = std::min(position_ + 1, p_.window);
    const int64_t begin = part * filled / p_.window_parts;
    const int64_t end = (part + 1) * filled / p_.window_parts;
    const bool has_row = begin <= Row(0) && Row(0) < end;
    CopyKeyMask();
    if (has_row) {
      if (!p_.update_state) SaveRows(1);
      WriteRow(0);
    }
    T* state = Part(part);
    Attend(0, {begin, end - begin}, state);
    state[p_.value_dim] = s_.softmax[0].max;
    state[p_.value_dim + 1] = s_.softmax[0].denominator;
    if (has_row && !p_.update_state) RestoreRows(1);
  }

  void MergeParts() const {
    const int64_t size = p_.value_dim;
    T* output = At(p_.output, p_.output_strides, 0);
    std::fill_n(output, size, T(0));
    OnlineSoftmax<T> softmax;
    for (int64_t part = 0; part < p_.window_parts; ++part) {
      const T* state = Part(part);
      const auto factors = softmax.Merge({state[size], state[size + 1]});
      const T others = factors.others * state[size + 1];
      for (int64_t d = 0; d < size; ++d) output[d] = output[d] * factors.own + state[d] * others;
    }
    const T normalizer = softmax.Normalizer();
    for (int64_t d = 0; d < size; ++d) output[d] *= normalizer;
  }

 private:
  void UseRing() {
    const int64_t stream = p_.streams[m_];
    const Strides &keys = p_.key_cache_strides, &values = p_.value_cache_strides;
    keys_ = p_.key_cache + stream * keys.stream + h_ * keys.head;
    key_stride_ = keys.step;
    values_ = p_.value_cache + stream * values.stream + h_ * values.head;
    value_stride_ = values.step;
  }

  // Lets the steps use a copy of the ring.
  void UseCopy() {
    const int64_t filled = std::min(position_, p_.window);
    for (int64_t row = 0; row < filled; ++row) {
      std::copy_n(keys_ + row * key_stride_, key_size_, &s_.keys[row * key_size_]);
      std::copy_n(values_ + row * value_stride_, value_size_, &s_.values[row * value_size_]);
    }
    keys_ = s_.keys.data();
    key_stride_ = key_size_;
    values_ = s_.values.data();
    value_stride_ = value_size_;
  }

  template <typename U>
  U* At(U* base, const Strides& strides, int64_t t = 0) const {
    return base + m_ * strides.stream + h_ * strides.head + t * strides.step;
  }

  T* Part(int64_t part) const {
    return p_.parts + (pair_ * p_.window_parts + part) * (p_.value_dim + 2);
  }

  void CopyKeyMask() const {
    std::copy_n(p_.key_mask_cache + p_.streams[m_] * p_.window, p_.window, s_.key_mask);
  }

  // The rows of step t's window, oldest first.
  RingSpans InOrder(int64_t t) const {
    const int64_t steps = position_ + t + 1, filled = std::min(steps, p_.window);
    return FindRingSpans(steps - filled, filled, p_.window);
  }

  // Attends with the queries of step t to the rows that have a key and are not masked.
  void Attend(int64_t t, const RingSpan& rows, T* output) {
    s_.key_mask[Row(t)] = p_.key_mask == nullptr || p_.key_mask[m_ * p_.num_steps + t];
    const bool* attended = s_.key_mask;
    if (p_.mask != nullptr) attended = Masked(t);
    RingAttentionParams<T, C> ring = {};
    ring.query = At(p_.query, p_.query_strides, t);
    ring.key = keys_;
    ring.key_stride = key_stride_;
    ring.value = values_;
    ring.value_stride = value_stride_;
    const bool all = std::memchr(attended + rows.first_row, 0, rows.rows) == nullptr;
    ring.key_mask = all ? nullptr : attended;
    ring.spans = {rows, {0, 0}};
    ring.output = output;
    ring.heads = ring.key_heads = heads_;
    ring.key_dim = p_.key_dim;
    ring.value_dim = p_.value_dim;
    ring.scale = p_.scale;
    ring.logits = s_.logits;
    ring.softmax = s_.softmax.empty() ? nullptr : s_.softmax.data();
    ring.far = IsFar();
    ring.next_key = NextKey();
    RingAttention(ring, 0, heads_);
  }

  // Returns whether the ring is in no near cache: it is read only once in a call, and all rings
  // together are too large for one.
  bool IsFar() const {
    const int64_t row_bytes = p_.num_heads * (p_.key_dim + p_.value_dim) * int64_t{sizeof(C)};
    return p_.num_steps == 1 && p_.num_streams * p_.window * row_bytes > kNearRingsBytes;
  }

  // Returns the keys of the next stream, if they are far too, and null otherwise.
  const C* NextKey() const {
    if (!IsFar() || heads_ < p_.num_heads || m_ + 1 == p_.num_streams) return nullptr;
    return p_.key_cache + p_.streams[m_ + 1] * p_.key_cache_strides.stream;
  }

  // Returns the rows of step t's window that have a key and are not masked.
  const bool* Masked(int64_t t) const {
    const RingSpans spans = InOrder(t);
    const bool* mask = At(p_.mask, p_.mask_strides, t) + p_.window - spans.before_wrap.rows -
                       spans.after_wrap.rows;
    for (const RingSpan& span : {spans.before_wrap, spans.after_wrap}) {
      for (int64_t row = span.first_row; row < span.first_row + span.rows; ++row, ++mask) {
        s_.attended[row] = s_.key_mask[row] && *mask;
      }
    }
    return s_.attended;
  }

  void PutScores(int64_t t) const {
    const RingSpans spans = InOrder(t);
    const int64_t filled = spans.before_wrap.rows + spans.after_wrap.rows;
    for (int64_t h = 0; h < heads_; ++h) {
      const T denominator = s_.softmax[h].denominator;
      const T normalizer = denominator == T(0) ? T(0) : T(1) / denominator;
      const T* weights = s_.logits + h * RingAttentionLogits(filled);
      T* scores = At(p_.scores, p_.scores_strides, t) + h * p_.scores_strides.head;
      scores = std::fill_n(scores, p_.window - filled, T(0));
      for (const RingSpan& span : {spans.before_wrap, spans.after_wrap}) {
        const T* begin = weights + span.first_row;
        scores = std::transform(begin, begin + span.rows, scores,
                                [normalizer](T weight) { return weight * normalizer; });
      }
    }
  }

  void CopyWindows() const {
    const int64_t rows = p_.window - 1;
    for (int64_t h = 0; h < heads_; ++h) {
      CopyWindow(keys_ + h * p_.key_cache_strides.head, key_stride_, p_.key_dim, position_,
                 p_.window, p_.window_key + (pair_ + h) * rows * p_.key_dim);
      CopyWindow(values_ + h * p_.value_cache_strides.head, value_stride_, p_.value_dim, position_,
                 p_.window, p_.window_value + (pair_ + h) * rows * p_.value_dim);
    }
  }

  // The ring row of this call's step t.
  int64_t Row(int64_t t) const { return (position_ + t) % p_.window; }
  C* Key(int64_t t) const { return keys_ + Row(t) * key_stride_; }
  C* Value(int64_t t) const { return values_ + Row(t) * value_stride_; }

  void WriteRow(int64_t t) const {
    std::copy_n(At(p_.key, p_.key_strides, t), key_size_, Key(t));
    std::copy_n(At(p_.value, p_.value_strides, t), value_size_, Value(t));
  }

  void WriteRing() {
    UseRing();
    for (int64_t t = std::max<int64_t>(0, p_.num_steps - p_.window); t < p_.num_steps; ++t) {
      WriteRow(t);
    }
  }

  void SaveRows(int64_t steps) const {
    C* saved = s_.overwritten.data();
    for (int64_t t = 0; t < steps; ++t) {
      saved = std::copy_n(Key(t), key_size_, saved);
      saved = std::copy_n(Value(t), value_size_, saved);
    }
  }

  void RestoreRows(int64_t steps) const {
    const C* saved = s_.overwritten.data();
    for (int64_t t = 0; t < steps; ++t, saved += key_size_ + value_size_) {
      std::copy_n(saved, key_size_, Key(t));
      std::copy_n(saved + key_size_, value_size_, Value(t));
    }
  }

  const SingleOutputParams<T, C>& p_;
  Scratch<T, C>& s_;
  const int64_t pair_;
  const int64_t m_;
  const int64_t h_;  // the first head
  const int64_t heads_;
  const int64_t key_size_;
  const int64_t value_size_;
  const int64_t position_;
  // The rings, or their copy.
  C *keys_, *values_;
  int64_t key_stride_, value_stride_;
};

}  // namespace

template <typename T, typename C>
SingleOutputPlan PlanSingleOutput(const SingleOutputParams<T, C>& params, int64_t threads) {
  // Measured with AVX-512 on an AMD Zen 4, windows in cache: 12, 23 and 43 cycles per row of float
  // for D = Dv = 12, 64 and 128; 55 for 64 if windows come from memory. With SSE2 it is about three
  // times as much, so threads are then used later than would be best.
  const int64_t bytes = (params.key_dim + params.value_dim) * sizeof(C);
  const int64_t per_row = 8 + bytes / 24;
  const int64_t heads = params.num_heads, streams = params.num_streams, pairs = streams * heads;
  const int64_t cycles = params.num_steps * params.window * per_row;
  // At D = 64 about 25,000 cycles, much more than the cost of calling a task and merging its part.
  constexpr int64_t kRowsPerPart = 1024;
  int64_t parts = 1;
  if (pairs > 0 && pairs < threads && params.num_steps == 1 && params.scores == nullptr &&
      params.window_key == nullptr) {
    parts =
        std::max<int64_t>(1, std::min((threads + pairs - 1) / pairs, params.window / kRowsPerPart));
  }
  if (parts > 1 || CopiesRings(params) || !CanTakeHeadsTogether(params)) {
    return {parts, pairs * parts, cycles / parts, 1};
  }
  // A task reads whole rows if there are streams enough for the threads, or too little work for
  // several.
  constexpr int64_t kCyclesWorthThreads = 250'000;
  int64_t groups = 1;
  if (streams > 0 && streams < threads && pairs * cycles >= kCyclesWorthThreads) {
    groups = std::min(heads, (threads + streams - 1) / streams);
  }
  const int64_t together = (heads + groups - 1) / groups;
  return {1, streams * ((heads + together - 1) / together), cycles * together, together};
}

template <typename T, typename C>
void SingleOutputAttention(const SingleOutputParams<T, C>& params, int64_t begin, int64_t end) {
  if (begin >= end) return;
  Scratch<T, C> scratch(params);
  const int64_t together = HeadsPerTask(params), parts = params.window_parts;
  const int64_t groups = (params.num_heads + together - 1) / together;  // tasks per stream
  for (int64_t task = begin; task < end; ++task) {
    if (parts > 1) {
      HeadStepper<T, C>(params, task / parts, 1, &scratch).RunPart(task % parts);
      continue;
    }
    const int64_t head = task % groups * together;
    const int64_t heads = std::min(together, params.num_heads - head);
    HeadStepper<T, C>(params, task / groups * params.num_heads + head, heads, &scratch).Run();
  }
}

template <typename T, typename C>
void FinishSingleOutput(const SingleOutputParams<T, C>& params) {
  const int64_t steps = params.num_steps, window = params.window;
  if (params.window_parts > 1) {
    Scratch<T, C> scratch(params);
    const int64_t pairs = params.num_streams * params.num_heads;
    for (int64_t i = 0; i < pairs; ++i) HeadStepper<T, C>(params, i, 1, &scratch).MergeParts();
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
