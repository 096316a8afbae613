// Attention of a plan. A block of threads takes a query of a head, or one part of its window, and
// reads its rows as single_output.cu does (partial_attention.cuh); retroactive attention is in
// retroactive.cuh. The rings lie in the streams' blocks, so a launch knows them by their addresses
// and not by a stride.

#include <cmath>
#include <cstdint>

#include "cc/attention/half.h"
#include "cc/attention/online_softmax.h"
#include "cuda/elements.cuh"
#include "cuda/for_each.cuh"
#include "cuda/launch.cuh"
#include "cuda/partial_attention.cuh"
#include "cuda/retroactive.cuh"
#include "cuda/session/node_kernels.h"
#include "cuda/window_parts.h"

namespace continual_transformers {
namespace {

// Returns launch(layout) with the layout for heads of these sizes. Every row of a head begins at a
// multiple of its size, from a 64-byte aligned address on.
template <typename C, typename F>
cudaError_t WithHeadLayout(int64_t key_dim, int64_t value_dim, const F& launch) {
  static_assert(LargestLayout::kLargest == kLargestHead);
  constexpr int kVector = kVectorBytes / sizeof(C);
  const int64_t larger = key_dim > value_dim ? key_dim : value_dim;
  if (key_dim % kVector != 0 || value_dim % kVector != 0) return WithLayout<1>(larger, launch);
  return WithLayout<kVector>(larger, launch);
}

// ---- Over the ring of a stream ----

struct RingQueryParams {
  char* const* blocks;
  const int64_t* positions;
  const bool* key_mask;  // [M], the caller's
  const float *query, *key, *value;
  const bool *node_key_mask, *node_query_mask;  // [M, rows]; null: all true
  float* output;
  int64_t row;  // of each step; a launch takes one
  int window_parts;
  float* parts;        // [M, H, window_parts, Dv + 2]; see PartsMerger
  uint32_t* arrivals;  // [M, H], zeros
  DeviceAttention s;
  bool prefetch;
};

// kCut: whether there is more than one part of a window.
template <typename C, typename L, bool kCut>
class RingQuery {
 public:
  __device__ explicit RingQuery(const RingQueryParams& p) : p_(p) {}

  // Fetches this block's share of the rows of the stream's rings into L2, before WaitForPrevious().
  // The rows of one head are not contiguous: the other heads' blocks fetch the rest.
  __device__ void Prefetch() const {
    const DeviceAttention& s = p_.s;
    if (!p_.prefetch || threadIdx.x != 0) return;
    const int64_t shares = s.heads * NumParts();
    const int64_t m = blockIdx.x / shares, share = blockIdx.x % shares;
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
    const int num_parts = NumParts(), part = blockIdx.x % num_parts;
    const int query = blockIdx.x / num_parts, m = query / heads, h = query % heads;
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
      store(PartsMerger<float>(parts, num_parts, s.value_dim));
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
    for (int i = threadIdx.x; i < size; i += kThreads) to[i] = ToStored<C>(has_key ? from[i] : 0.f);
  }

  const RingQueryParams& p_;
};

template <typename C, typename L, bool kCut>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor<float>)
    RingQueryKernel(const __grid_constant__ RingQueryParams p) {
  ReleaseNext();
  const RingQuery<C, L, kCut> query(p);
  query.Prefetch();
  WaitForPrevious();
  query.Run();
}

template <typename C>
NodeLaunch AttentionOf(const DeviceAttention& s) {
  return [=](const DeviceFrame& frame, cudaStream_t stream) {
    const int64_t window_parts = s.WindowParts(frame.streams);
    RingQueryParams p = {frame.blocks,
                         frame.positions,
                         frame.key_mask,
                         frame.Rows<float>(s.query),
                         frame.Rows<float>(s.key),
                         frame.Rows<float>(s.value),
                         frame.RowsOrNull<bool>(s.key_mask),
                         frame.RowsOrNull<bool>(s.query_mask),
                         frame.Rows<float>(s.output),
                         0,
                         static_cast<int>(window_parts),
                         frame.Rows<float>(s.parts),
                         frame.arrivals,
                         s,
                         frame.overlap && s.ReadsAll() &&
                             s.RingBytes(frame.streams, sizeof(C)) <= kMostPrefetchedBytes};
    // The next row overwrites a row of the ring that the query before it needs.
    for (; p.row < s.rows; ++p.row) {
      const cudaError_t error = WithHeadLayout<C>(s.key_dim, s.value_dim, [&](auto layout) {
        using L = decltype(layout);
        const auto kernel =
            window_parts > 1 ? RingQueryKernel<C, L, true> : RingQueryKernel<C, L, false>;
        return Launch(kernel, frame.streams * s.heads * window_parts, kThreads, frame.overlap,
                      stream, p);
      });
      if (error != cudaSuccess) return error;
      p.prefetch = false;  // The first row's launch has fetched all.
    }
    return cudaSuccess;
  };
}

// ---- Retroactive: all queries of a window (cuda/retroactive.cuh) ----

struct RetroactiveSteps {
  using Number = float;

  char* const* blocks;
  const int64_t* positions;
  const bool* key_mask;       // [M], the caller's
  const bool* node_key_mask;  // [M]; null: all true
  const float *query, *key, *value;
  float* output;
  DeviceRetroactive s;

