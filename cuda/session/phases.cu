#include <cooperative_groups.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "cuda/graph_builder.h"
#include "cuda/launch.cuh"
#include "cuda/row_norm.cuh"
#include "cuda/session/phases.h"
#include "cuda/session/ring_query.cuh"
#include "cuda/strip_block.cuh"

namespace continual_transformers {
namespace {

constexpr int kPhaseThreads = 256;
static_assert(VectorStrip<float>::kThreads == kPhaseThreads);
static_assert(kBlockSumThreads == kPhaseThreads);
// With 2, a thread would have 128 registers, and attention would keep some of its numbers in
// memory.
constexpr int kPhaseBlocksPerMultiprocessor = 1;

// A step whose phases have few tasks runs as one cluster, whose barrier takes less time than one
// through memory. But a cluster has few multiprocessors, so a block then does up to this many tasks
// of a phase. The limit is a guess, which no GPU has measured.
constexpr int kMostTasksOfBlock = 2;
constexpr int kLargestCluster = 16;

// When the step begins, L2 fetches the weights of dense layers, up to this many bytes. So memory is
// also read while blocks wait at barriers. A guess; an H100 and an H200 have 50 MB.
constexpr int64_t kMostFetchedBytes = 32 << 20;

struct PersistentParams {
  const Phase* phases;
  int count;
  int fetched;   // the weights of so many phases are fetched when the step begins
  bool cluster;  // whether the blocks are one cluster
};

// Calls f(data, bytes) for the weights of each layer of a dense phase.
template <typename F>
__host__ __device__ void ForEachMatrix(const Phase& phase, const F& f) {
  const auto of = [&](const auto& p) {
    for (int i = 0; i < p.num_layers; ++i) {
      const auto& layer = p.layers[i];
      f(layer.kernel, layer.inputs * layer.outputs * static_cast<int64_t>(sizeof(*layer.kernel)));
    }
  };
  if (phase.kind == Phase::Kind::kDense) of(phase.As<DeviceDenseParams<float, float>>());
  if (phase.kind == Phase::Kind::kNarrowDense) of(phase.As<DeviceDenseParams<float, BFloat16>>());
}

// Before CUDA 12.2, a block could not do anything between its arrival and its wait.
#if CUDART_VERSION >= 12030 && (!defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900)
#define CONTINUAL_TRANSFORMERS_HAS_PERSISTENT_KERNELS
static_assert(GraphBuilder::kCanOverlap);

// All blocks of the kernel wait for each other. What a block wrote before it arrived, all see after
// they waited.
class PhaseBarrier {
 public:
  __device__ explicit PhaseBarrier(bool cluster) : cluster_(cluster) {}

  __device__ void Arrive() {
    arrived_ = true;
    if (cluster_) {
      cooperative_groups::this_cluster().barrier_arrive();
    } else {
      token_ = cooperative_groups::this_grid().barrier_arrive();
    }
  }

  // Does nothing if the block has waited since it arrived.
  __device__ void Wait() {
    if (!arrived_) return;
    arrived_ = false;
    if (cluster_) {
      cooperative_groups::this_cluster().barrier_wait();
    } else {
      cooperative_groups::this_grid().barrier_wait(std::move(token_));
    }
  }

 private:
  const bool cluster_;
  bool arrived_ = false;
  cooperative_groups::grid_group::arrival_token token_;
};

// Tasks of phases, as StripBlock and RingQuery are. Begin() may read weights, and what the first
// phase takes: addresses and positions.
struct NormTask {
  const DeviceNormalizeParams<float>& p;
  const int row;
  __device__ void Begin() const {}
  __device__ void Run() const { NormalizeRow(p, row); }
};

template <typename F>
struct EachTask {
  const Phase::Each<F>& p;
  const int task;
  __device__ void Begin() const {}
  __device__ void Run() const {
    const int64_t i = int64_t{task} * kPhaseThreads + threadIdx.x;
    if (i < p.count) p.f(i);
  }
};

// C: the type of rings.
template <typename C>
class PersistentBlock {
 public:
  __device__ explicit PersistentBlock(const PersistentParams& p) : p_(p), barrier_(p.cluster) {}

  __device__ void Run() {
    Fetch();
    for (int word = threadIdx.x; word < kWords; word += kPhaseThreads) {
      Words(0)[word] = WordOf(0, word);
    }
    __syncthreads();
    for (int i = 0; i < p_.count; ++i) {
      // The next phase is read during this one.
      const int word = threadIdx.x;
      const bool copies = i + 1 < p_.count && word < kWords;
      const uint32_t next = copies ? WordOf(i + 1, word) : 0;
      const Phase& phase = *reinterpret_cast<const Phase*>(Words(i));
      // Read before the barrier: behind it, a faster warp may copy a phase over this one.
      const bool takes_inputs = phase.kind == Phase::Kind::kTakeInputs;
      RunPhase(phase);
      if (copies) Words(i + 1)[word] = next;
      if (i + 1 < p_.count) barrier_.Arrive();
      __syncthreads();                    // until the next phase has been copied
      if (takes_inputs) barrier_.Wait();  // Begin() may read addresses and positions.
    }
  }

