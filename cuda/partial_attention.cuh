// One query's attention to some rows of its window, by the threads of one block.

#ifndef CONTINUAL_TRANSFORMERS_CUDA_PARTIAL_ATTENTION_CUH_
#define CONTINUAL_TRANSFORMERS_CUDA_PARTIAL_ATTENTION_CUH_

#include <cuda_runtime.h>

#include <cstdint>
#include <limits>

#include "cc/attention/online_softmax.h"
#include "cuda/arrival.cuh"
#include "cuda/elements.cuh"
#include "cuda/warp.cuh"

namespace continual_transformers {

// The threads of a block that is launched for attention. In a persistent kernel it has more.
constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kLanesPerWarp;

// The number of blocks that fit on a multiprocessor at once. With 4, a thread has 128 registers,
// and 64 KB of loads are in flight. Without this limit the compiler uses up to 161 registers. With
// 5 blocks it spills.
template <typename T>
constexpr int kBlocksPerMultiprocessor = sizeof(T) == 8 ? 3 : 4;

// How a row is divided among the lanes of a group. Each of kLanes lanes makes kLoads loads of
// kElements elements. Load l of lane j begins at element (l * kLanes + j) * kElements. The block
// has kThreads threads.
template <int kElements_, int kLanes_, int kLoads_, int kThreads_>
struct RowLayout {
  static constexpr int kElements = kElements_, kLanes = kLanes_, kLoads = kLoads_;
  static constexpr int kThreads = kThreads_, kWarps = kThreads / kLanesPerWarp;
  static constexpr int kElementsPerLane = kElements * kLoads;
  static constexpr int kLargest = kElementsPerLane * kLanes;
  static constexpr int kGroups = kThreads / kLanes;
  // The rows of keys and of values that are loaded before the first is used.
  static constexpr int kRowsAtATime = kLoads == 1 ? 4 : 1;

  __device__ static int Lane() { return threadIdx.x % kLanes; }
  __device__ static int Group() { return threadIdx.x / kLanes; }
  __device__ static int Element(int load) { return Lane() * kElements + load * kStride; }
  static constexpr int kStride = kLanes * kElements;  // from one load of a lane to its next
};

// The layout for rows of any size up to kLargest, of which every element is loaded by itself.
template <int kBlockThreads>
using LargestLayoutOf = RowLayout<1, 32, 8, kBlockThreads>;
using LargestLayout = LargestLayoutOf<kThreads>;

// Returns the size of the larger head, of keys or of values.
template <typename Params>
int64_t LargerHead(const Params& params) {
  return params.key_dim > params.value_dim ? params.key_dim : params.value_dim;
}

// Returns f(layout), with the layout for rows of `size` elements that are loaded in vectors of
// kElements. The sums of retroactive attention depend on the layout: whoever changes it changes the
// orders of retroactive_rule.h.
#ifdef __CUDACC__
#pragma nv_exec_check_disable  // f is of the host or of the GPU, as its caller is.
#endif
template <int kElements, int kBlockThreads = kThreads, typename F>
__host__ __device__ auto WithLayout(int64_t size, const F& f) {
  if constexpr (kElements > 1) {
    const int64_t vectors = size / kElements;
    if (vectors <= 4) return f(RowLayout<kElements, 4, 1, kBlockThreads>{});
    if (vectors <= 8) return f(RowLayout<kElements, 8, 1, kBlockThreads>{});
    if (vectors <= 16) return f(RowLayout<kElements, 16, 1, kBlockThreads>{});
    if (vectors <= 32) return f(RowLayout<kElements, 32, 1, kBlockThreads>{});
  }
  return f(LargestLayoutOf<kBlockThreads>{});
}

// A row, from a lane's first element on.
template <typename C>
struct Row {
  const C* key;
  const C* value;
  bool attended;
};

template <typename T, typename C, typename L>
class PartialAttention {
 public:
  __device__ PartialAttention(const T* query, int64_t key_dim, int64_t value_dim, T scale)
      : key_dim_(static_cast<int>(key_dim)),
        value_dim_(static_cast<int>(value_dim)),
        scale_(scale) {
    ForEachElement([&](int i, int element) {
      query_[i] = element < key_dim_ ? query[element] : T(0);
      sum_[i] = T(0);
    });
  }

  // Attends to columns begin, ..., end - 1. row(column) returns a column's row. A group takes kRows
  // rows at a time. The logits are written to `scores`; null: not wanted.
  template <int kRows, typename RowOf>
  __device__ void Attend(int begin, int end, const RowOf& row, T* scores) {
    Attend<kRows>(begin, end, row, scores, [](T logit, int) { return logit; });
  }

