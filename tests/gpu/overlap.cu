// A program for test_emulated_overlap.py: overlap KERNEL WHERE ORDER. It launches four kernels a
// few times, one after the other, and prints how often the result was wrong. The third one is
// KERNEL. WHERE is "graph", "full_edges" (a graph without overlap), "stream", "old_driver" (it does
// not know edges that overlap) or "strict_driver" (it refuses to instantiate them). ORDER is the
// emulator's.

#include <cuda_runtime.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <utility>
#include <vector>

#include "cuda/graph_builder.h"
#include "cuda/launch.cuh"

namespace continual_transformers {
namespace {

constexpr int kThreads = 64, kBlocks = 20, kCount = kThreads * kBlocks, kLaunches = 20;

struct Params {
  const uint32_t* from;
  uint32_t* to;
};

// Each element needs one of another block.
__device__ uint32_t Load(const Params& p, int i) { return p.from[(i + 5 * kThreads + 7) % kCount]; }
__device__ uint32_t Next(uint32_t x, int i) { return 1664525 * x + i; }
__device__ int Element() { return blockIdx.x * kThreads + threadIdx.x; }

__global__ void Good(const __grid_constant__ Params p) {
  ReleaseNext();
  WaitForPrevious();
  p.to[Element()] = Next(Load(p, Element()), Element());
}

__global__ void ReadsEarly(const __grid_constant__ Params p) {
  ReleaseNext();
  const uint32_t x = Load(p, Element());
  WaitForPrevious();
  p.to[Element()] = Next(x, Element());
}

__global__ void WritesEarly(const __grid_constant__ Params p) {
  ReleaseNext();
  p.to[Element()] = 0;
  WaitForPrevious();
  p.to[Element()] = Next(Load(p, Element()), Element());
}

__global__ void NeverWaits(const __grid_constant__ Params p) {
  p.to[Element()] = Next(Load(p, Element()), Element());
}

// As a kernel does whose last threads have nothing to do.
__global__ void SomeWait(const __grid_constant__ Params p) {
  ReleaseNext();
  if (Element() >= kCount - 1) return;
  WaitForPrevious();
  p.to[Element()] = Next(Load(p, Element()), Element());
}

void Check(cudaError_t error, const char* doing) {
  if (error == cudaSuccess) return;
  std::printf("%s: error %d\n", doing, static_cast<int>(error));
  std::exit(0);
}

int Run(void (*third)(Params), const char* where) {
  const bool stream = std::strcmp(where, "stream") == 0;
  const bool overlap = std::strcmp(where, "full_edges") != 0;
  uint32_t* data = nullptr;
  Check(cudaMalloc(reinterpret_cast<void**>(&data), 2 * kCount * sizeof(uint32_t)), "memory");
  const auto launch_all = [&] {
    Params p = {data, data + kCount};
    void (*kernels[])(Params) = {Good, Good, third, Good};
    for (const auto kernel : kernels) {
      Check(Launch(kernel, kBlocks, kThreads, overlap, nullptr, p), "adding");
      p = {p.to, const_cast<uint32_t*>(p.from)};
    }
  };
  cudaGraphExec_t exec = nullptr;
  if (!stream) {
    cudaGraph_t graph;
    Check(cudaGraphCreate(&graph, 0), "creating");
    {
      const GraphBuilder builder(graph);
      launch_all();
    }
    Check(cudaGraphInstantiate(&exec, graph, 0), "instantiating");
    Check(cudaGraphDestroy(graph), "destroying");
  }
  int wrong = 0;
  std::vector<uint32_t> host(kCount), next(kCount), got(kCount);
  for (int launch = 0; launch < kLaunches; ++launch) {
    for (int i = 0; i < kCount; ++i) host[i] = 1000003u * launch + 17u * i;
    const size_t bytes = kCount * sizeof(uint32_t);
    Check(cudaMemcpyAsync(data, host.data(), bytes, cudaMemcpyHostToDevice, nullptr), "copying");
    if (stream) {
      launch_all();
    } else {
      Check(cudaGraphLaunch(exec, nullptr), "launching");
    }
    Check(cudaMemcpyAsync(got.data(), data, bytes, cudaMemcpyDeviceToHost, nullptr), "copying");
    for (int kernel = 0; kernel < 4; ++kernel) {
      for (int i = 0; i < kCount; ++i) {
        next[i] = 1664525 * host[(i + 5 * kThreads + 7) % kCount] + i;
      }
      std::swap(host, next);
    }
    wrong += got != host;
  }
  return wrong;
}

}  // namespace
}  // namespace continual_transformers

int main(int, char** arguments) {
  using namespace continual_transformers;  // in a program of one file
  const struct {
    const char* name;
    void (*kernel)(Params);
  } kernels[] = {{"Good", Good},
                 {"ReadsEarly", ReadsEarly},
                 {"WritesEarly", WritesEarly},
                 {"NeverWaits", NeverWaits},
                 {"SomeWait", SomeWait}};
  const char *const name = arguments[1], *const where = arguments[2];
  cuda_emulator_set_order(std::atoi(arguments[3]));
  if (std::strcmp(where, "old_driver") == 0) cuda_emulator_set_refuses_overlap(1);
  if (std::strcmp(where, "strict_driver") == 0) cuda_emulator_set_refuses_overlap(2);
  for (const auto& each : kernels) {
    if (std::strcmp(each.name, name) != 0) continue;
    const int wrong = Run(each.kernel, where);
    std::printf("%d of %d wrong, %d of %d nodes early\n", wrong, kLaunches,
                static_cast<int>(cuda_emulator_early_nodes()),
                static_cast<int>(cuda_emulator_nodes()));
  }
}
