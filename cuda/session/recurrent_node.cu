// Recurrent cells. A block of threads takes a stream, and its rows one after another; a thread
// takes every n-th unit. See RecurrentInstruction in cc/session/recurrent_instruction.h.

#include <cstdint>

#include "cuda/launch.cuh"
#include "cuda/session/activate.cuh"
#include "cuda/session/node_kernels.h"

namespace continual_transformers {
namespace {

constexpr int kThreads = 256;

struct RecurrentParams {
  char* const* blocks;
  const int64_t* positions;
  const float* x;    // [M, rows, gates * units]
  const bool* mask;  // [M, rows]; null: all true
  float* y;          // [M, rows, units]
  float* scratch;    // [M, 3 + gates, units]
  const float *kernel, *bias;
  DeviceCell cell;
  int64_t units, gates, rows;
  bool goes_on;
  int64_t first, state, memory;
  DeviceActivation activation, gate;
  bool overlap;
};

class StreamBlock {
 public:
  __device__ explicit StreamBlock(const RecurrentParams& p) : p_(p) {
    h_ = p.scratch + blockIdx.x * (3 + p.gates) * p.units;
    c_ = h_ + p.units;
    reset_ = c_ + p.units;
    products_ = reset_ + p.units;
  }

  // Fetches the kernel into L2, before WaitForPrevious(). One thread does it for all blocks.
  __device__ void Prefetch() const {
    const int64_t bytes = p_.units * p_.gates * p_.units * static_cast<int64_t>(sizeof(float));
    const bool fits = bytes <= kMostPrefetchedBytes;
    if (p_.overlap && fits && blockIdx.x == 0 && threadIdx.x == 0) PrefetchIntoL2(p_.kernel, bytes);
  }

  __device__ void Run() const {
    char* const block = p_.blocks[blockIdx.x];
    float* const state = reinterpret_cast<float*>(block + p_.state);
    float* const memory = reinterpret_cast<float*>(block + p_.memory);
    const bool remembers = p_.goes_on && p_.cell == DeviceCell::kLstm;
    for (int64_t j = threadIdx.x; j < p_.units; j += kThreads) {
      h_[j] = p_.goes_on ? state[j] : 0.f;
      c_[j] = remembers ? memory[j] : 0.f;
    }
    __syncthreads();
    for (int64_t r = 0; r < p_.rows; ++r) TakeRow(r);
    if (!p_.goes_on) return;
    for (int64_t j = threadIdx.x; j < p_.units; j += kThreads) {
      state[j] = h_[j];
      if (remembers) memory[j] = c_[j];
    }
  }

 private:
  __device__ void TakeRow(int64_t r) const {
    const int64_t n = p_.units, width = p_.gates * n, row = blockIdx.x * p_.rows + r;
    const float* const x = p_.x + row * width;
    const bool resets_before = p_.cell == DeviceCell::kGruResetBefore;
    for (int64_t j = threadIdx.x; j < (resets_before ? 2 * n : width); j += kThreads) {
      products_[j] = (p_.bias == nullptr ? 0.f : p_.bias[j]) + Product(h_, j);
    }
    __syncthreads();
    if (resets_before) {
      for (int64_t j = threadIdx.x; j < n; j += kThreads) {
        reset_[j] = Activate(p_.gate, x[n + j] + products_[n + j]) * h_[j];
      }
      __syncthreads();
      for (int64_t j = threadIdx.x; j < n; j += kThreads) {
        products_[2 * n + j] = Product(reset_, 2 * n + j);
      }
    }
    // A thread needs no other unit than its own from here on.
    const bool takes = Taken(r) && (p_.mask == nullptr || p_.mask[row]);
    for (int64_t j = threadIdx.x; j < n; j += kThreads) {
      if (takes) Unit(x, j);
      p_.y[row * n + j] = h_[j];
    }
    __syncthreads();
  }

  // Returns column j of rows [units] times the kernel.
  __device__ float Product(const float* rows, int64_t j) const {
    const int64_t width = p_.gates * p_.units;
    float sum = 0;
    for (int64_t i = 0; i < p_.units; ++i) sum += rows[i] * p_.kernel[i * width + j];
    return sum;
  }

  // Returns whether row r is of a step that was taken.
  __device__ bool Taken(int64_t r) const {
    const int64_t position = p_.positions[blockIdx.x];
    if (!p_.goes_on) return p_.rows - 1 - r <= position;
    // A position beyond -first is of no row before 0; there the product could overflow.
    return position > -p_.first || position * p_.rows + p_.first + r >= 0;
  }

  __device__ void Unit(const float* x, int64_t j) const {
    const int64_t n = p_.units;
    const auto gate = [&](int64_t g) {
      return Activate(p_.gate, x[g * n + j] + products_[g * n + j]);
    };
    switch (p_.cell) {
      case DeviceCell::kSimple:
        h_[j] = Activate(p_.activation, x[j] + products_[j]);
        return;
      case DeviceCell::kLstm: {
        const float in = gate(0), forget = gate(1), out = gate(3);
        const float fresh = Activate(p_.activation, x[2 * n + j] + products_[2 * n + j]);
        c_[j] = forget * c_[j] + in * fresh;
        h_[j] = Activate(p_.activation, c_[j]) * out;
        return;
      }
      case DeviceCell::kGru:
      case DeviceCell::kGruResetBefore: {
        const float product = products_[2 * n + j];
        const float inner = p_.cell == DeviceCell::kGru ? gate(1) * product : product;
        const float z = gate(0), fresh = Activate(p_.activation, x[2 * n + j] + inner);
        h_[j] = z * h_[j] + (1 - z) * fresh;
        return;
      }
    }
  }

  const RecurrentParams& p_;
  float *h_, *c_, *reset_, *products_;
};

__global__ void __launch_bounds__(kThreads)
    RecurrentKernel(const __grid_constant__ RecurrentParams p) {
  ReleaseNext();
  const StreamBlock block(p);
  block.Prefetch();
  WaitForPrevious();
  block.Run();
}

}  // namespace

NodeKernels RecurrentNode(const DeviceRecurrent& s) {
  const DeviceActivation activation(s.activation), gate(s.gate);
  return [=](const DeviceFrame& frame, cudaStream_t stream) {
    const RecurrentParams p = {frame.blocks,
                               frame.positions,
                               frame.Rows<float>(s.input),
                               frame.RowsOrNull<bool>(s.mask),
                               frame.Rows<float>(s.output),
                               frame.Rows<float>(s.scratch),
                               s.kernel,
                               s.bias,
                               s.cell,
                               s.units,
                               GatesOf(s.cell),
                               s.rows,
                               s.goes_on,
                               s.first,
                               s.state,
                               s.memory,
                               activation,
                               gate,
                               frame.overlap};
    return Launch(RecurrentKernel, frame.streams, kThreads, p.overlap, stream, p);
  };
}

}  // namespace continual_transformers
