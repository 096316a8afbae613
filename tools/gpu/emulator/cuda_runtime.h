// An emulator of the part of CUDA that the kernels in cuda/ use. With it, their logic can be tested
// on machines without a GPU: `g++ -x c++ -Itools/gpu/emulator` finds this header in place of
// CUDA's.
//
// emulated_blocks.h runs kernels, and emulated_memory.h is the memory of the GPU. This file has the
// functions of CUDA's runtime, which the host calls, and graphs.

#ifndef CONTINUAL_TRANSFORMERS_TESTS_GPU_EMULATOR_CUDA_RUNTIME_H_
#define CONTINUAL_TRANSFORMERS_TESTS_GPU_EMULATOR_CUDA_RUNTIME_H_

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "cuda.h"
#include "emulated_blocks.h"
#include "emulated_memory.h"

#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __launch_bounds__(...)
#define __noinline__ __attribute__((noinline))
#define __shared__ static

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorMemoryAllocation = 2,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInsufficientDriver = 35,
  cudaErrorCallRequiresNewerDriver = 36,
  cudaErrorInvalidDeviceFunction = 98,
  cudaErrorNoDevice = 100,
  cudaErrorInvalidDevice = 101,
  cudaErrorInvalidKernelImage = 200,
  cudaErrorNoKernelImageForDevice = 209,
  cudaErrorInvalidPtx = 218,
  cudaErrorJitCompilerNotFound = 221,
  cudaErrorUnsupportedPtxVersion = 222,
  cudaErrorNotSupported = 801
};
inline const char* cudaGetErrorName(cudaError_t) { return "cudaError"; }
inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess             ? "no error"
         : error == cudaErrorInvalidValue ? "invalid argument"
                                          : "invalid configuration argument";
}

// All work is done when a call returns.
struct CUstream_st {};
struct CUevent_st {
  std::chrono::steady_clock::time_point time;
};
using cudaStream_t = CUstream_st*;
using cudaEvent_t = CUevent_st*;

namespace cuda_emulator {
// How often the host waited for the GPU, copied and set memory. Tests read them.
inline std::atomic<int64_t> waits{0}, copies{0}, memsets{0};
// It is called where the host waits. Counted is how often it returned something else than 0.
inline std::atomic<int (*)()> probe{nullptr};
inline std::atomic<int64_t> probed{0};

template <typename F>
cudaError_t Do(const F& work) {
  NeedContext();
  const Work here;
  work();
  return cudaSuccess;
}
}  // namespace cuda_emulator

enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrComputeCapabilityMinor
};
inline cudaError_t cudaGetDevice(int* device) {
  const CUcontext current = cuda_emulator::CurrentOrNull();
  return *device = current == nullptr ? 0 : current->gpu, cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  return *value = 9, cudaSuccess;
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }

inline cudaError_t cudaGetDeviceCount(int* count) {
  return *count = cuda_emulator::kGpus, cudaSuccess;
}
inline cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= cuda_emulator::kGpus) return cudaErrorInvalidDevice;
  return cuda_emulator::MakeCurrent(device), cudaSuccess;
}

#define CUDART_VERSION 13000
enum { cudaEnableDefault = 0 };
inline cudaError_t cudaGetDriverEntryPointByVersion(const char* symbol, void** function, unsigned,
                                                    unsigned long long) {
  const std::string name = symbol;
  *function = name == "cuDeviceGet" ? reinterpret_cast<void*>(&cuDeviceGet)
              : name == "cuDevicePrimaryCtxRetain"
                  ? reinterpret_cast<void*>(&cuDevicePrimaryCtxRetain)
              : name == "cuCtxPushCurrent" ? reinterpret_cast<void*>(&cuCtxPushCurrent)
              : name == "cuCtxPopCurrent"  ? reinterpret_cast<void*>(&cuCtxPopCurrent)
                                           : nullptr;
  return cudaSuccess;
}

