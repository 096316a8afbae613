#include "cc/attention/ring_attention.h"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "cc/attention/ring_cache.h"
#include "cc/attention/step_types.h"
#include "cc/attention/targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cc/attention/ring_attention.cc"
#include "hwy/foreach_target.h"
// Must follow foreach_target.h: otherwise these are compiled for one target only.
#include "cc/attention/vector_math-inl.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace continual_transformers {
namespace HWY_NAMESPACE {

template <typename T, typename C>
class RingPass {
 public:
  RingPass(const RingAttentionParams<T, C>& params, int64_t begin, int64_t end)
      : p_(params),
        begin_(begin),
        end_(end),
        group_(params.heads / params.key_heads),
        rows_(params.spans.before_wrap.rows + params.spans.after_wrap.rows),
        stride_(RingAttentionLogits(rows_)),
        rows_of_part_(RowsOfBytes(kPartBytes, params.value_stride)),
        rows_ahead_(RowsOfBytes(kBytesAhead, params.key_stride)),
        in_parts_(rows_ > 2 * rows_of_part_),
        takes_rows_((end - begin) / group_ * params.key_dim == params.key_stride &&
                    (end - begin) / group_ * params.value_dim == params.value_stride),
        are_words_(AreWords(params.key, params.key_stride) &&
                   AreWords(params.value, params.value_stride)) {}

  void Run() {
    int64_t column = 0;
    for (const RingSpan& span : {p_.spans.before_wrap, p_.spans.after_wrap}) {
      Logits(span, column);
      column += span.rows;
    }
    if constexpr (kScaled) ScaleBy(p_.key_scale);
    if (p_.soft_cap != T(0)) Cap();
    if (p_.bias != nullptr) AddBias();
    if (p_.key_mask != nullptr) Mask();
    Softmax();
    if constexpr (kScaled) ScaleBy(p_.value_scale);
    Sum();
  }

  // The most heads of one pass: their normalizers are on the stack.
  static constexpr int64_t kMostHeads = 64;

 private:
  using D = hn::ScalableTag<T>;
  using V = hn::Vec<D>;
  static constexpr int64_t kLanes = hn::Lanes(D());
  // Rows whose dot products are computed together. They share each load of the query, and their
  // chains of additions overlap.
  static constexpr int64_t kRowsPerDot = 8;
  static constexpr int kAnyNumber = -1;
  static constexpr bool kScaled = std::is_same_v<C, int8_t>;
  // Whether two vectors of a row are loaded together, the even elements and then the odd ones. So
  // is the rest of a row, if that is an even number, unless one masked load and conversion is
  // enough. It took 0.75 of the time for N=256 H=16 D=12, and 0.9 for D=64 (AVX2).
  static constexpr bool kEvenOdd = std::is_same_v<C, BFloat16>;
  bool IsLoadedTogether(int64_t rest) const {
    return are_words_ && rest > 0 && rest % 2 == 0 && (HWY_TARGET != HWY_AVX3 || rest > kLanes);
  }
  // Whether every other element of the rows is aligned for two.
  static bool AreWords(const C* rows, int64_t stride) {
    return reinterpret_cast<uintptr_t>(rows) % (2 * sizeof(C)) == 0 && stride % 2 == 0;
  }
  // The values of a long window are summed part by part. A part stays in a near cache while the
  // heads take their columns of it, and the next one is prefetched meanwhile. Windows of 1 MB in
  // the last-level cache took 1.1 times as long as reading them once. In one part they took 1.65
  // times as long, because each pass over some columns touches only pieces of rows, far apart.
  static constexpr int64_t kPartBytes = 64 << 10;
  // How far ahead the keys of a long window are prefetched.
  static constexpr int64_t kBytesAhead = 16 << 10;
  static constexpr T kNotAttended = -std::numeric_limits<T>::infinity();

