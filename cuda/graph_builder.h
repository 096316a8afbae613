// Makes a CUDA graph of launches, node by node.
//
// The alternative is to capture a stream. But while a stream is captured, a cudaDeviceSynchronize
// of any other thread fails, and so does the capture.

#ifndef CONTINUAL_TRANSFORMERS_CUDA_GRAPH_BUILDER_H_
#define CONTINUAL_TRANSFORMERS_CUDA_GRAPH_BUILDER_H_

#include <cuda_runtime.h>

namespace continual_transformers {

class GraphBuilder {
 public:
  // Whether this CUDA has graphs whose kernels overlap. The driver may still refuse them: with an
  // error of Add(), or when the graph is instantiated.
  static constexpr bool kCanOverlap = CUDART_VERSION >= 12030;

  // During its life, what this thread launches with Launch() is not run. It becomes nodes of
  // `graph`, each after the one before.
  explicit GraphBuilder(cudaGraph_t graph) : graph_(graph) { current_ = this; }
  ~GraphBuilder() { current_ = nullptr; }
  GraphBuilder(const GraphBuilder&) = delete;
  GraphBuilder& operator=(const GraphBuilder&) = delete;

  // This thread's builder, or null.
  static GraphBuilder* Current() { return current_; }

  // `overlap`: see Launch().
  template <typename Params>
  cudaError_t Add(void (*kernel)(Params), dim3 blocks, dim3 threads, [[maybe_unused]] bool overlap,
                  const Params& params) {
    void* arguments[] = {const_cast<Params*>(&params)};  // CUDA copies what they point to.
    cudaKernelNodeParams node = {};
    // `func` is a void*. In the emulator it has a type that knows Params.
    using Function = decltype(node.func);
    node.func = Function(kernel);
    node.gridDim = blocks;
    node.blockDim = threads;
    node.kernelParams = arguments;
    const cudaGraphNode_t before = last_;
#if CUDART_VERSION >= 12030
    if (overlap && before != nullptr && !next_waits_) {
      const cudaError_t error = cudaGraphAddKernelNode(&last_, graph_, nullptr, 0, &node);
      return error == cudaSuccess ? AddProgrammaticEdge(before, last_) : error;
    }
#endif
    next_waits_ = false;
    return cudaGraphAddKernelNode(&last_, graph_, &before, before == nullptr ? 0 : 1, &node);
  }

  // The next kernel begins only when all kernels before it have ended.
  void LetNextWait() { next_waits_ = true; }

  // Adds a kernel whose blocks all run at once, so that they can wait for each other, by
  // cooperative_groups' grid_group. With `cluster` they are one cluster, and wait by its barrier.
  template <typename Params>
  cudaError_t AddTogether(void (*kernel)(Params), dim3 blocks, dim3 threads, bool cluster,
                          const Params& params) {
    const cudaError_t error = Add(kernel, blocks, threads, false, params);
    if (error != cudaSuccess) return error;
    // CUDA does not document that the next kernel may begin early then.
    next_waits_ = true;
    cudaLaunchAttributeValue value = {};
    if (cluster) {
      value.clusterDim.x = blocks.x;
      value.clusterDim.y = value.clusterDim.z = 1;
      return cudaGraphKernelNodeSetAttribute(last_, cudaLaunchAttributeClusterDimension, &value);
    }
    value.cooperative = 1;
    return cudaGraphKernelNodeSetAttribute(last_, cudaLaunchAttributeCooperative, &value);
  }

 private:
#if CUDART_VERSION >= 12030
  // The edge that a captured stream has where a launch has the attribute
  // cudaLaunchAttributeProgrammaticStreamSerialization.
  cudaError_t AddProgrammaticEdge(cudaGraphNode_t from, cudaGraphNode_t to) {
    cudaGraphEdgeData edge = {};
    edge.from_port = cudaGraphKernelNodePortProgrammatic;
    edge.type = cudaGraphDependencyTypeProgrammatic;
#if CUDART_VERSION >= 13000
    return cudaGraphAddDependencies(graph_, &from, &to, &edge, 1);
#else
    return cudaGraphAddDependencies_v2(graph_, &from, &to, &edge, 1);
#endif
  }
#endif

  static inline thread_local GraphBuilder* current_ = nullptr;

  const cudaGraph_t graph_;
  cudaGraphNode_t last_ = nullptr;
  bool next_waits_ = false;
};

}  // namespace continual_transformers

#endif  // CONTINUAL_TRANSFORMERS_CUDA_GRAPH_BUILDER_H_