inline cudaError_t cudaMalloc(void** data, size_t bytes) {
  cuda_emulator::NeedContext();
  const std::lock_guard<std::recursive_mutex> lock(cuda_emulator::running);
  *data = cuda_emulator::DeviceMemory::Get().Allocate(bytes);
  return *data == nullptr ? cudaErrorMemoryAllocation : cudaSuccess;
}
inline cudaError_t cudaFree(void* data) {
  cuda_emulator::NeedContext();
  const std::lock_guard<std::recursive_mutex> lock(cuda_emulator::running);
  return cuda_emulator::DeviceMemory::Get().Free(data), cudaSuccess;
}
inline cudaError_t cudaMallocHost(void** data, size_t bytes) {
  cuda_emulator::NeedContext();
  *data = std::malloc(bytes);
  return *data == nullptr ? cudaErrorMemoryAllocation : cudaSuccess;
}
inline cudaError_t cudaFreeHost(void* data) {
  cuda_emulator::NeedContext();
  return std::free(data), cudaSuccess;
}

enum cudaMemcpyKind { cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost, cudaMemcpyDeviceToDevice };
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind,
                                   cudaStream_t) {
  ++cuda_emulator::copies;
  return cuda_emulator::Do([=] { std::memcpy(to, from, bytes); });
}
inline cudaError_t cudaMemcpy2DAsync(void* to, size_t to_pitch, const void* from, size_t from_pitch,
                                     size_t width, size_t height, cudaMemcpyKind, cudaStream_t) {
  if (to_pitch < width || from_pitch < width) return cudaErrorInvalidValue;
  if (std::max(to_pitch, from_pitch) > 0x7fffffff) return cudaErrorInvalidValue;
  ++cuda_emulator::copies;
  return cuda_emulator::Do([=] {
    for (size_t i = 0; i < height; ++i) {
      std::memcpy(static_cast<char*>(to) + i * to_pitch,
                  static_cast<const char*>(from) + i * from_pitch, width);
    }
  });
}
inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  ++cuda_emulator::memsets;
  return cuda_emulator::Do([=] { std::memset(to, value, bytes); });
}

enum cudaMemoryType {
  cudaMemoryTypeUnregistered,
  cudaMemoryTypeHost,
  cudaMemoryTypeDevice,
  cudaMemoryTypeManaged
};
struct cudaPointerAttributes {
  cudaMemoryType type;
  int device;
};
inline cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* data) {
  const bool on_device = cuda_emulator::DeviceMemory::Get().Has(data);
  attributes->type = on_device ? cudaMemoryTypeDevice : cudaMemoryTypeUnregistered;
  attributes->device = 0;
  return cudaSuccess;
}

struct cudaFuncAttributes {};
template <typename Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, Kernel*) {
  return cudaSuccess;
}

enum { cudaStreamNonBlocking = 1 };
inline cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  cuda_emulator::NeedContext();
  return *stream = new CUstream_st, cudaSuccess;
}
inline cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  cuda_emulator::NeedContext();
  return delete stream, cudaSuccess;
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t) {
  ++cuda_emulator::waits;
  int (*const probe)() = cuda_emulator::probe;
  if (probe != nullptr && probe() != 0) ++cuda_emulator::probed;
  return cudaSuccess;
}

inline cudaError_t cudaEventCreate(cudaEvent_t* event) {
  return *event = new CUevent_st, cudaSuccess;
}
enum { cudaEventDisableTiming = 2 };
inline const cudaStream_t cudaStreamLegacy = nullptr;
inline cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  return cudaEventCreate(event);
}
inline cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t, unsigned) { return cudaSuccess; }
inline cudaError_t cudaEventDestroy(cudaEvent_t event) { return delete event, cudaSuccess; }
inline cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t) {
  return event->time = std::chrono::steady_clock::now(), cudaSuccess;
}
inline cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t begin, cudaEvent_t end) {
  *milliseconds = std::chrono::duration<float, std::milli>(end->time - begin->time).count();
  return cudaSuccess;
}

