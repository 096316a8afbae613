// The kernels of retroactive attention. A Source says where rings and sums lie: the op and sessions
// each have one.
//
//   using Number = float;                                          or double
//   RetroactiveHead<Number> Head(int64_t m, int h) const;          of row m of the call
//   bool HasKey(int64_t m, int64_t t) const;                       whether its step t has a key
//
// cc/attention/retroactive.h has the algorithm. Here a group of lanes takes a row of the window. It
// reads the row's query once, for the key that enters and the key that leaves. Then all threads of
// the block compute, one after the other, the newest row and the rows whose update is not exact
// enough.

#ifndef CONTINUAL_TRANSFORMERS_CUDA_RETROACTIVE_CUH_
#define CONTINUAL_TRANSFORMERS_CUDA_RETROACTIVE_CUH_

#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "cc/attention/retroactive_rule.h"
#include "cuda/elements.cuh"
#include "cuda/for_each.cuh"
#include "cuda/launch.cuh"
#include "cuda/partial_attention.cuh"
#include "cuda/warp.cuh"

namespace continual_transformers {

// One head of one stream: the steps of a launch, and the stream's state before them.
template <typename T>
struct RetroactiveHead {
  int64_t taken;  // steps before this launch; below 0: there is no such stream
  // The launch's steps. A stride goes from one to the next.
  const T *query, *key, *value;
  int64_t query_stride, key_stride, value_stride;
  // Rings. `query_row` goes from one row to the next.
  T *query_ring, *key_ring, *value_ring;
  int64_t query_row, key_row, value_row;
  bool* mask_ring;       // [N]
  double* softmax;       // [4, N]
  double* weighted_sum;  // [N, Dv]
  double* made_with;     // [2]
  T* output;             // the first step's oldest row
  int64_t output_stride, output_row;
};

template <typename Source>
struct RetroactiveLaunch {
  using T = typename Source::Number;

  Source source;
  int64_t streams, steps, heads, window, key_dim, value_dim;
  T scale;
  bool recompute;  // all rows of all steps. If false, the launch is of one step.
  bool keep;       // whether the rows' sums are stored
  bool overlap;    // see Launch()
};

// Returns a * b. The compiler may otherwise fuse the product with a later sum in one place and not
// in another, which gives other bits.
__device__ inline float RoundedProduct(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}
__device__ inline double RoundedProduct(double a, double b) {
#ifdef __CUDA_ARCH__
  return __dmul_rn(a, b);
#else
  return a * b;
#endif
}

// A lane's elements of a row, and zeros where the row has none.
template <typename T, typename L>
struct LaneRow {
  T x[L::kElementsPerLane] = {};

  __device__ LaneRow() {}
  __device__ LaneRow(const T* row, int size) {
#pragma unroll
    for (int load = 0; load < L::kLoads; ++load) {
      if (L::Element(load) >= size) continue;
      const auto vector = *reinterpret_cast<const Vector<T, L::kElements>*>(row + L::Element(load));
#pragma unroll
      for (int e = 0; e < L::kElements; ++e) x[load * L::kElements + e] = vector.Get(e);
    }
  }
};

// Two positive doubles in the bits of one: the upper halves of their bits. They are rounded down by
// at most 2^-20, which does not matter for a peak.
__device__ inline uint64_t BitsOf(double x) {
  uint64_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}
__device__ inline double DoubleOf(uint64_t bits) {
  double x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}
__device__ inline double PackPeaks(double denominator, double magnitude) {
  return DoubleOf((BitsOf(denominator) & 0xFFFFFFFF00000000u) | BitsOf(magnitude) >> 32);
}
__device__ inline double DenominatorPeak(double peaks) {
  return DoubleOf(BitsOf(peaks) & 0xFFFFFFFF00000000u);
}
__device__ inline double MagnitudePeak(double peaks) { return DoubleOf(BitsOf(peaks) << 32); }

// Elements that a lane loads or stores by vectors of 16 bytes.
template <typename T, int kElements>
struct alignas(kElements == 1 ? sizeof(T) : kVectorBytes) Pack {
  T x[kElements];
};

// How sums in this layout are made: an order of retroactive_rule.h. It assumes that exp gives the
// same bits on the GPUs among which streams move.
template <typename L>
constexpr int64_t kOrderOf = L::kElements == 1 ? kScalarOrderOnGpu : kVectorOrderOnGpu;

// The blocks of an update, for each head of a stream.
template <typename L>
__host__ __device__ constexpr int64_t UpdateBlocks(int64_t window) {
  return (window + L::kGroups - 1) / L::kGroups;
}

// A block's share of the update of one head: a row of the ring for each of its groups.
template <typename Source, typename L>
class RetroactiveUpdate {
  using T = typename Source::Number;
  using Launch = RetroactiveLaunch<Source>;

