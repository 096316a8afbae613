#include "cuda/session/device_plan.h"

#include <algorithm>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#include "cc/attention/elementwise.h"
#include "cc/attention/half.h"
#include "cc/session/activations.h"
#include "cc/session/error.h"
#include "cc/session/node_weights.h"
#include "cuda/dense.h"
#include "cuda/retroactive.h"
#include "cuda/session/node_kernels.h"
#include "cuda/window_parts.h"

namespace continual_transformers {
namespace {

DeviceAxis AxisOf(const std::vector<int64_t>& shape, int64_t axis) {
  DeviceAxis found = {1, shape[axis], 1};
  for (int64_t i = 0; i < axis; ++i) found.outer *= shape[i];
  for (size_t i = axis + 1; i < shape.size(); ++i) found.inner *= shape[i];
  return found;
}

class Compiler {
 public:
  Compiler(const ModelFile& file, const ExecutorOptions& options,
           const std::vector<StateEntry>& state, std::shared_ptr<const Gpu> gpu)
      : file_(file),
        plan_(file.plan()),
        options_(options),
        state_(state),
        gpu_(std::move(gpu)),
        device_("cuda:" + std::to_string(gpu_->number())) {}

  DevicePlan Compile() {
    CheckDTypes();
    result_.cache_dtype = options_.cache_dtype;
    result_.storage.resize(plan_.values.size());
    std::iota(result_.storage.begin(), result_.storage.end(), 0);
    for (const Node& node : plan_.nodes) {
      if (node.op == Op::kReshape) result_.storage[node.outputs[0]] = In(node);
    }
    for (size_t i = 0; i < plan_.values.size(); ++i) {
      const Value& value = plan_.values[i];
      result_.row_bytes.push_back(
          result_.storage[i] == static_cast<int>(i) ? value.size * SizeOf(value.dtype) : 0);
    }
    FindUses();
    for (size_t i = 0; i < plan_.nodes.size(); ++i) {
      const Node& node = plan_.nodes[i];
      if (done_[i]) continue;
      const int dense = node.op == Op::kDense ? static_cast<int>(i) : DenseAfterNorm(i);
      if (dense >= 0) {
        Dense(dense, dense == static_cast<int>(i) ? -1 : static_cast<int>(i));
      } else {
        result_.entries.push_back({Launch(static_cast<int>(i)), node.name, NameOf(node.op)});
      }
    }
    for (const GpuBytes& weights : result_.weights) result_.weights_bytes += weights.bytes();
    return std::move(result_);
  }

 private:
  void CheckDTypes() const {
    const auto check = [&](const char* what, DType dtype, bool fits, const char* expected) {
      if (fits) return;
      throw Error(ErrorCode::kInvalidArgument, std::string("the ") + what + " " + NameOf(dtype) +
                                                   " has no kernels on " + device_ + ", expected " +
                                                   expected +
                                                   ": choose another one, or device=\"cpu\"");
    };
    check("compute dtype", plan_.compute_dtype, plan_.compute_dtype == DType::kFloat32, "float32");
    const DType cache = options_.cache_dtype, weights = options_.weights_dtype;
    check("cache dtype", cache,
          cache == DType::kFloat32 || cache == DType::kBFloat16 || cache == DType::kFloat16,
          "float32, bfloat16 or float16");
    check("weights dtype", weights, weights == DType::kFloat32 || weights == DType::kBFloat16,
          "float32 or bfloat16");
  }

  int In(const Node& node, int i = 0) const { return result_.storage[node.inputs[i]]; }
  int Out(const Node& node) const { return result_.storage[node.outputs[0]]; }
  const Value& ValueOf(int value) const { return plan_.values[value]; }
  int64_t Size(int value) const { return plan_.values[value].size; }

  int MaskOf(const Node& node, const std::string& name) const {
    const auto found = node.masks.find(name);
    return found == node.masks.end() ? -1 : result_.storage[found->second];
  }

  int64_t Offset(int node, const std::string& name) const {
    for (const StateEntry& entry : state_) {
      if (entry.node == node && entry.name == name) return entry.offset;
    }
    throw Error(ErrorCode::kInternal, plan_.nodes[node].name + " has no state " + name);
  }