enum cudaLaunchAttributeID {
  cudaLaunchAttributeProgrammaticStreamSerialization,
  cudaLaunchAttributeCooperative,
  cudaLaunchAttributeClusterDimension
};
union cudaLaunchAttributeValue {
  int programmaticStreamSerializationAllowed;
  int cooperative;
  struct {
    unsigned x, y, z;
  } clusterDim;
};
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  cudaLaunchAttributeValue val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  cudaLaunchAttribute* attrs = nullptr;
  unsigned numAttrs = 0;
};

namespace cuda_emulator {

// A kernel with one parameter, in place of CUDA's void*, which does not know the parameter's type.
class AnyKernel {
 public:
  AnyKernel() = default;
  template <typename Params>
  explicit AnyKernel(void (*kernel)(Params))
      : with_([kernel](void** arguments) {
          return [kernel, params = *static_cast<Params*>(arguments[0])] { kernel(params); };
        }) {}

  // Returns a call with a copy of the parameter.
  std::function<void()> With(void** arguments) const { return with_(arguments); }

 private:
  std::function<std::function<void()>(void**)> with_;
};

}  // namespace cuda_emulator

extern "C" __attribute__((used, visibility("default"))) inline void cuda_emulator_set_order(
    int order) {
  cuda_emulator::order = order;
}
extern "C" __attribute__((used, visibility("default"))) inline size_t cuda_emulator_allocated() {
  return cuda_emulator::DeviceMemory::Get().allocated();
}
extern "C" __attribute__((used, visibility("default"))) inline int64_t cuda_emulator_waits() {
  return cuda_emulator::waits;
}
extern "C" __attribute__((used, visibility("default"))) inline int64_t cuda_emulator_copies() {
  return cuda_emulator::copies;
}
extern "C" __attribute__((used, visibility("default"))) inline int64_t cuda_emulator_memsets() {
  return cuda_emulator::memsets;
}
extern "C" __attribute__((used, visibility("default"))) inline int64_t cuda_emulator_blocks() {
  return cuda_emulator::blocks;
}
// Has `probe` called where the host waits, or nothing for null.
extern "C" __attribute__((used, visibility("default"))) inline void cuda_emulator_set_probe(
    int (*probe)()) {
  cuda_emulator::probed = 0;
  cuda_emulator::probe = probe;
}
extern "C" __attribute__((used, visibility("default"))) inline int64_t cuda_emulator_probed() {
  return cuda_emulator::probed;
}
// Bit n: whether GPU n has a context.
extern "C" __attribute__((used, visibility("default"))) inline int cuda_emulator_contexts() {
  return cuda_emulator::contexts;
}
// The thread's GPU, and its choice.
extern "C" __attribute__((used, visibility("default"))) inline int cuda_emulator_gpu() {
  int gpu;
  return cudaGetDevice(&gpu), gpu;
}
extern "C" __attribute__((used, visibility("default"))) inline void cuda_emulator_choose(int gpu) {
  cudaSetDevice(gpu);
}
// Device memory for tests, and a copy to or from it.
extern "C" __attribute__((used, visibility("default"))) inline void* cuda_emulator_allocate(
    size_t bytes) {
  void* data = nullptr;
  return cudaMalloc(&data, bytes) == cudaSuccess ? data : nullptr;
}
extern "C" __attribute__((used, visibility("default"))) inline void cuda_emulator_free(void* data) {
  cudaFree(data);
}
extern "C" __attribute__((used, visibility("default"))) inline void cuda_emulator_copy(
    void* to, const void* from, size_t bytes) {
  const cuda_emulator::Work here;
  std::memcpy(to, from, bytes);
}
// Sets how many bytes of device memory there are; at most 64 GB, which is also what there is
// without this call.
extern "C" __attribute__((used, visibility("default"))) inline void cuda_emulator_set_room(
    size_t bytes) {
  cuda_emulator::DeviceMemory::Get().SetRoom(bytes);
}

