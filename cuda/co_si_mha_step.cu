#include <cstdint>
#include <type_traits>

#include "cc/attention/half.h"
#include "cc/attention/step_types.h"
#include "cuda/co_si_mha_step.h"
#include "cuda/dense.h"
#include "cuda/launch.cuh"
#include "cuda/scratch.h"
#include "cuda/single_output.h"
#include "cuda/window_parts.h"

namespace continual_transformers {
namespace {

template <typename C>
constexpr Storage kStorage = std::is_same_v<C, BFloat16>  ? Storage::kBFloat16
                             : std::is_same_v<C, Float16> ? Storage::kFloat16
                                                          : Storage::kAsComputed;

// The memory between the launches of a step.
template <typename T, typename C, typename W>
struct Scratch {
  explicit Scratch(const DeviceCoSiMhaStep<T, C, W>& step) {
    const auto& p = step.attention;
    const int64_t pairs = p.num_streams * p.num_heads;
    ScratchLayout layout(step.scratch);
    query = layout.Take<T>(pairs * p.key_dim);
    key = layout.Take<C>(pairs * p.key_dim);
    value = layout.Take<C>(pairs * p.value_dim);
    gate = step.gate.kernel == nullptr ? nullptr : layout.Take<T>(pairs * p.value_dim);
    attended = layout.Take<T>(pairs * p.value_dim);
    asking = layout.Take<bool>(p.num_streams);
    window_parts = PlanWindowParts(pairs, p.window, step.multiprocessors);
    parts = layout.Take<T>(PartsSize(pairs, window_parts, p.value_dim));
    bytes = layout.bytes();
  }

  T* query;
  C *key, *value;
  T *gate, *attended;
  bool* asking;
  int64_t window_parts;
  T* parts;
  int64_t bytes;
};

// The parameters of the attention's launch.
template <typename T, typename C, typename W>
DeviceSingleOutputParams<T, C> AttentionOf(const DeviceCoSiMhaStep<T, C, W>& step) {
  const Scratch<T, C, W> scratch(step);
  DeviceSingleOutputParams<T, C> p = {};
  static_cast<SingleOutputParams<T, C>&>(p) = step.attention;
  p.num_steps = 1;
  p.query = scratch.query;
  p.key = scratch.key;
  p.value = scratch.value;
  p.output = scratch.attended;
  p.query_strides = p.key_strides = BatchTimeHead(1, p.num_heads, p.key_dim);
  p.value_strides = p.output_strides = BatchTimeHead(1, p.num_heads, p.value_dim);
  p.window_parts = scratch.window_parts;
  p.parts = scratch.parts;
  p.num_held = step.num_held;
  p.next_position = step.next_position;
  p.query_mask = scratch.asking;
  p.arrivals = step.arrivals;
  return p;
}

template <typename T, typename C, typename W>
DeviceDenseParams<T, W> ProjectionsIn(const DeviceCoSiMhaStep<T, C, W>& step,
                                      const Scratch<T, C, W>& scratch) {
  const auto& p = step.attention;
  const int64_t keys = p.num_heads * p.key_dim, values = p.num_heads * p.value_dim;
  DeviceDenseParams<T, W> dense = {};
  dense.layers[0] = DenseOf(step.query, keys, scratch.query);
  dense.layers[1] = DenseOf(step.key, keys, scratch.key);
  dense.layers[2] = DenseOf(step.value, values, scratch.value);
  dense.layers[1].output_as = dense.layers[2].output_as = kStorage<C>;
  dense.num_layers = 3;
  if (step.gate.kernel != nullptr) {
    dense.layers[3] = DenseOf(step.gate, values, scratch.gate);
    dense.layers[3].activation = Activation::kSigmoid;
    dense.num_layers = 4;
  }
  dense.rows = p.num_streams;
  if (step.delay > 0) {
    dense.layers[0].delay_ring = step.query_ring;
    dense.layers[3].delay_ring = step.gate_ring;
    dense.query_mask_ring = step.query_mask_ring;
    dense.delay = step.delay;
    dense.streams = p.streams;
    dense.position = p.position;
    dense.num_held = step.num_held;
    dense.update_state = p.update_state;
  }
  dense.query_mask = step.query_mask;
  dense.asking = scratch.asking;
  return dense;
}

template <typename T, typename C, typename W>
DeviceDenseParams<T, W> ProjectionOut(const DeviceCoSiMhaStep<T, C, W>& step,
                                      const Scratch<T, C, W>& scratch) {
  DeviceDenseParams<T, W> dense = {};
  dense.layers[0] = DenseOf(step.output, step.output_features, step.result);
  dense.layers[0].input = scratch.attended;
  dense.layers[0].factor = scratch.gate;
  dense.layers[0].residual = step.residual;
  dense.num_layers = 1;
  dense.rows = step.attention.num_streams;
  return dense;
}

}  // namespace

template <typename T, typename C, typename W>
int64_t DeviceCoSiMhaStep<T, C, W>::ScratchBytes() const {
  return Scratch<T, C, W>(*this).bytes;
}

template <typename T, typename C, typename W>
int64_t DeviceCoSiMhaStep<T, C, W>::NumArrivals() const {
  return AttentionOf(*this).NumArrivals();
}

template <typename T, typename C, typename W>
const char* RefusesCoSiMhaStep(const DeviceCoSiMhaStep<T, C, W>& step) {
  return RefusesSingleOutput(AttentionOf(step));
}

template <typename T, typename C, typename W>
cudaError_t LaunchCoSiMhaStep(const DeviceCoSiMhaStep<T, C, W>& step, cudaStream_t stream) {
  if (step.attention.num_streams == 0) return cudaSuccess;
  const Scratch<T, C, W> scratch(step);
  DeviceDenseParams<T, W> in = ProjectionsIn(step, scratch);
  DeviceSingleOutputParams<T, C> attention = AttentionOf(step);
  // Sizes are refused before the first launch.
  if (RefusesSingleOutput(attention) != nullptr) return cudaErrorInvalidValue;
  in.overlap = attention.overlap = step.may_overlap && CanOverlap();
  cudaError_t error = LaunchDense(in, stream);
  if (error == cudaSuccess) error = LaunchSingleOutput(attention, stream);
  if (error != cudaSuccess || step.result == nullptr) return error;
  DeviceDenseParams<T, W> out = ProjectionOut(step, scratch);
  out.overlap = in.overlap;
  return LaunchDense(out, stream);
}

#define INSTANTIATE(T, C, W)                                                           \
  template struct DeviceCoSiMhaStep<T, C, W>;                                          \
  template const char* RefusesCoSiMhaStep<T, C, W>(const DeviceCoSiMhaStep<T, C, W>&); \
  template cudaError_t LaunchCoSiMhaStep<T, C, W>(const DeviceCoSiMhaStep<T, C, W>&, cudaStream_t);
CONTINUAL_TRANSFORMERS_FOR_STEP_TYPES(INSTANTIATE)
#undef INSTANTIATE

}  // namespace continual_transformers
