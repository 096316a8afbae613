#include <cstdint>

#include "cuda/for_each.cuh"
#include "cuda/graph_builder.h"
#include "cuda/session/phases.h"
#include "cuda/session/step_ends.h"

namespace continual_transformers {

bool CanOverlapSteps() { return GraphBuilder::kCanOverlap && CanOverlap(); }

cudaError_t ProbeKernels() {
  cudaFuncAttributes attributes;
  return cudaFuncGetAttributes(&attributes, ForEachKernel<AdvanceEach>);
}

NodeKernels TakeInputs(const TakeInputsEach& inputs) {
  NodeKernels kernels = [=](const DeviceFrame&, cudaStream_t stream) {
    const cudaError_t error = ForEach(inputs.Count(), inputs, false, stream);
    if (GraphBuilder* const builder = GraphBuilder::Current()) builder->LetNextWait();
    return error;
  };
  kernels.phase = [=](const DeviceFrame&, Phases* phases) { phases->Add(inputs); };
  return kernels;
}

NodeKernels DeliverOutputs(const DeliverOutputsEach& outputs) {
  NodeKernels kernels = [=](const DeviceFrame& frame, cudaStream_t stream) {
    return ForEach(outputs.Count(), outputs, frame.overlap, stream);
  };
  kernels.phase = [=](const DeviceFrame&, Phases* phases) { phases->Add(outputs); };
  return kernels;
}

NodeKernels AdvancePositions() {
  const auto each_of = [](const DeviceFrame& frame) {
    return AdvanceEach{const_cast<int64_t*>(frame.positions)};  // Nodes only read them.
  };
  NodeKernels kernels = [=](const DeviceFrame& frame, cudaStream_t stream) {
    return ForEach(frame.streams, each_of(frame), frame.overlap, stream);
  };
  kernels.phase = [=](const DeviceFrame& frame, Phases* phases) {
    phases->Add(each_of(frame), frame.streams);
  };
  return kernels;
}

}  // namespace continual_transformers
