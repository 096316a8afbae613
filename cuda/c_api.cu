#include <cuda_runtime.h>

#include <type_traits>

#include "cc/attention/activations.h"
#include "cc/attention/half.h"
#include "cc/attention/params.h"
#include "cc/attention/step_types.h"
#include "cuda/c_api.h"
#include "cuda/co_si_encoder_step.h"
#include "cuda/co_si_mha_step.h"
#include "cuda/launch.cuh"
#include "cuda/retroactive.h"
#include "cuda/single_output.h"
#include "cuda/window_parts.h"

namespace continual_transformers {
namespace {

constexpr const char* kNoSuchTypes =
    "expected keys and values of float32, bfloat16 or float16 under float32, or of float64 under "
    "float64; and kernels of float32 or bfloat16, or of float64";

const char* ToMessage(cudaError_t error) {
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// The dtypes of c_api.h.
template <typename T>
constexpr int32_t kDtype = std::is_same_v<T, float>      ? kFloat32
                           : std::is_same_v<T, double>   ? kFloat64
                           : std::is_same_v<T, BFloat16> ? kBFloat16
                                                         : kFloat16;

// The strides of a mask [M, H, T, N]. Axes of size 1 broadcast.
Strides MaskStrides(int64_t rows, int64_t heads, int64_t steps, int64_t window) {
  Strides strides = BatchHeadTime(heads, steps, window);
  if (rows == 1) strides.stream = 0;
  if (heads == 1) strides.head = 0;
  if (steps == 1) strides.step = 0;
  return strides;
}

// The activations of c_api.h.
Activation ActivationOf(int32_t number) {
  return number == 1 ? Activation::kGelu : number == 2 ? Activation::kRelu : Activation::kLinear;
}

template <typename T, typename C>
DeviceSingleOutputParams<T, C> ParamsOf(const ContinualTransformersSingleOutput& call) {
  DeviceSingleOutputParams<T, C> p = {};
  const int64_t t = call.num_steps, h = call.num_heads;
  p.query = static_cast<const T*>(call.query);
  p.key = static_cast<const C*>(call.key);
  p.value = static_cast<const C*>(call.value);
  p.query_strides = p.key_strides = BatchTimeHead(t, h, call.key_dim);
  p.value_strides = p.output_strides = BatchTimeHead(t, h, call.value_dim);
  p.key_mask = static_cast<const bool*>(call.key_mask);
  p.key_cache = static_cast<C*>(call.key_cache);
  p.value_cache = static_cast<C*>(call.value_cache);
  p.key_cache_strides = RowMajorRing(h, call.window, call.key_dim);
  p.value_cache_strides = RowMajorRing(h, call.window, call.value_dim);
  p.key_mask_cache = static_cast<bool*>(call.key_mask_cache);
  p.position = call.position;
  p.next_position = call.advance_position != 0 ? call.position : nullptr;
  p.streams = call.streams;
  p.mask = static_cast<const bool*>(call.attention_mask);
  p.mask_strides = MaskStrides(call.mask_rows, call.mask_heads, call.mask_steps, call.window);
  p.output = static_cast<T*>(call.output);
  p.scores = static_cast<T*>(call.scores);
  p.scores_strides = BatchHeadTime(h, t, call.window);
  p.window_key = static_cast<C*>(call.window_key);
  p.window_value = static_cast<C*>(call.window_value);
  p.window_key_mask = static_cast<bool*>(call.window_key_mask);
  p.num_held = call.num_held;
  p.num_streams = call.num_streams;
  p.num_steps = t;
  p.num_heads = h;
  p.window = call.window;
  p.key_dim = call.key_dim;
  p.value_dim = call.value_dim;
  p.scale = static_cast<T>(call.scale);
  p.update_state = call.update_state != 0;
  p.overlap = call.overlap != 0;
  p.window_parts = call.window_parts;
  p.parts = static_cast<T*>(call.parts);
  p.steps_taken = call.steps_taken;
  p.query_mask = static_cast<const bool*>(call.query_mask);
  p.arrivals = call.arrivals;
  return p;
}

template <typename T, typename W>
Projection<T, W> ProjectionOf(const void* input, const void* kernel, const void* bias,
                              int64_t inputs) {
  return {static_cast<const T*>(input), static_cast<const W*>(kernel), static_cast<const T*>(bias),
          inputs};
}

template <typename T, typename C, typename W>
DeviceCoSiMhaStep<T, C, W> StepOf(const ContinualTransformersCoSiMhaStep& call) {
  const auto& attention = call.attention;
  DeviceCoSiMhaStep<T, C, W> s = {};
  s.attention = ParamsOf<T, C>(attention);
  const int64_t values = attention.num_heads * attention.value_dim;
  s.query =
      ProjectionOf<T, W>(attention.query, call.query_kernel, call.query_bias, call.query_features);
  s.key = ProjectionOf<T, W>(attention.key, call.key_kernel, call.key_bias, call.key_features);
  s.value =
      ProjectionOf<T, W>(attention.value, call.value_kernel, call.value_bias, call.value_features);
  s.gate =
      ProjectionOf<T, W>(attention.query, call.gate_kernel, call.gate_bias, call.query_features);
  s.output = ProjectionOf<T, W>(nullptr, call.output_kernel, call.output_bias, values);
  s.result = static_cast<T*>(call.result);
  s.output_features = call.output_features;
  s.delay = call.delay;
  s.query_ring = static_cast<T*>(call.query_ring);
  s.query_mask_ring = static_cast<bool*>(call.query_mask_ring);
  s.gate_ring = static_cast<T*>(call.gate_ring);
  s.query_mask = static_cast<const bool*>(attention.query_mask);
  s.num_held = attention.num_held;
  s.next_position = attention.advance_position != 0 ? attention.position : nullptr;
  s.multiprocessors = call.multiprocessors;
  s.scratch = call.scratch;
  s.arrivals = attention.arrivals;
  s.may_overlap = attention.overlap != 0;
  return s;
}

// Returns f(params of the call's types), or `otherwise` if no kernel has these types.
template <typename R, typename F>
R WithParams(const ContinualTransformersSingleOutput& call, R otherwise, const F& f) {
#define TRY(T, C)                                                         \
  if (call.compute_dtype == kDtype<T> && call.cache_dtype == kDtype<C>) { \
    return f(ParamsOf<T, C>(call));                                       \
  }
  CONTINUAL_TRANSFORMERS_FOR_CACHE_TYPES(TRY)
#undef TRY
  return otherwise;
}

template <typename R, typename F>
R WithStep(const ContinualTransformersCoSiMhaStep& call, R otherwise, const F& f) {
  const int32_t compute = call.attention.compute_dtype, cache = call.attention.cache_dtype;
#define TRY(T, C, W)                                                                   \
  if (compute == kDtype<T> && cache == kDtype<C> && call.weights_dtype == kDtype<W>) { \
    return f(StepOf<T, C, W>(call));                                                   \
  }
  CONTINUAL_TRANSFORMERS_FOR_STEP_TYPES(TRY)
#undef TRY
  return otherwise;
}

template <typename T, typename C, typename W>
DeviceCoSiEncoderStep<T, C, W> EncoderOf(const ContinualTransformersCoSiEncoderStep& call,
                                         const DeviceCoSiMhaStep<T, C, W>& attention) {
  const auto norm = [&](const void* scale, const void* offset) {
    return LayerNorm<T>{static_cast<const T*>(scale), static_cast<const T*>(offset),
                        static_cast<T>(call.epsilon)};
  };
  DeviceCoSiEncoderStep<T, C, W> e = {};
  e.attention = attention;
  e.attention_norm = norm(call.attention_norm_scale, call.attention_norm_offset);
  e.output_norm = norm(call.output_norm_scale, call.output_norm_offset);
  e.hidden =
      ProjectionOf<T, W>(nullptr, call.hidden_kernel, call.hidden_bias, attention.query.inputs);
  e.output =
      ProjectionOf<T, W>(nullptr, call.output_kernel, call.output_bias, call.hidden_features);
  e.hidden_features = call.hidden_features;
  e.activation = ActivationOf(call.activation);
  e.norm_first = call.norm_first != 0;
  e.result = static_cast<T*>(call.result);
  e.scratch = call.scratch;
  return e;
}

template <typename T>
DeviceRetroactiveParams<T> RetroactiveParamsOf(const ContinualTransformersRetroactive& call) {
  DeviceRetroactiveParams<T> p = {};
  const int64_t t = call.num_steps, h = call.num_heads, n = call.window;
  p.query = static_cast<const T*>(call.query);
  p.key = static_cast<const T*>(call.key);
  p.value = static_cast<const T*>(call.value);
  p.query_strides = p.key_strides = BatchTimeHead(t, h, call.key_dim);
  p.value_strides = BatchTimeHead(t, h, call.value_dim);
  p.key_mask = static_cast<const bool*>(call.key_mask);
  p.query_cache = static_cast<T*>(call.query_cache);
  p.key_cache = static_cast<T*>(call.key_cache);
  p.value_cache = static_cast<T*>(call.value_cache);
  p.query_cache_strides = p.key_cache_strides = RowMajorRing(h, n, call.key_dim);
  p.value_cache_strides = RowMajorRing(h, n, call.value_dim);
  p.key_mask_cache = static_cast<bool*>(call.key_mask_cache);
  p.softmax = call.softmax;
  p.weighted_sum = call.weighted_sum;
  p.made_with = call.made_with;
  p.position = call.position;
  p.next_position = call.advance_position != 0 ? call.position : nullptr;
  p.streams = call.streams;
  p.output = static_cast<T*>(call.output);
  p.output_strides = BatchTimeHead(t, h, n * call.value_dim);
  p.output_row_stride = call.value_dim;
  p.num_held = call.num_held;
  p.num_streams = call.num_streams;
  p.num_steps = t;
  p.num_heads = h;
  p.window = n;
  p.key_dim = call.key_dim;
  p.value_dim = call.value_dim;
  p.scale = static_cast<T>(call.scale);
  p.update_state = call.update_state != 0;
  p.recompute = call.recompute != 0;
  p.steps_taken = call.steps_taken;
  return p;
}

struct Nothing {};
__global__ void NothingKernel(const __grid_constant__ Nothing) {}

}  // namespace
}  // namespace continual_transformers

using namespace continual_transformers;  // the functions below have C names

const char* continual_transformers_cuda_single_output(const ContinualTransformersSingleOutput* call,
                                                      void* stream) {
  return WithParams(*call, kNoSuchTypes, [&](const auto& params) {
    const char* refused = RefusesSingleOutput(params);
    if (refused != nullptr) return refused;
    return ToMessage(LaunchSingleOutput(params, static_cast<cudaStream_t>(stream)));
  });
}

int64_t continual_transformers_cuda_single_output_parts(
    const ContinualTransformersSingleOutput* call) {
  return WithParams(*call, int64_t{-1}, [](const auto& params) { return params.NumParts(); });
}

int64_t continual_transformers_cuda_single_output_arrivals(
    const ContinualTransformersSingleOutput* call) {
  return WithParams(*call, int64_t{-1}, [](const auto& params) { return params.NumArrivals(); });
}

int64_t continual_transformers_cuda_plan_window_parts(int64_t queries, int64_t window,
                                                      int32_t multiprocessors) {
  return PlanWindowParts(queries, window, multiprocessors);
}

const char* continual_transformers_cuda_co_si_mha_step(const ContinualTransformersCoSiMhaStep* call,
                                                       void* stream) {
  return WithStep(*call, kNoSuchTypes, [&](const auto& step) {
    const char* refused = RefusesCoSiMhaStep(step);
    if (refused != nullptr) return refused;
    return ToMessage(LaunchCoSiMhaStep(step, static_cast<cudaStream_t>(stream)));
  });
}

int64_t continual_transformers_cuda_co_si_mha_step_scratch_bytes(
    const ContinualTransformersCoSiMhaStep* call) {
  return WithStep(*call, int64_t{-1}, [](const auto& step) { return step.ScratchBytes(); });
}

int64_t continual_transformers_cuda_co_si_mha_step_arrivals(
    const ContinualTransformersCoSiMhaStep* call) {
  return WithStep(*call, int64_t{-1}, [](const auto& step) { return step.NumArrivals(); });
}

const char* continual_transformers_cuda_co_si_encoder_step(
    const ContinualTransformersCoSiEncoderStep* call, void* stream) {
  return WithStep(call->attention, kNoSuchTypes, [&](const auto& attention) {
    const auto encoder = EncoderOf(*call, attention);
    const char* refused = RefusesCoSiEncoderStep(encoder);
    if (refused != nullptr) return refused;
    return ToMessage(LaunchCoSiEncoderStep(encoder, static_cast<cudaStream_t>(stream)));
  });
}

int64_t continual_transformers_cuda_co_si_encoder_step_scratch_bytes(
    const ContinualTransformersCoSiEncoderStep* call) {
  return WithStep(call->attention, int64_t{-1}, [&](const auto& attention) {
    return EncoderOf(*call, attention).ScratchBytes();
  });
}

const char* continual_transformers_cuda_retroactive(const ContinualTransformersRetroactive* call,
                                                    void* stream) {
#define TRY(T)                                                                      \
  if (call->compute_dtype == kDtype<T>) {                                           \
    const DeviceRetroactiveParams<T> params = RetroactiveParamsOf<T>(*call);        \
    const char* refused = RefusesRetroactive(params);                               \
    if (refused != nullptr) return refused;                                         \
    return ToMessage(LaunchRetroactive(params, static_cast<cudaStream_t>(stream))); \
  }
  CONTINUAL_TRANSFORMERS_FOR_COMPUTE_TYPES(TRY)
#undef TRY
  return "expected float32 or float64";
}

const char* continual_transformers_cuda_nothing(void* stream) {
  return ToMessage(
      Launch(NothingKernel, 1, 1, false, static_cast<cudaStream_t>(stream), Nothing()));
}
