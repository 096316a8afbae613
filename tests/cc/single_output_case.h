// A call of the kernel on raw pointers, and a reference in double that keeps each stream's whole
// history.
#ifndef CONTINUAL_TRANSFORMERS_TESTS_CC_SINGLE_OUTPUT_CASE_H_
#define CONTINUAL_TRANSFORMERS_TESTS_CC_SINGLE_OUTPUT_CASE_H_

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <numeric>
#include <random>
#include <string>
#include <tuple>
#include <vector>

#include "cc/attention/half.h"
#include "cc/attention/params.h"
#include "cc/attention/single_output.h"
#include "cc/attention/targets.h"
#include "gtest/gtest.h"

namespace continual_transformers {

// The layouts of rings: [S, H, N, D]; [S, N, H, D]; or the latter inside larger blocks, one per
// stream.
enum class Layout { kHeadMajor, kRowMajor, kBlocks };

struct Sizes {
  int64_t window, key_dim, value_dim, steps;
  int64_t heads = 2;
  Layout layout = Layout::kHeadMajor;
  bool gaps = true;  // whether about one step in five has no key

  Strides Ring(int64_t size) const {
    if (layout == Layout::kHeadMajor) return HeadMajorRing(heads, window, size);
    Strides strides = RowMajorRing(heads, window, size);
    if (layout == Layout::kBlocks) strides.stream += 7;
    return strides;
  }
};

template <typename T>
T Nan() {
  return std::numeric_limits<T>::quiet_NaN();
}
template <>
inline BFloat16 Nan<BFloat16>() {
  return {0x7fc0};
}
template <>
inline Float16 Nan<Float16>() {
  return {0x7e00};
}

// A number with few bits, which all types hold exactly.
template <typename T>
T Exactly(int quarters) {
  return T(quarters) / 4;
}
template <>
inline BFloat16 Exactly<BFloat16>(int quarters) {
  return {static_cast<uint16_t>(BitsOfFloat(quarters / 4.0f) >> 16)};
}
template <>
inline Float16 Exactly<Float16>(int quarters) {
  const uint32_t bits = BitsOfFloat(quarters / 4.0f), magnitude = bits & 0x7fffffff;
  const uint32_t half = magnitude == 0 ? 0 : (magnitude >> 13) - ((127 - 15) << 10);
  return {static_cast<uint16_t>(half | bits >> 31 << 15)};
}

// A buffer that is aligned only to its element, with NaN on either side.
template <typename T>
class Unaligned {
 public:
  explicit Unaligned(int64_t size) : data_(size + 2, Nan<T>()) {}
  T* data() { return data_.data() + 1; }
  T& operator[](int64_t i) { return data_[i + 1]; }
  bool Intact() const {
    return std::isnan(Widen(data_.front())) && std::isnan(Widen(data_.back()));
  }
  bool SameBits(const Unaligned& other) const {
    return std::memcmp(data_.data(), other.data_.data(), data_.size() * sizeof(T)) == 0;
  }