 public:
  __device__ explicit RetroactiveUpdate(const Launch& p)
      : p_(p),
        window_(static_cast<int>(p.window)),
        key_dim_(static_cast<int>(p.key_dim)),
        value_dim_(static_cast<int>(p.value_dim)) {
    const int blocks = static_cast<int>(UpdateBlocks<L>(p.window));
    const int64_t pair = blockIdx.x / blocks, m = pair / p.heads;
    first_ = blockIdx.x % blocks * L::kGroups;
    head_ = p.source.Head(m, static_cast<int>(pair % p.heads));
    if (head_.taken < 0) return;
    row_ = static_cast<int>(head_.taken % window_);
    filled_ = static_cast<int>(head_.taken < window_ ? head_.taken + 1 : window_);
    has_key_ = p.source.HasKey(m, 0);
    had_key_ = head_.taken >= window_ && head_.mask_ring[row_];
  }

  __device__ void Run() {
    if (head_.taken < 0) return Fill(0, window_, std::numeric_limits<T>::quiet_NaN());
    // Rows of the ring that no step has written stand for the output's first ones.
    Fill(filled_, window_, T(0));
    __shared__ bool inexact[L::kGroups];
    const bool is_inexact = Update(first_ + L::Group());
    if (L::Lane() == 0) inexact[L::Group()] = is_inexact;
    __syncthreads();
#pragma unroll 1
    for (int group = 0; group < L::kGroups; ++group) {
      if (inexact[group]) ComputeExactly(first_ + group);
    }
  }

 private:
  static constexpr T kNotAttended = -std::numeric_limits<T>::infinity();

  // Fills the outputs of those of this block's rows that are in begin, ..., end - 1.
  __device__ void Fill(int begin, int end, T x) const {
    const int row = first_ + L::Group();
    if (row < begin || row >= end) return;
    T* const output = head_.output + (row - begin) * head_.output_row;
    for (int d = L::Lane(); d < value_dim_; d += L::kLanes) output[d] = x;
  }

  // The output of the query in this row of the ring.
  __device__ T* OutputOf(int row) const {
    const int age = row <= row_ ? row_ - row : row_ - row + window_;
    return head_.output + (window_ - 1 - age) * head_.output_row;
  }
  __device__ const T* QueryOf(int row) const {
    return row == row_ ? head_.query : head_.query_ring + row * head_.query_row;
  }
  __device__ const T* KeyOf(int row) const {
    return row == row_ ? head_.key : head_.key_ring + row * head_.key_row;
  }
  __device__ const T* ValueOf(int row) const {
    return row == row_ ? head_.value : head_.value_ring + row * head_.value_row;
  }

  // Every logit of a query and a key has the same bits, wherever it is computed.
  __device__ T Logit(const LaneRow<T, L>& query, const LaneRow<T, L>& key) const {
    T sum = T(0);
#pragma unroll
    for (int i = 0; i < L::kElementsPerLane; ++i) sum = std::fma(query.x[i], key.x[i], sum);
    return RoundedProduct(SumOverLanes<L::kLanes>(sum), p_.scale);
  }

  // Logits above kMostAboveReference only need to give more than kMostWeight. NaN stays NaN.
  __device__ static T WeightOf(T logit, T reference) {
    constexpr T kMost = static_cast<T>(kMostAboveReference + 1);
    const T x = logit - reference;
    return std::exp(x > kMost ? kMost : x);
  }

