// A block takes a strip of columns of one layer and all rows of its kernel. Each group of lanes
// takes every n-th row, several loads at a time. The sums of the groups are added at the end. The
// kernel is read once for kRows rows of input.

#include <cmath>
#include <limits>
#include <type_traits>

#include "cc/attention/half.h"
#include "cc/attention/step_types.h"
#include "cuda/dense.h"
#include "cuda/elements.cuh"
#include "cuda/launch.cuh"
#include "cuda/row_norm.cuh"
#include "cuda/warp.cuh"

namespace continual_transformers {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kLanesPerWarp;

// A lane loads kColumns of a kernel's row at once. With kLanes = 4, strips have 64 bytes. With 8,
// the three layers of 1024 x 1024 floats of the paper's model would be only 96 blocks, for the 132
// multiprocessors of an H100.
template <int kColumns_, int kLanes_>
struct StripLayout {
  static constexpr int kColumns = kColumns_, kLanes = kLanes_;
  static constexpr int kStrip = kColumns * kLanes;
  static constexpr int kGroups = kThreads / kLanes;
};

// The number of rows of a kernel that a lane loads before it uses the first.
constexpr int kLoads = 8;

// Up to this many rows, each block normalizes its input by itself: that takes less time than a
// launch does. With more rows, so many blocks would do the same again. The limit is a guess, which
// no GPU has measured.
constexpr int64_t kMostNormalizedRows = 16;

template <typename T, typename W, typename L, int kRows, bool kNormalizes>
class StripBlock {
 public:
  using Params = DeviceDenseParams<T, W>;

  __device__ StripBlock(const Params& params) : p_(params) {
    int block = blockIdx.x;
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

  // Fetches the kernel's strip into L2. That is safe before WaitForPrevious(), whoever writes it.
  __device__ void Prefetch() const {
    if (!p_.overlap || first_row_ != 0) return;
    const DeviceDense<T, W>& layer = p_.layers[layer_];
    for (int64_t i = threadIdx.x; i < layer.inputs; i += kThreads) {
      PrefetchLineIntoL2(layer.kernel + i * layer.outputs + strip_ * L::kStrip);
    }
  }

  __device__ void Run() {
    const DeviceDense<T, W>& layer = p_.layers[layer_];
    if constexpr (kNormalizes) Normalize();
    const int lane = threadIdx.x % L::kLanes, group = threadIdx.x / L::kLanes;
    const int64_t column = strip_ * L::kStrip + lane * L::kColumns;
    T sums[kRows][L::kColumns] = {};
    if (column < layer.outputs) {
      const W* kernel = layer.kernel + column;
      const int inputs = static_cast<int>(layer.inputs);
#pragma unroll 1
      for (int base = group; base < inputs; base += L::kGroups * kLoads) {
        Vector<W, L::kColumns> loaded[kLoads];
#pragma unroll
        for (int load = 0; load < kLoads; ++load) {
          const int i = base + load * L::kGroups;
          if (i < inputs) {
            loaded[load] = *reinterpret_cast<const Vector<W, L::kColumns>*>(
                kernel + static_cast<int64_t>(i) * layer.outputs);
          }
        }
#pragma unroll
        for (int load = 0; load < kLoads; ++load) {
          const int i = base + load * L::kGroups;
          if (i >= inputs) continue;
#pragma unroll
          for (int r = 0; r < kRows; ++r) {
            const T x = Input(layer, r, i);
#pragma unroll
            for (int c = 0; c < L::kColumns; ++c) sums[r][c] += x * loaded[load].Get(c);
          }
        }
      }
    }
    AddUp(sums);
    __syncthreads();
    for (int i = threadIdx.x; i < kRows * L::kStrip; i += kThreads) {
      const int64_t row = first_row_ + i / L::kStrip;
      const int64_t output = strip_ * L::kStrip + i % L::kStrip;
      if (row < p_.rows && output < layer.outputs) {
        Write(layer, row, output, Total(i / L::kStrip, i % L::kStrip));
      }
    }
    if (layer_ == 0 && strip_ == 0) Ask();
  }

 private:
  using Sums = T[kWarps][kRows][L::kStrip];
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
      for (int i = threadIdx.x; i < size; i += kThreads) y[i] = Normalized(r, i);
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
    for (int warp = 0; warp < kWarps; ++warp) sum += SumsOfWarps()[warp][row][column];
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
  RowNorm<T> norms_[kRows];
};

template <typename T, typename W, typename L, int kRows, bool kNormalizes>
__global__ void __launch_bounds__(kThreads)
    DenseKernel(const __grid_constant__ DeviceDenseParams<T, W> params) {
  ReleaseNext();
  StripBlock<T, W, L, kRows, kNormalizes> block(params);
  block.Prefetch();
  WaitForPrevious();
  block.Run();
}

template <typename L, int kRows, typename T, typename W>
cudaError_t LaunchWith(const DeviceDenseParams<T, W>& p, cudaStream_t stream) {
  int64_t strips = 0;
  for (int i = 0; i < p.num_layers; ++i) {
    strips += (p.layers[i].outputs + L::kStrip - 1) / L::kStrip;
  }
  const auto kernel =
      p.norm.x == nullptr ? DenseKernel<T, W, L, kRows, false> : DenseKernel<T, W, L, kRows, true>;
  return Launch(kernel, strips * ((p.rows + kRows - 1) / kRows), kThreads, p.overlap, stream, p);
}

}  // namespace

template <typename T, typename W>
cudaError_t LaunchDense(const DeviceDenseParams<T, W>& p, cudaStream_t stream) {
  if (p.norm.x != nullptr && p.rows > kMostNormalizedRows) {
    const cudaError_t error = LaunchNormalize(p.norm, stream);
    if (error != cudaSuccess) return error;
    DeviceDenseParams<T, W> rest = p;
    rest.norm = {};
    return LaunchDense(rest, stream);
  }
  static_assert(kThreads == kBlockSumThreads);
  bool vectors = !std::is_same_v<T, double>;  // doubles are for tests: one kernel is enough
  for (int i = 0; i < p.num_layers; ++i) {
    if (p.layers[i].inputs > std::numeric_limits<int>::max()) return cudaErrorInvalidValue;
    vectors = vectors && IsAligned(p.layers[i].kernel, p.layers[i].outputs);
  }
  if constexpr (!std::is_same_v<T, double>) {
    using Strip = StripLayout<kVectorBytes / sizeof(W), 4>;
    if (vectors) {
      return p.rows == 1 ? LaunchWith<Strip, 1>(p, stream) : LaunchWith<Strip, 4>(p, stream);
    }
  }
  return LaunchWith<StripLayout<1, 32>, 4>(p, stream);
}

#define INSTANTIATE(T, W) \
  template cudaError_t LaunchDense<T, W>(const DeviceDenseParams<T, W>&, cudaStream_t);
CONTINUAL_TRANSFORMERS_FOR_WEIGHT_TYPES(INSTANTIATE)
#undef INSTANTIATE

}  // namespace continual_transformers
