// The memory of a call in progress on a GPU, and the graphs of its steps.

#ifndef CONTINUAL_TRANSFORMERS_CUDA_SESSION_DEVICE_ARENA_H_
#define CONTINUAL_TRANSFORMERS_CUDA_SESSION_DEVICE_ARENA_H_

#include <cuda_runtime.h>

#include <atomic>
#include <cstdint>
#include <list>
#include <memory>
#include <vector>

#include "cc/session/executor.h"
#include "cc/session/plan.h"
#include "cuda/session/device_frame.h"
#include "cuda/session/device_memory.h"
#include "cuda/session/device_plan.h"
#include "cuda/session/mailbox.h"
#include "cuda/session/phases.h"

namespace continual_transformers {

// One call at a time uses it, with the GPU in use.
class DeviceArena final : public Arena {
 public:
  DeviceArena(const Plan& plan, const DevicePlan& compiled, std::shared_ptr<const Gpu> gpu);
  ~DeviceArena() override;
  int64_t bytes() const override;

  // Throws Error. No stream has changed if it is for lack of memory.
  void Step(const StepCall& call);

  void BeginProfile();
  // Seconds by entry of the plan.
  const std::vector<double>& EndProfile();

  // Whether launches may overlap, in graphs that any session makes from now on. A benchmark sets it
  // to false for a while, to measure what that gains.
  static inline std::atomic<bool> may_overlap{true};
  // The same for whether a step of one stream may be a persistent kernel (phases.h), as far as its
  // nodes have phases. No GPU has run one yet, so sessions take graphs of launches.
  static inline std::atomic<bool> may_persist{false};
  // How many graphs have such kernels: a driver may refuse them.
  static inline std::atomic<int64_t> persistent_graphs{0};

 private:
  // Where the things of a step of M streams lie in `step_`. Everything that the host sends for a
  // single step comes first, so that one copy, or TakeInputs(), brings it.
  struct Layout {
    explicit Layout(const Plan& plan, const DevicePlan& compiled, int64_t streams);

    int64_t streams;
    int64_t blocks, positions, key_mask;  // in bytes
    int64_t arrays;                       // a MailedArrays
    std::vector<int64_t> values;          // and then scratches; -1: shares another's rows
    int64_t sent;                         // bytes from the beginning
    int64_t bytes;
  };

  // A step of M streams. It holds addresses in `step_`, and of the mailbox.
  struct Graph {
    Layout layout;
    std::vector<MailedPort> inputs, outputs;
    bool fits_mailbox;   // whether inputs and outputs are small enough
    bool takes_mailbox;  // whether its kernels take them from there, and deliver them
    std::vector<char*> values;
    cudaGraphExec_t exec = nullptr;
  };

  DeviceFrame FrameOf(const Graph& graph, bool overlap) const;
  // `mail`: whether the graph should take the mailbox, if it fits.
  Graph* GraphFor(int64_t streams, bool mail);
  Graph NewGraph(int64_t streams, bool mail) const;
  void MakeArrivals();
  int64_t PhasesBytes() const;  // of one graph
  void Build(Graph* graph);
  cudaError_t Instantiate(Graph* graph, bool overlap, bool persist) const;
  // Null: no work becomes a phase.
  cudaError_t LaunchAll(const Graph& graph, const DeviceFrame& frame, Phases* phases) const;
  TakeInputsEach InputsOf(const Graph& graph) const;
  DeliverOutputsEach OutputsOf(const Graph& graph) const;
  void TakeStep(const Graph& graph);
  void TakeProfiledStep(const Graph& graph);
  void StepByMail(const StepCall& call, const Graph& graph);
  void StepOnce(const StepCall& call, const Graph& graph);
  void StepSeveral(const StepCall& call, const Graph& graph);
  void FillHeader(const StepCall& call, const Layout& layout, char* to) const;
  // Finds which arrays of a call are on the GPU, and lets the steps wait for them.
  void LookAtArrays(const StepCall& call);
  void DropGraphs();
  // Makes room, if there is less.
  void Reserve(GpuBytes* memory, GpuBytes::Kind kind, int64_t bytes);
  int64_t InputBytes(size_t i) const;
  int64_t OutputBytes(size_t i) const;

  const Plan& plan_;
  const DevicePlan& compiled_;
  const std::shared_ptr<const Gpu> gpu_;
  const GpuStream stream_;
  GpuBytes step_;      // what a step of M streams works on
  GpuBytes arrivals_;  // counters of blocks, for all graphs
  GpuBytes phases_;    // of the persistent kernels of two graphs of one stream
  Mailbox mailbox_;
  GpuBytes staged_;           // inputs and outputs of a call of several steps
  GpuBytes sent_, received_;  // of the host, pinned: what is copied to the GPU and back
  std::vector<bool> input_on_gpu_, output_on_gpu_;  // of the call
  std::list<Graph> graphs_;                         // the newest used first
  bool profiles_ = false;
  std::vector<double> seconds_;
};

}  // namespace continual_transformers

#endif  // CONTINUAL_TRANSFORMERS_CUDA_SESSION_DEVICE_ARENA_H_