 private:
  static constexpr int kWords = sizeof(Phase) / sizeof(uint32_t);
  static_assert(sizeof(Phase) % sizeof(uint32_t) == 0 && kWords <= kPhaseThreads);

  // Room for a phase and for the next one.
  __device__ static uint32_t* Words(int phase) {
    alignas(Phase) __shared__ uint32_t words[2][kWords];
    return words[phase % 2];
  }
  __device__ uint32_t WordOf(int phase, int word) const {
    return reinterpret_cast<const uint32_t*>(p_.phases + phase)[word];
  }

  // Has L2 fetch this block's share of the weights.
  __device__ void Fetch() const {
    for (int i = threadIdx.x; i < p_.fetched; i += kPhaseThreads) {
      ForEachMatrix(p_.phases[i], [](const void* data, int64_t bytes) {
        const int64_t share = blockIdx.x, shares = gridDim.x;
        const int64_t begin = bytes * share / shares, end = bytes * (share + 1) / shares;
        PrefetchIntoL2(static_cast<const char*>(data) + begin, end - begin);
      });
    }
  }

  __device__ void RunPhase(const Phase& phase) {
    switch (phase.kind) {
      case Phase::Kind::kDense:
        return RunDense<float>(phase);
      case Phase::Kind::kNarrowDense:
        return RunDense<BFloat16>(phase);
      case Phase::Kind::kAttention: {
        const auto& p = phase.As<RingQueryParams>();
        return WithHeadLayout<C, kPhaseThreads>(p.s.key_dim, p.s.value_dim, [&](auto layout) {
          using L = decltype(layout);
          if (p.window_parts > 1) {
            RunTasks<RingQuery<C, L, true>>(phase, p);
          } else {
            RunTasks<RingQuery<C, L, false>>(phase, p);
          }
        });
      }
      case Phase::Kind::kNorm:
        return RunTasks<NormTask>(phase, phase.As<DeviceNormalizeParams<float>>());
      case Phase::Kind::kPositional:
        return RunEach<PositionalEach>(phase);
      case Phase::Kind::kTakeInputs:
        return RunEach<TakeInputsEach>(phase);
      case Phase::Kind::kDeliverOutputs:
        return RunEach<DeliverOutputsEach>(phase);
      case Phase::Kind::kAdvance:
        return RunEach<AdvanceEach>(phase);
    }
  }

  template <typename F>
  __device__ void RunEach(const Phase& phase) {
    RunTasks<EachTask<F>>(phase, phase.As<Phase::Each<F>>());
  }

  template <typename W>
  __device__ void RunDense(const Phase& phase) {
    if (phase.vectors) {
      RunStrips<W, VectorStrip<W>>(phase);
    } else {
      RunStrips<W, ElementStrip>(phase);
    }
  }

  template <typename W, typename L>
  __device__ void RunStrips(const Phase& phase) {
    const auto& p = phase.As<DeviceDenseParams<float, W>>();
    if (p.norm.x == nullptr) {
      RunTasks<StripBlock<float, W, L, 1, false>>(phase, p);
    } else {
      RunTasks<StripBlock<float, W, L, 1, true>>(phase, p);
    }
  }

  // Does this block's tasks of a phase, after all blocks have done theirs of the phase before. Each
  // is a function of its own: if all were part of the kernel, it would not have enough registers.
  template <typename Task, typename Params>
  __device__ __noinline__ void RunTasks(const Phase& phase, const Params& params) {
    const int blocks = static_cast<int>(gridDim.x);
    for (int i = blockIdx.x; i < phase.tasks; i += blocks) {
      Task task{params, i};
      task.Begin();
      barrier_.Wait();
      task.Run();
      // Until no thread needs the shared memory that the next one uses.
      if (i + blocks < phase.tasks) __syncthreads();
    }
    barrier_.Wait();
  }

  const PersistentParams& p_;
  PhaseBarrier barrier_;
};

#endif

template <typename C>
__global__ void __launch_bounds__(kPhaseThreads, kPhaseBlocksPerMultiprocessor)
    PersistentKernel(const __grid_constant__ PersistentParams p) {
#ifdef CONTINUAL_TRANSFORMERS_HAS_PERSISTENT_KERNELS
  PersistentBlock<C>(p).Run();
#endif
}

// Returns how many blocks one cluster of this kernel can have on this GPU; 1: there are no
// clusters.
cudaError_t FindClusterSize(void (*kernel)(PersistentParams), int* size) {
  cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  if (error != cudaSuccess) return error;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(kLargestCluster);
  config.blockDim = dim3(kPhaseThreads);
  error = cudaOccupancyMaxPotentialClusterSize(size, kernel, &config);
  if (error != cudaSuccess) return error;
  *size = std::min(*size, kLargestCluster);
  // Whether there is room for one, for example on a part of a GPU.
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = *size;
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  config.gridDim = dim3(*size);
  config.attrs = &attribute;
  config.numAttrs = 1;
  int clusters = 0;
  error = cudaOccupancyMaxActiveClusters(&clusters, kernel, &config);
  if (clusters < 1) *size = 1;
  return error;
}

cudaError_t LaunchPersistent(void (*kernel)(PersistentParams), PersistentParams p, int most_tasks,
                             int multiprocessors) {
  GraphBuilder* const builder = GraphBuilder::Current();
  if (builder == nullptr) return cudaErrorNotSupported;
  int cluster, resident;
  cudaError_t error = FindClusterSize(kernel, &cluster);
  if (error != cudaSuccess) return error;
  p.cluster = cluster > 1 && most_tasks <= kMostTasksOfBlock * cluster;
  if (p.cluster) return builder->AddTogether(kernel, cluster, kPhaseThreads, true, p);
  error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, kPhaseThreads, 0);
  if (error != cudaSuccess) return error;
  const int blocks = std::min(most_tasks, resident * multiprocessors);
  return builder->AddTogether(kernel, blocks, kPhaseThreads, false, p);
}

}  // namespace