  __device__ static bool IsFinite(double magnitude) {
    return magnitude < std::numeric_limits<double>::infinity();
  }

  // The sum of the magnitudes of a value. Infinities and NaN count as 0: they spoil the sums that
  // they are in, which are computed exactly when they leave, and say nothing about the others.
  __device__ static double MagnitudeOf(const LaneRow<T, L>& value) {
    double sum = 0;
#pragma unroll
    for (int i = 0; i < L::kElementsPerLane; ++i) {
      const double magnitude = std::fabs(static_cast<double>(value.x[i]));
      if (IsFinite(magnitude)) sum += magnitude;
    }
    return SumOverLanes<L::kLanes>(sum);
  }

  __device__ static bool AllFinite(const LaneRow<T, L>& value) {
    T zero = T(0);  // Infinity and NaN times 0 are NaN.
#pragma unroll
    for (int i = 0; i < L::kElementsPerLane; ++i) zero += value.x[i] * T(0);
    return SumOverLanes<L::kLanes>(zero) == T(0);
  }

  // Updates a row for the key that enters and the one that leaves. Returns whether the row must be
  // computed exactly: because it is the newest, or because an update is not exact enough.
  __device__ bool Update(int row) const {
    // Shuffles need all lanes, so groups without a row to update take the newest and store nothing.
    const bool kept = row < filled_ && row != row_;
    const int at = kept ? row : row_;
    const LaneRow<T, L> none;
    const LaneRow<T, L> leaving_value =
        had_key_ ? LaneRow<T, L>(head_.value_ring + row_ * head_.value_row, value_dim_) : none;
    const double made_now = ArithmeticOf(kOrderOf<L>, head_.taken);
    // An infinity or NaN that leaves has spoiled every sum that it was in.
    const bool updates = head_.made_with[0] == made_now &&
                         head_.made_with[1] == static_cast<double>(p_.scale) &&
                         AllFinite(leaving_value);
    if (!updates) return row < filled_;

    const LaneRow<T, L> query(QueryOf(at), key_dim_);
    const LaneRow<T, L> fresh_value = has_key_ ? LaneRow<T, L>(head_.value, value_dim_) : none;
    double* const softmax = head_.softmax + at;
    const T reference = kept ? static_cast<T>(softmax[0]) : T(0);
    double fresh = 0, leaving = 0;
    if (has_key_) {
      fresh = WeightOf(Logit(query, LaneRow<T, L>(head_.key, key_dim_)), reference);
    }
    if (had_key_) {
      const LaneRow<T, L> key(head_.key_ring + row_ * head_.key_row, key_dim_);
      leaving = WeightOf(Logit(query, key), reference);
    }
    const double before = kept ? softmax[window_] : 0, peaks = kept ? softmax[3 * window_] : 0;
    const double denominator = before + fresh - leaving;
    double magnitude = kept ? softmax[2 * window_] : 0;
    magnitude = std::fma(fresh, MagnitudeOf(fresh_value), magnitude);
    magnitude = std::fma(-leaving, MagnitudeOf(leaving_value), magnitude);
    __syncwarp();  // Lane 0 stores below what the other lanes have read.
    if (!kept) return row == row_;

    const double denominator_peak = DenominatorPeak(peaks), magnitude_peak = MagnitudePeak(peaks);
    // A NaN that stays changes nothing. One that leaves has spoiled the sums. A row that has had no
    // key yet has no reference.
    const bool is_inexact = denominator < kLeastOfPeak<T> * denominator_peak ||
                            magnitude < kLeastOfPeak<T> * magnitude_peak || fresh > kMostWeight ||
                            leaving != leaving || (has_key_ && before == 0);
    if (is_inexact) return true;
    if (p_.keep && L::Lane() == 0) {
      softmax[window_] = denominator;
      softmax[2 * window_] = magnitude;
      softmax[3 * window_] =
          PackPeaks(denominator > denominator_peak ? denominator : denominator_peak,
                    magnitude > magnitude_peak ? magnitude : magnitude_peak);
    }
    double* const sums = head_.weighted_sum + static_cast<int64_t>(at) * value_dim_;
    T* const output = OutputOf(at);
    const double normalizer = Normalizer(denominator);
#pragma unroll
    for (int load = 0; load < L::kLoads; ++load) {
      if (L::Element(load) >= value_dim_) continue;
      auto* const at_sums = reinterpret_cast<Pack<double, L::kElements>*>(sums + L::Element(load));
      auto sum = *at_sums;
      Pack<T, L::kElements> rounded;
#pragma unroll
      for (int e = 0; e < L::kElements; ++e) {
        const int i = load * L::kElements + e;
        sum.x[e] = std::fma(fresh, static_cast<double>(fresh_value.x[i]), sum.x[e]);
        sum.x[e] = std::fma(-leaving, static_cast<double>(leaving_value.x[i]), sum.x[e]);
        rounded.x[e] = static_cast<T>(sum.x[e] * normalizer);
      }
      if (p_.keep) *at_sums = sum;
      *reinterpret_cast<Pack<T, L::kElements>*>(output + L::Element(load)) = rounded;
    }
    return false;
  }

