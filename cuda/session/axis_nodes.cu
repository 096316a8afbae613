// Nodes that compute along an axis. A line is the elements along it, `inner` apart. Sums run in the
// order of the elements, as on the CPU.

#include <cmath>
#include <cstdint>
#include <limits>
#include <string>

#include "cuda/block_sum.cuh"
#include "cuda/for_each.cuh"
#include "cuda/launch.cuh"
#include "cuda/normalize.h"
#include "cuda/session/node_kernels.h"
#include "cuda/session/phases.h"

namespace continual_transformers {
namespace {

// The lines of a value, of all streams.
struct Lines {
  const float* x;
  float* y;
  int64_t size, inner;

  Lines(const DeviceFrame& frame, const DeviceAxis& axis, int input, int output)
      : x(frame.Rows<float>(input)),
        y(frame.Rows<float>(output)),
        size(axis.size),
        inner(axis.inner) {}

  // The first element of line number i.
  __device__ int64_t Begin(int64_t i) const { return i / inner * size * inner + i % inner; }
};

int64_t NumLines(const DeviceFrame& frame, const DeviceAxis& axis) {
  return frame.streams * axis.outer * axis.inner;
}

// i is a line.
struct SoftmaxEach {
  Lines lines;
  bool log;
  __device__ void operator()(int64_t i) const {
    const float* const x = lines.x + lines.Begin(i);
    float* const y = lines.y + lines.Begin(i);
    float max = -std::numeric_limits<float>::infinity(), sum = 0;
    for (int64_t k = 0; k < lines.size; ++k) {
      if (x[k * lines.inner] > max) max = x[k * lines.inner];  // the exponential keeps a NaN
    }
    for (int64_t k = 0; k < lines.size; ++k) sum += std::exp(x[k * lines.inner] - max);
    const float log_sum = std::log(sum);
    for (int64_t k = 0; k < lines.size; ++k) {
      const float less = x[k * lines.inner] - max;
      y[k * lines.inner] = log ? less - log_sum : std::exp(less) / sum;
    }
  }
};

// i is a line. See SparsemaxOf in cc/session/row_instructions.h. Nothing is sorted: the number of
// larger elements is an element's place in the order.
struct SparsemaxEach {
  Lines lines;
  __device__ void operator()(int64_t i) const {
    const float* const x = lines.x + lines.Begin(i);
    float* const y = lines.y + lines.Begin(i);
    float sums = 0;
    int64_t support = 0;
    bool has_nan = false;
    for (int64_t k = 0; k < lines.size; ++k) {
      const float own = x[k * lines.inner];
      has_nan |= std::isnan(own);
      float sum = 0;  // of the elements up to this one, the largest first
      int64_t place = 0;
      for (int64_t j = 0; j < lines.size; ++j) {
        const float other = x[j * lines.inner];
        if (other > own || (other == own && j <= k)) {
          sum += other;
          ++place;
        }
      }
      if (1 + place * own > sum) {
        sums += sum;
        ++support;
      }
    }
    const float threshold = (sums - 1) / support;
    for (int64_t k = 0; k < lines.size; ++k) {
      const float rest = x[k * lines.inner] - threshold;
      y[k * lines.inner] = has_nan    ? std::numeric_limits<float>::quiet_NaN()
                           : rest > 0 ? rest
                                      : 0.f;
    }
  }
};

enum class Reduction { kSum, kMean, kMax, kMin, kProduct, kArgmax, kArgmin };

Reduction ReductionNamed(const std::string& function) {
  return function == "sum"       ? Reduction::kSum
         : function == "mean"    ? Reduction::kMean
         : function == "max"     ? Reduction::kMax
         : function == "min"     ? Reduction::kMin
         : function == "product" ? Reduction::kProduct
         : function == "argmax"  ? Reduction::kArgmax
                                 : Reduction::kArgmin;
}

// i is a line, and an element of the output.
struct ReduceEach {
  Lines lines;
  Reduction function;
  __device__ void operator()(int64_t i) const {
    const float* const x = lines.x + lines.Begin(i);
    float found = x[0];
    int64_t at = 0;
    for (int64_t k = 1; k < lines.size; ++k) {
      const float next = x[k * lines.inner];
      switch (function) {
        case Reduction::kSum:
        case Reduction::kMean:
          found += next;
          break;
        case Reduction::kProduct:
          found *= next;
          break;
        case Reduction::kMax:
          found = next > found || std::isnan(next) ? next : found;
          break;
        case Reduction::kMin:
          found = next < found || std::isnan(next) ? next : found;
          break;
        case Reduction::kArgmax:
        case Reduction::kArgmin:
          if ((function == Reduction::kArgmax ? next > found : next < found) ||
              (std::isnan(next) && !std::isnan(found))) {
            found = next;
            at = k;
          }
          break;
      }
    }
    if (function == Reduction::kMean) found /= static_cast<float>(lines.size);
    const bool index = function == Reduction::kArgmax || function == Reduction::kArgmin;
    lines.y[i] = index ? static_cast<float>(at) : found;
  }
};

// i is a line.
struct CumulativeEach {
  Lines lines;
  bool product;
  __device__ void operator()(int64_t i) const {
    const int64_t begin = lines.Begin(i);
    float all = lines.x[begin];
    lines.y[begin] = all;
    for (int64_t k = 1; k < lines.size; ++k) {
      const float next = lines.x[begin + k * lines.inner];
      all = product ? all * next : all + next;
      lines.y[begin + k * lines.inner] = all;
    }
  }
};

// i is an element. It finds its place by counting the elements before it.
struct SortEach {
  Lines lines;
  bool indices, descending;
  __device__ void operator()(int64_t i) const {
    const int64_t line = i / lines.size, k = i % lines.size, begin = lines.Begin(line);
    const float own = lines.x[begin + k * lines.inner];
    int64_t place = 0;
    for (int64_t j = 0; j < lines.size; ++j) {
      const float other = lines.x[begin + j * lines.inner];
      place += Before(other, own) || (!Before(own, other) && j < k);
    }
    lines.y[begin + place * lines.inner] = indices ? static_cast<float>(k) : own;
  }
  __device__ bool Before(float a, float b) const { return descending ? Less(b, a) : Less(a, b); }
  // NaN counts as the largest number.
  __device__ static bool Less(float a, float b) {
    return a < b || (std::isnan(b) && !std::isnan(a));
  }
};

struct ScaleNormParams {
  const float *x, *gamma, *beta;
  float* y;
  int64_t size;
  float epsilon;
  bool rms;
};

// A block takes a row.
__global__ void __launch_bounds__(kBlockSumThreads)
    ScaleNormKernel(const __grid_constant__ ScaleNormParams p) {
  ReleaseNext();
  WaitForPrevious();
  const float* const x = p.x + blockIdx.x * p.size;
  float* const y = p.y + blockIdx.x * p.size;
  float squares = 0;
  for (int64_t i = threadIdx.x; i < p.size; i += kBlockSumThreads) squares += x[i] * x[i];
  const float sum = SumOverBlock(squares);
  const float square = p.rms             ? sum / static_cast<float>(p.size) + p.epsilon
                       : sum < p.epsilon ? p.epsilon
                                         : sum;
  const float factor = 1 / std::sqrt(square);
  for (int64_t i = threadIdx.x; i < p.size; i += kBlockSumThreads) {
    y[i] = x[i] * factor * p.gamma[i] + p.beta[i];
  }
}

}  // namespace

NodeKernels SoftmaxNode(const std::string& function, const DeviceAxis& axis, int input,
                        int output) {
  if (function == "sparsemax") {
    return [=](const DeviceFrame& frame, cudaStream_t stream) {
      return ForEach(NumLines(frame, axis), SparsemaxEach{Lines(frame, axis, input, output)},
                     frame.overlap, stream);
    };
  }
  const bool log = function == "log_softmax";
  return [=](const DeviceFrame& frame, cudaStream_t stream) {
    return ForEach(NumLines(frame, axis), SoftmaxEach{Lines(frame, axis, input, output), log},
                   frame.overlap, stream);
  };
}

NodeKernels ReduceNode(const std::string& function, const DeviceAxis& axis, int input, int output) {
  const Reduction named = ReductionNamed(function);
  return [=](const DeviceFrame& frame, cudaStream_t stream) {
    return ForEach(NumLines(frame, axis), ReduceEach{Lines(frame, axis, input, output), named},
                   frame.overlap, stream);
  };
}

NodeKernels CumulativeNode(bool product, const DeviceAxis& axis, int input, int output) {
  return [=](const DeviceFrame& frame, cudaStream_t stream) {
    return ForEach(NumLines(frame, axis),
                   CumulativeEach{Lines(frame, axis, input, output), product}, frame.overlap,
                   stream);
  };
}

NodeKernels SortNode(bool indices, bool descending, const DeviceAxis& axis, int input, int output) {
  return [=](const DeviceFrame& frame, cudaStream_t stream) {
    return ForEach(NumLines(frame, axis) * axis.size,
                   SortEach{Lines(frame, axis, input, output), indices, descending}, frame.overlap,
                   stream);
  };
}

NodeKernels NormNode(const std::string& function, const float* gamma, const float* beta,
                     double epsilon, int64_t rows, int64_t columns, int input, int output) {
  if (function == "layer") {
    const auto params_of = [=](const DeviceFrame& frame) {
      DeviceNormalizeParams<float> p = {};
      p.norm = {gamma, beta, static_cast<float>(epsilon)};
      p.x = frame.Rows<float>(input);
      p.y = frame.Rows<float>(output);
      p.rows = frame.streams * rows;
      p.size = columns;
      p.overlap = frame.overlap;
      return p;
    };
    NodeKernels node = [=](const DeviceFrame& frame, cudaStream_t stream) {
      return LaunchNormalize(params_of(frame), stream);
    };
    node.phase = [=](const DeviceFrame& frame, Phases* phases) { phases->Add(params_of(frame)); };
    return node;
  }
  const bool rms = function == "rms";
  return [=](const DeviceFrame& frame, cudaStream_t stream) {
    const ScaleNormParams p = {
        frame.Rows<float>(input),    gamma, beta, frame.Rows<float>(output), columns,
        static_cast<float>(epsilon), rms};
    return Launch(ScaleNormKernel, frame.streams * rows, kBlockSumThreads, frame.overlap, stream,
                  p);
  };
}

}  // namespace continual_transformers
