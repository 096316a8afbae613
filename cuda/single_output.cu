// A block of threads takes one query, or one part of its window, and reads every row of it once.
// Within a block a group of lanes reads a row of keys and the row of values beside it, several rows
// at a time, and keeps a softmax and a sum of values of its own; these are merged when all rows are
// read. What needs all blocks (parts merged, rings of many steps written, positions advanced) is
// done by the last of them to arrive, so a step is one launch.
//
// That was chosen over a reduction through distributed shared memory, which exists from compute
// capability 9.0 on and joins at most 16 blocks: one long window is to be read by all
// multiprocessors.

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>

#include "cc/attention/half.h"
#include "cc/attention/online_softmax.h"
#include "cuda/arrival.cuh"
#include "cuda/elements.cuh"
#include "cuda/launch.cuh"
#include "cuda/partial_attention.cuh"
#include "cuda/single_output.h"

namespace continual_transformers {
namespace {

// One block's share of a call.
template <typename T, typename C, typename L>
class QueryBlock {
 public:
  using Params = DeviceSingleOutputParams<T, C>;

  __device__ explicit QueryBlock(const Params& params) : p_(params) {
    // In 32 bits, as all that a launch's blocks are numbered by: registers are what is short.
    unsigned block = blockIdx.x;
    parts_ = static_cast<int>(p_.window_parts);
    part_ = static_cast<int>(block % parts_);
    query_ = static_cast<int>(block / parts_);
    t_ = query_ % static_cast<int>(p_.num_steps);
    pair_ = query_ / static_cast<int>(p_.num_steps);
    h_ = pair_ % static_cast<int>(p_.num_heads);
    m_ = pair_ / static_cast<int>(p_.num_heads);
    window_ = static_cast<int>(p_.window);
  }

  // While the kernel before this one may still be writing the query.
  __device__ void Prefetch() const {
    if (!p_.overlap || threadIdx.x != 0 || t_ != 0) return;
    const int64_t stream = Stream();
    if (stream < 0 || stream >= p_.num_held) return;  // It may be written only now.
    const int64_t ring = (stream * p_.num_heads + h_) * p_.window;
    const int64_t begin = p_.window * part_ / parts_, end = p_.window * (part_ + 1) / parts_;
    PrefetchIntoL2(p_.key_cache + (ring + begin) * p_.key_dim,
                   (end - begin) * p_.key_dim * static_cast<int64_t>(sizeof(C)));
    PrefetchIntoL2(p_.value_cache + (ring + begin) * p_.value_dim,
                   (end - begin) * p_.value_dim * static_cast<int64_t>(sizeof(C)));
  }

  __device__ void Run() {
    stream_ = Stream();
    // All blocks of a row see the same, so none waits for one that has left.
    if (stream_ < 0 || stream_ >= p_.num_held) return Refuse();
    position_ = p_.position[stream_];
    if (position_ < 0) return Refuse();
    const int64_t ring = stream_ * p_.num_heads + h_;
    key_ring_ = p_.key_cache + ring * p_.window * p_.key_dim;
    value_ring_ = p_.value_cache + ring * p_.window * p_.value_dim;
    mask_ring_ = p_.key_mask_cache + stream_ * p_.window;

    if (t_ == 0) CopyWindow();
    // The row that the only step of a call overwrites is no longer in its window, so nobody reads
    // it.
    if (p_.update_state && p_.num_steps == 1 && part_ == 0) {
      WriteRing();
      if (h_ == 0) WriteMaskRing();
    }
    if (!Attend()) return;
    if (t_ == 0 && h_ == 0 && p_.steps_taken != nullptr && threadIdx.x == 0) {
      p_.steps_taken[m_] = position_ + p_.num_steps;
    }
    if (!p_.update_state) return;
    uint32_t* const pairs = p_.arrivals + p_.NumQueries();
    if (p_.num_steps > 1) {
      if (!ArrivesLast(pairs + pair_, static_cast<uint32_t>(p_.num_steps))) return;
      WriteRing();
    }
    uint32_t* const rows = pairs + p_.num_streams * p_.num_heads;
    if (!ArrivesLast(rows + m_, static_cast<uint32_t>(p_.num_heads))) return;
    if (p_.num_steps > 1) WriteMaskRing();
    if (threadIdx.x == 0) p_.next_position[stream_] = position_ + p_.num_steps;
  }