template <typename Params>
Phase* Phases::New(Phase::Kind kind, int64_t tasks, const Params& params) {
  Phase phase = {};
  phase.kind = kind;
  phase.tasks = static_cast<int32_t>(tasks);
  static_assert(std::is_trivially_copyable_v<Params> && sizeof(params) <= sizeof(phase.params));
  std::memcpy(phase.params, &params, sizeof(params));
  phases_.push_back(phase);
  return &phases_.back();
}

template <typename W>
void Phases::AddDense(Phase::Kind kind, DeviceDenseParams<float, W> p) {
  p.overlap = true;  // Begin() has L2 fetch the weights.
  const bool vectors = HasVectors(p);
  New(kind, vectors ? NumStrips<VectorStrip<W>>(p) : NumStrips<ElementStrip>(p), p)->vectors =
      vectors;
}

void Phases::Add(const DeviceDenseParams<float, float>& params) {
  AddDense(Phase::Kind::kDense, params);
}

void Phases::Add(const DeviceDenseParams<float, BFloat16>& params) {
  AddDense(Phase::Kind::kNarrowDense, params);
}

void Phases::Add(const RingQueryParams& params) {
  RingQueryParams p = params;
  // PlanWindowParts() knows of several smaller blocks on a multiprocessor. Here it has one.
  const int64_t parts = std::max<int64_t>(1, multiprocessors_ / p.s.heads);
  p.window_parts = static_cast<int>(std::min<int64_t>(p.window_parts, parts));
  New(Phase::Kind::kAttention, p.s.heads * p.window_parts, p);
}

void Phases::Add(const DeviceNormalizeParams<float>& params) {
  New(Phase::Kind::kNorm, params.rows, params);
}

template <typename F>
void Phases::AddEach(Phase::Kind kind, const F& f, int64_t count) {
  New(kind, (count + kPhaseThreads - 1) / kPhaseThreads, Phase::Each<F>{f, count});
}

void Phases::Add(const PositionalEach& each, int64_t count) {
  AddEach(Phase::Kind::kPositional, each, count);
}

void Phases::Add(const TakeInputsEach& inputs) {
  AddEach(Phase::Kind::kTakeInputs, inputs, inputs.Count());
}

void Phases::Add(const DeliverOutputsEach& outputs) {
  AddEach(Phase::Kind::kDeliverOutputs, outputs, outputs.Count());
}

void Phases::Add(const AdvanceEach& each, int64_t count) {
  AddEach(Phase::Kind::kAdvance, each, count);
}

cudaError_t Phases::Launch(cudaStream_t stream) {
  if (phases_.empty()) return cudaSuccess;
  PersistentParams p = {};
  p.count = static_cast<int>(phases_.size());
  p.phases = reinterpret_cast<const Phase*>(memory_);
  p.fetched = p.count;
  int most_tasks = 1;
  int64_t bytes = 0;
  for (int i = 0; i < p.count; ++i) {
    const Phase& phase = phases_[i];
    most_tasks = std::max(most_tasks, phase.tasks);
    ForEachMatrix(phase, [&](const void*, int64_t size) { bytes += size; });
    if (bytes > kMostFetchedBytes) p.fetched = std::min(p.fetched, i);
  }
  const int64_t size = BytesOf(phases_.size());
  if (size > end_ - memory_) return cudaErrorInvalidValue;
  cudaError_t error =
      cudaMemcpyAsync(memory_, phases_.data(), size, cudaMemcpyHostToDevice, stream);
  if (error == cudaSuccess) error = cudaStreamSynchronize(stream);
  if (error != cudaSuccess) return error;
  memory_ += size;
  phases_.clear();
  const auto kernel = cache_ == DType::kBFloat16  ? PersistentKernel<BFloat16>
                      : cache_ == DType::kFloat16 ? PersistentKernel<Float16>
                                                  : PersistentKernel<float>;
  return LaunchPersistent(kernel, p, most_tasks, multiprocessors_);
}

}  // namespace continual_transformers
