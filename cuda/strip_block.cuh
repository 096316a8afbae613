// A block of a launch of dense layers takes a strip of columns of one layer and all rows of its
// kernel. Each group of lanes takes every n-th row, several loads at a time. The sums of the groups
// are added at the end. The kernel is read once for kRows rows of input.

#ifndef CONTINUAL_TRANSFORMERS_CUDA_STRIP_BLOCK_CUH_
#define CONTINUAL_TRANSFORMERS_CUDA_STRIP_BLOCK_CUH_

#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "cc/attention/half.h"
#include "cuda/dense.h"
#include "cuda/elements.cuh"
#include "cuda/launch.cuh"
#include "cuda/row_norm.cuh"
#include "cuda/warp.cuh"

namespace continual_transformers {

// A lane loads kColumns of a kernel's row at once. With kLanes = 4, strips have 64 bytes. With 8,
// the three layers of 1024 x 1024 floats of the paper's model would be only 96 blocks, for the 132
// multiprocessors of an H100.
template <int kColumns_, int kLanes_>
struct StripLayout {
  static constexpr int kThreads = 256, kWarps = kThreads / kLanesPerWarp;
  static constexpr int kColumns = kColumns_, kLanes = kLanes_;
  static constexpr int kStrip = kColumns * kLanes;
  static constexpr int kGroups = kThreads / kLanes;
  // The number of rows of a kernel that a lane loads before it uses the first.
  static constexpr int kLoads = 8;
  static constexpr int kRowsAtOnce = kGroups * kLoads;  // the rows that a block loads at once
};

// The layout for kernels whose rows can be loaded in vectors, and the one for others.
template <typename W>
using VectorStrip = StripLayout<kVectorBytes / sizeof(W), 4>;
using ElementStrip = StripLayout<1, 32>;

// Returns whether rows of all kernels can be loaded in vectors. There is no kernel with vectors of
// doubles: they are for tests.
template <typename T, typename W>
bool HasVectors(const DeviceDenseParams<T, W>& p) {
  bool all = !std::is_same_v<T, double>;
  for (int i = 0; i < p.num_layers; ++i) {
    all = all && IsAligned(p.layers[i].kernel, p.layers[i].outputs);
  }
  return all;
}

// Returns the number of strips of all kernels.
template <typename L, typename T, typename W>
int64_t NumStrips(const DeviceDenseParams<T, W>& p) {
  int64_t strips = 0;
  for (int i = 0; i < p.num_layers; ++i) {
    strips += (p.layers[i].outputs + L::kStrip - 1) / L::kStrip;
  }
  return strips;
}

template <typename T, typename W, typename L, int kRows, bool kNormalizes>
class StripBlock {
 public:
  using Params = DeviceDenseParams<T, W>;

  __device__ StripBlock(const Params& params, int block) : p_(params) {
    // Blocks for the same strip of a kernel are neighbours: all but the first find it in L2.
    const int row_blocks = static_cast<int>((p_.rows + kRows - 1) / kRows);
    first_row_ = block % row_blocks * kRows;
    block /= row_blocks;
    layer_ = 0;
    while (block >= Strips(p_.layers[layer_])) block -= Strips(p_.layers[layer_++]);
    strip_ = block;
  }

  __device__ static int Strips(const DeviceDense<T, W>& layer) {
    return static_cast<int>((layer.outputs + L::kStrip - 1) / L::kStrip);
  }

  // Is called before WaitForPrevious(). It has L2 fetch the kernel's strip. That is safe, whoever
  // writes the kernel. If it is constant, Begin() also loads what the block uses first.
  __device__ void Begin() {
    if (p_.constant_kernels) Load(Group());
    if (!p_.overlap || first_row_ != 0) return;
    const DeviceDense<T, W>& layer = p_.layers[layer_];
    const int64_t loaded = p_.constant_kernels ? L::kRowsAtOnce : 0;
    for (int64_t i = loaded + threadIdx.x; i < layer.inputs; i += L::kThreads) {
      PrefetchLineIntoL2(layer.kernel + i * layer.outputs + strip_ * L::kStrip);
    }
  }

  __device__ void Run() {
    const DeviceDense<T, W>& layer = p_.layers[layer_];
    if (!p_.constant_kernels) Load(Group());
    if constexpr (kNormalizes) Normalize();
    T sums[kRows][L::kColumns] = {};
    if (Column() < layer.outputs) {
      const int inputs = static_cast<int>(layer.inputs);
#pragma unroll 1
      for (int base = Group(); base < inputs; base += L::kRowsAtOnce) {
#pragma unroll
        for (int load = 0; load < L::kLoads; ++load) {
          const int i = base + load * L::kGroups;
          if (i >= inputs) continue;
#pragma unroll
          for (int r = 0; r < kRows; ++r) {
            const T x = Input(layer, r, i);
#pragma unroll
            for (int c = 0; c < L::kColumns; ++c) sums[r][c] += x * loaded_[load].Get(c);
          }
        }
        Load(base + L::kRowsAtOnce);
      }
    }
    AddUp(sums);
    __syncthreads();
    for (int i = threadIdx.x; i < kRows * L::kStrip; i += L::kThreads) {
      const int64_t row = first_row_ + i / L::kStrip;
      const int64_t output = strip_ * L::kStrip + i % L::kStrip;
      if (row < p_.rows && output < layer.outputs) {
        Write(layer, row, output, Total(i / L::kStrip, i % L::kStrip));
      }
    }
    if (layer_ == 0 && strip_ == 0) Ask();
  }

 private:
  __device__ static int Group() { return threadIdx.x / L::kLanes; }
  __device__ int64_t Column() const {
    return strip_ * L::kStrip + threadIdx.x % L::kLanes * L::kColumns;
  }