 private:
  __device__ int64_t Stream() const { return p_.streams == nullptr ? m_ : p_.streams[m_]; }

  template <typename U>
  __device__ U* At(U* base, const Strides& strides, int64_t t) const {
    return base + m_ * strides.stream + h_ * strides.head + t * strides.step;
  }

  // Attends to this part of the window, and finishes the query where this is the last part to
  // arrive. Returns whether it is.
  __device__ bool Attend() const {
    const bool asks = p_.query_mask == nullptr || p_.query_mask[m_];
    // Column c of the window is step number first + c, of which those below 0 were never taken.
    const int64_t first = position_ + t_ - (window_ - 1);
    const int filled = first < 0 ? static_cast<int>(-first) : 0;
    const int64_t columns = asks ? window_ - filled : 0;
    const int begin = filled + static_cast<int>(columns * part_ / parts_);
    const int end = filled + static_cast<int>(columns * (part_ + 1) / parts_);
    // Those from `own` on are this call's: its newest is column window - 1, step t.
    const int own = t_ >= window_ ? 0 : window_ - 1 - t_;
    const int oldest = static_cast<int>((first + filled) % window_);  // `filled`'s row.
    const bool* mask = p_.mask == nullptr ? nullptr : At(p_.mask, p_.mask_strides, t_);
    T* scores = p_.scores == nullptr ? nullptr : At(p_.scores, p_.scores_strides, t_);
    const auto row = [&](int column) {
      Row<C> row;
      if (column < own) {
        int r = oldest + column - filled;
        if (r >= window_) r -= window_;
        row.key = key_ring_ + static_cast<int64_t>(r) * p_.key_dim;
        row.value = value_ring_ + static_cast<int64_t>(r) * p_.value_dim;
        row.attended = mask_ring_[r];
      } else {
        const int64_t t = t_ - (window_ - 1 - column);
        row.key = At(p_.key, p_.key_strides, t);
        row.value = At(p_.value, p_.value_strides, t);
        row.attended = p_.key_mask == nullptr || p_.key_mask[m_ * p_.num_steps + t];
      }
      if (mask != nullptr) row.attended = row.attended && mask[column];
      return row;
    };

    PartialAttention<T, C, L> attention(At(p_.query, p_.query_strides, t_), p_.key_dim,
                                        p_.value_dim, p_.scale);
    attention.Attend(begin, end, row, scores);
    attention.MergeGroups();
    T* const output = At(p_.output, p_.output_strides, t_);
    OnlineSoftmax<T> softmax = attention.softmax();
    if (parts_ == 1) {
      attention.Store(softmax.Normalizer(), output);
    } else {
      const int64_t size = p_.value_dim + 2;
      T* const parts = p_.parts + static_cast<int64_t>(query_) * parts_ * size;
      T* const own_part = parts + part_ * size;
      attention.Store(T(1), own_part);
      if (threadIdx.x == 0) {
        own_part[p_.value_dim] = softmax.max;
        own_part[p_.value_dim + 1] = softmax.denominator;
      }
      if (!ArrivesLast(p_.arrivals + query_, static_cast<uint32_t>(parts_))) return false;
      softmax = MergeParts(parts, parts_, p_.value_dim, output);
    }
    if (scores == nullptr) return true;
    __syncthreads();  // The block's own logits; those of other parts were waited for.
    const int scored = asks ? filled : window_;
    const T normalizer = softmax.Normalizer();
    for (int column = threadIdx.x; column < window_; column += kThreads) {
      scores[column] = column < scored ? T(0) : softmax.Weight(scores[column]) * normalizer;
    }
    return true;
  }

