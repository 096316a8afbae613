#include <cstdint>

#include "cuda/for_each.cuh"
#include "cuda/session/advance.h"

namespace continual_transformers {
namespace {

struct AdvanceEach {
  int64_t* positions;
  __device__ void operator()(int64_t m) const { ++positions[m]; }
};

}  // namespace

bool CanOverlapSteps() { return GraphBuilder::kCanOverlap && CanOverlap(); }

cudaError_t ProbeKernels() {
  cudaFuncAttributes attributes;
  return cudaFuncGetAttributes(&attributes, ForEachKernel<AdvanceEach>);
}

cudaError_t AdvancePositions(const DeviceFrame& frame, cudaStream_t stream) {
  // const_cast: nodes only read them.
  return ForEach(frame.streams, AdvanceEach{const_cast<int64_t*>(frame.positions)}, frame.overlap,
                 stream);
}

}  // namespace continual_transformers