template <typename... Params, typename... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...),
                               Args&&... args) {
  bool may_overlap = false;
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    may_overlap |= config->attrs[i].val.programmaticStreamSerializationAllowed != 0;
  }
  return cuda_emulator::Do([&] {
    cuda_emulator::Grid(
        config->gridDim, config->blockDim, [&] { kernel(args...); }, may_overlap)
        .Run();
  });
}

// There is no capture of streams here. While one is captured, a cudaDeviceSynchronize of another
// thread fails, and so does the capture: graphs must be built node by node.
using cudaGraphNode_t = struct CUgraphNode_st*;
struct CUgraphNode_st {
  struct Edge {
    cudaGraphNode_t from;
    bool programmatic;
  };
  std::vector<Edge> after;
  std::function<cuda_emulator::Grid(bool must_wait, bool together)> grid;
  unsigned blocks;
  bool together = false;  // whether its blocks can wait for each other

  bool MayBeginEarly() const {
    return std::any_of(after.begin(), after.end(), [](const Edge& e) { return e.programmatic; });
  }
};
struct CUgraph_st {
  std::vector<std::unique_ptr<CUgraphNode_st>> nodes;
};
struct CUgraphExec_st {
  struct Step {
    std::function<cuda_emulator::Grid()> grid;
    int earliest;  // the step before which it may begin; its own number: not early
  };
  std::vector<Step> steps;
  std::mt19937 random;
};
using cudaGraph_t = CUgraph_st*;
using cudaGraphExec_t = CUgraphExec_st*;

enum { cudaGraphDependencyTypeDefault = 0, cudaGraphDependencyTypeProgrammatic = 1 };
enum {
  cudaGraphKernelNodePortDefault = 0,
  cudaGraphKernelNodePortProgrammatic = 1,
  cudaGraphKernelNodePortLaunchCompletion = 2
};
struct cudaGraphEdgeData {
  unsigned char from_port, to_port, type, reserved[5];
};

namespace cuda_emulator {
// Up to so many nodes before its own turn, a node begins.
constexpr int kMostEarly = 3;
// Where programmatic edges are refused: 0: nowhere, 1: as by a driver that does not know the
// function, 2: when the graph is instantiated.
inline int refuses_overlap = 0;
// How many nodes graphs have launched, and how many of them could begin early.
inline std::atomic<int64_t> nodes{0}, early_nodes{0};
}  // namespace cuda_emulator

extern "C" __attribute__((used, visibility("default"))) inline void
cuda_emulator_set_refuses_overlap(int where) {
  cuda_emulator::refuses_overlap = where;
}
extern "C" __attribute__((used, visibility("default"))) inline int64_t cuda_emulator_nodes() {
  return cuda_emulator::nodes;
}
extern "C" __attribute__((used, visibility("default"))) inline int64_t cuda_emulator_early_nodes() {
  return cuda_emulator::early_nodes;
}