  // ---- Weights ----

  template <typename T>
  const T* Upload(const std::vector<T>& elements) {
    const int64_t bytes = static_cast<int64_t>(elements.size() * sizeof(T));
    result_.weights.emplace_back(gpu_, GpuBytes::Kind::kDevice, bytes, "weights");
    char* const to = result_.weights.back().get();
    Check(cudaMemcpyAsync(to, elements.data(), bytes, cudaMemcpyHostToDevice, stream_.get()),
          "copying weights");
    Check(cudaStreamSynchronize(stream_.get()), "copying weights");
    return reinterpret_cast<const T*>(to);
  }

  bool Has(const Node& node, const std::string& name) const {
    return node.weights.find(name) != node.weights.end();
  }

  std::vector<float> Elements(const Node& node, const std::string& name) const {
    return ElementsOf<float>(file_.tensor(node.weights.at(name)));
  }

  // Null if the node has no such weight.
  const float* Weight(const Node& node, const std::string& name) {
    return Has(node, name) ? Upload(Elements(node, name)) : nullptr;
  }

  // Filled with `otherwise` if the node has no such weight.
  const float* Weight(const Node& node, const std::string& name, int64_t size, float otherwise) {
    return Upload(Has(node, name) ? Elements(node, name) : std::vector<float>(size, otherwise));
  }

  // Layers that share a tensor share its copy.
  const void* Kernel(const Node& node) {
    const std::string& tensor = node.weights.at("kernel");
    const auto found = kernels_.find(tensor);
    if (found != kernels_.end()) return found->second;
    const std::vector<float> elements = Elements(node, "kernel");
    const void* kernel;
    if (options_.weights_dtype == DType::kBFloat16) {
      std::vector<BFloat16> narrow(elements.size());
      Narrow(elements.data(), static_cast<int64_t>(elements.size()), narrow.data());
      kernel = Upload(narrow);
    } else {
      kernel = Upload(elements);
    }
    return kernels_[tensor] = kernel;
  }

  // ---- Dense layers, and the nodes fused into them ----

  void FindUses() {
    const size_t values = plan_.values.size();
    done_.assign(plan_.nodes.size(), false);
    producer_.assign(values, -1);
    user_.assign(values, -1);
    uses_.assign(values, 0);
    const auto use = [&](int value, int by) {
      ++uses_[result_.storage[value]];
      user_[result_.storage[value]] = by;
    };
    for (size_t i = 0; i < plan_.nodes.size(); ++i) {
      const Node& node = plan_.nodes[i];
      done_[i] = node.op == Op::kReshape;
      if (done_[i]) continue;
      producer_[Out(node)] = static_cast<int>(i);
      for (int value : node.inputs) use(value, static_cast<int>(i));
      for (const auto& mask : node.masks) use(mask.second, static_cast<int>(i));
    }
    for (const Port& output : plan_.outputs) use(output.value, -1);
  }

  // Returns the only node that reads a value, or -1.
  int OnlyUser(int value) const { return uses_[value] == 1 ? user_[value] : -1; }

  // Returns the dense layer that comes right after a layer normalization and reads it, or -1.
  int DenseAfterNorm(size_t norm) const {
    const Node& node = plan_.nodes[norm];
    if (node.op != Op::kNorm || node.Text("function") != "layer") return -1;
    size_t next = norm + 1;
    while (next < plan_.nodes.size() && done_[next]) ++next;
    if (next == plan_.nodes.size()) return -1;
    const Node& dense = plan_.nodes[next];
    const bool follows = dense.op == Op::kDense && In(dense) == Out(node) &&
                         ValueOf(dense.inputs[0]).shape.back() == Columns(node);
    return follows ? static_cast<int>(next) : -1;
  }

  int64_t Columns(const Node& node) const { return ValueOf(node.outputs[0]).shape.back(); }

