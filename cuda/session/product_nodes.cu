// Nodes that multiply matrices, and depthwise convolutions.

#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

#include "cc/attention/half.h"
#include "cuda/dense.h"
#include "cuda/for_each.cuh"
#include "cuda/session/node_kernels.h"
#include "cuda/session/phases.h"

namespace continual_transformers {
namespace {

template <typename W>
NodeKernels DenseOf(const std::vector<DeviceDenseLayer>& layers, const DeviceLayerNorm& norm,
                    int64_t rows) {
  static_assert(DeviceDenseParams<float, W>::kMost == kMostDenseLayers);
  const auto params_of = [=](const DeviceFrame& frame) {
    DeviceDenseParams<float, W> p = {};
    for (const DeviceDenseLayer& from : layers) {
      DeviceDense<float, W>& layer = p.layers[p.num_layers++];
      layer.input = frame.Rows<float>(from.input);
      layer.kernel = static_cast<const W*>(from.kernel);
      layer.bias = from.bias;
      layer.inputs = from.inputs;
      layer.outputs = from.outputs;
      layer.activation = from.activation;
      layer.residual = frame.RowsOrNull<float>(from.residual);
      layer.output = frame.Rows<float>(from.output);
    }
    p.rows = frame.streams * rows;
    p.overlap = frame.overlap;
    p.constant_kernels = true;
    if (norm.input >= 0) {
      p.norm.norm = {norm.gamma, norm.beta, norm.epsilon};
      p.norm.x = frame.Rows<float>(norm.input);
      p.norm.y = frame.Rows<float>(norm.output);
      p.norm.rows = p.rows;
      p.norm.size = norm.columns;
      p.norm.overlap = frame.overlap;
    }
    return p;
  };
  NodeKernels node = [=](const DeviceFrame& frame, cudaStream_t stream) {
    return LaunchDense(params_of(frame), stream);
  };
  const bool fits = std::all_of(layers.begin(), layers.end(), [](const DeviceDenseLayer& layer) {
    return layer.inputs <= std::numeric_limits<int>::max();  // as LaunchDense demands
  });
  if (rows == 1 && fits) {
    node.phase = [=](const DeviceFrame& frame, Phases* phases) { phases->Add(params_of(frame)); };
  }
  return node;
}

// i is an element of the output.
struct MatmulEach {
  const float *a, *b;
  float* y;
  int64_t rows, depth, columns;
  __device__ void operator()(int64_t i) const {
    const int64_t matrix = i / (rows * columns), row = i / columns % rows, column = i % columns;
    const float* const x = a + (matrix * rows + row) * depth;
    const float* const w = b + matrix * depth * columns + column;
    float sum = 0;
    for (int64_t k = 0; k < depth; ++k) sum += x[k] * w[k * columns];
    y[i] = sum;
  }
};

// i is an element of the output.
struct DepthwiseEach {
  DeviceDepthwise s;
  const float* x;
  float* y;
  __device__ void operator()(int64_t i) const {
    const int64_t m = i / (s.output_rows * s.outputs), row = i / s.outputs % s.output_rows;
    const int64_t j = i % s.outputs, channel = j / (s.outputs / s.channels);
    const float* const of_step = x + m * s.rows * s.channels;
    float sum = s.bias == nullptr ? 0.f : s.bias[j];
    for (int64_t tap = 0; tap < s.taps; ++tap) {
      sum += of_step[(row * s.stride + tap * s.dilation) * s.channels + channel] *
             s.kernel[tap * s.outputs + j];
    }
    y[i] = sum;
  }
};

}  // namespace

NodeKernels DenseNode(const std::vector<DeviceDenseLayer>& layers, const DeviceLayerNorm& norm,
                      DType weights, int64_t rows) {
  return weights == DType::kBFloat16 ? DenseOf<BFloat16>(layers, norm, rows)
                                     : DenseOf<float>(layers, norm, rows);
}

NodeKernels MatmulNode(int a, int b, int output, int64_t count, int64_t rows, int64_t depth,
                       int64_t columns) {
  return [=](const DeviceFrame& frame, cudaStream_t stream) {
    return ForEach(frame.streams * count * rows * columns,
                   MatmulEach{frame.Rows<float>(a), frame.Rows<float>(b), frame.Rows<float>(output),
                              rows, depth, columns},
                   frame.overlap, stream);
  };
}

NodeKernels DepthwiseNode(const DeviceDepthwise& spec) {
  return [=](const DeviceFrame& frame, cudaStream_t stream) {
    return ForEach(
        frame.streams * spec.output_rows * spec.outputs,
        DepthwiseEach{spec, frame.Rows<float>(spec.input), frame.Rows<float>(spec.output)},
        frame.overlap, stream);
  };
}

}  // namespace continual_transformers