  // Memory that will be read soon, in one piece or two. It is fetched into the second-level cache a
  // few lines at a time, between computations. A processor drops prefetches that it has no room
  // for. So when all lines of a part were prefetched at once, most were dropped: beyond the
  // last-level cache, N=64 H=8 D=64 took 1.1 times as long in float32 and 2.2 times in int8 (make
  // bench, AVX2). Plain loads are never dropped, but were slower than these prefetches too.
  class Ahead {
   public:
    // Adds `count` rows from row `first` on, without anything between two rows.
    void Add(const C* rows, int64_t stride, int64_t first, int64_t count) {
      if (count <= 0) return;
      lines_ += LinesOf(count * stride);
      const C* const begin = rows + first * stride;
      const Piece piece = {reinterpret_cast<const char*>(begin),
                           reinterpret_cast<const char*>(begin + count * stride)};
      (now_.at == nullptr ? now_ : then_) = piece;
    }

    // Fetches the next lines, and maybe some beyond the end.
    HWY_INLINE void Fetch(int64_t lines) {
      if (now_.at == nullptr) return;
      HWY_UNROLL(1)  // Unrolled, the library has 0.25 MB more.
      for (int64_t i = 0; i < lines; ++i) {
        __builtin_prefetch(now_.at + i * kLineBytes, /*rw=*/0, /*locality=*/2);
      }
      now_.at += lines * kLineBytes;
      if (now_.at >= now_.end) GoOn();
    }

    // How many lines were added in all.
    int64_t lines() const { return lines_; }

    static constexpr int64_t LinesOf(int64_t elements) {
      return (elements * static_cast<int64_t>(sizeof(C)) + kLineBytes - 1) / kLineBytes;
    }

   private:
    static constexpr int64_t kLineBytes = 64;
    struct Piece {
      const char *at = nullptr, *end = nullptr;
    };
    // Not inline: the pieces would take registers from the sums.
    HWY_NOINLINE void GoOn() {
      now_ = then_;
      then_ = {};
    }

    Piece now_, then_;
    int64_t lines_ = 0;
  };

  // Rows of so many bytes, a multiple of kRowsPerDot.
  static int64_t RowsOfBytes(int64_t bytes, int64_t stride) {
    const int64_t rows = bytes / (stride * static_cast<int64_t>(sizeof(C)));
    return std::max(kRowsPerDot, rows / kRowsPerDot * kRowsPerDot);
  }

  T* LogitsOf(int64_t head) const { return p_.logits + (head - begin_) * stride_; }

  // Computes the scaled dot products of every head's query with the keys of a span.
  void Logits(const RingSpan& span, int64_t column) const {
    const int64_t vectors = p_.key_dim / kLanes;
    if (group_ > 1) {
      if (p_.key_dim % kLanes == 0) return LogitsOfVectors<kAnyNumber, false, true>(span, column);
      return LogitsOfVectors<kAnyNumber, true, true>(span, column);
    }
    if (p_.key_dim % kLanes != 0) {
      if (vectors == 0) return LogitsOfVectors<0, true>(span, column);
      if (vectors == 1) return LogitsOfVectors<1, true>(span, column);
      return LogitsOfVectors<kAnyNumber, true>(span, column);
    }
    if (vectors == 1) return LogitsOfVectors<1, false>(span, column);
    if (vectors == 2) return LogitsOfVectors<2, false>(span, column);
    if (vectors == 4) return LogitsOfVectors<4, false>(span, column);
    if (vectors == 8) return LogitsOfVectors<8, false>(span, column);
    return LogitsOfVectors<kAnyNumber, false>(span, column);
  }

