#include <cstdint>

#include "cc/attention/params.h"
#include "cc/attention/step_types.h"
#include "cuda/elements.cuh"
#include "cuda/for_each.cuh"
#include "cuda/launch.cuh"
#include "cuda/partial_attention.cuh"
#include "cuda/retroactive.cuh"
#include "cuda/retroactive.h"

namespace continual_transformers {
namespace {

template <typename T>
struct StreamsSource {
  using Number = T;

  DeviceRetroactiveParams<T> p;
  int64_t first;  // the call's step that is the launch's first

  __device__ bool Exists(int64_t m) const {
    const int64_t stream = StreamOf(m);
    return stream >= 0 && stream < p.num_held && p.position[stream] >= 0;
  }
  __device__ int64_t StreamOf(int64_t m) const {
    return p.streams == nullptr ? m : int64_t{p.streams[m]};
  }

  __device__ RetroactiveHead<T> Head(int64_t m, int h) const {
    const bool exists = Exists(m);
    const int64_t stream = exists ? StreamOf(m) : 0, n = p.window;
    const auto ring = [&](T* base, const Strides& strides) {
      return base + stream * strides.stream + h * strides.head;
    };
    const auto step = [&](auto* base, const Strides& strides) {
      return base + m * strides.stream + h * strides.head + first * strides.step;
    };
    RetroactiveHead<T> head;
    head.taken = exists ? p.position[stream] + first : -1;
    head.query = step(p.query, p.query_strides);
    head.key = step(p.key, p.key_strides);
    head.value = step(p.value, p.value_strides);
    head.query_stride = p.query_strides.step;
    head.key_stride = p.key_strides.step;
    head.value_stride = p.value_strides.step;
    head.query_ring = ring(p.query_cache, p.query_cache_strides);
    head.key_ring = ring(p.key_cache, p.key_cache_strides);
    head.value_ring = ring(p.value_cache, p.value_cache_strides);
    head.query_row = p.query_cache_strides.step;
    head.key_row = p.key_cache_strides.step;
    head.value_row = p.value_cache_strides.step;
    head.mask_ring = p.key_mask_cache + stream * n;
    const int64_t pair = stream * p.num_heads + h;
    head.softmax = p.softmax + pair * 4 * n;
    head.weighted_sum = p.weighted_sum + pair * n * p.value_dim;
    head.made_with = p.made_with + 2 * stream;
    head.output = step(p.output, p.output_strides);
    head.output_stride = p.output_strides.step;
    head.output_row = p.output_row_stride;
    return head;
  }

  __device__ bool HasKey(int64_t m, int64_t t) const {
    return p.key_mask == nullptr || p.key_mask[m * p.num_steps + first + t];
  }
};

template <typename T>
struct AdvanceEach {
  StreamsSource<T> source;
  __device__ void operator()(int64_t m) const {
    const auto& p = source.p;
    const bool exists = source.Exists(m);
    const int64_t stream = source.StreamOf(m);
    const int64_t taken = exists ? p.position[stream] + p.num_steps : -1;
    if (p.steps_taken != nullptr) p.steps_taken[m] = taken;
    if (exists && p.update_state && p.next_position != nullptr) p.next_position[stream] = taken;
  }
};

template <typename T>
bool TakesVectors(const DeviceRetroactiveParams<T>& p) {
  constexpr int kVector = kVectorBytes / sizeof(T);
  if (p.key_dim % kVector != 0 || p.value_dim % kVector != 0) return false;
  return IsAligned(p.query, p.query_strides) && IsAligned(p.key, p.key_strides) &&
         IsAligned(p.value, p.value_strides) && IsAligned(p.query_cache, p.query_cache_strides) &&
         IsAligned(p.key_cache, p.key_cache_strides) &&
         IsAligned(p.value_cache, p.value_cache_strides) &&
         IsAligned(p.weighted_sum, p.value_dim) && IsAligned(p.output, p.output_strides) &&
         IsAligned(p.output, p.output_row_stride);
}

template <int kElements, typename T>
cudaError_t LaunchSteps(const DeviceRetroactiveParams<T>& p, cudaStream_t stream) {
  RetroactiveLaunch<StreamsSource<T>> launch = {};
  launch.source = {p, 0};
  launch.streams = p.num_streams;
  launch.heads = p.num_heads;
  launch.window = p.window;
  launch.key_dim = p.key_dim;
  launch.value_dim = p.value_dim;
  launch.scale = p.scale;
  launch.keep = p.update_state;
  launch.overlap = CanOverlap();
  launch.recompute = p.recompute || (!p.update_state && p.num_steps > 1);
  // An update needs the sums of the step before it. Recomputing takes all steps at once.
  launch.steps = launch.recompute ? p.num_steps : 1;
  return WithLayout<kElements>(LargerHead(p), [&](auto layout) {
    // If the second launch's code could not be loaded after the first had changed the sums, a step
    // that is repeated would change them again.
    cudaError_t error = LoadKeepRetroactiveSteps(launch);
    if (error != cudaSuccess) return error;
    for (; launch.source.first < p.num_steps; launch.source.first += launch.steps) {
      error = LaunchRetroactiveRows<decltype(layout)>(launch, stream);
      if (error == cudaSuccess && p.update_state) {
        error = KeepRetroactiveSteps<decltype(layout)>(launch, stream);
      }
      if (error != cudaSuccess) return error;
    }
    return ForEach(p.num_streams, AdvanceEach<T>{{p, 0}}, launch.overlap, stream);
  });
}

}  // namespace

template <typename T>
const char* RefusesRetroactive(const DeviceRetroactiveParams<T>& p) {
  if (p.num_steps < 1 || p.num_heads < 1 || p.window < 1 || p.key_dim < 1 || p.value_dim < 1) {
    return "expected steps, heads, rows of the window and features >= 1";
  }
  if (p.window > kLongestRetroactiveWindow) return "expected windows of at most 2^29 rows";
  static_assert(LargestLayout::kLargest == 256);
  if (LargerHead(p) <= LargestLayout::kLargest) return nullptr;
  return "expected key and value sizes of at most 256";
}

template <typename T>
cudaError_t LaunchRetroactive(const DeviceRetroactiveParams<T>& p, cudaStream_t stream) {
  if (p.num_streams == 0) return cudaSuccess;
  if (RefusesRetroactive(p) != nullptr) return cudaErrorInvalidValue;
  // Doubles are for tests. One kernel is enough for them.
  if constexpr (sizeof(T) == 4) {
    if (TakesVectors(p)) return LaunchSteps<kVectorBytes / sizeof(T)>(p, stream);
  }
  return LaunchSteps<1>(p, stream);
}

#define INSTANTIATE(T)                                                           \
  template const char* RefusesRetroactive<T>(const DeviceRetroactiveParams<T>&); \
  template cudaError_t LaunchRetroactive<T>(const DeviceRetroactiveParams<T>&, cudaStream_t);
CONTINUAL_TRANSFORMERS_FOR_COMPUTE_TYPES(INSTANTIATE)
#undef INSTANTIATE

}  // namespace continual_transformers
