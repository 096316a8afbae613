// The kernels as a C interface, which tests/gpu and benchmarks/gpu call through ctypes.

#ifndef CONTINUAL_TRANSFORMERS_CUDA_C_API_H_
#define CONTINUAL_TRANSFORMERS_CUDA_C_API_H_

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#pragma GCC visibility push(default)  // the library exports nothing else

// The dtypes of the computation, of keys and values, and of kernels.
enum { kFloat32 = 0, kFloat64 = 1, kBFloat16 = 2, kFloat16 = 3 };

// SingleOutputParams and DeviceSingleOutputParams without types. Arrays are contiguous, with the
// axes of params.h; rings are [S, N, H, D].
typedef struct {
  int32_t compute_dtype, cache_dtype;
  const void *query, *key, *value;
  const void* key_mask;
  void *key_cache, *value_cache, *key_mask_cache;
  int64_t* position;
  const int32_t* streams;
  const void* attention_mask;                 // [M or 1, H or 1, T or 1, N]
  int64_t mask_rows, mask_heads, mask_steps;  // its first three axes
  void *output, *scores, *window_key, *window_value, *window_key_mask;
  int64_t num_held, num_streams, num_steps, num_heads, window, key_dim, value_dim;
  double scale;
  int32_t update_state, advance_position, overlap;
  int64_t window_parts;
  void* parts;
  int64_t* steps_taken;
  const void* query_mask;
  uint32_t* arrivals;
} ContinualTransformersSingleOutput;

// Returns null, or the reason why the call was not made, which is never freed.
const char* continual_transformers_cuda_single_output(const ContinualTransformersSingleOutput* call,
                                                      void* stream);
// Return the sizes of call->parts, in elements of the compute dtype, and of call->arrivals.
int64_t continual_transformers_cuda_single_output_parts(
    const ContinualTransformersSingleOutput* call);
int64_t continual_transformers_cuda_single_output_arrivals(
    const ContinualTransformersSingleOutput* call);
int64_t continual_transformers_cuda_plan_window_parts(int64_t queries, int64_t window,
                                                      int32_t multiprocessors);

// CoSiMhaStep and DeviceCoSiMhaStep without types. `attention` has the sizes, state, masks, scores
// and streams. Its query, key and value are the layer's inputs [M, features]. Its output is unused.
typedef struct {
  ContinualTransformersSingleOutput attention;
  int32_t weights_dtype;
  const void *query_kernel, *key_kernel, *value_kernel, *gate_kernel, *output_kernel;
  const void *query_bias, *key_bias, *value_bias, *gate_bias, *output_bias;
  int64_t query_features, key_features, value_features, output_features;
  void* result;
  int64_t delay;
  void *query_ring, *query_mask_ring, *gate_ring;
  int32_t multiprocessors;
  void* scratch;
} ContinualTransformersCoSiMhaStep;

const char* continual_transformers_cuda_co_si_mha_step(const ContinualTransformersCoSiMhaStep* call,
                                                       void* stream);
int64_t continual_transformers_cuda_co_si_mha_step_scratch_bytes(
    const ContinualTransformersCoSiMhaStep* call);
int64_t continual_transformers_cuda_co_si_mha_step_arrivals(
    const ContinualTransformersCoSiMhaStep* call);

// DeviceCoSiEncoderStep without types. The result and scratch of `attention` are unused. The norms'
// scales and offsets are [E].
typedef struct {
  ContinualTransformersCoSiMhaStep attention;
  const void *attention_norm_scale, *attention_norm_offset, *output_norm_scale, *output_norm_offset;
  double epsilon;
  const void *hidden_kernel, *hidden_bias, *output_kernel, *output_bias;
  int64_t hidden_features;
  int32_t activation;  // 0: linear, 1: gelu, 2: relu
  int32_t norm_first;
  void* result;
  void* scratch;
} ContinualTransformersCoSiEncoderStep;

const char* continual_transformers_cuda_co_si_encoder_step(
    const ContinualTransformersCoSiEncoderStep* call, void* stream);
int64_t continual_transformers_cuda_co_si_encoder_step_scratch_bytes(
    const ContinualTransformersCoSiEncoderStep* call);

// DeviceRetroactiveParams without types. `compute_dtype` is that of all arrays but softmax,
// weighted_sum and made_with, which are in double. Arrays are contiguous, with the axes of
// params.h; rings are [S, N, H, D], and the output is [M, T, H, N, Dv].
typedef struct {
  int32_t compute_dtype;
  const void *query, *key, *value;
  const void* key_mask;
  void *query_cache, *key_cache, *value_cache, *key_mask_cache;
  double *softmax, *weighted_sum, *made_with;
  int64_t* position;
  const int32_t* streams;
  void* output;
  int64_t num_held, num_streams, num_steps, num_heads, window, key_dim, value_dim;
  double scale;
  int32_t update_state, advance_position, recompute;
  int64_t* steps_taken;
} ContinualTransformersRetroactive;

const char* continual_transformers_cuda_retroactive(const ContinualTransformersRetroactive* call,
                                                    void* stream);

// Launches a kernel that does nothing, to measure the cost of a launch.
const char* continual_transformers_cuda_nothing(void* stream);

#pragma GCC visibility pop

#ifdef __cplusplus
}
#endif

#endif  // CONTINUAL_TRANSFORMERS_CUDA_C_API_H_
