// Dense layers with few rows on a GPU. The time is little more than that of reading their kernels.

#ifndef CONTINUAL_TRANSFORMERS_CUDA_DENSE_H_
#define CONTINUAL_TRANSFORMERS_CUDA_DENSE_H_

#include <cuda_runtime.h>

#include <cstdint>

#include "cc/attention/activations.h"
#include "cc/attention/co_si_mha_step.h"
#include "cuda/normalize.h"

namespace continual_transformers {

enum class Storage { kAsComputed, kBFloat16, kFloat16 };

// output = activation((input * factor) @ kernel + bias) + residual. T is the compute type, W the
// type of the kernel.
template <typename T, typename W>
struct DeviceDense {
  const T* input;   // [M, inputs]
  const T* factor;  // [M, inputs]; null: ones
  const W* kernel;  // [inputs, outputs]
  const T* bias;    // [outputs]; null: none
  int64_t inputs;
  int64_t outputs;
  Activation activation;  // HasActivation()
  const T* residual;      // [M, outputs]; null: none
  // [S, delay, outputs]. The output is exchanged for that of `delay` steps before, or for zeros if
  // there was no such step. Null: no delay.
  T* delay_ring;
  void* output;  // [M, outputs]
  Storage output_as;
};

template <typename T, typename W>
DeviceDense<T, W> DenseOf(const Projection<T, W>& projection, int64_t outputs, void* output) {
  DeviceDense<T, W> layer = {};
  layer.input = projection.input;
  layer.kernel = projection.kernel;
  layer.bias = projection.bias;
  layer.inputs = projection.inputs;
  layer.outputs = outputs;
  layer.output = output;
  return layer;
}

// Returns whether the kernel can apply it. Activations with parameters have their defaults.
constexpr bool HasActivation(Activation activation) {
  return activation == Activation::kLinear || activation == Activation::kSigmoid ||
         activation == Activation::kGelu || activation == Activation::kRelu;
}

// Several layers with the same rows, in one launch.
template <typename T, typename W>
struct DeviceDenseParams {
  static constexpr int kMost = 4;
  DeviceDense<T, W> layers[kMost];
  int num_layers;
  int64_t rows;  // M

  // If norm.x is not null, rows of it are normalized to norm.y first. Layers may have norm.y as
  // their input, but not as their residual. With few rows this is part of the same launch.
  DeviceNormalizeParams<T> norm;

  // The streams of the delay rings. Not read if no layer has a ring.
  const int32_t* streams;   // [M]; null: row m is stream m
  const int64_t* position;  // [S]
  int64_t num_held;         // S
  int64_t delay;
  bool update_state;
  // Whether each query attends. It is exchanged like the outputs. Null: all true.
  const bool* query_mask;  // [M]
  bool* query_mask_ring;   // [S, delay]; null: no delay
  bool* asking;            // [M]; null: not wanted

  bool overlap;  // see DeviceSingleOutputParams
  // Whether no launch that may overlap this one writes the kernels. Then this one reads them before
  // it waits.
  bool constant_kernels;
};

// Instantiated for the weight types of step_types.h.
template <typename T, typename W>
cudaError_t LaunchDense(const DeviceDenseParams<T, W>& params, cudaStream_t stream);

}  // namespace continual_transformers

#endif  // CONTINUAL_TRANSFORMERS_CUDA_DENSE_H_