  // For keys of kVectors vectors, plus a partial one with kRest. The compiler knows the usual
  // sizes: otherwise keys of 12 took 1.3 times as long. With kGrouped, several queries share a key:
  // where each has its own, these lines would cost up to a tenth.
  template <int kVectors, bool kRest, bool kGrouped = false>
  void LogitsOfVectors(const RingSpan& span, int64_t column) const {
    const int64_t key_dim = p_.key_dim, stride = p_.key_stride, heads = end_ - begin_;
    const T* HWY_RESTRICT query = p_.query + begin_ * key_dim;
    Ahead ahead = AfterKeys(span);
    const int64_t dots = std::max<int64_t>(1, (span.rows + kRowsPerDot - 1) / kRowsPerDot * heads);
    const int64_t lines_a_dot = (ahead.lines() + dots - 1) / dots;
    for (int64_t i = 0; i < span.rows; i += kRowsPerDot) {
      const int64_t count = std::min(kRowsPerDot, span.rows - i);
      const int64_t first = (span.first_row + i) * stride;
      // Separate names, as the compiler would keep an array in memory. The last row replaces
      // missing ones.
      const C* HWY_RESTRICT k0 = p_.key + first + (kGrouped ? 0 : begin_ * key_dim);
      const C* HWY_RESTRICT k1 = k0 + (count > 1 ? stride : 0);
      const C* HWY_RESTRICT k2 = k1 + (count > 2 ? stride : 0);
      const C* HWY_RESTRICT k3 = k2 + (count > 3 ? stride : 0);
      const C* HWY_RESTRICT k4 = k3 + (count > 4 ? stride : 0);
      const C* HWY_RESTRICT k5 = k4 + (count > 5 ? stride : 0);
      const C* HWY_RESTRICT k6 = k5 + (count > 6 ? stride : 0);
      const C* HWY_RESTRICT k7 = k6 + (count > 7 ? stride : 0);
      T* HWY_RESTRICT logits = p_.logits + column + i;
      for (int64_t h = 0; h < heads; ++h, logits += stride_) {
        ahead.Fetch(lines_a_dot);
        // The head's query and key are both at `at`.
        const int64_t at = (kGrouped ? (begin_ + h) / group_ : h) * key_dim;
        const T* HWY_RESTRICT from = kGrouped ? query + h * key_dim - at : query;
        Dots<kVectors, kRest>(from, at, k0, k1, k2, k3, k4, k5, k6, k7, logits);
      }
    }
  }

  // Returns what to prefetch while the keys of a span are read. A long window needs the keys a
  // little further on, and then the first part of its values. A short one needs its values, if they
  // are far.
  Ahead AfterKeys(const RingSpan& span) const {
    Ahead ahead;
    if (!takes_rows_) return ahead;
    int64_t values = 0;
    if (in_parts_) {
      ahead.Add(p_.key, p_.key_stride, span.first_row + rows_ahead_, span.rows - rows_ahead_);
      values = std::min(rows_of_part_, span.rows);
    } else if (p_.far) {
      values = span.rows;
    }
    ahead.Add(p_.value, p_.value_stride, span.first_row, values);
    return ahead;
  }

  // Returns what to prefetch while a part of the values is read: the next part. `left`: the rows of
  // the span after the part.
  Ahead AfterPart(const RingSpan& left) const {
    Ahead ahead;
    if (!takes_rows_) return ahead;
    ahead.Add(p_.value, p_.value_stride, left.first_row, std::min(rows_of_part_, left.rows));
    return ahead;
  }

  // Returns what to prefetch while the last values are read: the next keys, if they are known. Of a
  // long window these are the first ones. The next pass prefetches the others itself.
  Ahead AfterValues() const {
    Ahead ahead;
    if (!takes_rows_ || p_.next_key == nullptr) return ahead;
    for (const RingSpan& span : {p_.spans.before_wrap, p_.spans.after_wrap}) {
      ahead.Add(p_.next_key, p_.key_stride, span.first_row,
                in_parts_ ? std::min(rows_ahead_, span.rows) : span.rows);
    }
    return ahead;
  }