  // The same with the logits logit_of(scaled product, column).
  template <int kRows, typename RowOf, typename LogitOf>
  __device__ void Attend(int begin, int end, const RowOf& row, T* scores, const LogitOf& logit_of) {
    // Zeros where a lane has nothing to load, so that products with them are not NaN.
    Loaded key[kRows] = {}, value[kRows] = {};
    // Every group has the same number of turns, because shuffles need all lanes of a warp.
#pragma unroll 1
    for (int base = begin; base < end; base += L::kGroups * kRows) {
      bool attended[kRows];
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        // Beyond the end the last row is loaded again. That avoids a branch between the loads.
        const int column = Column(base, r);
        const Row<C> from = row(column < end ? column : end - 1);
        attended[r] = from.attended & (column < end);
        key[r].Load(from.key, key_dim_);
        value[r].Load(from.value, value_dim_);
      }
      T logits[kRows];
      T largest = -std::numeric_limits<T>::infinity();
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const int column = Column(base, r);
        const T logit = logit_of(Dot(key[r]) * scale_, column < end ? column : end - 1);
        // The logit of a row that is not attended to is dropped, even if it is NaN.
        logits[r] = attended[r] ? logit : -std::numeric_limits<T>::infinity();
        if (logits[r] > largest) largest = logits[r];
      }
      if (scores != nullptr && L::Lane() == 0) {
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          if (Column(base, r) < end) scores[Column(base, r)] = logits[r];
        }
      }
      const T rescale = softmax_.Raise(largest);
      ForEachElement([&](int i, int) { sum_[i] *= rescale; });
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const T weight = softmax_.Weight(logits[r]);
        softmax_.denominator += weight;
        ForEachLoad(
            [&](int load, int i) {
              const T x = value[r].vectors[load].Get(i % L::kElements);
              sum_[i] += weight * (attended[r] ? x : T(0));
            },
            value_dim_);
      }
    }
  }

  // Merges the groups. After it, all threads know the block's softmax, and Store() writes the
  // block's sum of values.
  __device__ void MergeGroups() {
#pragma unroll
    for (int distance = L::kLanes; distance < kLanesPerWarp; distance *= 2) {
      OnlineSoftmax<T> other;
      other.max = OfLaneAcross(softmax_.max, distance);
      other.denominator = OfLaneAcross(softmax_.denominator, distance);
      const auto factors = softmax_.Merge(other);
      ForEachElement([&](int i, int) {
        const T others = OfLaneAcross(sum_[i], distance);
        sum_[i] = sum_[i] * factors.own + others * factors.others;
      });
    }
    Shared& shared = SharedByWarps();
    const int warp = threadIdx.x / kLanesPerWarp;
    if (threadIdx.x % kLanesPerWarp < L::kLanes) {
      ForEachElement([&](int i, int element) { shared.sums[warp][element] = sum_[i]; });
    }
    if (threadIdx.x % kLanesPerWarp == 0) {
      shared.max[warp] = softmax_.max;
      shared.denominator[warp] = softmax_.denominator;
    }
    __syncthreads();
    softmax_ = {};
#pragma unroll
    for (int w = 0; w < L::kWarps; ++w) softmax_.Merge({shared.max[w], shared.denominator[w]});
  }

  __device__ const OnlineSoftmax<T>& softmax() const { return softmax_; }

  // Writes the block's sum of values times `factor` to output [Dv].
  __device__ void Store(T factor, T* output) const {
    const Shared& shared = SharedByWarps();
#pragma unroll 1
    for (int d = threadIdx.x; d < value_dim_; d += L::kThreads) {
      T sum = T(0);
#pragma unroll
      for (int w = 0; w < L::kWarps; ++w) sum += shared.sums[w][d] * softmax_.Weight(shared.max[w]);
      output[d] = sum * factor;
    }
  }

  // Leaves what the block has read in `parts`, as part `part` of its query's window. Returns
  // whether it is the last of `num_parts` blocks that do, which then merges them. See PartsMerger
  // for `parts`, and ArrivesLast() for `counter`.
  __device__ bool LeavePart(int part, int num_parts, T* parts, uint32_t* counter) const {
    T* const own = parts + static_cast<int64_t>(part) * (value_dim_ + 2);
    Store(T(1), own);
    if (threadIdx.x == 0) {
      own[value_dim_] = softmax_.max;
      own[value_dim_ + 1] = softmax_.denominator;
    }
    return ArrivesLast(counter, static_cast<uint32_t>(num_parts));
  }

 private:
  // This lane's elements of a row.
  struct Loaded {
    Vector<C, L::kElements> vectors[L::kLoads];

    __device__ void Load(const C* row, int size) {
#pragma unroll
      for (int load = 0; load < L::kLoads; ++load) {
        if (L::Element(load) < size) {
          vectors[load] =
              *reinterpret_cast<const Vector<C, L::kElements>*>(row + load * L::kStride);
        }
      }
    }
  };

  struct Shared {
    T sums[L::kWarps][L::kLargest];
    T max[L::kWarps], denominator[L::kWarps];
  };
  __device__ static Shared& SharedByWarps() {
    __shared__ Shared shared;
    return shared;
  }

  __device__ static int Column(int base, int r) { return base + r * L::kGroups + L::Group(); }

  // Calls f(i, element) for this lane's i-th element.
  template <typename F>
  __device__ static void ForEachElement(const F& f) {
#pragma unroll
    for (int load = 0; load < L::kLoads; ++load) {
#pragma unroll
      for (int e = 0; e < L::kElements; ++e) f(load * L::kElements + e, L::Element(load) + e);
    }
  }

  // Calls f(load, i) for this lane's elements. Skips loads that no lane needs for a row of this
  // size.
  template <typename F>
  __device__ static void ForEachLoad(const F& f, int size) {
#pragma unroll
    for (int load = 0; load < L::kLoads; ++load) {
      if (L::kLoads > 1 && load * L::kStride >= size) continue;
#pragma unroll
      for (int e = 0; e < L::kElements; ++e) f(load, load * L::kElements + e);
    }
  }

  // Returns query . key, to all lanes of the group.
  __device__ T Dot(const Loaded& key) const {
    T sum = T(0);
    ForEachLoad(
        [&](int load, int i) { sum += query_[i] * key.vectors[load].Get(i % L::kElements); },
        key_dim_);
    return SumOverLanes<L::kLanes>(sum);
  }

  const int key_dim_, value_dim_;
  const T scale_;
  T query_[L::kElementsPerLane];
  T sum_[L::kElementsPerLane];
  OnlineSoftmax<T> softmax_;
};