  // Dense layers that follow each other are one launch, if none reads what another writes. `norm`
  // is the normalization that is part of it, or -1.
  void Dense(int first, int norm) {
    std::vector<DeviceDenseLayer> layers;
    DevicePlan::Entry entry;
    DeviceLayerNorm normalizes = {};
    if (norm >= 0) {
      const Node& node = plan_.nodes[norm];
      const int64_t columns = Columns(node);
      normalizes = {Weight(node, "gamma", columns, 1),
                    Weight(node, "beta", columns, 0),
                    static_cast<float>(node.Number("epsilon")),
                    columns,
                    In(node),
                    Out(node)};
      entry = {{}, node.name, NameOf(node.op)};
      done_[norm] = true;
    }
    const int64_t rows = RowsOf(first);
    for (size_t i = first; i < plan_.nodes.size() && layers.size() < kMostDenseLayers; ++i) {
      if (done_[i]) continue;
      if (plan_.nodes[i].op != Op::kDense || RowsOf(static_cast<int>(i)) != rows ||
          producer_[In(plan_.nodes[i])] >= first) {
        break;
      }
      layers.push_back(Layer(static_cast<int>(i), norm < 0 ? first : norm, &entry));
    }
    entry.kernels = DenseNode(layers, normalizes, options_.weights_dtype, rows);
    result_.entries.push_back(std::move(entry));
  }

  int64_t RowsOf(int dense) const {
    const Node& node = plan_.nodes[dense];
    return Size(node.outputs[0]) / ValueOf(node.outputs[0]).shape.back();
  }

  // A dense layer with the activation and the sum after it, as far as they can be computed at the
  // place of node `first`.
  DeviceDenseLayer Layer(int dense, int first, DevicePlan::Entry* entry) {
    const auto take = [&](int i) {
      const char* const plus = entry->name.empty() ? "" : " + ";
      entry->name += plus + plan_.nodes[i].name;
      entry->op += std::string(plus) + NameOf(plan_.nodes[i].op);
      done_[i] = true;
      return Out(plan_.nodes[i]);
    };
    const Node& node = plan_.nodes[dense];
    const std::vector<int64_t>& shape = file_.tensor(node.weights.at("kernel")).shape;
    DeviceDenseLayer layer = {Kernel(node), Weight(node, "bias"), shape[0], shape[1],
                              In(node),     take(dense)};
    for (int next = OnlyUser(layer.output); next >= 0; next = OnlyUser(layer.output)) {
      const Node& after = plan_.nodes[next];
      if (after.op == Op::kActivation && layer.activation == Activation::kLinear &&
          layer.residual < 0 && IsInDense(after)) {
        layer.activation = ActivationOf(after).kind;
      } else if (after.op == Op::kBinary && after.Text("function") == "add" && layer.residual < 0) {
        const int other = In(after, 0) == layer.output ? In(after, 1) : In(after, 0);
        if (producer_[other] >= first) break;
        layer.residual = other;
      } else {
        break;
      }
      layer.output = take(next);
    }
    return layer;
  }

  // Returns whether the kernel of dense layers has an activation.
  bool IsInDense(const Node& node) const {
    if (Has(node, "alpha")) return false;
    const ActivationSpec spec = ActivationOf(node), relu = PlainRelu();
    return HasActivation(spec.kind) &&
           (spec.kind != relu.kind || (spec.a == relu.a && spec.b == relu.b && spec.c == relu.c));
  }

  // ---- Nodes ----

