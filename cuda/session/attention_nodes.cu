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
#include "cuda/session/phases.h"
#include "cuda/session/ring_query.cuh"
#include "cuda/window_parts.h"

namespace continual_transformers {
namespace {

// ---- Over the ring of a stream ----

template <typename C, typename L, bool kCut>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor<float>)
    RingQueryKernel(const __grid_constant__ RingQueryParams p) {
  ReleaseNext();
  const RingQuery<C, L, kCut> query(p, blockIdx.x);
  query.Begin();
  WaitForPrevious();
  query.Run();
}

// Returns the parameters for the first row of each step.
template <typename C>
RingQueryParams ParamsOf(const DeviceAttention& s, const DeviceFrame& frame) {
  return {frame.blocks,
          frame.positions,
          frame.key_mask,
          frame.Rows<float>(s.query),
          frame.Rows<float>(s.key),
          frame.Rows<float>(s.value),
          frame.RowsOrNull<bool>(s.key_mask),
          frame.RowsOrNull<bool>(s.query_mask),
          frame.Rows<float>(s.output),
          0,
          static_cast<int>(s.WindowParts(frame.streams)),
          frame.Rows<float>(s.parts),
          frame.arrivals,
          s,
          frame.overlap && s.ReadsAll() &&
              s.RingBytes(frame.streams, sizeof(C)) <= kMostPrefetchedBytes};
}

template <typename C>
NodeKernels AttentionOf(const DeviceAttention& s) {
  NodeKernels node = [=](const DeviceFrame& frame, cudaStream_t stream) {
    RingQueryParams p = ParamsOf<C>(s, frame);
    const int64_t window_parts = p.window_parts;
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
  if (s.rows == 1) {
    node.phase = [=](const DeviceFrame& frame, Phases* phases) {
      phases->Add(ParamsOf<C>(s, frame));
    };
  }
  return node;
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

NodeKernels AttentionNode(const DeviceAttention& spec, DType cache) {
  switch (cache) {
    case DType::kBFloat16:
      return AttentionOf<BFloat16>(spec);
    case DType::kFloat16:
      return AttentionOf<Float16>(spec);
    default:
      return AttentionOf<float>(spec);
  }
}

NodeKernels RetroactiveNode(const DeviceRetroactive& s) {
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

NodeKernels WindowAttentionNode(const DeviceWindowAttention& s) {
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