  // Computes the dots of kRowsPerDot keys, from element `at` of the query and of each key on.
  template <int kVectors, bool kRest>
  HWY_INLINE void Dots(const T* HWY_RESTRICT query, int64_t at, const C* HWY_RESTRICT k0,
                       const C* HWY_RESTRICT k1, const C* HWY_RESTRICT k2, const C* HWY_RESTRICT k3,
                       const C* HWY_RESTRICT k4, const C* HWY_RESTRICT k5, const C* HWY_RESTRICT k6,
                       const C* HWY_RESTRICT k7, T* HWY_RESTRICT logits) const {
    const D d;
    V s0 = hn::Zero(d), s1 = s0, s2 = s0, s3 = s0, s4 = s0, s5 = s0, s6 = s0, s7 = s0;
    const auto add = [&](int64_t i, auto load) HWY_ATTR {
      const V q = load(query + i);
      s0 = hn::MulAdd(q, load(k0 + i), s0);
      s1 = hn::MulAdd(q, load(k1 + i), s1);
      s2 = hn::MulAdd(q, load(k2 + i), s2);
      s3 = hn::MulAdd(q, load(k3 + i), s3);
      s4 = hn::MulAdd(q, load(k4 + i), s4);
      s5 = hn::MulAdd(q, load(k5 + i), s5);
      s6 = hn::MulAdd(q, load(k6 + i), s6);
      s7 = hn::MulAdd(q, load(k7 + i), s7);
    };
    const auto whole = [d](const auto* p) HWY_ATTR { return LoadWide(d, p); };
    const int64_t vectors = kVectors == kAnyNumber ? p_.key_dim / kLanes : kVectors;
    int64_t v = 0;
    if constexpr (kEvenOdd) {
      const auto add_two = [&](V q0, V q1, auto load) HWY_ATTR {
        ToEvenOdd(d, &q0, &q1);
        const auto dot = [&](const C* k, V s) HWY_ATTR {
          V even, odd;
          load(k + at, &even, &odd);
          return hn::MulAdd(q1, odd, hn::MulAdd(q0, even, s));
        };
        s0 = dot(k0, s0);
        s1 = dot(k1, s1);
        s2 = dot(k2, s2);
        s3 = dot(k3, s3);
        s4 = dot(k4, s4);
        s5 = dot(k5, s5);
        s6 = dot(k6, s6);
        s7 = dot(k7, s7);
      };
      for (; v + 2 <= vectors; v += 2, at += 2 * kLanes) {
        add_two(hn::LoadU(d, query + at), hn::LoadU(d, query + at + kLanes),
                [d](const C* p, V* even, V* odd) HWY_ATTR { LoadEvenOdd(d, p, even, odd); });
      }
      const int64_t rest = p_.key_dim - v * kLanes;
      if (kRest && IsLoadedTogether(rest)) {
        const int64_t second = std::max<int64_t>(0, rest - kLanes);
        add_two(hn::LoadN(d, query + at, rest), hn::LoadN(d, query + at + rest - second, second),
                [d, rest](const C* p, V* even, V* odd)
                    HWY_ATTR { LoadEvenOddN(d, p, rest, even, odd); });
        v = vectors + 1;
      }
    }
    for (; v < vectors; ++v, at += kLanes) add(at, whole);
    if (kRest && v == vectors) {
      const size_t rest = p_.key_dim - vectors * kLanes;
      add(at, [d, rest](const auto* p) HWY_ATTR { return LoadWideN(d, p, rest); });
    }
    StoreScaledSums(d, s0, s1, s2, s3, p_.scale, logits);
    StoreScaledSums(d, s4, s5, s6, s7, p_.scale, logits + 4);
  }

  // Multiplies the number that each head has for a row by the row's scale.
  void ScaleBy(const T* scale) const {
    const D d;
    int64_t column = 0;
    for (const RingSpan& span : {p_.spans.before_wrap, p_.spans.after_wrap}) {
      for (int64_t h = begin_; h < end_; ++h) {
        T* HWY_RESTRICT x = LogitsOf(h) + column;
        const T* HWY_RESTRICT factor = scale + span.first_row;
        int64_t i = 0;
        for (; i + kLanes <= span.rows; i += kLanes) {
          hn::StoreU(hn::Mul(hn::LoadU(d, x + i), hn::LoadU(d, factor + i)), d, x + i);
        }
        for (; i < span.rows; ++i) x[i] *= factor[i];
      }
      column += span.rows;
    }
  }