  NodeKernels Launch(int i) {
    const Node& node = plan_.nodes[i];
    const int output = Out(node);
    const int64_t size = Size(output);
    const std::vector<int64_t>& shape = ValueOf(node.outputs[0]).shape;
    switch (node.op) {
      case Op::kMatmul: {
        const std::vector<int64_t>& first = ValueOf(node.inputs[0]).shape;
        return MatmulNode(In(node, 0), In(node, 1), output, first[0], first[1], first[2], shape[2]);
      }
      case Op::kDepthwise: {
        const std::vector<int64_t>& kernel = file_.tensor(node.weights.at("kernel")).shape;
        const std::vector<int64_t>& rows = ValueOf(node.inputs[0]).shape;
        return DepthwiseNode({Weight(node, "kernel"), Weight(node, "bias"), rows[0], rows[1],
                              shape[0], shape[1], kernel[0], node.Int("stride"),
                              node.Int("dilation"), In(node), output});
      }
      case Op::kActivation:
        if (Has(node, "alpha")) return PReluNode(Weight(node, "alpha"), In(node), output, size);
        return ActivationNode(ActivationOf(node), In(node), output, size);
      case Op::kSoftmax:
        return SoftmaxNode(node.Text("function"), AxisOf(shape, node.Int("axis")), In(node),
                           output);
      case Op::kBinary:
        return BinaryNode(node.Text("function"), In(node, 0), In(node, 1), output, size);
      case Op::kWhere:
        return WhereNode(In(node, 0), In(node, 1), In(node, 2), output, size);
      case Op::kConstant:
        return ConstantNode(Weight(node, "value"), output, size);
      case Op::kAffine:
      case Op::kBatchNorm: {
        const Affine<float> affine = AffineOf<float>(file_, node);
        return AffineNode(Upload(affine.scale), Upload(affine.offset), shape.back(), In(node),
                          output, size);
      }
      case Op::kNorm: {
        const int64_t columns = shape.back();
        return NormNode(node.Text("function"), Weight(node, "gamma", columns, 1),
                        Weight(node, "beta", columns, 0), node.Number("epsilon"), size / columns,
                        columns, In(node), output);
      }
      case Op::kConcat: {
        std::vector<std::pair<int, int64_t>> parts;
        int64_t outer = 1;
        for (int value : node.inputs) {
          const DeviceAxis axis = AxisOf(ValueOf(value).shape, node.Int("axis"));
          outer = axis.outer;
          parts.emplace_back(result_.storage[value], axis.size * axis.inner);
        }
        return ConcatNode(parts, outer, SizeOf(ValueOf(output).dtype), output);
      }
      case Op::kStrided:
        return StridedNode(node.Int("offset"), shape, node.Ints("strides"),
                           SizeOf(ValueOf(output).dtype), In(node), Size(In(node)), output);
      case Op::kReduce:
        return ReduceNode(node.Text("function"),
                          AxisOf(ValueOf(node.inputs[0]).shape, node.Int("axis")), In(node),
                          output);
      case Op::kCumulative:
        return CumulativeNode(node.Text("function") == "product", AxisOf(shape, node.Int("axis")),
                              In(node), output);
      case Op::kSort:
        return SortNode(node.Text("function") == "indices", node.Bool("descending"),
                        AxisOf(shape, node.Int("axis")), In(node), output);
      case Op::kCast:
        return CastNode(ValueOf(In(node)).dtype, ValueOf(output).dtype, In(node), output, size);
      case Op::kEmbedding: {
        const int64_t columns = file_.tensor(node.weights.at("table")).shape[1];
        return EmbeddingNode(Weight(node, "table"), columns, ValueOf(In(node)).dtype, In(node),
                             output, Size(In(node)));
      }
      case Op::kNotEqual:
        return NotEqualNode(ValueOf(In(node)).dtype, node.Number("value"), node.Bool("any"),
                            In(node), output, Size(In(node)));
      case Op::kMasked:
        return MaskedNode(In(node, 0), In(node, 1), output, size);
      case Op::kMaskAnd:
        return MaskAndNode(In(node, 0), In(node, 1), output, size);
      case Op::kPositional: {
        const int64_t start = ElementsOf<int64_t>(file_.tensor(node.weights.at("start")))[0];
        return PositionalNode(Weight(node, "rows"), file_.tensor(node.weights.at("rows")).shape[0],
                              start, Offset(i, "offset"), In(node), output, shape.back(),
                              RowsAStep(plan_, node));
      }
      case Op::kRotaryAngles: {
        const Tensor& turns = file_.tensor(node.weights.at("turns"));
        return RotaryAnglesNode(Upload(ElementsOf<int64_t>(turns)), turns.shape[0],
                                RowsAStep(plan_, node), output);
      }
      case Op::kRotary: {
        const int64_t head = shape.back(), each = RowsAStep(plan_, node);
        return RotaryNode(node.Bool("interleaved"), In(node, 0), In(node, 1), output, each,
                          size / head / each, head, Size(In(node, 1)) / 2 / each);
      }
      case Op::kDelay:
        return DelayNode(node.Int("steps"), Offset(i, "ring"), SizeOf(ValueOf(output).dtype),
                         In(node), output, size);
      case Op::kWindow:
        return WindowNode(node.Int("window"), Offset(i, "ring"), SizeOf(ValueOf(output).dtype),
                          In(node), output, Size(In(node)));
      case Op::kZeroUntaken:
        return ZeroUntakenNode(shape[0], In(node), output, size / shape[0]);
      case Op::kPresent:
        return PresentNode(node.Int("rows"), node.Int("first"), size, output);
      case Op::kAttention:
        return Attention(i);
      case Op::kRetroactiveAttention:
        return Retroactive(i);
      case Op::kWindowAttention:
        return WindowAttention(node);
      case Op::kRecurrent:
        return Recurrent(i);
      case Op::kDense:
      case Op::kReshape:
        break;  // Compile() has handled them.
    }
    throw Error(ErrorCode::kInvalidArgument,
                node.name + ": the node " + NameOf(node.op) + " has no kernel on " + device_ +
                    ": leave out device=, and the session runs on the CPU");
  }