  __device__ static double Normalizer(double denominator) {
    return denominator == 0 ? 0 : 1 / denominator;
  }

  struct Shared {
    double sums[kWarps][L::kLargest];
    double denominators[kWarps], magnitudes[kWarps];
    T largest[kWarps];
  };
  __device__ static Shared& SharedByWarps() {
    __shared__ Shared shared;
    return shared;
  }

  // Computes a row from all keys of the window, by all threads of the block. The keys are read
  // twice: the weights of the sums must be relative to their final reference, bit for bit.
  __device__ void ComputeExactly(int row) const {
    const LaneRow<T, L> query(QueryOf(row), key_dim_);
    const T largest = LargestLogit(query);
    const T reference = largest == kNotAttended ? T(0) : largest;
    double denominator = 0, magnitude = 0, sums[L::kElementsPerLane] = {};
    ForEachLogit(query, [&](int at, T logit, bool attended) {
      const double weight = attended ? WeightOf(logit, reference) : T(0);
      const LaneRow<T, L> value(ValueOf(at), value_dim_);
      denominator += weight;
#pragma unroll
      for (int i = 0; i < L::kElementsPerLane; ++i) {
        const double x = attended ? static_cast<double>(value.x[i]) : 0;
        sums[i] = std::fma(weight, x, sums[i]);
        const double one = weight * std::fabs(x);
        if (IsFinite(one)) magnitude += one;
      }
    });
    // Merges the groups of each warp, and then the warps.
#pragma unroll
    for (int distance = L::kLanes; distance < kLanesPerWarp; distance *= 2) {
      denominator += OfLaneAcross(denominator, distance);
#pragma unroll
      for (int i = 0; i < L::kElementsPerLane; ++i) sums[i] += OfLaneAcross(sums[i], distance);
    }
    magnitude = SumOverLanes<kLanesPerWarp>(magnitude);
    Shared& shared = SharedByWarps();
    const int warp = threadIdx.x / kLanesPerWarp, lane = threadIdx.x % kLanesPerWarp;
    if (lane < L::kLanes) {
#pragma unroll
      for (int load = 0; load < L::kLoads; ++load) {
#pragma unroll
        for (int e = 0; e < L::kElements; ++e) {
          shared.sums[warp][L::Element(load) + e] = sums[load * L::kElements + e];
        }
      }
    }
    if (lane == 0) {
      shared.denominators[warp] = denominator;
      shared.magnitudes[warp] = magnitude;
    }
    __syncthreads();
    denominator = magnitude = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      denominator += shared.denominators[w];
      magnitude += shared.magnitudes[w];
    }
    if (p_.keep && threadIdx.x == 0) {
      double* const softmax = head_.softmax + row;
      softmax[0] = reference;
      softmax[window_] = denominator;
      softmax[2 * window_] = magnitude;
      softmax[3 * window_] = PackPeaks(denominator, magnitude);
    }
    T* const output = OutputOf(row);
    for (int d = threadIdx.x; d < value_dim_; d += kThreads) {
      double sum = 0;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) sum += shared.sums[w][d];
      if (p_.keep) head_.weighted_sum[static_cast<int64_t>(row) * value_dim_ + d] = sum;
      output[d] = static_cast<T>(sum * Normalizer(denominator));
    }
    __syncthreads();  // before the next row's sums
  }

  // Calls f(row, logit, attended) for a group's share of the window's rows, with all lanes.
  template <typename F>
  __device__ void ForEachLogit(const LaneRow<T, L>& query, const F& f) const {
#pragma unroll(L::kLoads == 1 ? 4 : 1)
    for (int base = 0; base < filled_; base += L::kGroups) {
      const int mine = base + L::Group(), at = mine < filled_ ? mine : filled_ - 1;
      const T logit = Logit(query, LaneRow<T, L>(KeyOf(at), key_dim_));
      f(at, logit, mine < filled_ && (at == row_ ? has_key_ : head_.mask_ring[at]));
    }
  }

  // Returns the largest logit that is attended to, or kNotAttended, to all threads. Ignores NaN.
  __device__ T LargestLogit(const LaneRow<T, L>& query) const {
    T largest = kNotAttended;
    const auto raise = [&largest](T x) {
      if (x > largest) largest = x;
    };
    ForEachLogit(query, [&](int, T logit, bool attended) {
      if (attended) raise(logit);
    });
#pragma unroll
    for (int distance = L::kLanes; distance < kLanesPerWarp; distance *= 2) {
      raise(OfLaneAcross(largest, distance));
    }
    Shared& shared = SharedByWarps();
    if (threadIdx.x % kLanesPerWarp == 0) {
      shared.largest[threadIdx.x / kLanesPerWarp] = largest;
    }
    __syncthreads();
#pragma unroll
    for (int w = 0; w < kWarps; ++w) raise(shared.largest[w]);
    return largest;
  }

  const Launch& p_;
  const int window_, key_dim_, value_dim_;
  RetroactiveHead<T> head_;
  int first_;                               // this block's first row of the ring
  int row_ = 0, filled_ = 0;                // the newest row, and how many there are with it
  bool has_key_ = false, had_key_ = false;  // the step that enters, and the one that leaves
};