  void Cap() const {
    const D d;
    const V cap = hn::Set(d, p_.soft_cap), inverse = hn::Set(d, T(1) / p_.soft_cap);
    for (int64_t h = begin_; h < end_; ++h) {
      T* HWY_RESTRICT x = LogitsOf(h);
      // The last vector may end beyond the rows, where there is room.
      for (int64_t i = 0; i < rows_; i += kLanes) {
        hn::StoreU(hn::Mul(cap, TanhOf(d, hn::Mul(inverse, hn::LoadU(d, x + i)))), d, x + i);
      }
    }
  }

  void AddBias() const {
    int64_t column = 0;
    for (const RingSpan& span : {p_.spans.before_wrap, p_.spans.after_wrap}) {
      for (int64_t i = 0; i < span.rows;) {
        const int64_t from = (span.first_row + i + p_.bias_first) % p_.bias_rows;
        const int64_t count = std::min(span.rows - i, p_.bias_rows - from);
        for (int64_t h = begin_; h < end_; ++h) {
          T* HWY_RESTRICT x = LogitsOf(h) + column + i;
          const T* HWY_RESTRICT bias = p_.bias + h * p_.bias_rows + from;
          for (int64_t j = 0; j < count; ++j) x[j] += bias[j];
        }
        i += count;
      }
      column += span.rows;
    }
  }

  // Removes the weight of rows that are not attended to.
  void Mask() const {
    int64_t column = 0;
    for (const RingSpan& span : {p_.spans.before_wrap, p_.spans.after_wrap}) {
      const bool* mask = p_.key_mask + span.first_row;
      for (int64_t i = 0; i < span.rows; ++i) {
        if (mask[i]) continue;
        for (int64_t h = begin_; h < end_; ++h) LogitsOf(h)[column + i] = kNotAttended;
      }
      column += span.rows;
    }
  }

  // Replaces logits by weights and computes their normalizers. Each stage with a long latency is a
  // loop over the heads, so that the latencies of the heads overlap.
  void Softmax() {
    const D d;
    const V none = hn::Set(d, kNotAttended);
    const int64_t heads = end_ - begin_;
    for (int64_t h = 0; h < heads; ++h) {
      T* HWY_RESTRICT logits = p_.logits + h * stride_;
      hn::StoreU(none, d, logits + rows_);
      V max = none;
      // A NaN is not a maximum, but it becomes a weight.
      for (int64_t i = 0; i < rows_; i += kLanes) {
        const V x = hn::LoadU(d, logits + i);
        max = hn::IfThenElse(hn::Gt(x, max), x, max);
      }
      // If nothing is attended, -infinity minus -infinity would be NaN.
      const T largest = hn::ReduceMax(d, max);
      if (p_.softmax != nullptr) p_.softmax[begin_ + h].max = largest;
      normalizer_of_[h] = largest == kNotAttended ? T(0) : largest;
    }
    Ahead ahead = in_parts_ ? Ahead() : AfterValues();
    for (int64_t h = 0; h < heads; ++h) {
      T* HWY_RESTRICT logits = p_.logits + h * stride_;
      const V reference = hn::Set(d, normalizer_of_[h]);
      V sum = hn::Zero(d);
      for (int64_t i = 0; i < rows_; i += kLanes) {
        ahead.Fetch(1);
        const V weight = ExpOfNonPositive(d, hn::Sub(hn::LoadU(d, logits + i), reference));
        hn::StoreU(weight, d, logits + i);
        sum = hn::Add(sum, weight);
      }
      const T denominator = hn::ReduceSum(d, sum);
      if (p_.softmax != nullptr) p_.softmax[begin_ + h].denominator = denominator;
      normalizer_of_[h] = denominator == T(0) ? T(0) : T(1) / denominator;
    }
    ahead_ = ahead;
  }

