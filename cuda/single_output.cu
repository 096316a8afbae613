// A block of threads takes one query, or one part of its window, and reads each of its rows once.
// Within a block, each group of lanes reads several rows of keys and values at a time, and keeps
// its own softmax and sum of values. The groups are merged when all rows are read. The last block
// to arrive does the work that needs all blocks: it merges parts, writes the rings of many steps,
// and advances positions. So a step is one launch.
//
// The alternative was a reduction through distributed shared memory. It needs compute capability
// 9.0 and joins at most 16 blocks, but one long window should be read by all multiprocessors.

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>

#include "cc/attention/online_softmax.h"
#include "cc/attention/step_types.h"
#include "cuda/arrival.cuh"
#include "cuda/elements.cuh"
#include "cuda/launch.cuh"
#include "cuda/partial_attention.cuh"
#include "cuda/single_output.h"
#include "cuda/window_parts.h"

namespace continual_transformers {
namespace {

// One block's share of a call.
template <typename T, typename C, typename L>
class QueryBlock {
 public:
  using Params = DeviceSingleOutputParams<T, C>;

  __device__ explicit QueryBlock(const Params& params) : p_(params) {}

  // Runs while the kernel before this one may still be writing the query.
  __device__ void Prefetch() const {
    const int64_t row = p_.num_heads * (p_.key_dim + p_.value_dim) * int64_t{sizeof(C)};
    const bool fits = p_.num_streams * p_.window * row <= kMostPrefetchedBytes;
    if (!p_.overlap || !fits || threadIdx.x != 0) return;
    const Place place = PlaceOfBlock();
    const int stream = Stream(place.m);
    // The stream may be written at this moment, so it can be any number.
    if (place.t != 0 || stream < 0 || stream >= p_.num_held) return;
    // A contiguous share of all rings of the stream. The rows of one head are not contiguous: they
    // lie between those of the other heads, whose blocks fetch the rest.
    const int64_t rows = p_.window * p_.num_heads, shares = Parts() * p_.num_heads;
    const int64_t share = place.part * p_.num_heads + place.h;
    const int64_t begin = rows * share / shares, end = rows * (share + 1) / shares;
    const auto prefetch = [&](const C* cache, const Strides& strides, int64_t size) {
      PrefetchIntoL2(cache + stream * strides.stream + begin * size,
                     (end - begin) * size * static_cast<int64_t>(sizeof(C)));
    };
    prefetch(p_.key_cache, p_.key_cache_strides, p_.key_dim);
    prefetch(p_.value_cache, p_.value_cache_strides, p_.value_dim);
  }

  __device__ void Run() {
    if (threadIdx.x == 0) {
      Here() = PlaceOfBlock();
      Look(&Here());
    }
    __syncthreads();
    const Place& here = Here();
    // All blocks of a row decide the same, so none waits for a block that has left.
    if (here.taken < 0) return Refuse();
    if (here.t == 0) CopyWindow();
    // If a call has only one step, the row that it overwrites has left the window, so no block
    // reads it.
    if (p_.update_state && p_.num_steps == 1 && here.part == 0) {
      WriteRing();
      if (here.h == 0) WriteMaskRing();
    }
    if (!Attend() || !p_.update_state) return;
    uint32_t* const pairs = p_.arrivals + p_.NumQueries();
    uint32_t* const rows = pairs + p_.num_streams * p_.num_heads;
    const uint32_t heads = static_cast<uint32_t>(p_.num_heads);
    if (p_.num_steps == 1) {
      if (threadIdx.x == 0 && ThreadArrivesLast(rows + here.m, heads)) Advance();
      return;
    }
    // The rows of a window are needed until all its queries are answered.
    if (!ArrivesLast(pairs + here.pair, static_cast<uint32_t>(p_.num_steps))) return;
    WriteRing();
    if (!ArrivesLast(rows + here.m, heads)) return;
    WriteMaskRing();
    if (threadIdx.x == 0) Advance();
  }

 private:
  // Sizes in 32 bits, read from the launch's parameters instead of kept in registers.
  __device__ int Window() const { return static_cast<int>(p_.window); }
  __device__ int Parts() const { return static_cast<int>(p_.window_parts); }
  // The distance from one row of a head's ring to the next.
  __device__ int KeyStep() const { return static_cast<int>(p_.key_cache_strides.step); }
  __device__ int ValueStep() const { return static_cast<int>(p_.value_cache_strides.step); }

  // Where in a call this block is. It is in shared memory, not in the registers of each thread.
  struct Place {
    int query, pair, m, h, t, part;
    int stream;
    int taken;         // steps before this call, at most the window; -1: there is no such stream
    int position_row;  // the ring's row for this call's first step
  };
  __device__ static Place& Here() {
    __shared__ Place place;
    return place;
  }