 private:
  std::vector<T> data_;
};

// Everything that one call touches, for streams at the given positions. About one step in five has
// no key, and holds NaN instead.
template <typename T, typename C>
class Call {
 public:
  Call(const Sizes& sizes, const std::vector<int64_t>& positions,
       const std::vector<int32_t>& streams)
      : sizes_(sizes),
        positions_(positions),
        streams_(streams),
        query_(Rows() * sizes.key_dim),
        key_(Rows() * sizes.key_dim),
        value_(Rows() * sizes.value_dim),
        key_cache_(Held() * sizes.Ring(sizes.key_dim).stream),
        value_cache_(Held() * sizes.Ring(sizes.value_dim).stream),
        output_(Rows() * sizes.value_dim),
        scores_(Rows() * sizes.window),
        window_key_(Pairs() * (sizes.window - 1) * sizes.key_dim),
        window_value_(Pairs() * (sizes.window - 1) * sizes.value_dim),
        key_mask_(streams.size() * sizes.steps),
        key_mask_cache_(Held() * sizes.window),
        window_key_mask_(streams.size() * (sizes.window - 1)),
        old_keys_(Held()),
        old_values_(Held()),
        old_key_mask_(Held()) {
    for (char& has_key : key_mask_) has_key = !sizes.gaps || random_() % 5 != 0;
    for (int64_t i = 0; i < Rows() * sizes.key_dim; ++i) query_[i] = T(distribution_(random_));
    for (int64_t row = 0; row < Rows(); ++row) {
      const bool has_key = key_mask_[row / sizes.heads];
      for (int64_t d = 0; d < sizes.key_dim; ++d) {
        key_[row * sizes.key_dim + d] = has_key ? Random() : Nan<C>();
      }
      for (int64_t d = 0; d < sizes.value_dim; ++d) {
        value_[row * sizes.value_dim + d] = has_key ? Random() : Nan<C>();
      }
    }
    // Rows that no step has written stay NaN.
    for (int64_t s = 0; s < Held(); ++s) {
      const int64_t taken = std::min(positions[s], sizes.window);
      for (int64_t p = positions[s] - taken; p < positions[s]; ++p) {
        const bool has_key = !sizes.gaps || random_() % 5 != 0;
        old_key_mask_[s].push_back(has_key);
        key_mask_cache_[s * sizes.window + p % sizes.window] = has_key;
        for (int64_t h = 0; h < sizes.heads; ++h) {
          for (int64_t d = 0; d < sizes.key_dim; ++d) {
            const C x = has_key ? Random() : Nan<C>();
            old_keys_[s].push_back(Widen(KeyRow(s, h, p)[d] = x));
          }
          for (int64_t d = 0; d < sizes.value_dim; ++d) {
            const C x = has_key ? Random() : Nan<C>();
            old_values_[s].push_back(Widen(ValueRow(s, h, p)[d] = x));
          }
        }
      }
    }
  }

  // A step whose windows are divided into parts. It returns no scores, and no window for a
  // gradient.
  SingleOutputParams<T, C> ParamsInParts(int64_t parts) {
    SingleOutputParams<T, C> p = ParamsWithoutOrder();
    parts_.resize(Pairs() * parts * (sizes_.value_dim + 2));
    p.window_parts = parts;
    p.parts = parts_.data();
    return p;
  }

  // Steps without any output that has columns.
  SingleOutputParams<T, C> ParamsWithoutOrder() {
    SingleOutputParams<T, C> p = Params();
    p.scores = nullptr;
    p.window_key = p.window_value = nullptr;
    p.window_key_mask = nullptr;
    check_scores_ = false;
    return p;
  }

  SingleOutputParams<T, C> Params() {
    SingleOutputParams<T, C> p = {};
    const int64_t t = sizes_.steps, h = sizes_.heads;
    const auto strides = [&](int64_t size) { return Strides{t * h * size, h * size, size}; };
    p.query = query_.data();
    p.key = key_.data();
    p.value = value_.data();
    p.output = output_.data();
    p.scores = scores_.data();
    p.query_strides = p.key_strides = strides(sizes_.key_dim);
    p.value_strides = p.output_strides = strides(sizes_.value_dim);
    p.scores_strides = {h * t * sizes_.window, sizes_.window, t * sizes_.window};
    p.key_cache = key_cache_.data();
    p.value_cache = value_cache_.data();
    p.key_cache_strides = sizes_.Ring(sizes_.key_dim);
    p.value_cache_strides = sizes_.Ring(sizes_.value_dim);
    p.key_mask = reinterpret_cast<bool*>(key_mask_.data());
    p.key_mask_cache = reinterpret_cast<bool*>(key_mask_cache_.data());
    p.window_key = window_key_.data();
    p.window_value = window_value_.data();
    p.window_key_mask = reinterpret_cast<bool*>(window_key_mask_.data());
    p.position = positions_.data();
    p.streams = streams_.data();
    p.num_streams = streams_.size();
    p.num_steps = t;
    p.num_heads = h;
    p.window = sizes_.window;
    p.key_dim = sizes_.key_dim;
    p.value_dim = sizes_.value_dim;
    p.scale = T(1) / std::sqrt(T(sizes_.key_dim));
    p.update_state = true;
    p.window_parts = 1;
    return p;
  }

  // Compares output and scores with the reference, and the rings with what they must hold.
  void Check(double bound) {
    const Sizes& z = sizes_;
    for (size_t m = 0; m < streams_.size(); ++m) {
      for (int64_t h = 0; h < z.heads; ++h) {
        const History history = HistoryOf(m, h);
        for (int64_t t = 0; t < z.steps; ++t) CheckStep(m, h, t, history, bound);
        CheckRing(m, h, history);
        if (check_scores_) CheckWindow(m, h, history);
      }
    }
    EXPECT_TRUE(query_.Intact() && key_.Intact() && value_.Intact() && output_.Intact() &&
                scores_.Intact() && key_cache_.Intact() && value_cache_.Intact() &&
                window_key_.Intact() && window_value_.Intact());
  }