  // Sums the values with their weights, as many columns at a time as registers can hold. Small
  // heads are summed several at a time.
  void Sum() {
    if (!in_parts_) return SumRows({p_.spans, 0, true, true});
    int64_t column = 0;
    for (const RingSpan& span : {p_.spans.before_wrap, p_.spans.after_wrap}) {
      for (int64_t i = 0; i < span.rows; i += rows_of_part_) {
        const int64_t rows = std::min(rows_of_part_, span.rows - i);
        const int64_t row = span.first_row + i, left = span.rows - i - rows;
        if (column + rows == rows_) {
          ahead_ = AfterValues();
        } else {
          ahead_ = AfterPart(left > 0 ? RingSpan{row + rows, left} : p_.spans.after_wrap);
        }
        SumRows({{{row, rows}, {0, 0}}, column, column == 0, column + rows == rows_});
        column += rows;
      }
    }
  }

  // Rows whose values are summed, and the column of the logits of the first of them. The sums begin
  // with the first rows, and are normalized after the last; between, they are in the output.
  struct Part {
    RingSpans spans;
    int64_t column;
    bool is_first, is_last;
  };

  void SumRows(const Part& part) {
    const int64_t vectors = p_.value_dim / kLanes;
    if (group_ > 1) return Columns(part, vectors);
    if (p_.value_dim == kLanes) return Heads<8, 1, Width::kHead>(part, 0);
    if (p_.value_dim == 2 * kLanes) return Heads<4, 2, Width::kHead>(part, 0);
    if (p_.value_dim == 4 * kLanes) return Heads<2, 4, Width::kHead>(part, 0);
    if (p_.value_dim == 8 * kLanes) return Heads<1, 8, Width::kHead>(part, 0);
    Columns(part, vectors);
  }

  void Columns(const Part& part, int64_t vectors) {
    int64_t v = 0;
    for (; v + 8 <= vectors; v += 8) Heads<1, 8, Width::kPart>(part, v);
    for (; v + 4 <= vectors; v += 4) Heads<2, 4, Width::kPart>(part, v);
    for (; v + 2 <= vectors; v += 2) Heads<4, 2, Width::kPart>(part, v);
    if constexpr (kEvenOdd) {
      // Fewer columns than two vectors have remain.
      if (IsLoadedTogether(p_.value_dim - v * kLanes)) return Heads<4, 2, Width::kRest>(part, v);
    }
    for (; v < vectors; ++v) Heads<8, 1, Width::kPart>(part, v);
    if (v * kLanes < p_.value_dim) Heads<8, 1, Width::kRest>(part, v);
  }

  // The columns of a head that are summed: all, so that address offsets are constants; some whole
  // vectors; or the last, fewer than kVectors vectors have.
  enum class Width { kHead, kPart, kRest };

  // Sums kVectors vectors of columns from vector v on, for all heads, kHeads at a time where
  // possible.
  template <int kHeads, int kVectors, Width kWidth>
  void Heads(const Part& part, int64_t v) {
    // Heads that are summed together have either values of their own, or all the same values.
    for (int64_t h = begin_; h < end_;) {
      const int64_t end = group_ == 1 ? end_ : std::min(end_, (h / group_ + 1) * group_);
      for (; h + kHeads <= end; h += kHeads) SumOf<kHeads, kVectors, kWidth>(part, h, v * kLanes);
      if constexpr (kHeads > 1) {
        constexpr int kHalf = kHeads / 2;
        for (; h + kHalf <= end; h += kHalf) SumOf<kHalf, kVectors, kWidth>(part, h, v * kLanes);
        for (; h < end; ++h) SumOf<1, kVectors, kWidth>(part, h, v * kLanes);
      }
    }
  }

