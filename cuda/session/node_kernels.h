// The launches of a plan's nodes; docs/model_file.md says what each node does. A node is given by
// its plan values, its sizes and its weights, which are in device memory and outlive it. All
// compute in float32.

#ifndef CONTINUAL_TRANSFORMERS_CUDA_SESSION_NODE_KERNELS_H_
#define CONTINUAL_TRANSFORMERS_CUDA_SESSION_NODE_KERNELS_H_

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "cc/attention/activations.h"
#include "cc/session/plan.h"
#include "cuda/session/device_frame.h"
#include "cuda/window_parts.h"

namespace continual_transformers {

// The largest head of keys or values.
constexpr int64_t kLargestHead = 256;

// ---- Element by element (element_nodes.cu). `size` elements of each step. ----

NodeKernels ActivationNode(const ActivationSpec& spec, int input, int output, int64_t size);
NodeKernels PReluNode(const float* alpha, int input, int output, int64_t size);
// `function` is one of plan_ops.cc; ParsePlan has checked it.
NodeKernels BinaryNode(const std::string& function, int a, int b, int output, int64_t size);
NodeKernels WhereNode(int condition, int a, int b, int output, int64_t size);
// x * scale + offset, along the last axis.
NodeKernels AffineNode(const float* scale, const float* offset, int64_t columns, int input,
                       int output, int64_t size);
NodeKernels MaskedNode(int input, int mask, int output, int64_t size);
NodeKernels MaskAndNode(int a, int b, int output, int64_t size);
NodeKernels CastNode(DType from, DType to, int input, int output, int64_t size);
NodeKernels NotEqualNode(DType dtype, double number, bool any, int input, int output, int64_t size);

// ---- Moving elements (layout_nodes.cu). `element` is the size of one in bytes. ----

NodeKernels ConstantNode(const float* value, int output, int64_t size);
NodeKernels StridedNode(int64_t offset, const std::vector<int64_t>& shape,
                        const std::vector<int64_t>& strides, int64_t element, int input,
                        int64_t input_size, int output);
// Each part is a plan value, and its elements in each of the `outer` blocks before the axis.
NodeKernels ConcatNode(const std::vector<std::pair<int, int64_t>>& parts, int64_t outer,
                       int64_t element, int output);
NodeKernels EmbeddingNode(const float* table, int64_t columns, DType index, int input, int output,
                          int64_t size);

// ---- Along an axis (axis_nodes.cu) ----

// The number of elements before, along and after an axis, in a step.
struct DeviceAxis {
  int64_t outer, size, inner;
};

NodeKernels SoftmaxNode(const std::string& function, const DeviceAxis& axis, int input, int output);
NodeKernels ReduceNode(const std::string& function, const DeviceAxis& axis, int input, int output);
NodeKernels CumulativeNode(bool product, const DeviceAxis& axis, int input, int output);
NodeKernels SortNode(bool indices, bool descending, const DeviceAxis& axis, int input, int output);
// `function`: "layer", "rms" or "unit". `rows` of `columns` elements in a step.
NodeKernels NormNode(const std::string& function, const float* gamma, const float* beta,
                     double epsilon, int64_t rows, int64_t columns, int input, int output);

// ---- With the position or the past of a stream (ring_nodes.cu). `_at`: bytes in a block. ----

NodeKernels PositionalNode(const float* table, int64_t table_rows, int64_t start, int64_t offset_at,
                           int input, int output, int64_t columns, int64_t rows_a_step);
NodeKernels DelayNode(int64_t steps, int64_t ring_at, int64_t element, int input, int output,
                      int64_t size);
// `size` elements of each of the window's rows.
NodeKernels WindowNode(int64_t window, int64_t ring_at, int64_t element, int input, int output,
                       int64_t size);
NodeKernels ZeroUntakenNode(int64_t window, int input, int output, int64_t row_size);
NodeKernels PresentNode(int64_t rows, int64_t first, int64_t size, int output);
NodeKernels RotaryAnglesNode(const int64_t* turns, int64_t pairs, int64_t rows_a_step, int output);
NodeKernels RotaryNode(bool interleaved, int input, int angles, int output, int64_t rows_a_step,
                       int64_t heads, int64_t head_size, int64_t pairs);

// ---- Products (product_nodes.cu) ----

// output = activation(input @ kernel + bias) + residual
struct DeviceDenseLayer {
  const void* kernel;  // [inputs, outputs]
  const float* bias;   // [outputs]; null: none
  int64_t inputs, outputs;
  int input, output;
  Activation activation = Activation::kLinear;  // HasActivation() in cuda/dense.h
  int residual = -1;                            // -1: none
};
// Up to this many layers are one launch.
constexpr size_t kMostDenseLayers = 4;
// A layer normalization, of rows of `columns` elements.
struct DeviceLayerNorm {
  const float *gamma, *beta;  // [columns]
  float epsilon;
  int64_t columns;
  int input = -1, output = -1;  // -1: there is none
};
// Layers that do not read each other's outputs, each with `rows` in a step. They may read that of
// `norm`, which comes first, but not as a residual. Kernels are in `weights`: kFloat32 or
// kBFloat16.
NodeKernels DenseNode(const std::vector<DeviceDenseLayer>& layers, const DeviceLayerNorm& norm,
                      DType weights, int64_t rows);
// `count` products of [rows, depth] and [depth, columns].
NodeKernels MatmulNode(int a, int b, int output, int64_t count, int64_t rows, int64_t depth,
                       int64_t columns);
struct DeviceDepthwise {
  const float* kernel;  // [taps, outputs]
  const float* bias;    // [outputs]; null: none
  int64_t rows, channels, output_rows, outputs, taps, stride, dilation;
  int input, output;
};
NodeKernels DepthwiseNode(const DeviceDepthwise& spec);

// ---- Attention (attention_nodes.cu) ----

struct DeviceAttention {
  int query, key, value, output;
  int key_mask = -1, query_mask = -1;  // plan values, bool [rows]; -1: none
  int64_t rows = 1;                    // of each step
  int64_t heads, key_heads, window, key_dim, value_dim;
  int64_t first_column, end_column, query_delay;
  float scale, soft_cap;                    // soft_cap 0: none
  const float* bias;                        // [H, N]; null: none
  const float* sink;                        // [H]; null: none
  int64_t key_ring, value_ring, mask_ring;  // bytes in a block
  int multiprocessors;                      // of the GPU
  int parts = -1;                           // a scratch of PartsBytes()