  __device__ RetroactiveHead<float> Head(int64_t m, int h) const {
    const int64_t keys = s.heads * s.key_dim, values = s.heads * s.value_dim, n = s.window;
    char* const block = blocks[m];
    const auto ring = [&](int64_t offset) { return reinterpret_cast<float*>(block + offset); };
    const auto sums = [&](int64_t offset) { return reinterpret_cast<double*>(block + offset); };
    RetroactiveHead<float> head;
    head.taken = positions[m];
    head.query = query + m * keys + h * s.key_dim;
    head.key = key + m * keys + h * s.key_dim;
    head.value = value + m * values + h * s.value_dim;
    head.query_stride = head.key_stride = head.query_row = head.key_row = keys;
    head.value_stride = head.value_row = head.output_row = values;
    head.query_ring = ring(s.query_ring) + h * s.key_dim;
    head.key_ring = ring(s.key_ring) + h * s.key_dim;
    head.value_ring = ring(s.value_ring) + h * s.value_dim;
    head.mask_ring = reinterpret_cast<bool*>(block + s.mask_ring);
    head.softmax = sums(s.softmax) + h * 4 * n;
    head.weighted_sum = sums(s.weighted_sum) + h * n * s.value_dim;
    head.made_with = sums(s.made_with);
    head.output = output + m * n * values + h * s.value_dim;
    head.output_stride = n * values;
    return head;
  }

  __device__ bool HasKey(int64_t m, int64_t) const {
    return key_mask[m] && (node_key_mask == nullptr || node_key_mask[m]);
  }
};

// ---- Among the rows of a window that a step changes as a whole ----

struct WindowQueryParams {
  const int64_t* positions;
  const float *query, *key, *value;
  float* output;
  DeviceWindowAttention s;
};

template <typename L>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor<float>)
    WindowQueryKernel(const __grid_constant__ WindowQueryParams p) {
  ReleaseNext();
  WaitForPrevious();
  const DeviceWindowAttention& s = p.s;
  const int heads = static_cast<int>(s.heads), queries = static_cast<int>(s.queries);
  const int h = blockIdx.x % heads, i = blockIdx.x / heads % queries;
  const int64_t m = blockIdx.x / heads / queries, n = s.window, position = p.positions[m];
  const int64_t key_step = s.heads * s.key_dim, value_step = s.heads * s.value_dim;
  // How many rows of the window are of no step yet. Far into a stream the product could overflow.
  int64_t first = position > -s.first ? 0 : -s.first - position * s.rows;
  first = first < 0 ? 0 : first > n ? n : first;
  const int64_t own = i + n - queries;  // the query's row of the window
  if (s.band > 0 && own - s.band + 1 > first) first = own - s.band + 1;
  int64_t end = s.causal ? own + 1 : s.band > 0 ? own + s.band : n;
  if (end > n) end = n;
  const float* const keys = p.key + m * n * key_step + h * s.key_dim;
  const float* const values = p.value + m * n * value_step + h * s.value_dim;
  const auto row = [&](int k) {
    return Row<float>{keys + k * key_step + L::Element(0), values + k * value_step + L::Element(0),
                      true};
  };
  const int64_t query = m * queries + i;
  PartialAttention<float, float, L> attention(p.query + query * key_step + h * s.key_dim, s.key_dim,
                                              s.value_dim, s.scale);
  attention.template Attend<L::kRowsAtATime>(static_cast<int>(first), static_cast<int>(end), row,
                                             nullptr);
  attention.MergeGroups();
  attention.Store(attention.softmax().Normalizer(),
                  p.output + query * value_step + h * s.value_dim);
}

}  // namespace

NodeLaunch AttentionNode(const DeviceAttention& spec, DType cache) {
  switch (cache) {
    case DType::kBFloat16:
      return AttentionOf<BFloat16>(spec);
    case DType::kFloat16:
      return AttentionOf<Float16>(spec);
    default:
      return AttentionOf<float>(spec);
  }
}

NodeLaunch RetroactiveNode(const DeviceRetroactive& s) {
  return [=](const DeviceFrame& frame, cudaStream_t stream) {
    RetroactiveLaunch<RetroactiveSteps> p = {};
    p.source = {frame.blocks,
                frame.positions,
                frame.key_mask,
                frame.RowsOrNull<bool>(s.key_mask),
                frame.Rows<float>(s.query),
                frame.Rows<float>(s.key),
                frame.Rows<float>(s.value),
                frame.Rows<float>(s.output),
                s};
    p.streams = frame.streams;
    p.steps = 1;
    p.heads = s.heads;
    p.window = s.window;
    p.key_dim = s.key_dim;
    p.value_dim = s.value_dim;
    p.scale = s.scale;
    p.recompute = s.recompute;
    p.keep = true;
    p.overlap = frame.overlap;
    return WithHeadLayout<float>(s.key_dim, s.value_dim, [&](auto layout) {
      const cudaError_t error = LaunchRetroactiveRows<decltype(layout)>(p, stream);
      return error == cudaSuccess ? KeepRetroactiveSteps<decltype(layout)>(p, stream) : error;
    });
  };
}

NodeLaunch WindowAttentionNode(const DeviceWindowAttention& s) {
  return [=](const DeviceFrame& frame, cudaStream_t stream) {
    const WindowQueryParams p = {frame.positions,
                                 frame.Rows<float>(s.query),
                                 frame.Rows<float>(s.key),
                                 frame.Rows<float>(s.value),
                                 frame.Rows<float>(s.output),
                                 s};
    return WithHeadLayout<float>(s.key_dim, s.value_dim, [&](auto layout) {
      return Launch(WindowQueryKernel<decltype(layout)>, frame.streams * s.queries * s.heads,
                    kThreads, frame.overlap, stream, p);
    });
  };
}

}  // namespace continual_transformers
