// Nodes that only move elements.

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "cc/session/plan_ops.h"
#include "cuda/for_each.cuh"
#include "cuda/session/element_size.h"
#include "cuda/session/node_kernels.h"

namespace continual_transformers {
namespace {

struct ConstantEach {
  const float* value;
  float* y;
  int64_t size;
  __device__ void operator()(int64_t i) const { y[i] = value[i % size]; }
};

// U is a type of the elements' size.
template <typename U>
struct StridedEach {
  const U* x;
  U* y;
  int64_t offset, size, input_size;  // of a row
  int axes;
  int64_t shape[kMostAxes], strides[kMostAxes];
  __device__ void operator()(int64_t i) const {
    int64_t rest = i % size, at = offset + i / size * input_size;
    for (int axis = axes - 1; axis >= 0; --axis) {
      at += rest % shape[axis] * strides[axis];
      rest /= shape[axis];
    }
    y[i] = x[at];
  }
};

template <typename U>
struct ConcatEach {
  const U* x;
  U* y;
  int64_t part, first, width;  // elements of a block: of this part, before it, and of all
  __device__ void operator()(int64_t i) const { y[i / part * width + first + i % part] = x[i]; }
};

// i is an element of the output.
template <typename Index>
struct EmbeddingEach {
  const Index* x;
  const float* table;
  float* y;
  int64_t columns;
  // Executor::Check has checked the indices before the step.
  __device__ void operator()(int64_t i) const {
    y[i] = table[static_cast<int64_t>(x[i / columns]) * columns + i % columns];
  }
};

template <typename Index>
NodeKernels EmbeddingOf(const float* table, int64_t columns, int input, int output, int64_t size) {
  return [=](const DeviceFrame& frame, cudaStream_t stream) {
    return ForEach(
        frame.streams * size * columns,
        EmbeddingEach<Index>{frame.Rows<Index>(input), table, frame.Rows<float>(output), columns},
        frame.overlap, stream);
  };
}

}  // namespace

NodeKernels ConstantNode(const float* value, int output, int64_t size) {
  return [=](const DeviceFrame& frame, cudaStream_t stream) {
    return ForEach(frame.streams * size, ConstantEach{value, frame.Rows<float>(output), size},
                   frame.overlap, stream);
  };
}

NodeKernels StridedNode(int64_t offset, const std::vector<int64_t>& shape,
                        const std::vector<int64_t>& strides, int64_t element, int input,
                        int64_t input_size, int output) {
  return WithElement(element, [&](auto example) -> NodeKernels {
    using U = decltype(example);
    StridedEach<U> each = {};
    each.offset = offset;
    each.input_size = input_size;
    each.size = 1;
    each.axes = static_cast<int>(shape.size());
    for (size_t axis = 0; axis < shape.size(); ++axis) each.size *= shape[axis];
    std::copy(shape.begin(), shape.end(), each.shape);
    std::copy(strides.begin(), strides.end(), each.strides);
    return [=](const DeviceFrame& frame, cudaStream_t stream) {
      StridedEach<U> of_frame = each;
      of_frame.x = frame.Rows<U>(input);
      of_frame.y = frame.Rows<U>(output);
      return ForEach(frame.streams * each.size, of_frame, frame.overlap, stream);
    };
  });
}

NodeKernels ConcatNode(const std::vector<std::pair<int, int64_t>>& parts, int64_t outer,
                       int64_t element, int output) {
  int64_t width = 0;
  for (const auto& part : parts) width += part.second;
  return WithElement(element, [&](auto example) -> NodeKernels {
    using U = decltype(example);
    return [=](const DeviceFrame& frame, cudaStream_t stream) {
      int64_t first = 0;
      for (const auto& [value, size] : parts) {
        const cudaError_t error =
            ForEach(frame.streams * outer * size,
                    ConcatEach<U>{frame.Rows<U>(value), frame.Rows<U>(output), size, first, width},
                    frame.overlap, stream);
        if (error != cudaSuccess) return error;
        first += size;
      }
      return cudaSuccess;
    };
  });
}

NodeKernels EmbeddingNode(const float* table, int64_t columns, DType index, int input, int output,
                          int64_t size) {
  return index == DType::kInt32 ? EmbeddingOf<int32_t>(table, columns, input, output, size)
                                : EmbeddingOf<int64_t>(table, columns, input, output, size);
}

}  // namespace continual_transformers