template <typename Source, typename L>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor<typename Source::Number>)
    RetroactiveUpdateKernel(const __grid_constant__ RetroactiveLaunch<Source> p) {
  ReleaseNext();
  WaitForPrevious();
  RetroactiveUpdate<Source, L>(p).Run();
}

// A block computes one row of one step's output, as single_output.cu does.
template <typename Source, typename L>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor<typename Source::Number>)
    RetroactiveRecomputeKernel(const __grid_constant__ RetroactiveLaunch<Source> p) {
  ReleaseNext();
  WaitForPrevious();
  using T = typename Source::Number;
  const int heads = static_cast<int>(p.heads), window = static_cast<int>(p.window);
  const int h = blockIdx.x % heads, i = blockIdx.x / heads % window;
  const int64_t rest = blockIdx.x / heads / window, t = rest % p.steps, m = rest / p.steps;
  const RetroactiveHead<T> head = p.source.Head(m, h);
  T* const output = head.output + t * head.output_stride + i * head.output_row;
  if (head.taken < 0) {
    for (int d = threadIdx.x; d < p.value_dim; d += kThreads) {
      output[d] = std::numeric_limits<T>::quiet_NaN();
    }
    return;
  }
  const int64_t position = head.taken + t, step = position - (window - 1) + i;
  const int64_t oldest = position < window ? 0 : position - (window - 1);
  // A query of a step that was never taken attends to nothing.
  const int count = step < 0 ? 0 : static_cast<int>(position - oldest + 1);
  // The ring still has the steps before this launch.
  const int from_ring = static_cast<int>(head.taken - oldest < 0 ? 0 : head.taken - oldest);
  const int first_row = static_cast<int>(oldest % window);
  const int64_t first_step = oldest + from_ring - head.taken;
  const auto row = [&](int k) {
    if (k >= from_ring) {
      const int64_t at = first_step + (k - from_ring);
      return Row<T>{head.key + at * head.key_stride + L::Element(0),
                    head.value + at * head.value_stride + L::Element(0), p.source.HasKey(m, at)};
    }
    const int at = first_row + k < window ? first_row + k : first_row + k - window;
    return Row<T>{head.key_ring + at * head.key_row + L::Element(0),
                  head.value_ring + at * head.value_row + L::Element(0), head.mask_ring[at]};
  };
  const T* const query = step >= head.taken
                             ? head.query + (step - head.taken) * head.query_stride
                             : head.query_ring + (step < 0 ? 0 : step % window) * head.query_row;
  PartialAttention<T, T, L> attention(query, p.key_dim, p.value_dim, p.scale);
  attention.template Attend<L::kRowsAtATime>(0, count, row, nullptr);
  attention.MergeGroups();
  attention.Store(attention.softmax().Normalizer(), output);
}

