// A persistent kernel: a step of one stream in one launch. What would be a launch of its own is a
// phase of it, and what would be a block of that launch is a task. All blocks of threads run at
// once, and before each phase they wait for each other. While they wait, they fetch their parts of
// the next weights.

#ifndef CONTINUAL_TRANSFORMERS_CUDA_SESSION_PHASES_H_
#define CONTINUAL_TRANSFORMERS_CUDA_SESSION_PHASES_H_

#include <cuda_runtime.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "cc/attention/half.h"
#include "cc/session/plan.h"
#include "cuda/dense.h"
#include "cuda/normalize.h"
#include "cuda/session/mailbox.h"
#include "cuda/session/positional_each.h"
#include "cuda/session/ring_query.h"
#include "cuda/session/step_ends.h"

namespace continual_transformers {

// A Phase is copied to the GPU byte by byte.
struct Phase {
  enum class Kind : int32_t {
    kTakeInputs,
    kDense,
    kNarrowDense,
    kAttention,
    kNorm,
    kPositional,
    kDeliverOutputs,
    kAdvance,
  };
  // The work of ForEach.
  template <typename F>
  struct Each {
    F f;
    int64_t count;
  };

  Kind kind;
  int32_t tasks;
  bool vectors;  // of a dense phase: whether rows of its weights can be loaded in vectors
  // What Add() was given.
  alignas(8) unsigned char params[std::max(sizeof(DeviceDenseParams<float, float>),
                                           sizeof(RingQueryParams))];

  template <typename Params>
  __host__ __device__ const Params& As() const {
    static_assert(sizeof(Params) <= sizeof(params) && alignof(Params) <= 8);
    return *reinterpret_cast<const Params*>(params);
  }
};

// Collects phases for a GraphBuilder. The GPU must be in use, and CanOverlapSteps().
class Phases {
 public:
  // How much memory so many phases need.
  static int64_t BytesOf(size_t phases) { return static_cast<int64_t>(phases * sizeof(Phase)); }

  // `memory` of the GPU has `bytes`, and lives as long as the graph. `cache` is the plan's.
  Phases(char* memory, int64_t bytes, DType cache, int multiprocessors)
      : begin_(memory),
        end_(memory + bytes),
        memory_(memory),
        cache_(cache),
        multiprocessors_(multiprocessors) {}

  // Each adds the work of a launch with these parameters: of LaunchDense for one row, of attention
  // for one query, of LaunchNormalize, and of ForEach.
  void Add(const DeviceDenseParams<float, float>& params);
  void Add(const DeviceDenseParams<float, BFloat16>& params);
  void Add(const RingQueryParams& params);
  void Add(const DeviceNormalizeParams<float>& params);
  void Add(const PositionalEach& each, int64_t count);
  void Add(const TakeInputsEach& inputs);
  void Add(const DeliverOutputsEach& outputs);
  void Add(const AdvanceEach& each, int64_t count);

  // Whether Launch() has launched a kernel.
  bool launched() const { return memory_ != begin_; }

  // Launches what was added since the last call.
  cudaError_t Launch(cudaStream_t stream);

 private:
  template <typename Params>
  Phase* New(Phase::Kind kind, int64_t tasks, const Params& params);
  template <typename F>
  void AddEach(Phase::Kind kind, const F& f, int64_t count);
  template <typename W>
  void AddDense(Phase::Kind kind, DeviceDenseParams<float, W> params);

  char *const begin_, *const end_;
  char* memory_;  // for the next phases
  const DType cache_;
  const int multiprocessors_;
  std::vector<Phase> phases_;
};

}  // namespace continual_transformers

#endif  // CONTINUAL_TRANSFORMERS_CUDA_SESSION_PHASES_H_