  // Returns the number of a new scratch, which has bytes(M) bytes in a step of M streams.
  int Scratch(std::function<int64_t(int64_t streams)> bytes) {
    result_.scratch_bytes.push_back(std::move(bytes));
    return static_cast<int>(plan_.values.size() + result_.scratch_bytes.size() - 1);
  }

  void CheckHead(const Node& node, int64_t key_dim, int64_t value_dim) const {
    const int64_t larger = std::max(key_dim, value_dim);
    if (larger <= kLargestHead) return;
    throw Error(ErrorCode::kInvalidArgument,
                node.name + ": " + NameOf(node.op) + " with heads of " + std::to_string(larger) +
                    " features has no kernel on " + device_ + ", expected at most " +
                    std::to_string(kLargestHead) +
                    ": leave out device=, and the session runs on the CPU");
  }

  NodeKernels Attention(int i) {
    const Node& node = plan_.nodes[i];
    DeviceAttention spec;
    spec.query = In(node, 0);
    spec.key = In(node, 1);
    spec.value = In(node, 2);
    spec.output = Out(node);
    spec.key_mask = MaskOf(node, "key");
    spec.query_mask = MaskOf(node, "query");
    spec.rows = RowsAStep(plan_, node);
    spec.heads = node.Int("heads");
    spec.key_heads = node.Int("key_heads", spec.heads);
    spec.window = node.Int("window");
    spec.key_dim = Size(spec.key) / spec.rows / spec.key_heads;
    spec.value_dim = Size(spec.value) / spec.rows / spec.key_heads;
    spec.first_column = node.Int("first_column");
    spec.end_column = node.Int("end_column");
    spec.query_delay = node.Int("query_delay");
    spec.scale = static_cast<float>(node.Number("scale"));
    spec.soft_cap = static_cast<float>(node.Number("soft_cap", 0));
    spec.bias = Weight(node, "bias");
    spec.sink = Weight(node, "sink");
    spec.key_ring = Offset(i, "key");
    spec.value_ring = Offset(i, "value");
    spec.mask_ring = Offset(i, "key_mask");
    spec.multiprocessors = gpu_->multiprocessors();
    spec.parts = Scratch([spec](int64_t streams) { return spec.PartsBytes(streams); });
    // Also if one stream's window is not cut: that of several may be.
    result_.arrivals = MostCutQueries(spec.multiprocessors);
    CheckHead(node, spec.key_dim, spec.value_dim);
    return AttentionNode(spec, options_.cache_dtype);
  }