  // Returns whether the rings have the same bits, including rows that no step has written and the
  // memory between rows.
  bool SameState(const Call& other) const {
    return key_cache_.SameBits(other.key_cache_) && value_cache_.SameBits(other.value_cache_) &&
           key_mask_cache_ == other.key_mask_cache_;
  }
  bool SameOutput(const Call& other) const { return output_.SameBits(other.output_); }

 private:
  int64_t Held() const { return positions_.size(); }
  int64_t Pairs() const { return streams_.size() * sizes_.heads; }
  int64_t Rows() const { return Pairs() * sizes_.steps; }
  // The address of step p of a stream in its ring.
  C* KeyRow(int64_t stream, int64_t h, int64_t p) {
    return Row(key_cache_.data(), sizes_.Ring(sizes_.key_dim), stream, h, p);
  }
  C* ValueRow(int64_t stream, int64_t h, int64_t p) {
    return Row(value_cache_.data(), sizes_.Ring(sizes_.value_dim), stream, h, p);
  }
  C* Row(C* ring, const Strides& strides, int64_t stream, int64_t h, int64_t p) const {
    return ring + stream * strides.stream + h * strides.head + p % sizes_.window * strides.step;
  }
  C Random() { return Exactly<C>(static_cast<int>(random_() % 17) - 8); }

  // Returns whether step p of a stream in this call has a key.
  bool HasKey(int64_t m, int64_t p) {
    const int32_t stream = streams_[m];
    const int64_t position = positions_[stream];
    if (p >= position) return key_mask_[m * sizes_.steps + p - position];
    return old_key_mask_[stream][p - position + std::min(position, sizes_.window)];
  }

  // Returns the key or the value of step p of a stream in this call, from its history or from the
  // inputs.
  std::vector<double> Features(bool of_key, int64_t m, int64_t h, int64_t p) {
    const int64_t size = of_key ? sizes_.key_dim : sizes_.value_dim;
    const int32_t stream = streams_[m];
    const int64_t position = positions_[stream];
    std::vector<double> features(size);
    if (p >= position) {
      const int64_t row = (m * sizes_.steps + p - position) * sizes_.heads + h;
      C* input = (of_key ? key_ : value_).data() + row * size;
      std::transform(input, input + size, features.begin(), [](C x) { return Widen(x); });
    } else {
      const int64_t first = position - std::min(position, sizes_.window);
      const auto& old = of_key ? old_keys_[stream] : old_values_[stream];
      std::copy_n(old.begin() + ((p - first) * sizes_.heads + h) * size, size, features.begin());
    }
    return features;
  }

  // What a stream's head has from its oldest step that is known to its newest one.
  struct History {
    int64_t first;
    std::vector<std::vector<double>> keys, values;
    std::vector<bool> has_key;
  };

  History HistoryOf(int64_t m, int64_t h) {
    const int64_t position = positions_[streams_[m]];
    History history = {position - std::min(position, sizes_.window), {}, {}, {}};
    for (int64_t p = history.first; p < position + sizes_.steps; ++p) {
      history.keys.push_back(Features(true, m, h, p));
      history.values.push_back(Features(false, m, h, p));
      history.has_key.push_back(HasKey(m, p));
    }
    return history;
  }

  void CheckStep(int64_t m, int64_t h, int64_t t, const History& history, double bound) {
    const Sizes& z = sizes_;
    const int64_t newest = positions_[streams_[m]] + t;
    const int64_t oldest = std::max<int64_t>(0, newest - z.window + 1);
    const int64_t row = (m * z.steps + t) * z.heads + h;
    std::vector<double> weights, sums(z.value_dim);
    double denominator = 0;
    for (int64_t p = oldest; p <= newest; ++p) {
      weights.push_back(0);
      if (!history.has_key[p - history.first]) continue;
      const double* key = history.keys[p - history.first].data();
      const double* value = history.values[p - history.first].data();
      const T* query = query_.data() + row * z.key_dim;
      const double logit = std::inner_product(key, key + z.key_dim, query, 0.0);
      weights.back() = std::exp(logit / std::sqrt(static_cast<double>(z.key_dim)));
      denominator += weights.back();
      for (int64_t d = 0; d < z.value_dim; ++d) sums[d] += weights.back() * value[d];
    }
    if (denominator == 0) denominator = 1;  // nothing to attend to: zeros
    for (int64_t d = 0; d < z.value_dim; ++d) {
      ASSERT_NEAR(output_[row * z.value_dim + d], sums[d] / denominator, bound);
    }
    const int64_t unfilled = z.window - (newest - oldest + 1);
    for (int64_t c = 0; c < z.window && check_scores_; ++c) {
      const double expected = c < unfilled ? 0 : weights[c - unfilled] / denominator;
      const int64_t scores_row = (m * z.heads + h) * z.steps + t;
      ASSERT_NEAR(scores_[scores_row * z.window + c], expected, bound);
    }
  }