  // Returns what follows from the launch.
  __device__ Place PlaceOfBlock() const {
    Place place;
    const unsigned block = blockIdx.x;
    place.part = static_cast<int>(block % Parts());
    place.query = static_cast<int>(block / Parts());
    place.t = place.query % static_cast<int>(p_.num_steps);
    place.pair = place.query / static_cast<int>(p_.num_steps);
    place.h = place.pair % static_cast<int>(p_.num_heads);
    place.m = place.pair / static_cast<int>(p_.num_heads);
    return place;
  }

  // Reads the rest from the state. One thread calls it.
  __device__ void Look(Place* place) const {
    const bool first = place->t == 0 && place->h == 0 && place->part == 0;
    const bool wants_steps = first && p_.steps_taken != nullptr;
    place->stream = Stream(place->m);
    place->taken = -1;
    if (wants_steps) p_.steps_taken[place->m] = -1;
    if (place->stream < 0 || place->stream >= p_.num_held) return;
    const int64_t position = p_.position[place->stream];
    if (position < 0) return;
    place->taken = static_cast<int>(position < p_.window ? position : p_.window);
    place->position_row = static_cast<int>(position % p_.window);
    if (wants_steps) p_.steps_taken[place->m] = position + p_.num_steps;
  }

  // Reads the stream once: before WaitForPrevious() it may change between two reads.
  __device__ int Stream(int m) const {
    return p_.streams == nullptr ? m : *static_cast<const volatile int32_t*>(p_.streams + m);
  }

  // Returns this head's ring in a cache.
  __device__ C* Ring(C* cache, const Strides& strides) const {
    return cache + Here().stream * strides.stream + Here().h * strides.head;
  }
  __device__ C* KeyRing() const { return Ring(p_.key_cache, p_.key_cache_strides); }
  __device__ C* ValueRing() const { return Ring(p_.value_cache, p_.value_cache_strides); }
  __device__ bool* MaskRing() const { return p_.key_mask_cache + Here().stream * p_.window; }

  template <typename U>
  __device__ U* At(U* base, const Strides& strides, int64_t t) const {
    return base + Here().m * strides.stream + Here().h * strides.head + t * strides.step;
  }

  __device__ void Advance() const {
    if (p_.next_position != nullptr) p_.next_position[Here().stream] += p_.num_steps;
  }

  // Attends to this part of the window. If this is the last part to arrive, finishes the query and
  // returns true.
  __device__ bool Attend() const {
    const int now = Here().t, part = Here().part, taken = Here().taken;
    const bool asks = p_.query_mask == nullptr || p_.query_mask[Here().m];
    // The columns of the window that hold a step begin at `filled`.
    const int before = Window() - 1 - now;  // columns before this call
    const int filled = before > taken ? before - taken : 0;
    const int64_t columns = asks ? Window() - filled : 0;
    const int begin = filled + static_cast<int>(columns * part / Parts());
    const int end = filled + static_cast<int>(columns * (part + 1) / Parts());
    // Columns from `own` on are steps of this call. Column window - 1 is step `now`.
    const int own = before > 0 ? before : 0;
    // Column c is row c + shift of the ring, modulo the window.
    const int shift = RowAfter(now + 1 + filled) - filled;
    const bool* mask = p_.mask == nullptr ? nullptr : At(p_.mask, p_.mask_strides, now);
    T* scores = p_.scores == nullptr ? nullptr : At(p_.scores, p_.scores_strides, now);
    const auto allowed = [&](int column) { return mask == nullptr || mask[column]; };
    const C *const keys = KeyRing() + L::Element(0), *const values = ValueRing() + L::Element(0);
    const bool* const mask_ring = MaskRing();
    const auto ring_row = [&](int column) {
      int r = column + shift;
      if (r >= Window()) r -= Window();
      return Row<C>{keys + r * KeyStep(), values + r * ValueStep(),
                    static_cast<bool>(mask_ring[r] & allowed(column))};
    };
    const auto own_row = [&](int column) {
      const int t = now - (Window() - 1 - column);
      const bool has_key = p_.key_mask == nullptr || p_.key_mask[Here().m * p_.num_steps + t];
      return Row<C>{At(p_.key, p_.key_strides, t) + L::Element(0),
                    At(p_.value, p_.value_strides, t) + L::Element(0),
                    static_cast<bool>(has_key & allowed(column))};
    };

    PartialAttention<T, C, L> attention(At(p_.query, p_.query_strides, now), p_.key_dim,
                                        p_.value_dim, p_.scale);
    // Two loops, so that the loop over the ring computes few addresses.
    attention.template Attend<L::kRowsAtATime>(begin, end < own ? end : own, ring_row, scores);
    attention.template Attend<1>(begin > own ? begin : own, end, own_row, scores);
    attention.MergeGroups();
    T* const output = At(p_.output, p_.output_strides, now);
    OnlineSoftmax<T> softmax = attention.softmax();
    if (Parts() == 1) {
      attention.Store(softmax.Normalizer(), output);
    } else {
      T* const parts = p_.parts + PartsSize(Here().query, Parts(), p_.value_dim);
      if (!attention.LeavePart(part, Parts(), parts, p_.arrivals + Here().query)) return false;
      const PartsMerger<T, kThreads> merger(parts, Parts(), p_.value_dim);
      softmax = merger.softmax();
      merger.Store(softmax.Normalizer(), output);
    }
    if (scores == nullptr) return true;
    __syncthreads();  // for this block's logits; ArrivesLast() has waited for those of other parts
    const int scored = asks ? filled : Window();
    const T normalizer = softmax.Normalizer();
#pragma unroll 1
    for (int column = threadIdx.x; column < Window(); column += kThreads) {
      scores[column] = column < scored ? T(0) : softmax.Weight(scores[column]) * normalizer;
    }
    return true;
  }