// Computes the outputs of p.steps steps, and the rows' sums. L is the layout of the heads.
template <typename L, typename Source>
cudaError_t LaunchRetroactiveRows(const RetroactiveLaunch<Source>& p, cudaStream_t stream) {
  const int64_t pairs = p.streams * p.heads;
  if (p.recompute) {
    return Launch(RetroactiveRecomputeKernel<Source, L>, pairs * p.steps * p.window, kThreads,
                  p.overlap, stream, p);
  }
  return Launch(RetroactiveUpdateKernel<Source, L>, pairs * UpdateBlocks<L>(p.window), kThreads,
                p.overlap, stream, p);
}

// i is an element of the query, key and value of a head's step, one after the other.
template <typename Source>
struct KeepRetroactiveEach {
  RetroactiveLaunch<Source> p;
  int64_t kept;   // the last steps, at most N
  int64_t order;  // of the sums that were made; 0: there are none

  __device__ void operator()(int64_t i) const {
    const int64_t size = 2 * p.key_dim + p.value_dim, k = i % size, row = i / size;
    const int h = static_cast<int>(row % p.heads);
    const int64_t t = p.steps - kept + row / p.heads % kept, m = row / p.heads / kept;
    const auto head = p.source.Head(m, h);
    if (head.taken < 0) return;
    const int64_t at = (head.taken + t) % p.window;
    if (k < p.key_dim) {
      head.query_ring[at * head.query_row + k] = head.query[t * head.query_stride + k];
    } else if (k < 2 * p.key_dim) {
      const int64_t d = k - p.key_dim;
      head.key_ring[at * head.key_row + d] = head.key[t * head.key_stride + d];
    } else {
      const int64_t d = k - 2 * p.key_dim;
      head.value_ring[at * head.value_row + d] = head.value[t * head.value_stride + d];
    }
    if (h != 0 || k != 0) return;
    head.mask_ring[at] = p.source.HasKey(m, t);
    if (t != p.steps - 1) return;
    head.made_with[0] = order == 0 ? 0 : ArithmeticOf(order, head.taken + p.steps);
    head.made_with[1] = order == 0 ? 0 : static_cast<double>(p.scale);
  }
};

// Has the GPU load the code of the next function's kernel.
template <typename Source>
cudaError_t LoadKeepRetroactiveSteps(const RetroactiveLaunch<Source>&) {
  cudaFuncAttributes attributes;
  return cudaFuncGetAttributes(&attributes, ForEachKernel<KeepRetroactiveEach<Source>>);
}

// Writes the steps into the rings, after their outputs have been computed. L as before.
template <typename L, typename Source>
cudaError_t KeepRetroactiveSteps(const RetroactiveLaunch<Source>& p, cudaStream_t stream) {
  const int64_t kept = p.steps < p.window ? p.steps : p.window;
  const int64_t order = p.recompute ? 0 : kOrderOf<L>;
  return ForEach(p.streams * kept * p.heads * (2 * p.key_dim + p.value_dim),
                 KeepRetroactiveEach<Source>{p, kept, order}, p.overlap, stream);
}

}  // namespace continual_transformers

#endif  // CONTINUAL_TRANSFORMERS_CUDA_RETROACTIVE_CUH_
