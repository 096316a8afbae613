#include <cstdint>

#include "cuda/for_each.cuh"
#include "cuda/graph_builder.h"
#include "cuda/session/step_ends.h"

namespace continual_transformers {

bool CanOverlapSteps() { return GraphBuilder::kCanOverlap && CanOverlap(); }

cudaError_t ProbeKernels() {
  cudaFuncAttributes attributes;
  return cudaFuncGetAttributes(&attributes, ForEachKernel<AdvanceEach>);
}

cudaError_t TakeInputs(const TakeInputsEach& inputs, cudaStream_t stream) {
  const cudaError_t error = ForEach(inputs.Count(), inputs, false, stream);
  if (GraphBuilder* const builder = GraphBuilder::Current()) builder->LetNextWait();
  return error;
}

cudaError_t DeliverOutputs(const DeliverOutputsEach& outputs, bool overlap, cudaStream_t stream) {
  return ForEach(outputs.Count(), outputs, overlap, stream);
}

cudaError_t AdvancePositions(const DeviceFrame& frame, cudaStream_t stream) {
  // const_cast: nodes only read them.
  return ForEach(frame.streams, AdvanceEach{const_cast<int64_t*>(frame.positions)}, frame.overlap,
                 stream);
}

}  // namespace continual_transformers