  NodeKernels Retroactive(int i) {
    const Node& node = plan_.nodes[i];
    DeviceRetroactive spec;
    spec.query = In(node, 0);
    spec.key = In(node, 1);
    spec.value = In(node, 2);
    spec.output = Out(node);
    spec.key_mask = MaskOf(node, "key");
    spec.heads = node.Int("heads");
    spec.window = node.Int("window");
    spec.key_dim = Size(spec.key) / spec.heads;
    spec.value_dim = Size(spec.value) / spec.heads;
    spec.scale = static_cast<float>(node.Number("scale"));
    spec.query_ring = Offset(i, "query");
    spec.key_ring = Offset(i, "key");
    spec.value_ring = Offset(i, "value");
    spec.mask_ring = Offset(i, "key_mask");
    spec.softmax = Offset(i, "softmax");
    spec.weighted_sum = Offset(i, "weighted_sum");
    spec.made_with = Offset(i, "made_with");
    const std::string& algorithm = node.Text("algorithm");
    spec.recompute =
        algorithm == "recompute" || (algorithm == "auto" && RecomputingIsFasterOnGpu(spec.window));
    CheckHead(node, spec.key_dim, spec.value_dim);
    if (spec.window > kLongestRetroactiveWindow) {
      throw Error(ErrorCode::kInvalidArgument,
                  node.name + ": retroactive attention with a window of " +
                      std::to_string(spec.window) + " has no kernel on " + device_ +
                      ", expected at most " + std::to_string(kLongestRetroactiveWindow) +
                      ": leave out device=, and the session runs on the CPU");
    }
    return RetroactiveNode(spec);
  }

  NodeKernels WindowAttention(const Node& node) {
    DeviceWindowAttention spec;
    spec.query = In(node, 0);
    spec.key = In(node, 1);
    spec.value = In(node, 2);
    spec.output = Out(node);
    spec.heads = node.Int("heads");
    spec.queries = ValueOf(node.inputs[0]).shape[0];
    spec.window = ValueOf(node.inputs[1]).shape[0];
    spec.key_dim = ValueOf(node.inputs[1]).shape[1] / spec.heads;
    spec.value_dim = ValueOf(node.inputs[2]).shape[1] / spec.heads;
    spec.band = node.Int("band");
    spec.causal = node.Bool("causal");
    spec.scale = static_cast<float>(node.Number("scale"));
    spec.rows = node.Int("rows", 1);
    spec.first = node.Int("first", 1 - spec.window);
    CheckHead(node, spec.key_dim, spec.value_dim);
    return WindowAttentionNode(spec);
  }

  NodeKernels Recurrent(int i) {
    const Node& node = plan_.nodes[i];
    const std::string& function = node.Text("function");
    DeviceRecurrent spec;
    spec.cell = function == "simple" ? DeviceCell::kSimple
                : function == "lstm" ? DeviceCell::kLstm
                : function == "gru"  ? DeviceCell::kGru
                                     : DeviceCell::kGruResetBefore;
    spec.kernel = Weight(node, "kernel");
    spec.bias = Weight(node, "bias");
    spec.units = ValueOf(node.outputs[0]).shape.back();
    spec.rows = Size(node.outputs[0]) / spec.units;
    spec.goes_on = node.Bool("goes_on");
    spec.first = node.Int("first");
    spec.input = In(node);
    spec.output = Out(node);
    spec.mask = MaskOf(node, "step");
    spec.state = spec.goes_on ? Offset(i, "state") : 0;
    spec.memory = spec.goes_on && spec.cell == DeviceCell::kLstm ? Offset(i, "memory") : 0;
    spec.activation = ActivationNamed(node.Text("activation"), node);
    spec.gate = ActivationNamed(node.Text("gate"), node);
    spec.scratch = Scratch([spec](int64_t streams) { return spec.ScratchBytes(streams); });
    return RecurrentNode(spec);
  }

  const ModelFile& file_;
  const Plan& plan_;
  const ExecutorOptions& options_;
  const std::vector<StateEntry>& state_;
  const std::shared_ptr<const Gpu> gpu_;
  const std::string device_;
  const GpuStream stream_{gpu_};
  std::map<std::string, const void*> kernels_;  // by the tensor's name
  std::vector<bool> done_;                      // one per node: whether it needs no launch
  // One per value: the node that writes it or -1, the last node that reads it, and how many do.
  std::vector<int> producer_, user_, uses_;
  DevicePlan result_;
};

}  // namespace

DevicePlan CompileForGpu(const ModelFile& file, const ExecutorOptions& options,
                         const std::vector<StateEntry>& state, std::shared_ptr<const Gpu> gpu) {
  return Compiler(file, options, state, std::move(gpu)).Compile();
}

}  // namespace continual_transformers