  // Whether a query reads the whole window.
  bool ReadsAll() const { return first_column == 0 && end_column == window && query_delay == 0; }
  // The bytes of the rings of M streams.
  int64_t RingBytes(int64_t streams, int64_t element_bytes) const {
    return streams * window * key_heads * (key_dim + value_dim) * element_bytes;
  }
  // How many parts each query's window is cut into in a step of M streams.
  int64_t WindowParts(int64_t streams) const {
    return PlanWindowParts(streams * heads, end_column - first_column, multiprocessors);
  }
  int64_t PartsBytes(int64_t streams) const {
    return PartsSize(streams * heads, WindowParts(streams), value_dim) *
           static_cast<int64_t>(sizeof(float));
  }
};
// `cache`: kFloat32, kBFloat16 or kFloat16.
NodeKernels AttentionNode(const DeviceAttention& spec, DType cache);

struct DeviceRetroactive {
  int query, key, value, output;
  int key_mask = -1;
  int64_t heads, window, key_dim, value_dim;
  float scale;
  // Bytes in a block.
  int64_t query_ring, key_ring, value_ring, mask_ring, softmax, weighted_sum, made_with;
  bool recompute;  // all rows in each step
};
NodeKernels RetroactiveNode(const DeviceRetroactive& spec);

struct DeviceWindowAttention {
  int query, key, value, output;
  int64_t heads, queries, window, key_dim, value_dim, band, rows, first;
  bool causal;
  float scale;
};
NodeKernels WindowAttentionNode(const DeviceWindowAttention& spec);

// ---- Recurrent cells (recurrent_node.cu) ----

enum class DeviceCell { kSimple, kGru, kGruResetBefore, kLstm };

constexpr int64_t GatesOf(DeviceCell cell) {
  return cell == DeviceCell::kSimple ? 1 : cell == DeviceCell::kLstm ? 4 : 3;
}

struct DeviceRecurrent {
  DeviceCell cell;
  const float* kernel;  // [units, gates * units]
  const float* bias;    // [gates * units]; null: none
  int64_t units, rows;  // rows of a step
  bool goes_on;
  int64_t first;
  int input, output, mask;  // mask -1: none
  int scratch = -1;         // of ScratchBytes()
  int64_t state, memory;    // bytes in a block
  ActivationSpec activation, gate;

  int64_t ScratchBytes(int64_t streams) const {
    return streams * (3 + GatesOf(cell)) * units * static_cast<int64_t>(sizeof(float));
  }
};
NodeKernels RecurrentNode(const DeviceRecurrent& spec);

}  // namespace continual_transformers

#endif  // CONTINUAL_TRANSFORMERS_CUDA_SESSION_NODE_KERNELS_H_