  // Returns the ring's row of step number position + steps.
  __device__ int RowAfter(int steps) const {
    return static_cast<int>((static_cast<unsigned>(Here().position_row) + steps) % Window());
  }

  // Returns how many of this call's steps are already too old for the ring.
  __device__ int Passed() const {
    const int steps = static_cast<int>(p_.num_steps);
    return steps < Window() ? 0 : steps - Window();
  }

  // Calls f(row, element) for all elements of rows begin, ..., end - 1. A warp takes a row.
  template <typename F>
  __device__ static void ForEachOfRows(int begin, int end, int64_t size, const F& f) {
    const int warp = threadIdx.x / kLanesPerWarp, lane = threadIdx.x % kLanesPerWarp;
#pragma unroll 1
    for (int row = begin + warp; row < end; row += kWarps) {
#pragma unroll 1
      for (int i = lane; i < size; i += kLanesPerWarp) f(row, i);
    }
  }

  // Writes this call's steps of one head.
  __device__ void WriteRing() const {
    const auto write = [&](const C* from, const Strides& strides, int64_t size, C* ring, int step) {
      ForEachOfRows(Passed(), static_cast<int>(p_.num_steps), size,
                    [&](int t, int i) { ring[RowAfter(t) * step + i] = At(from, strides, t)[i]; });
    };
    write(p_.key, p_.key_strides, p_.key_dim, KeyRing(), KeyStep());
    write(p_.value, p_.value_strides, p_.value_dim, ValueRing(), ValueStep());
  }

  __device__ void WriteMaskRing() const {
    bool* const ring = MaskRing();
#pragma unroll 1
    for (int t = Passed() + threadIdx.x; t < p_.num_steps; t += kThreads) {
      ring[RowAfter(t)] = p_.key_mask == nullptr || p_.key_mask[Here().m * p_.num_steps + t];
    }
  }

  // Copies this part of the N - 1 steps before this call, oldest first.
  __device__ void CopyWindow() const {
    if (p_.window_key == nullptr) return;
    const int64_t rows = Window() - 1;
    const int begin = static_cast<int>(rows * Here().part / Parts());
    const int end = static_cast<int>(rows * (Here().part + 1) / Parts());
    const auto copy = [&](const auto* ring, int step, int64_t size, auto* window) {
      ForEachOfRows(begin, end, size, [&](int row, int i) {
        window[row * size + i] = Here().taken - rows + row < 0 ? std::decay_t<decltype(*window)>{}
                                                               : ring[RowAfter(row + 1) * step + i];
      });
    };
    copy(KeyRing(), KeyStep(), p_.key_dim, p_.window_key + Here().pair * p_.key_dim * rows);
    copy(ValueRing(), ValueStep(), p_.value_dim,
         p_.window_value + Here().pair * p_.value_dim * rows);
    if (Here().h == 0) copy(MaskRing(), 1, 1, p_.window_key_mask + int64_t{Here().m} * rows);
  }