  template <int kHeads, int kVectors, Width kWidth>
  HWY_INLINE void SumOf(const Part& part, int64_t h, int64_t column) {
    const D d;
    // If there were too few chains of additions, alternate rows have separate sums.
    constexpr int kChains = std::max(1, 8 / (kHeads * kVectors));
    const int64_t value_dim = kWidth == Width::kHead ? kVectors * kLanes : p_.value_dim;
    const size_t rest = value_dim - column;
    constexpr bool kTogether = kEvenOdd && kVectors % 2 == 0;
    const auto load = [d, rest](const C* p) HWY_ATTR {
      return kWidth == Width::kRest ? LoadWideN(d, p, rest) : LoadWide(d, p);
    };
    const auto load_two = [d, rest](const auto* p, V* even, V* odd) HWY_ATTR {
      kWidth == Width::kRest ? LoadEvenOddN(d, p, rest, even, odd) : LoadEvenOdd(d, p, even, odd);
    };
    // How many columns vector v has, if not all.
    const auto left = [rest](int v) {
      return std::min<size_t>(kLanes, rest - std::min<size_t>(rest, v * kLanes));
    };
    // All loops over these are unrolled. Otherwise the compiler keeps them in memory.
    V sum[kChains][kHeads][kVectors];
    CONTINUAL_TRANSFORMERS_UNROLL
    for (int c = 0; c < kChains; ++c) {
      CONTINUAL_TRANSFORMERS_UNROLL
      for (int i = 0; i < kHeads; ++i) {
        CONTINUAL_TRANSFORMERS_UNROLL
        for (int v = 0; v < kVectors; ++v) sum[c][i][v] = hn::Zero(d);
      }
    }
    if (!part.is_first) {
      CONTINUAL_TRANSFORMERS_UNROLL
      for (int i = 0; i < kHeads; ++i) {
        const T* output = p_.output + (h + i) * value_dim + column;
        CONTINUAL_TRANSFORMERS_UNROLL
        for (int v = 0; v < kVectors; ++v) {
          sum[0][i][v] = kWidth == Width::kRest ? hn::LoadN(d, output + v * kLanes, left(v))
                                                : hn::LoadU(d, output + v * kLanes);
        }
        if constexpr (kTogether) {
          CONTINUAL_TRANSFORMERS_UNROLL
          for (int v = 0; v < kVectors; v += 2) ToEvenOdd(d, &sum[0][i][v], &sum[0][i][v + 1]);
        }
      }
    }
    const int64_t value_stride = p_.value_stride;
    // From the values of one head to those of the next.
    const bool grouped = kWidth != Width::kHead && group_ > 1;
    const int64_t step = grouped ? 0 : value_dim;
    const C* values = p_.value + (grouped ? h / group_ : h) * value_dim + column;
    const T* logits = LogitsOf(h) + part.column;
    constexpr int64_t kLinesARow = Ahead::LinesOf(kLanes * kHeads * kVectors);
    for (const RingSpan& span : {part.spans.before_wrap, part.spans.after_wrap}) {
      const int64_t end = span.first_row + span.rows;
      for (int64_t next = span.first_row; next < end;) {
        const RingSpan run = NextRun(next, end);
        next = run.first_row + run.rows;
        const C* HWY_RESTRICT value = values + run.first_row * value_stride;
        const T* HWY_RESTRICT weights = logits + (run.first_row - span.first_row);
        const auto add = [&](int c) HWY_ATTR {
          CONTINUAL_TRANSFORMERS_UNROLL
          for (int i = 0; i < kHeads; ++i) {
            const V weight = hn::Set(d, weights[i * stride_ + c]);
            const C* from = value + c * value_stride + i * step;
            if constexpr (kTogether) {
              CONTINUAL_TRANSFORMERS_UNROLL
              for (int v = 0; v < kVectors; v += 2) {
                V even, odd;
                load_two(from + v * kLanes, &even, &odd);
                sum[c][i][v] = hn::MulAdd(weight, even, sum[c][i][v]);
                sum[c][i][v + 1] = hn::MulAdd(weight, odd, sum[c][i][v + 1]);
              }
            } else {
              CONTINUAL_TRANSFORMERS_UNROLL
              for (int v = 0; v < kVectors; ++v) {
                sum[c][i][v] = hn::MulAdd(weight, load(from + v * kLanes), sum[c][i][v]);
              }
            }
          }
        };
        int64_t row = 0;
        for (; row + kChains <= run.rows; row += kChains) {
          ahead_.Fetch(kChains * kLinesARow);
          CONTINUAL_TRANSFORMERS_UNROLL
          for (int c = 0; c < kChains; ++c) add(c);
          value += kChains * value_stride;
          weights += kChains;
        }
        for (; row < run.rows; ++row) {
          add(0);
          value += value_stride;
          ++weights;
        }
      }
      logits += span.rows;
    }
    CONTINUAL_TRANSFORMERS_UNROLL
    for (int i = 0; i < kHeads; ++i) {
      const V normalizer = hn::Set(d, part.is_last ? normalizer_of_[h + i - begin_] : T(1));
      T* output = p_.output + (h + i) * value_dim + column;
      V total[kVectors];
      CONTINUAL_TRANSFORMERS_UNROLL
      for (int v = 0; v < kVectors; ++v) {
        total[v] = sum[0][i][v];
        CONTINUAL_TRANSFORMERS_UNROLL
        for (int c = 1; c < kChains; ++c) total[v] = hn::Add(total[v], sum[c][i][v]);
        total[v] = hn::Mul(total[v], normalizer);
      }
      if constexpr (kTogether) {
        CONTINUAL_TRANSFORMERS_UNROLL
        for (int v = 0; v < kVectors; v += 2) FromEvenOdd(d, &total[v], &total[v + 1]);
      }
      CONTINUAL_TRANSFORMERS_UNROLL
      for (int v = 0; v < kVectors; ++v) {
        if (kWidth == Width::kRest) {
          hn::StoreN(total[v], d, output + v * kLanes, left(v));
        } else {
          hn::StoreU(total[v], d, output + v * kLanes);
        }
      }
    }
  }