  // This call's steps of one head.
  __device__ void WriteRing() const {
    const int64_t kept = p_.num_steps < p_.window ? p_.num_steps : p_.window;
    const int64_t skipped = p_.num_steps - kept;
    const auto write = [&](const C* from, const Strides& strides, int64_t size, C* ring) {
      for (int64_t i = threadIdx.x; i < kept * size; i += kThreads) {
        const int64_t t = skipped + i / size;
        ring[(position_ + t) % p_.window * size + i % size] = At(from, strides, t)[i % size];
      }
    };
    write(p_.key, p_.key_strides, p_.key_dim, key_ring_);
    write(p_.value, p_.value_strides, p_.value_dim, value_ring_);
  }

  __device__ void WriteMaskRing() const {
    const int64_t kept = p_.num_steps < p_.window ? p_.num_steps : p_.window;
    for (int64_t t = p_.num_steps - kept + threadIdx.x; t < p_.num_steps; t += kThreads) {
      mask_ring_[(position_ + t) % p_.window] =
          p_.key_mask == nullptr || p_.key_mask[m_ * p_.num_steps + t];
    }
  }

  // This part of the N - 1 steps before this call, oldest first.
  __device__ void CopyWindow() const {
    if (p_.window_key == nullptr) return;
    const int64_t rows = p_.window - 1, begin = rows * part_ / parts_,
                  end = rows * (part_ + 1) / parts_;
    const auto copy = [&](const auto* ring, int64_t size, auto* window) {
      for (int64_t i = begin * size + threadIdx.x; i < end * size; i += kThreads) {
        const int64_t step = position_ - rows + i / size;
        window[i] =
            step < 0 ? std::decay_t<decltype(*window)>{} : ring[step % p_.window * size + i % size];
      }
    };
    copy(key_ring_, p_.key_dim, p_.window_key + pair_ * rows * p_.key_dim);
    copy(value_ring_, p_.value_dim, p_.window_value + pair_ * rows * p_.value_dim);
    if (h_ == 0) copy(mask_ring_, 1, p_.window_key_mask + m_ * rows);
  }

  // A row of no stream that there is: NaN for what it asks, and no state is touched.
  __device__ void Refuse() const {
    if (part_ != 0) return;
    const T nan = std::numeric_limits<T>::quiet_NaN();
    T* const output = At(p_.output, p_.output_strides, t_);
    for (int64_t i = threadIdx.x; i < p_.value_dim; i += kThreads) output[i] = nan;
    if (p_.scores != nullptr) {
      T* const scores = At(p_.scores, p_.scores_strides, t_);
      for (int64_t i = threadIdx.x; i < p_.window; i += kThreads) scores[i] = nan;
    }
    if (t_ != 0) return;
    if (h_ == 0 && p_.steps_taken != nullptr && threadIdx.x == 0) p_.steps_taken[m_] = -1;
    if (p_.window_key == nullptr) return;
    const int64_t rows = p_.window - 1;
    const auto clear = [&](auto* window, int64_t size) {
      for (int64_t i = threadIdx.x; i < size; i += kThreads) {
        window[i] = std::decay_t<decltype(*window)>{};
      }
    };
    clear(p_.window_key + pair_ * rows * p_.key_dim, rows * p_.key_dim);
    clear(p_.window_value + pair_ * rows * p_.value_dim, rows * p_.value_dim);
    if (h_ == 0) clear(p_.window_key_mask + m_ * rows, rows);
  }

