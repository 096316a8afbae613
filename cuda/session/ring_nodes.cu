// Nodes that know a stream's position, or keep its past in its block; attention has a file of its
// own. Step number p of a stream lies in row p mod (rows of the ring).

#include <cstdint>

#include "cuda/for_each.cuh"
#include "cuda/session/element_size.h"
#include "cuda/session/node_kernels.h"
#include "cuda/session/phases.h"
#include "cuda/session/positional_each.h"

namespace continual_transformers {
namespace {

// i is an element of a row.
template <typename U>
struct DelayEach {
  char* const* blocks;
  const int64_t* positions;
  const U* x;
  U* y;
  int64_t steps, ring_at, size;
  __device__ void operator()(int64_t i) const {
    const int64_t m = i / size, position = positions[m];
    U* const ring = reinterpret_cast<U*>(blocks[m] + ring_at);
    U* const at = ring + position % steps * size + i % size;
    y[i] = position >= steps ? *at : U(0);
    *at = x[i];
  }
};

// i is an element of the output.
template <typename U>
struct WindowEach {
  char* const* blocks;
  const int64_t* positions;
  const U* x;
  U* y;
  int64_t window, rows, ring_at, size;
  __device__ void operator()(int64_t i) const {
    const int64_t m = i / (window * size), position = positions[m];
    const int64_t step = position - (window - 1) + i / size % window;
    if (step == position) {
      y[i] = x[m * size + i % size];
      return;
    }
    const U* const ring = reinterpret_cast<const U*>(blocks[m] + ring_at);
    y[i] = step < 0 ? U(0) : ring[step % rows * size + i % size];
  }
};

// i is an element of a row. The row that it overwrites has just been read.
template <typename U>
struct WindowPutEach {
  char* const* blocks;
  const int64_t* positions;
  const U* x;
  int64_t rows, ring_at, size;
  __device__ void operator()(int64_t i) const {
    const int64_t m = i / size;
    U* const ring = reinterpret_cast<U*>(blocks[m] + ring_at);
    ring[positions[m] % rows * size + i % size] = x[i];
  }
};

// i is an element of the output.
struct ZeroUntakenEach {
  const int64_t* positions;
  const float* x;
  float* y;
  int64_t window, row_size;
  __device__ void operator()(int64_t i) const {
    const int64_t m = i / (window * row_size), row = i / row_size % window;
    y[i] = row < window - 1 - positions[m] ? 0.f : x[i];
  }
};

// i is an element of the output.
struct PresentEach {
  const int64_t* positions;
  float* y;
  int64_t rows, first, size;
  __device__ void operator()(int64_t i) const {
    const int64_t position = positions[i / size];
    // Far into a stream the product could overflow.
    y[i] = position > -first || position * rows + first + i % size >= 0 ? 1.f : 0.f;
  }
};

// i is an angle. Unsigned products wrap around, which drops whole turns.
struct RotaryAnglesEach {
  const int64_t* positions;
  const int64_t* turns;
  float* y;
  int64_t pairs, rows;
  __device__ void operator()(int64_t i) const {
    const int64_t m = i / (rows * pairs), row = i / pairs % rows, pair = i % pairs;
    const uint64_t number = static_cast<uint64_t>(positions[m]) * static_cast<uint64_t>(rows) +
                            static_cast<uint64_t>(row);
    const uint64_t angle = number * static_cast<uint64_t>(turns[pair]);
    // In half turns, from -1 to 1.
    double sin, cos;
    sincospi(static_cast<double>(static_cast<int64_t>(angle)) * 0x1p-63, &sin, &cos);
    float* const to = y + (m * rows + row) * 2 * pairs + pair;
    to[0] = static_cast<float>(cos);
    to[pairs] = static_cast<float>(sin);
  }
};

// i is a pair of a head, or one of its elements that stay as they are.
struct RotaryEach {
  const float *x, *angles;
  float* y;
  int64_t heads, size, pairs;  // heads of a row
  bool interleaved;
  __device__ void operator()(int64_t i) const {
    const int64_t each = size - pairs, head = i / each, k = i % each, row = head / heads;
    const float* const from = x + head * size;
    float* const to = y + head * size;
    if (k >= pairs) {
      to[k + pairs] = from[k + pairs];
      return;
    }
    const int64_t first = interleaved ? 2 * k : k, second = first + (interleaved ? 1 : pairs);
    const float cos = angles[row * 2 * pairs + k], sin = angles[(row * 2 + 1) * pairs + k];
    const float a = from[first], b = from[second];
    to[first] = a * cos - b * sin;
    to[second] = b * cos + a * sin;
  }
};

}  // namespace

NodeKernels PositionalNode(const float* table, int64_t table_rows, int64_t start, int64_t offset_at,
                           int input, int output, int64_t columns, int64_t rows_a_step) {
  const auto each_of = [=](const DeviceFrame& frame) {
    return PositionalEach{frame.blocks,
                          frame.positions,
                          frame.Rows<float>(input),
                          table,
                          frame.Rows<float>(output),
                          table_rows,
                          start,
                          offset_at,
                          columns,
                          rows_a_step};
  };
  NodeKernels node = [=](const DeviceFrame& frame, cudaStream_t stream) {
    return ForEach(frame.streams * rows_a_step * columns, each_of(frame), frame.overlap, stream);
  };
  node.phase = [=](const DeviceFrame& frame, Phases* phases) {
    phases->Add(each_of(frame), frame.streams * rows_a_step * columns);
  };
  return node;
}

NodeKernels DelayNode(int64_t steps, int64_t ring_at, int64_t element, int input, int output,
                      int64_t size) {
  return WithElement(element, [&](auto example) -> NodeKernels {
    using U = decltype(example);
    return [=](const DeviceFrame& frame, cudaStream_t stream) {
      return ForEach(frame.streams * size,
                     DelayEach<U>{frame.blocks, frame.positions, frame.Rows<U>(input),
                                  frame.Rows<U>(output), steps, ring_at, size},
                     frame.overlap, stream);
    };
  });
}

NodeKernels WindowNode(int64_t window, int64_t ring_at, int64_t element, int input, int output,
                       int64_t size) {
  const int64_t rows = window > 1 ? window - 1 : 1;
  return WithElement(element, [&](auto example) -> NodeKernels {
    using U = decltype(example);
    return [=](const DeviceFrame& frame, cudaStream_t stream) {
      const U* const x = frame.Rows<U>(input);
      const cudaError_t error =
          ForEach(frame.streams * window * size,
                  WindowEach<U>{frame.blocks, frame.positions, x, frame.Rows<U>(output), window,
                                rows, ring_at, size},
                  frame.overlap, stream);
      if (error != cudaSuccess) return error;
      return ForEach(frame.streams * size,
                     WindowPutEach<U>{frame.blocks, frame.positions, x, rows, ring_at, size},
                     frame.overlap, stream);
    };
  });
}

NodeKernels ZeroUntakenNode(int64_t window, int input, int output, int64_t row_size) {
  return [=](const DeviceFrame& frame, cudaStream_t stream) {
    return ForEach(frame.streams * window * row_size,
                   ZeroUntakenEach{frame.positions, frame.Rows<float>(input),
                                   frame.Rows<float>(output), window, row_size},
                   frame.overlap, stream);
  };
}

NodeKernels PresentNode(int64_t rows, int64_t first, int64_t size, int output) {
  return [=](const DeviceFrame& frame, cudaStream_t stream) {
    return ForEach(frame.streams * size,
                   PresentEach{frame.positions, frame.Rows<float>(output), rows, first, size},
                   frame.overlap, stream);
  };
}

NodeKernels RotaryAnglesNode(const int64_t* turns, int64_t pairs, int64_t rows_a_step, int output) {
  return [=](const DeviceFrame& frame, cudaStream_t stream) {
    return ForEach(
        frame.streams * rows_a_step * pairs,
        RotaryAnglesEach{frame.positions, turns, frame.Rows<float>(output), pairs, rows_a_step},
        frame.overlap, stream);
  };
}

NodeKernels RotaryNode(bool interleaved, int input, int angles, int output, int64_t rows_a_step,
                       int64_t heads, int64_t head_size, int64_t pairs) {
  return [=](const DeviceFrame& frame, cudaStream_t stream) {
    return ForEach(frame.streams * rows_a_step * heads * (head_size - pairs),
                   RotaryEach{frame.Rows<float>(input), frame.Rows<float>(angles),
                              frame.Rows<float>(output), heads, head_size, pairs, interleaved},
                   frame.overlap, stream);
  };
}

}  // namespace continual_transformers