  // Gives NaN for a row whose stream does not exist. Changes no state.
  __device__ void Refuse() const {
    if (Here().part != 0) return;
    const T nan = std::numeric_limits<T>::quiet_NaN();
    T* const output = At(p_.output, p_.output_strides, Here().t);
    ForEachOfRows(0, 1, p_.value_dim, [&](int, int i) { output[i] = nan; });
    if (p_.scores != nullptr) {
      T* const scores = At(p_.scores, p_.scores_strides, Here().t);
      ForEachOfRows(0, 1, p_.window, [&](int, int i) { scores[i] = nan; });
    }
    if (Here().t != 0) return;
    if (p_.window_key == nullptr) return;
    const int rows = Window() - 1;
    const auto clear = [&](auto* window, int64_t size) {
      ForEachOfRows(0, rows, size, [&](int row, int i) {
        window[row * size + i] = std::decay_t<decltype(*window)>{};
      });
    };
    clear(p_.window_key + Here().pair * p_.key_dim * rows, p_.key_dim);
    clear(p_.window_value + Here().pair * p_.value_dim * rows, p_.value_dim);
    if (Here().h == 0) clear(p_.window_key_mask + int64_t{Here().m} * rows, 1);
  }

  const Params& p_;
};

template <typename T, typename C, typename L>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor<T>)
    SingleOutputKernel(const __grid_constant__ DeviceSingleOutputParams<T, C> params) {
  ReleaseNext();
  QueryBlock<T, C, L> block(params);
  block.Prefetch();
  WaitForPrevious();
  block.Run();
}

template <typename T, typename C>
bool TakesVectors(const DeviceSingleOutputParams<T, C>& p, int bytes) {
  // The stride of the heads or the steps is a row's size, so a row is whole vectors.
  return IsAligned(p.key, p.key_strides, bytes) &&
         IsAligned(p.key_cache, p.key_cache_strides, bytes) &&
         IsAligned(p.value, p.value_strides, bytes) &&
         IsAligned(p.value_cache, p.value_cache_strides, bytes);
}

// Loads vectors of kElements.
template <int kElements, typename T, typename C>
cudaError_t LaunchVectors(const DeviceSingleOutputParams<T, C>& p, cudaStream_t stream) {
  return WithLayout<kElements>(LargerHead(p), [&](auto layout) {
    return Launch(SingleOutputKernel<T, C, decltype(layout)>, p.NumQueries() * p.window_parts,
                  kThreads, p.overlap, stream, p);
  });
}

}  // namespace

template <typename T, typename C>
const char* RefusesSingleOutput(const DeviceSingleOutputParams<T, C>& p) {
  if (p.num_steps < 1 || p.num_heads < 1 || p.window < 1 || p.key_dim < 1 || p.value_dim < 1 ||
      p.window_parts < 1) {
    return "expected steps, heads, rows of the window, features and window_parts >= 1";
  }
  // Offsets within a stream's rings and within a call are computed in 32 bits.
  constexpr int64_t kMost = int64_t{1} << 31;
  const int64_t ring_step = std::max(p.key_cache_strides.step, p.value_cache_strides.step);
  if (p.window * ring_step > kMost) {
    return "expected rings of at most 2^31 elements of keys and of values a stream";
  }
  if (std::max(p.window, p.num_steps) * std::max<int64_t>(LargerHead(p), 2) > kMost) {
    return "expected windows and calls of at most 2^31 elements of keys and of values a head";
  }
  static_assert(LargestLayout::kLargest == 256);
  if (LargerHead(p) <= LargestLayout::kLargest) return nullptr;
  return "expected key and value sizes of at most 256";
}

template <typename T, typename C>
cudaError_t LaunchSingleOutput(const DeviceSingleOutputParams<T, C>& params, cudaStream_t stream) {
  if (params.num_streams == 0) return cudaSuccess;
  if (RefusesSingleOutput(params) != nullptr) return cudaErrorInvalidValue;
  DeviceSingleOutputParams<T, C> p = params;
  p.overlap = params.overlap && CanOverlap();
  constexpr int kVector = kVectorBytes / sizeof(C);
  // Doubles are for tests. One kernel is enough for them.
  if constexpr (!std::is_same_v<C, double>) {
    if (TakesVectors(p, kVectorBytes)) return LaunchVectors<kVector>(p, stream);
  }
  // Heads of 16 bits whose size is a multiple of 4, such as the 12 of the paper's audio model.
  if constexpr (sizeof(C) == 2) {
    if (TakesVectors(p, kVectorBytes / 2)) return LaunchVectors<kVector / 2>(p, stream);
  }
  return LaunchVectors<1>(p, stream);
}

#define INSTANTIATE(T, C)                                                                \
  template const char* RefusesSingleOutput<T, C>(const DeviceSingleOutputParams<T, C>&); \
  template cudaError_t LaunchSingleOutput<T, C>(const DeviceSingleOutputParams<T, C>&,   \
                                                cudaStream_t);
CONTINUAL_TRANSFORMERS_FOR_CACHE_TYPES(INSTANTIATE)
#undef INSTANTIATE

}  // namespace continual_transformers
