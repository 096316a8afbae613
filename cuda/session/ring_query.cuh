// Attention of one query of a head over a ring in a stream's block. A block of threads reads the
// window, or one part of it, as single_output.cu does (partial_attention.cuh). It knows the rings
// by their addresses, and not by a stride.

#ifndef CONTINUAL_TRANSFORMERS_CUDA_SESSION_RING_QUERY_CUH_
#define CONTINUAL_TRANSFORMERS_CUDA_SESSION_RING_QUERY_CUH_

#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>

#include "cc/attention/online_softmax.h"
#include "cuda/elements.cuh"
#include "cuda/launch.cuh"
#include "cuda/partial_attention.cuh"
#include "cuda/session/ring_query.h"

namespace continual_transformers {

// Returns f(layout) with the layout for heads of these sizes. Every row of a head begins at a
// multiple of its size, from a 64-byte aligned address on.
#ifdef __CUDACC__
#pragma nv_exec_check_disable  // f is of the host or of the GPU, as its caller is.
#endif
template <typename C, int kBlockThreads = kThreads, typename F>
__host__ __device__ auto WithHeadLayout(int64_t key_dim, int64_t value_dim, const F& f) {
  static_assert(LargestLayout::kLargest == kLargestHead);
  constexpr int kVector = kVectorBytes / sizeof(C);
  const int64_t larger = key_dim > value_dim ? key_dim : value_dim;
  if (key_dim % kVector != 0 || value_dim % kVector != 0) {
    return WithLayout<1, kBlockThreads>(larger, f);
  }
  return WithLayout<kVector, kBlockThreads>(larger, f);
}

// What one block of a launch does. kCut: whether there is more than one part of a window.
template <typename C, typename L, bool kCut>
class RingQuery {
 public:
  __device__ RingQuery(const RingQueryParams& p, int block) : p_(p), block_(block) {}

  // Fetches this block's share of the rows of the stream's rings into L2, before WaitForPrevious().
  // The rows of one head are not contiguous: the other heads' blocks fetch the rest.
  __device__ void Begin() const {
    const DeviceAttention& s = p_.s;
    if (!p_.prefetch || threadIdx.x != 0) return;
    const int64_t shares = s.heads * NumParts();
    const int64_t m = block_ / shares, share = block_ % shares;
    const int64_t before = RowsBefore(static_cast<int>(m));
    const int64_t rows = (before < s.window ? before : s.window) * s.key_heads;
    const int64_t begin = rows * share / shares, end = rows * (share + 1) / shares;
    const auto prefetch = [&](int64_t ring, int64_t size) {
      const int64_t bytes = size * static_cast<int64_t>(sizeof(C));
      PrefetchIntoL2(p_.blocks[m] + ring + begin * bytes, (end - begin) * bytes);
    };
    prefetch(s.key_ring, s.key_dim);
    prefetch(s.value_ring, s.value_dim);
  }

  __device__ void Run() const {
    const DeviceAttention& s = p_.s;
    const int heads = static_cast<int>(s.heads), window = static_cast<int>(s.window);
    const int num_parts = NumParts(), part = block_ % num_parts;
    const int query = block_ / num_parts, m = query / heads, h = query % heads;
    const int key_head = static_cast<int>(h / (s.heads / s.key_heads));
    const int64_t r = m * s.rows + p_.row, position = RowsBefore(m);
    const int64_t key_step = s.key_heads * s.key_dim, value_step = s.key_heads * s.value_dim;
    char* const block = p_.blocks[m];
    C* const keys = reinterpret_cast<C*>(block + s.key_ring) + key_head * s.key_dim;
    C* const values = reinterpret_cast<C*>(block + s.value_ring) + key_head * s.value_dim;
    bool* const mask = reinterpret_cast<bool*>(block + s.mask_ring);

    // The row that is overwritten has left the window, so no one reads it. The new row is in the
    // last part, whose block writes it, so that no block waits for another. Blocks that share it
    // write the same bytes. A row without a key is zeros.
    if (part == num_parts - 1) {
      const int at = static_cast<int>(position % window);
      const bool has_key = p_.key_mask[m] && (p_.node_key_mask == nullptr || p_.node_key_mask[r]);
      Put(has_key, p_.key + r * key_step + key_head * s.key_dim, s.key_dim, keys + at * key_step);
      Put(has_key, p_.value + r * value_step + key_head * s.value_dim, s.value_dim,
          values + at * value_step);
      if (threadIdx.x == 0) mask[at] = has_key;
    }
    __syncthreads();

    const bool asks =
        position >= s.query_delay && (p_.node_query_mask == nullptr || p_.node_query_mask[r]);
    // The steps that the query attends to: step 0 of the window is its column 0.
    const int64_t oldest = position - (window - 1), end = oldest + s.end_column;
    const int64_t first = oldest + s.first_column > 0 ? oldest + s.first_column : 0;
    const int64_t count = asks && end > first ? end - first : 0;
    const int first_row = static_cast<int>(first % window);
    const auto row = [&](int i) {
      int ring_row = first_row + i;
      if (ring_row >= window) ring_row -= window;
      return Row<C>{keys + ring_row * key_step + L::Element(0),
                    values + ring_row * value_step + L::Element(0), mask[ring_row]};
    };
    const float* const bias =
        s.bias == nullptr ? nullptr : s.bias + h * s.window + (first - oldest);
    const auto logit_of = [&](float x, int i) {
      if (s.soft_cap != 0) x = s.soft_cap * std::tanh(x / s.soft_cap);
      return bias == nullptr ? x : x + bias[i];
    };
    PartialAttention<float, C, L> attention(p_.query + (r * s.heads + h) * s.key_dim, s.key_dim,
                                            s.value_dim, s.scale);
    attention.template Attend<L::kRowsAtATime>(static_cast<int>(count * part / num_parts),
                                               static_cast<int>(count * (part + 1) / num_parts),
                                               row, nullptr, logit_of);
    attention.MergeGroups();
    const auto store = [&](const auto& attended) {
      OnlineSoftmax<float> softmax = attended.softmax();
      float factor = 1;
      if (s.sink != nullptr) factor = softmax.Merge({s.sink[h], 1.f}).own;
      attended.Store(factor * softmax.Normalizer(), p_.output + (r * s.heads + h) * s.value_dim);
    };
    if constexpr (kCut) {
      float* const parts = p_.parts + PartsSize(query, num_parts, s.value_dim);
      if (!attention.LeavePart(part, num_parts, parts, p_.arrivals + query)) return;
      store(PartsMerger<float, L::kThreads>(parts, num_parts, s.value_dim));
    } else {
      store(attention);
    }
  }

 private:
  __device__ int NumParts() const { return kCut ? p_.window_parts : 1; }

  // Returns how many rows the stream has before this one, or as many a few windows earlier: far
  // into a stream the product could overflow.
  __device__ int64_t RowsBefore(int m) const {
    const int64_t n = p_.s.window, position = p_.positions[m];
    if (p_.s.rows == 1) return position;
    return (position < n ? position : n + position % n) * p_.s.rows + p_.row;
  }

  __device__ static void Put(bool has_key, const float* from, int64_t size, C* to) {
    for (int i = threadIdx.x; i < size; i += L::kThreads)
      to[i] = ToStored<C>(has_key ? from[i] : 0.f);
  }

  const RingQueryParams& p_;
  const int block_;
};

}  // namespace continual_transformers

#endif  // CONTINUAL_TRANSFORMERS_CUDA_SESSION_RING_QUERY_CUH_