// Merges the parts of a query's attention, [parts, size + 2]: sum of values, maximum, denominator.
// All threads of a block share the work: in one thread, the loop would wait for each part in turn.
template <typename T, int kThreads>
class PartsMerger {
 public:
  __device__ PartsMerger(const T* parts, int num_parts, int64_t size)
      : parts_(parts), num_parts_(num_parts), size_(static_cast<int>(size)) {
    OnlineSoftmax<T> softmax;
    for (int part = threadIdx.x; part < num_parts_; part += kThreads) {
      softmax.Merge({Part(part)[size_], Part(part)[size_ + 1]});
    }
#pragma unroll
    for (int distance = kLanesPerWarp / 2; distance > 0; distance /= 2) {
      softmax.Merge(
          {OfLaneAcross(softmax.max, distance), OfLaneAcross(softmax.denominator, distance)});
    }
    __shared__ T max[kWarps], denominator[kWarps];
    if (threadIdx.x % kLanesPerWarp == 0) {
      max[threadIdx.x / kLanesPerWarp] = softmax.max;
      denominator[threadIdx.x / kLanesPerWarp] = softmax.denominator;
    }
    __syncthreads();
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) softmax_.Merge({max[warp], denominator[warp]});
  }

  __device__ const OnlineSoftmax<T>& softmax() const { return softmax_; }

  // Writes the query's sum of values times `factor` to output [size].
  __device__ void Store(T factor, T* output) const {
    __shared__ T sums[kThreads];
#pragma unroll 1
    for (int first = 0; first < size_; first += kThreads) {
      const int elements = size_ - first < kThreads ? size_ - first : kThreads;
      // The threads that are left over share the parts of an element.
      const int sharers = kThreads / elements;
      const int d = threadIdx.x % elements, sharer = threadIdx.x / elements;
      T sum = T(0);
      if (sharer < sharers) {
#pragma unroll 8
        for (int part = sharer; part < num_parts_; part += sharers) {
          sum += Part(part)[first + d] * softmax_.Weight(Part(part)[size_]);
        }
      }
      sums[threadIdx.x] = sum;
      __syncthreads();
      if (sharer == 0) {
        for (int other = 1; other < sharers; ++other) sum += sums[other * elements + d];
        output[first + d] = sum * factor;
      }
      __syncthreads();
    }
  }

 private:
  __device__ const T* Part(int part) const {
    return parts_ + static_cast<int64_t>(part) * (size_ + 2);
  }

  static constexpr int kWarps = kThreads / kLanesPerWarp;

  const T* const parts_;
  const int num_parts_, size_;
  OnlineSoftmax<T> softmax_;
};

}  // namespace continual_transformers

#endif  // CONTINUAL_TRANSFORMERS_CUDA_PARTIAL_ATTENTION_CUH_