  // Expects equal numbers; NaN equals NaN.
  static void ExpectSame(double got, double expected) {
    if (std::isnan(got) && std::isnan(expected)) return;
    ASSERT_EQ(got, expected);
  }

  void CheckRing(int64_t m, int64_t h, const History& history) {
    const Sizes& z = sizes_;
    const int64_t end = positions_[streams_[m]] + z.steps;
    for (int64_t p = std::max<int64_t>(0, end - z.window); p < end; ++p) {
      const auto& key = history.keys[p - history.first];
      const auto& value = history.values[p - history.first];
      const C* key_row = KeyRow(streams_[m], h, p);
      const C* value_row = ValueRow(streams_[m], h, p);
      for (int64_t d = 0; d < z.key_dim; ++d) ExpectSame(Widen(key_row[d]), key[d]);
      for (int64_t d = 0; d < z.value_dim; ++d) ExpectSame(Widen(value_row[d]), value[d]);
      ASSERT_EQ(bool(key_mask_cache_[streams_[m] * z.window + p % z.window]),
                history.has_key[p - history.first]);
    }
  }

  // Checks the copied steps before the call, oldest first.
  void CheckWindow(int64_t m, int64_t h, const History& history) {
    const Sizes& z = sizes_;
    const int64_t position = positions_[streams_[m]];
    const std::vector<double> zero_key(z.key_dim), zero_value(z.value_dim);
    for (int64_t i = 0; i < z.window - 1; ++i) {
      const int64_t p = position - (z.window - 1) + i;
      const int64_t row = (m * z.heads + h) * (z.window - 1) + i;
      const auto& key = p < 0 ? zero_key : history.keys[p - history.first];
      const auto& value = p < 0 ? zero_value : history.values[p - history.first];
      for (int64_t d = 0; d < z.key_dim; ++d) {
        ExpectSame(Widen(window_key_[row * z.key_dim + d]), key[d]);
      }
      for (int64_t d = 0; d < z.value_dim; ++d) {
        ExpectSame(Widen(window_value_[row * z.value_dim + d]), value[d]);
      }
      ASSERT_EQ(bool(window_key_mask_[m * (z.window - 1) + i]),
                p >= 0 && history.has_key[p - history.first]);
    }
  }

  Sizes sizes_;
  std::vector<int64_t> positions_;
  std::vector<int32_t> streams_;
  std::mt19937 random_{7};
  std::normal_distribution<double> distribution_;
  Unaligned<T> query_;
  Unaligned<C> key_, value_, key_cache_, value_cache_;
  Unaligned<T> output_, scores_;
  Unaligned<C> window_key_, window_value_;
  std::vector<char> key_mask_, key_mask_cache_, window_key_mask_;
  std::vector<std::vector<double>> old_keys_, old_values_;
  std::vector<std::vector<bool>> old_key_mask_;
  std::vector<T> parts_;
  bool check_scores_ = true;
};

// The compute type, the type of keys and values, and the target.
template <typename T, typename C, Target target>
struct Kernel {
  using Compute = T;
  using Cache = C;
  static constexpr Target kTarget = target;
};

template <typename K>
class SingleOutputTest : public ::testing::Test {
 public:
  using OneCall = Call<typename K::Compute, typename K::Cache>;
  static constexpr double kBound = sizeof(typename K::Compute) == 4 ? 5e-6 : 1e-13;

  void SetUp() override {
    const std::string error = UseTarget(NameOf(K::kTarget));
    if (!error.empty()) GTEST_SKIP() << error;
  }
  void TearDown() override { UseTarget(""); }
};

}  // namespace continual_transformers

#endif  // CONTINUAL_TRANSFORMERS_TESTS_CC_SINGLE_OUTPUT_CASE_H_
