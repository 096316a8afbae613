#include <cstdint>
#include <limits>
#include <type_traits>

#include "cc/attention/half.h"
#include "cc/attention/step_types.h"
#include "cuda/dense.h"
#include "cuda/launch.cuh"
#include "cuda/strip_block.cuh"

namespace continual_transformers {
namespace {

// Up to this many rows, each block normalizes its input by itself: that takes less time than a
// launch does. With more rows, so many blocks would do the same again. The limit is a guess, which
// no GPU has measured.
constexpr int64_t kMostNormalizedRows = 16;

template <typename T, typename W, typename L, int kRows, bool kNormalizes>
__global__ void __launch_bounds__(L::kThreads)
    DenseKernel(const __grid_constant__ DeviceDenseParams<T, W> params) {
  ReleaseNext();
  StripBlock<T, W, L, kRows, kNormalizes> block(params, blockIdx.x);
  block.Begin();
  WaitForPrevious();
  block.Run();
}

template <typename L, int kRows, typename T, typename W>
cudaError_t LaunchWith(const DeviceDenseParams<T, W>& p, cudaStream_t stream) {
  const auto kernel =
      p.norm.x == nullptr ? DenseKernel<T, W, L, kRows, false> : DenseKernel<T, W, L, kRows, true>;
  return Launch(kernel, NumStrips<L>(p) * ((p.rows + kRows - 1) / kRows), L::kThreads, p.overlap,
                stream, p);
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
  static_assert(ElementStrip::kThreads == kBlockSumThreads);
  for (int i = 0; i < p.num_layers; ++i) {
    if (p.layers[i].inputs > std::numeric_limits<int>::max()) return cudaErrorInvalidValue;
  }
  if constexpr (!std::is_same_v<T, double>) {
    if (HasVectors(p)) {
      return p.rows == 1 ? LaunchWith<VectorStrip<W>, 1>(p, stream)
                         : LaunchWith<VectorStrip<W>, 4>(p, stream);
    }
  }
  return LaunchWith<ElementStrip, 4>(p, stream);
}

#define INSTANTIATE(T, W) \
  template cudaError_t LaunchDense<T, W>(const DeviceDenseParams<T, W>&, cudaStream_t);
CONTINUAL_TRANSFORMERS_FOR_WEIGHT_TYPES(INSTANTIATE)
#undef INSTANTIATE

}  // namespace continual_transformers