struct cudaKernelNodeParams {
  cuda_emulator::AnyKernel func;
  dim3 gridDim, blockDim;
  unsigned sharedMemBytes;
  void** kernelParams;
  void** extra;
};
inline cudaError_t cudaGraphCreate(cudaGraph_t* graph, unsigned) {
  return *graph = new CUgraph_st, cudaSuccess;
}
inline cudaError_t cudaGraphAddDependencies(cudaGraph_t, const cudaGraphNode_t* from,
                                            const cudaGraphNode_t* to,
                                            const cudaGraphEdgeData* edges, size_t count) {
  for (size_t i = 0; i < count; ++i) {
    const cudaGraphEdgeData edge = edges == nullptr ? cudaGraphEdgeData{} : edges[i];
    const bool programmatic = edge.type == cudaGraphDependencyTypeProgrammatic;
    if (programmatic && cuda_emulator::refuses_overlap == 1) {
      return cudaErrorCallRequiresNewerDriver;
    }
    // A programmatic edge comes from a port of its own, and the others do not.
    if ((edge.from_port != cudaGraphKernelNodePortDefault) != programmatic || edge.to_port != 0) {
      return cudaErrorInvalidValue;
    }
    for (const CUgraphNode_st::Edge& other : to[i]->after) {
      if (other.from == from[i]) return cudaErrorInvalidValue;
    }
    to[i]->after.push_back({from[i], programmatic});
  }
  return cudaSuccess;
}
inline cudaError_t cudaGraphAddKernelNode(cudaGraphNode_t* node, cudaGraph_t graph,
                                          const cudaGraphNode_t* dependencies, size_t count,
                                          const cudaKernelNodeParams* params) {
  graph->nodes.push_back(std::make_unique<CUgraphNode_st>());
  *node = graph->nodes.back().get();
  (*node)->grid = [blocks = params->gridDim, threads = params->blockDim,
                   body = params->func.With(params->kernelParams)](bool must_wait, bool together) {
    return cuda_emulator::Grid(blocks, threads, body, must_wait, together);
  };
  (*node)->blocks = params->gridDim.x;
  const std::vector<cudaGraphNode_t> to(count, *node);
  return cudaGraphAddDependencies(graph, dependencies, to.data(), nullptr, count);
}
// There is room for all blocks of a launch at once, if they are no more than these.
namespace cuda_emulator {
constexpr int kMultiprocessors = 9, kBlocksPerMultiprocessor = 1, kLargestCluster = 8;
// How many nodes of instantiated graphs have blocks that can wait for each other.
inline std::atomic<int64_t> together_nodes{0};
// Whether such nodes are refused, as by a driver that does not know them.
inline bool refuses_together = false;
}  // namespace cuda_emulator
extern "C" __attribute__((used, visibility("default"))) inline int64_t
cuda_emulator_together_nodes() {
  return cuda_emulator::together_nodes;
}
extern "C" __attribute__((used, visibility("default"))) inline void
cuda_emulator_set_refuses_together(int refuses) {
  cuda_emulator::refuses_together = refuses != 0;
}
template <typename Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel*, int, size_t) {
  return *blocks = cuda_emulator::kBlocksPerMultiprocessor, cudaSuccess;
}
template <typename Kernel>
cudaError_t cudaOccupancyMaxPotentialClusterSize(int* size, Kernel*, const cudaLaunchConfig_t*) {
  return *size = cuda_emulator::kLargestCluster, cudaSuccess;
}
template <typename Kernel>
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, Kernel*, const cudaLaunchConfig_t*) {
  return *clusters = 1, cudaSuccess;
}
enum cudaFuncAttribute { cudaFuncAttributeNonPortableClusterSizeAllowed };
template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel*, cudaFuncAttribute, int) {
  return cudaSuccess;
}
inline cudaError_t cudaGraphKernelNodeSetAttribute(cudaGraphNode_t node, cudaLaunchAttributeID id,
                                                   const cudaLaunchAttributeValue* value) {
  if (cuda_emulator::refuses_together) return cudaErrorNotSupported;
  const bool cluster = id == cudaLaunchAttributeClusterDimension;
  const int most = cluster
                       ? cuda_emulator::kLargestCluster
                       : cuda_emulator::kMultiprocessors * cuda_emulator::kBlocksPerMultiprocessor;
  if (node->blocks > static_cast<unsigned>(most)) return cudaErrorInvalidConfiguration;
  if (cluster && node->blocks % value->clusterDim.x != 0) return cudaErrorInvalidConfiguration;
  node->together = cluster ? value->clusterDim.x == node->blocks : value->cooperative != 0;
  return cudaSuccess;
}
// Nodes run in any order that their dependencies allow.
inline cudaError_t cudaGraphInstantiate(cudaGraphExec_t* exec, cudaGraph_t graph,
                                        unsigned long long) {
  std::vector<cudaGraphNode_t> waiting;
  for (int i : cuda_emulator::Ordered(static_cast<int>(graph->nodes.size()))) {
    waiting.push_back(graph->nodes[i].get());
  }
  auto made = std::make_unique<CUgraphExec_st>();
  made->random.seed(cuda_emulator::order);
  std::map<cudaGraphNode_t, int> done;  // the number of its step
  while (!waiting.empty()) {
    const auto next = std::find_if(waiting.begin(), waiting.end(), [&](cudaGraphNode_t node) {
      return std::all_of(node->after.begin(), node->after.end(),
                         [&](const CUgraphNode_st::Edge& edge) { return done.count(edge.from); });
    });
    if (next == waiting.end()) return cudaErrorInvalidValue;
    const int number = static_cast<int>(made->steps.size());
    const bool early = (*next)->MayBeginEarly();
    cuda_emulator::together_nodes += (*next)->together;
    if (early && cuda_emulator::refuses_overlap == 2) return cudaErrorNotSupported;
    int earliest = early ? std::max(0, number - cuda_emulator::kMostEarly) : number;
    for (const CUgraphNode_st::Edge& edge : (*next)->after) {
      const int before = done[edge.from];
      earliest = std::max(earliest, edge.programmatic ? made->steps[before].earliest : before + 1);
    }
    made->steps.push_back({[grid = (*next)->grid, early, together = (*next)->together] {
                             return grid(early, together);
                           },
                           earliest});
    done[*next] = number;
    waiting.erase(next);
  }
  return *exec = made.release(), cudaSuccess;
}
inline cudaError_t cudaGraphDestroy(cudaGraph_t graph) { return delete graph, cudaSuccess; }
inline cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec) {
  cuda_emulator::NeedContext();
  return delete exec, cudaSuccess;
}
inline cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t) {
  return cuda_emulator::Do([&] {
    const int count = static_cast<int>(exec->steps.size());
    std::vector<std::vector<int>> beginning(count);  // by the step before which they begin
    std::vector<std::unique_ptr<cuda_emulator::Grid>> grids;
    for (int i = 0; i < count; ++i) {
      const auto& step = exec->steps[i];
      grids.push_back(std::make_unique<cuda_emulator::Grid>(step.grid()));
      ++cuda_emulator::nodes;
      if (step.earliest == i) continue;
      ++cuda_emulator::early_nodes;
      const int early = static_cast<int>(exec->random() % (i - step.earliest + 1));
      if (early > 0) beginning[i - early].push_back(i);
    }
    for (int i = 0; i < count; ++i) {
      for (int other : beginning[i]) grids[other]->Begin();
      grids[i]->Run();
    }
  });
}

inline void cudaGridDependencySynchronize() { cuda_emulator::Block::Running().WaitForPrevious(); }

inline float __uint_as_float(unsigned bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}
inline void sincospi(double x, double* sin, double* cos) {
  constexpr double kPi = 3.14159265358979323846;
  *sin = std::sin(kPi * x);
  *cos = std::cos(kPi * x);
}
inline void __syncthreads() { cuda_emulator::Block::Running().WaitForBlock(); }
inline void __threadfence() {}
template <typename T>
T __shfl_xor_sync(unsigned, T value, int distance) {
  return cuda_emulator::Block::Running().Exchange(value, distance);
}
// It waits, as a shuffle does, for all lanes.
inline void __syncwarp() { __shfl_xor_sync(0xffffffffu, 0, 0); }
template <typename T>
T atomicAdd(T* address, T value) {
  const T old = *address;
  *address += value;
  return old;
}

#endif  // CONTINUAL_TRANSFORMERS_TESTS_GPU_EMULATOR_CUDA_RUNTIME_H_