  // Returns the first run of rows from `row` to `end` that are attended to, or an empty one at
  // `end`. The values of other rows may be NaN, so a weight of 0 would not be enough. Not inline,
  // as the compiler would make a second copy of the loop around it, and spoil the first.
  HWY_NOINLINE RingSpan NextRun(int64_t row, int64_t end) const {
    if (p_.key_mask == nullptr) return {row, end - row};
    while (row < end && !p_.key_mask[row]) ++row;
    if (row == end) return {end, 0};
    const bool* run = p_.key_mask + row;
    const void* after = std::memchr(run, 0, end - row);
    return {row, after == nullptr ? end - row : static_cast<const bool*>(after) - run};
  }

  const RingAttentionParams<T, C>& p_;
  const int64_t begin_;
  const int64_t end_;
  const int64_t group_;  // Queries that share a head of keys and values.
  const int64_t rows_;
  const int64_t stride_;
  const int64_t rows_of_part_, rows_ahead_;
  const bool in_parts_;
  const bool takes_rows_;  // Whether it reads whole rows: only then is anything prefetched.
  const bool are_words_;
  T normalizer_of_[kMostHeads];
  Ahead ahead_;  // What to prefetch while values are summed.
};

template <typename T, typename C>
void AttendHeads(const RingAttentionParams<T, C>& params, int64_t begin, int64_t end) {
  for (int64_t h = begin; h < end; h += RingPass<T, C>::kMostHeads) {
    RingPass<T, C>(params, h, std::min(end, h + RingPass<T, C>::kMostHeads)).Run();
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace continual_transformers
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace continual_transformers {

template <typename T, typename C>
void RingAttention(const RingAttentionParams<T, C>& params, int64_t begin, int64_t end) {
  CONTINUAL_TRANSFORMERS_DISPATCH(AttendHeads, params, begin, end);
}

#define INSTANTIATE(T, C) \
  template void RingAttention<T, C>(const RingAttentionParams<T, C>&, int64_t, int64_t);
CONTINUAL_TRANSFORMERS_FOR_RING_TYPES(INSTANTIATE)
#undef INSTANTIATE

}  // namespace continual_transformers
#endif  // HWY_ONCE