  const Params& p_;
  int query_, pair_, h_, m_, part_, parts_, t_, window_;
  int64_t stream_, position_;
  C *key_ring_, *value_ring_;
  bool* mask_ring_;
};

template <typename T, typename C, typename L>
__global__ void __launch_bounds__(kThreads, L::kBlocksPerMultiprocessor)
    SingleOutputKernel(const __grid_constant__ DeviceSingleOutputParams<T, C> params) {
  ReleaseNext();
  QueryBlock<T, C, L> block(params);
  block.Prefetch();
  WaitForPrevious();
  block.Run();
}

// The elements that a kernel of vectors takes at the most, and that of single elements.
template <typename C>
constexpr int kElementsOfVector = kVectorBytes / sizeof(C);
template <typename C>
constexpr int64_t kLargestHead = 128 * kElementsOfVector<C>;
constexpr int64_t kLargestUnalignedHead = 256;

template <typename T, typename C>
bool TakesVectors(const DeviceSingleOutputParams<T, C>& p) {
  // Doubles are for checking: one kernel is enough.
  if (std::is_same_v<C, double>) return false;
  const auto aligned = [](const C* input, const Strides& strides, const C* ring, int64_t size) {
    return IsAligned(input, strides.stream) && IsAligned(input, strides.step) &&
           IsAligned(input, strides.head) && IsAligned(ring, size);
  };
  return aligned(p.key, p.key_strides, p.key_cache, p.key_dim) &&
         aligned(p.value, p.value_strides, p.value_cache, p.value_dim);
}

template <typename T, typename C>
int64_t LargerHead(const DeviceSingleOutputParams<T, C>& p) {
  return std::max(p.key_dim, p.value_dim);
}

template <typename L, typename T, typename C>
cudaError_t LaunchWith(const DeviceSingleOutputParams<T, C>& p, cudaStream_t stream) {
  return Launch(SingleOutputKernel<T, C, L>, p.NumQueries() * p.window_parts, kThreads, p.overlap,
                stream, p);
}

}  // namespace

int64_t PlanWindowParts(int64_t queries, int64_t window, int multiprocessors) {
  // Two blocks a multiprocessor keep enough loads under way; a part of fewer rows than a block
  // reads at a time would be shorter than the merge that it costs.
  constexpr int64_t kBlocksPerMultiprocessor = 2, kRowsPerPart = 64;
  if (queries < 1) return 1;
  const int64_t wanted = (kBlocksPerMultiprocessor * multiprocessors + queries - 1) / queries;
  return std::max<int64_t>(1, std::min(wanted, window / kRowsPerPart));
}

template <typename T, typename C>
const char* RefusesSingleOutput(const DeviceSingleOutputParams<T, C>& p) {
  if (p.num_steps < 1 || p.num_heads < 1 || p.window < 1 || p.key_dim < 1 || p.value_dim < 1 ||
      p.window_parts < 1) {
    return "expected steps, heads, rows of the window, features and window_parts >= 1";
  }
  if (std::max(p.window, p.num_steps) > (int64_t{1} << 30)) {
    return "expected windows and calls of at most 2^30 steps";
  }
  if (TakesVectors(p) ? LargerHead(p) <= kLargestHead<C> : LargerHead(p) <= kLargestUnalignedHead) {
    return nullptr;
  }
  return "expected key and value sizes of at most 256; or, where each key and value is a multiple "
         "of 16 bytes and begins at one, of at most 512 in float32 and 1024 in 16-bit types";
}

template <typename T, typename C>
cudaError_t LaunchSingleOutput(const DeviceSingleOutputParams<T, C>& p, cudaStream_t stream) {
  if (p.num_streams == 0) return cudaSuccess;
  if (RefusesSingleOutput(p) != nullptr) return cudaErrorInvalidValue;
  if constexpr (!std::is_same_v<C, double>) {
    if (TakesVectors(p)) {
      constexpr int kVector = kElementsOfVector<C>;
      const int64_t vectors = LargerHead(p) / kVector;
      if (vectors <= 4) return LaunchWith<RowLayout<kVector, 4, 1>>(p, stream);
      if (vectors <= 8) return LaunchWith<RowLayout<kVector, 8, 1>>(p, stream);
      if (vectors <= 16) return LaunchWith<RowLayout<kVector, 16, 1>>(p, stream);
      if (vectors <= 32) return LaunchWith<RowLayout<kVector, 32, 1>>(p, stream);
    }
  }
  return LaunchWith<RowLayout<1, 32, 8>>(p, stream);
}

#define INSTANTIATE(T, C)                                                                \
  template const char* RefusesSingleOutput<T, C>(const DeviceSingleOutputParams<T, C>&); \
  template cudaError_t LaunchSingleOutput<T, C>(const DeviceSingleOutputParams<T, C>&, cudaStream_t)
INSTANTIATE(float, float);
INSTANTIATE(float, BFloat16);
INSTANTIATE(float, Float16);
INSTANTIATE(double, double);
#undef INSTANTIATE

}  // namespace continual_transformers