  // Loads this lane's part of every kGroups-th row of the kernel, from row `base` on.
  __device__ void Load(int base) {
    const DeviceDense<T, W>& layer = p_.layers[layer_];
    if (Column() >= layer.outputs) return;
    const W* const kernel = layer.kernel + Column();
#pragma unroll
    for (int load = 0; load < L::kLoads; ++load) {
      const int64_t i = base + load * L::kGroups;
      if (i >= layer.inputs) continue;
      loaded_[load] = *reinterpret_cast<const Vector<W, L::kColumns>*>(kernel + i * layer.outputs);
    }
  }

  using Sums = T[L::kWarps][kRows][L::kStrip];
  __device__ static Sums& SumsOfWarps() {
    __shared__ Sums sums;
    return sums;
  }

  // Measures the rows. The block of the first strip writes the normalized ones, for later launches.
  __device__ void Normalize() {
    const DeviceNormalizeParams<T>& p = p_.norm;
    const int size = static_cast<int>(p.size);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (first_row_ + r >= p_.rows) continue;  // the same for all threads
      norms_[r] = MeasureRow(p.norm, p.x + (first_row_ + r) * p.size, size);
      if (layer_ != 0 || strip_ != 0) continue;
      T* const y = p.y + (first_row_ + r) * p.size;
      for (int i = threadIdx.x; i < size; i += L::kThreads) y[i] = Normalized(r, i);
    }
  }

  __device__ T Normalized(int r, int i) const {
    const DeviceNormalizeParams<T>& p = p_.norm;
    return norms_[r].Of(p.norm, p.x + (first_row_ + r) * p.size, i);
  }

  __device__ T Input(const DeviceDense<T, W>& layer, int r, int i) const {
    const int64_t row = first_row_ + r;
    if (row >= p_.rows) return T(0);
    if constexpr (kNormalizes) {
      if (layer.input == p_.norm.y) return Normalized(r, i);
    }
    const T x = layer.input[row * layer.inputs + i];
    return layer.factor == nullptr ? x : x * layer.factor[row * layer.inputs + i];
  }

  // Adds up a warp's sums, into shared memory.
  __device__ static void AddUp(const T (&sums)[kRows][L::kColumns]) {
    const int lane = threadIdx.x % kLanesPerWarp, warp = threadIdx.x / kLanesPerWarp;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int c = 0; c < L::kColumns; ++c) {
        T sum = sums[r][c];
#pragma unroll
        for (int distance = L::kLanes; distance < kLanesPerWarp; distance *= 2) {
          sum += OfLaneAcross(sum, distance);
        }
        if (lane < L::kLanes) SumsOfWarps()[warp][r][lane * L::kColumns + c] = sum;
      }
    }
  }

  __device__ static T Total(int row, int column) {
    T sum = T(0);
#pragma unroll
    for (int warp = 0; warp < L::kWarps; ++warp) sum += SumsOfWarps()[warp][row][column];
    return sum;
  }

  __device__ void Write(const DeviceDense<T, W>& layer, int64_t row, int64_t i, T x) const {
    if (layer.bias != nullptr) x += layer.bias[i];
    x = Activate(layer.activation, x);
    if (layer.residual != nullptr) x += layer.residual[row * layer.outputs + i];
    if (layer.delay_ring != nullptr) x = Exchange(layer.delay_ring, row, layer.outputs, i, x);
    const int64_t at = row * layer.outputs + i;
    if constexpr (std::is_same_v<T, float>) {
      if (layer.output_as == Storage::kBFloat16) return StoreAs<BFloat16>(layer.output, at, x);
      if (layer.output_as == Storage::kFloat16) return StoreAs<Float16>(layer.output, at, x);
    }
    StoreAs<T>(layer.output, at, x);
  }

  __device__ static T Activate(Activation activation, T x) {
    switch (activation) {
      case Activation::kSigmoid:
        return T(1) / (T(1) + std::exp(-x));
      case Activation::kGelu:
        return T(0.5) * x * std::erfc(x * T(-0.70710678118654752));
      case Activation::kRelu:
        return x < T(0) ? T(0) : x;  // NaN stays NaN
      default:
        return x;
    }
  }

  template <typename C>
  __device__ static void StoreAs(void* output, int64_t at, T x) {
    static_cast<C*>(output)[at] = ToStored<C>(x);
  }

  // Exchanges element i of a row for that of `delay` steps before. Returns zero if there was no
  // such step, or if there is no such stream.
  template <typename U>
  __device__ U Exchange(U* ring, int64_t row, int64_t size, int64_t i, U now) const {
    const int64_t stream = p_.streams == nullptr ? row : p_.streams[row];
    if (stream < 0 || stream >= p_.num_held) return U(0);
    const int64_t position = p_.position[stream];
    if (position < 0) return U(0);
    U* const at = ring + (stream * p_.delay + position % p_.delay) * size + i;
    const U due = position >= p_.delay ? *at : U(0);
    if (p_.update_state) *at = now;
    return due;
  }

  // Writes which of these rows' queries attend.
  __device__ void Ask() const {
    const int64_t row = first_row_ + threadIdx.x;
    if (p_.asking == nullptr || threadIdx.x >= kRows || row >= p_.rows) return;
    bool asks = p_.query_mask == nullptr || p_.query_mask[row];
    if (p_.query_mask_ring != nullptr) asks = Exchange(p_.query_mask_ring, row, 1, 0, asks);
    p_.asking[row] = asks;
  }

  const Params& p_;
  int layer_, strip_, first_row_;
  Vector<W, L::kColumns> loaded_[L::kLoads];
  RowNorm<T> norms_[kRows];
};

}  // namespace continual_transformers

#endif  // CONTINUAL_TRANSFORMERS_CUDA_STRIP_BLOCK_CUH_
