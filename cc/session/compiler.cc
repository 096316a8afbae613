#include "cc/session/compiler.h"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <map>
#include <memory>
#include <numeric>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "cc/attention/activations.h"
#include "cc/attention/half.h"
#include "cc/attention/step_types.h"
#include "cc/session/activations.h"
#include "cc/session/attention_instructions.h"
#include "cc/session/dense_instruction.h"
#include "cc/session/error.h"
#include "cc/session/few_queries_instruction.h"
#include "cc/session/layout_instructions.h"
#include "cc/session/node_weights.h"
#include "cc/session/product_instructions.h"
#include "cc/session/recurrent_instruction.h"
#include "cc/session/retroactive_instruction.h"
#include "cc/session/ring_instructions.h"
#include "cc/session/rotary_instructions.h"
#include "cc/session/row_instructions.h"
#include "cc/session/state_layout.h"

namespace continual_transformers {
namespace {

constexpr int64_t kAlignment = 64;

// The dtype of a type of step_types.h.
template <typename T>
constexpr DType kDType = DType::kFloat32;
template <>
constexpr DType kDType<double> = DType::kFloat64;
template <>
constexpr DType kDType<BFloat16> = DType::kBFloat16;
template <>
constexpr DType kDType<Float16> = DType::kFloat16;
template <>
constexpr DType kDType<int8_t> = DType::kInt8;

int64_t Align(int64_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

// Returns whether an activation has weights for each element. Such an activation cannot be fused
// into another node.
bool HasWeights(const Node& node) { return !node.weights.empty(); }

// T is the plan's compute dtype.
template <typename T>
class Compiler {
 public:
  Compiler(const ModelFile& file, const ExecutorOptions& options)
      : file_(file),
        plan_(file.plan()),
        options_(options),
        absorbed_(plan_.nodes.size(), false),
        producer_(plan_.values.size(), -1),
        uses_(plan_.values.size(), 0),
        user_(plan_.values.size(), -1),
        is_output_(plan_.values.size(), false),
        state_(LayOut(plan_, options.cache_dtype).entries) {}

  CompiledPlan Compile() {
    FindUses();
    for (size_t i = 0; i < plan_.nodes.size(); ++i) {
      if (!absorbed_[i]) Translate(i);
    }
    PutQueriesLast();
    std::stable_sort(emitted_.begin(), emitted_.end(),
                     [](const Emitted& a, const Emitted& b) { return a.position < b.position; });
    PlaceValues();
    for (Emitted& e : emitted_) {
      result_.scratch_bytes = std::max(result_.scratch_bytes, e.instruction->ScratchBytes());
      result_.weights_bytes += e.instruction->WeightsBytes();
      result_.instructions.push_back({std::move(e.instruction), e.name, e.op});
    }
    result_.weights_bytes += other_weights_;
    return std::move(result_);
  }

 private:
  // An instruction, and the storages that it reads and writes.
  struct Emitted {
    // Twice the index of its last node. An odd number puts the instruction between two nodes.
    int64_t position;
    std::unique_ptr<Instruction> instruction;
    std::string name, op;
    std::vector<int> reads;
    int writes;
  };

  // ---- Facts about the plan, found before any instruction is made. ----

  int64_t Offset(int node, const std::string& name) const {
    for (const StateEntry& entry : state_) {
      if (entry.node == node && entry.name == name) return entry.offset;
    }
    throw Error(ErrorCode::kInternal, plan_.nodes[node].name + " has no state " + name);
  }

  void FindUses() {
    result_.storage.resize(plan_.values.size());
    std::iota(result_.storage.begin(), result_.storage.end(), 0);
    for (size_t i = 0; i < plan_.nodes.size(); ++i) {
      const Node& node = plan_.nodes[i];
      if (node.op == Op::kReshape) {
        result_.storage[node.outputs[0]] = Root(node.inputs[0]);
        absorbed_[i] = true;
        continue;
      }
      producer_[node.outputs[0]] = i;
      for (int root : RootsRead(node)) {
        ++uses_[root];
        user_[root] = i;
      }
    }
    for (const Port& output : plan_.outputs) is_output_[Root(output.value)] = true;
    for (size_t i = 0; i < plan_.nodes.size(); ++i) {
      if (plan_.nodes[i].op == Op::kZeroUntaken) ShareStorage(plan_.nodes[i], i);
    }
  }

  // Lets a node write into the storage of its input, if no other node reads that.
  void ShareStorage(const Node& node, int i) {
    const int from = In(node), to = Out(node);
    if (OnlyUser(from) != i || producer_[from] < 0 ||
        plan_.nodes[producer_[from]].op == Op::kConstant) {
      return;
    }
    for (int& storage : result_.storage) {
      if (storage == to) storage = from;
    }
    // Its own reading still counts, so nothing that reads the output is fused into the producer.
    uses_[from] += uses_[to];
    is_output_[from] = is_output_[to];
  }

  int Root(int value) const { return result_.storage[value]; }
  int In(const Node& node, int i = 0) const { return Root(node.inputs[i]); }
  int Out(const Node& node) const { return Root(node.outputs[0]); }
  const Value& ValueOf(int value) const { return plan_.values[value]; }
  int64_t Size(int value) const { return plan_.values[value].size; }

  std::vector<int> RootsRead(const Node& node) const {
    std::vector<int> roots;
    roots.reserve(node.inputs.size() + node.masks.size());
    for (int value : node.inputs) roots.push_back(Root(value));
    for (const auto& mask : node.masks) roots.push_back(Root(mask.second));
    return roots;
  }

  int MaskOf(const Node& node, const std::string& name) const {
    const auto found = node.masks.find(name);
    return found == node.masks.end() ? -1 : Root(found->second);
  }

  // Returns the only node that reads a storage, or -1.
  int OnlyUser(int root) const {
    return uses_[root] == 1 && !is_output_[root] && !absorbed_[user_[root]] ? user_[root] : -1;
  }

  std::vector<T> Weights(const Node& node, const std::string& name) const {
    const auto found = node.weights.find(name);
    if (found == node.weights.end()) return {};
    return ElementsOf<T>(file_.tensor(found->second));
  }

  // Optional weights: filled with `otherwise` if the node has none.
  std::vector<T> Weights(const Node& node, const std::string& name, int64_t size,
                         T otherwise) const {
    std::vector<T> weights = Weights(node, name);
    if (weights.empty()) weights.assign(size, otherwise);
    return weights;
  }

  void Emit(int64_t last_node, std::unique_ptr<Instruction> instruction, const Node& node,
            std::vector<int> reads, int writes) {
    emitted_.push_back({2 * last_node, std::move(instruction), node.name, NameOf(node.op),
                        std::move(reads), writes});
  }

  // ---- One node ----

  void Translate(int i) {
    const Node& node = plan_.nodes[i];
    if (node.op == Op::kDense) {
      const int user = OnlyUser(Out(node));
      const bool of_attention =
          user >= 0 && ProjectsItself(user) && In(plan_.nodes[user]) != Out(node);
      if (!of_attention) TranslateDense(i);
      return;
    }
    if ((node.op == Op::kAffine || node.op == Op::kBatchNorm) && FoldsIntoNext(i)) return;
    if (node.op == Op::kConstant) {
      if (!IsOperandOnly(node)) Emit(i, Constant(node), node, {}, Out(node));
      return;
    }
    if (ProjectsItself(i)) return TranslateFewQueries(i);
    if (node.op == Op::kWindow && IsReadInPlace(i)) return;
    if (node.op == Op::kDepthwise) return TranslateDepthwise(i);
    Emit(i, Make(i), node, RootsRead(node), Out(node));
  }

  std::unique_ptr<Instruction> Make(int i) {
    const Node& node = plan_.nodes[i];
    const int output = Out(node);
    const int64_t size = Size(output);
    const std::vector<int64_t>& shape = ValueOf(node.outputs[0]).shape;
    switch (node.op) {
      case Op::kMatmul: {
        const std::vector<int64_t>& first = ValueOf(node.inputs[0]).shape;
        return MakeMatmul<T>(OperandOf(In(node, 0)), OperandOf(In(node, 1)), output, first[0],
                             first[1], first[2], shape[2]);
      }
      case Op::kActivation:
        if (HasWeights(node)) return MakePRelu<T>(Kept(Weights(node, "alpha")), In(node), output);
        return MakeActivation<T>(ActivationOf(node), In(node), output, size);
      case Op::kSoftmax: {
        const Axis axis = AxisOf(shape, node.Int("axis"));
        return std::make_unique<SoftmaxInstruction<T>>(node.Text("function"), axis, In(node),
                                                       output);
      }
      case Op::kBinary:
        return MakeBinary<T>(node.Text("function"), OperandOf(In(node, 0)), OperandOf(In(node, 1)),
                             output, size);
      case Op::kWhere:
        return MakeWhere<T>(In(node, 0), In(node, 1), In(node, 2), output, size);
      case Op::kAffine:
      case Op::kBatchNorm: {
        Affine<T> affine = AffineOf<T>(file_, node);
        return MakeAffine<T>(Kept(affine.scale), Kept(affine.offset), In(node), output, size);
      }
      case Op::kNorm:
        return Norm(node);
      case Op::kConcat:
        return Concat(node);
      case Op::kStrided:
        return MakeStrided(node.Int("offset"), shape, node.Ints("strides"),
                           SizeOf(ValueOf(output).dtype), In(node), Size(In(node)), output);
      case Op::kReduce:
        return MakeReduce<T>(node.Text("function"),
                             AxisOf(ValueOf(node.inputs[0]).shape, node.Int("axis")), In(node),
                             output);
      case Op::kCumulative:
        return MakeCumulative<T>(node.Text("function"), AxisOf(shape, node.Int("axis")), In(node),
                                 output);
      case Op::kSort:
        return std::make_unique<SortInstruction<T>>(
            node.Text("function") == "indices", node.Bool("descending"),
            AxisOf(shape, node.Int("axis")), In(node), output);
      case Op::kCast:
        return Cast(ValueOf(In(node)).dtype, ValueOf(output).dtype, In(node), output, size);
      case Op::kEmbedding:
        return Embedding(node);
      case Op::kNotEqual:
        return NotEqual(node);
      case Op::kMasked:
        return MakeMasked<T>(In(node, 0), In(node, 1), output, size);
      case Op::kMaskAnd: {
        const int a = In(node, 0), b = In(node, 1);
        return MakeRows(size, [=](const Frame& frame) {
          for (int64_t r = 0; r < frame.rows() * size; ++r) {
            frame.Rows<bool>(output)[r] = frame.Rows<bool>(a)[r] && frame.Rows<bool>(b)[r];
          }
        });
      }
      case Op::kPositional: {
        const int64_t start = ElementsOf<int64_t>(file_.tensor(node.weights.at("start")))[0];
        return MakePositional<T>(Kept(Weights(node, "rows")), start, Offset(i, "offset"), In(node),
                                 output, shape.back(), RowsAStep(plan_, node));
      }
      case Op::kRotaryAngles:
        return RotaryAngles(node);
      case Op::kRotary:
        return Rotary(node);
      case Op::kDelay:
        return MakeDelay(node.Int("steps"), Offset(i, "ring"), In(node), output,
                         size * SizeOf(ValueOf(output).dtype));
      case Op::kWindow:
        return MakeWindow(node.Int("window"), Offset(i, "ring"), In(node), output,
                          Size(In(node)) * SizeOf(ValueOf(output).dtype));
      case Op::kZeroUntaken:
        return MakeZeroUntaken(shape[0], In(node), output, size / shape[0] * sizeof(T));
      case Op::kPresent:
        return MakePresent<T>(node.Int("rows"), node.Int("first"), size, output);
      case Op::kAttention:
        return Attention(i);
      case Op::kRetroactiveAttention:
        return RetroactiveAttentionOf(i);
      case Op::kWindowAttention:
        return std::make_unique<WindowAttentionInstruction<T>>(WindowAttentionSpecOf(node));
      case Op::kRecurrent:
        return Recurrent(i);
      case Op::kDense:
      case Op::kDepthwise:
      case Op::kConstant:
      case Op::kReshape:
        break;  // Translate and FindUses handle them
    }
    throw Error(ErrorCode::kInternal,
                node.name + ": there is no instruction for " + NameOf(node.op));
  }

  // Counts weights that instructions keep unchanged.
  std::vector<T> Kept(std::vector<T> weights) {
    other_weights_ += static_cast<int64_t>(weights.size() * sizeof(T));
    return weights;
  }

  // ---- Dense layers, and the nodes fused into them ----

  void TranslateDense(int i) {
    const Node& node = plan_.nodes[i];
    const std::vector<int64_t>& shape = file_.tensor(node.weights.at("kernel")).shape;
    DenseSpec<T> spec;
    DenseKernel kernel = {node.weights.at("kernel"), Weights(node, "kernel")};
    spec.bias = Weights(node, "bias");
    spec.inputs = shape[0];
    spec.outputs = shape[1];
    spec.rows_a_step = Size(node.outputs[0]) / spec.outputs;
    spec.input = In(node);
    std::string name = node.name, op = NameOf(node.op);
    int last = i, output = Out(node);
    std::vector<int> reads;
    FoldBefore(&spec, &kernel, &name, &op);
    reads.push_back(spec.input);
    for (int next = OnlyUser(output); next >= 0; next = OnlyUser(output)) {
      if (!FoldAfter(plan_.nodes[next], output, &spec, &kernel)) break;
      absorbed_[next] = true;
      name += " + " + plan_.nodes[next].name;
      op += std::string(" + ") + NameOf(plan_.nodes[next].op);
      last = next;
      output = Out(plan_.nodes[next]);
    }
    if (spec.residual >= 0) reads.push_back(spec.residual);
    spec.output = output;
    emitted_.push_back(
        {2 * last, MakeDense(std::move(spec), kernel), name, op, std::move(reads), output});
  }

  // The kernel of a dense layer. `tensor` is its name, "" once something is folded into it.
  struct DenseKernel {
    std::string tensor;
    std::vector<T> elements;  // [inputs, outputs]
  };

  std::unique_ptr<Instruction> MakeDense(DenseSpec<T> spec, const DenseKernel& kernel) {
#define TRY(U, W)                                                                            \
  if constexpr (std::is_same_v<T, U>) {                                                      \
    if (options_.weights_dtype == kDType<W>) return MakeDenseOf<W>(std::move(spec), kernel); \
  }
    CONTINUAL_TRANSFORMERS_FOR_PACKED_TYPES(TRY)
#undef TRY
    throw Error(ErrorCode::kInternal, "no dense layer for this weights dtype");
  }

  // Layers that share a tensor share the packed kernel.
  template <typename W>
  std::unique_ptr<Instruction> MakeDenseOf(DenseSpec<T> spec, const DenseKernel& kernel) {
    std::shared_ptr<const PackedKernel<T, W>> packed;
    const auto found = packed_.find(kernel.tensor);
    if (found != packed_.end()) {
      packed = std::static_pointer_cast<const PackedKernel<T, W>>(found->second);
    } else {
      packed = std::make_shared<const PackedKernel<T, W>>(kernel.elements.data(), spec.inputs,
                                                          spec.outputs);
      other_weights_ += packed->bytes();
      if (!kernel.tensor.empty()) packed_[kernel.tensor] = packed;
    }
    return std::make_unique<DenseInstruction<T, W>>(std::move(spec), std::move(packed));
  }

  // 16-bit kernels would be rounded a second time.
  bool MayFoldKernels() const {
    return options_.weights_dtype != DType::kBFloat16 && plan_.weights_dtype != DType::kBFloat16;
  }

  // Returns whether an affine node is fused into the dense layer that reads it.
  bool FoldsIntoNext(int i) const {
    const Node& node = plan_.nodes[i];
    const int next = OnlyUser(Out(node));
    if (next < 0 || plan_.nodes[next].op != Op::kDense || !MayFoldKernels()) return false;
    const int64_t columns = ValueOf(node.outputs[0]).shape.back();
    return columns == file_.tensor(plan_.nodes[next].weights.at("kernel")).shape[0];
  }

  void FoldBefore(DenseSpec<T>* spec, DenseKernel* kernel, std::string* name, std::string* op) {
    const int before = producer_[spec->input];
    if (before < 0 || absorbed_[before]) return;
    const Node& node = plan_.nodes[before];
    if ((node.op != Op::kAffine && node.op != Op::kBatchNorm) || !FoldsIntoNext(before)) return;
    const Affine<T> affine = AffineOf<T>(file_, node);
    if (spec->bias.empty()) spec->bias.assign(spec->outputs, T(0));
    for (int64_t o = 0; o < spec->outputs; ++o) {
      double bias = spec->bias[o];
      for (int64_t i = 0; i < spec->inputs; ++i) {
        T& weight = kernel->elements[i * spec->outputs + o];
        bias += static_cast<double>(affine.offset[i]) * weight;
        weight *= affine.scale[i];
      }
      spec->bias[o] = static_cast<T>(bias);
    }
    kernel->tensor.clear();
    spec->input = In(node);
    *name = node.name + " + " + *name;
    *op = std::string(NameOf(node.op)) + " + " + *op;
  }

  // Fuses a node into the dense layer whose output only this node reads. Returns false if that is
  // not possible.
  bool FoldAfter(const Node& node, int output, DenseSpec<T>* spec, DenseKernel* kernel) const {
    const bool is_linear = spec->activation.kind == Activation::kLinear;
    if (!is_linear) return false;
    switch (node.op) {
      case Op::kAffine:
      case Op::kBatchNorm: {
        if (spec->residual >= 0 || !MayFoldKernels() ||
            ValueOf(node.outputs[0]).shape.back() != spec->outputs) {
          return false;
        }
        const Affine<T> affine = AffineOf<T>(file_, node);
        if (spec->bias.empty()) spec->bias.assign(spec->outputs, T(0));
        for (int64_t o = 0; o < spec->outputs; ++o) {
          for (int64_t i = 0; i < spec->inputs; ++i) {
            kernel->elements[i * spec->outputs + o] *= affine.scale[o];
          }
          spec->bias[o] = spec->bias[o] * affine.scale[o] + affine.offset[o];
        }
        kernel->tensor.clear();
        return true;
      }
      case Op::kBinary: {
        const int other = In(node, 0) == output ? In(node, 1) : In(node, 0);
        const bool is_constant =
            producer_[other] >= 0 && plan_.nodes[producer_[other]].op == Op::kConstant;
        if (node.Text("function") != "add" || spec->residual >= 0 || is_constant) return false;
        spec->residual = other;
        return true;
      }
      case Op::kActivation:
        if (HasWeights(node)) return false;
        spec->activation = ActivationOf(node);
        return true;
      default:
        return false;
    }
  }

  // ---- Constants ----

  // Returns whether only nodes that read a constant in place read this one.
  bool IsOperandOnly(const Node& constant) const {
    const int root = Out(constant);
    if (is_output_[root]) return false;
    for (const Node& node : plan_.nodes) {
      const std::vector<int> reads = RootsRead(node);
      if (node.op != Op::kReshape && node.op != Op::kBinary && node.op != Op::kMatmul &&
          std::find(reads.begin(), reads.end(), root) != reads.end()) {
        return false;
      }
    }
    return true;
  }

  std::unique_ptr<Instruction> Constant(const Node& node) const {
    const std::vector<T> value = Weights(node, "value");
    const char* bytes = reinterpret_cast<const char*>(value.data());
    return MakeConstant(std::vector<char>(bytes, bytes + value.size() * sizeof(T)), Out(node));
  }

  Operand<T> OperandOf(int root) {
    const int producer = producer_[root];
    if (producer < 0 || plan_.nodes[producer].op != Op::kConstant) return {root};
    auto value = std::make_shared<std::vector<T>>(Kept(Weights(plan_.nodes[producer], "value")));
    result_.kept.push_back(value);
    return {root, value->data()};
  }

  // ---- Depthwise convolutions ----

  // Returns whether only a depthwise convolution of one row reads a window. It reads the ring.
  bool IsReadInPlace(int window) const {
    const Node& node = plan_.nodes[window];
    const int user = OnlyUser(Out(node));
    if (user < 0 || plan_.nodes[user].op != Op::kDepthwise) return false;
    const std::vector<int64_t>& rows = ValueOf(plan_.nodes[user].inputs[0]).shape;
    return rows == std::vector<int64_t>{node.Int("window"), Size(In(node))} &&
           ValueOf(plan_.nodes[user].outputs[0]).shape[0] == 1;
  }

  void TranslateDepthwise(int i) {
    const Node& node = plan_.nodes[i];
    const std::vector<int64_t>& shape = ValueOf(node.outputs[0]).shape;
    DepthwiseSpec<T> spec;
    spec.kernel = Weights(node, "kernel");
    spec.bias = Weights(node, "bias", shape[1], T(0));
    spec.rows = ValueOf(node.inputs[0]).shape[0];
    spec.channels = ValueOf(node.inputs[0]).shape[1];
    spec.output_rows = shape[0];
    spec.stride = node.Int("stride");
    spec.dilation = node.Int("dilation");
    spec.input = In(node);
    spec.output = Out(node);
    std::string name = node.name, op = NameOf(node.op);
    const int before = producer_[spec.input];
    if (before >= 0 && plan_.nodes[before].op == Op::kWindow && IsReadInPlace(before)) {
      const Node& window = plan_.nodes[before];
      spec.ring_at = Offset(before, "ring");
      spec.input = In(window);
      name = window.name + " + " + name;
      op = std::string(NameOf(window.op)) + " + " + op;
    }
    const int input = spec.input, output = spec.output;
    emitted_.push_back({2 * i,
                        std::make_unique<DepthwiseInstruction<T>>(std::move(spec)),
                        name,
                        op,
                        {input},
                        output});
  }

  // ---- Other nodes ----

  std::unique_ptr<Instruction> Norm(const Node& node) {
    const int64_t columns = ValueOf(node.outputs[0]).shape.back();
    const int64_t rows = Size(node.outputs[0]) / columns;
    std::vector<T> gamma = Kept(Weights(node, "gamma", columns, T(1)));
    std::vector<T> beta = Kept(Weights(node, "beta", columns, T(0)));
    const std::string& function = node.Text("function");
    const double epsilon = node.Number("epsilon");
    if (function == "layer") {
      return MakeLayerNorm<T>(std::move(gamma), std::move(beta), epsilon, In(node), Out(node),
                              rows);
    }
    return MakeScaleNorm<T>(function == "rms", std::move(gamma), std::move(beta), epsilon, In(node),
                            Out(node), rows);
  }

  std::unique_ptr<Instruction> Concat(const Node& node) const {
    const int64_t element = SizeOf(ValueOf(node.outputs[0]).dtype);
    std::vector<ConcatPart> parts;
    int64_t outer = 1;
    for (int value : node.inputs) {
      const Axis axis = AxisOf(ValueOf(value).shape, node.Int("axis"));
      outer = axis.outer;
      parts.push_back({Root(value), axis.size * axis.inner * element});
    }
    return MakeConcat(std::move(parts), outer, Out(node));
  }

  template <typename From>
  static std::unique_ptr<Instruction> CastFrom(DType to, int input, int output, int64_t size) {
    switch (to) {
      case DType::kFloat32:
        return MakeCast<From, float>(input, output, size);
      case DType::kFloat64:
        return MakeCast<From, double>(input, output, size);
      case DType::kInt32:
        return MakeCast<From, int32_t>(input, output, size);
      case DType::kInt64:
        return MakeCast<From, int64_t>(input, output, size);
      case DType::kBool:
        return MakeCast<From, bool>(input, output, size);
      default:
        throw Error(ErrorCode::kBadModelFile,
                    std::string("cannot cast to ") + NameOf(to) +
                        ", expected float32, float64, int32, int64 or bool");
    }
  }

  static std::unique_ptr<Instruction> Cast(DType from, DType to, int input, int output,
                                           int64_t size) {
    switch (from) {
      case DType::kFloat32:
        return CastFrom<float>(to, input, output, size);
      case DType::kFloat64:
        return CastFrom<double>(to, input, output, size);
      case DType::kInt32:
        return CastFrom<int32_t>(to, input, output, size);
      case DType::kInt64:
        return CastFrom<int64_t>(to, input, output, size);
      case DType::kBool:
        return CastFrom<bool>(to, input, output, size);
      default:
        throw Error(ErrorCode::kBadModelFile,
                    std::string("cannot cast from ") + NameOf(from) +
                        ", expected float32, float64, int32, int64 or bool");
    }
  }

  std::unique_ptr<Instruction> NotEqual(const Node& node) const {
    const int input = In(node), output = Out(node);
    const double number = node.Number("value");
    const bool any = node.Bool("any");
    switch (ValueOf(input).dtype) {
      case DType::kInt32:
        return MakeNotEqual<int32_t>(number, any, input, output, Size(input));
      case DType::kInt64:
        return MakeNotEqual<int64_t>(number, any, input, output, Size(input));
      case DType::kBool:
        return MakeNotEqual<bool>(number, any, input, output, Size(input));
      default:
        return MakeNotEqual<T>(number, any, input, output, Size(input));
    }
  }

  std::unique_ptr<Instruction> Embedding(const Node& node) {
    const Tensor& table = file_.tensor(node.weights.at("table"));
    std::vector<T> rows = Kept(Weights(node, "table"));
    if (ValueOf(In(node)).dtype == DType::kInt32) {
      return MakeEmbedding<T, int32_t>(std::move(rows), table.shape[1], In(node), Out(node),
                                       Size(In(node)));
    }
    return MakeEmbedding<T, int64_t>(std::move(rows), table.shape[1], In(node), Out(node),
                                     Size(In(node)));
  }

  std::unique_ptr<Instruction> Recurrent(int i) {
    const Node& node = plan_.nodes[i];
    const std::string& function = node.Text("function");
    RecurrentSpec spec;
    spec.cell = function == "simple" ? Cell::kSimple
                : function == "lstm" ? Cell::kLstm
                : function == "gru"  ? Cell::kGru
                                     : Cell::kGruResetBefore;
    spec.units = ValueOf(node.outputs[0]).shape.back();
    spec.rows_a_step = Size(node.outputs[0]) / spec.units;
    spec.input = In(node);
    spec.output = Out(node);
    spec.mask = MaskOf(node, "step");
    spec.goes_on = node.Bool("goes_on");
    spec.first = node.Int("first");
    spec.state = spec.goes_on ? Offset(i, "state") : 0;
    spec.memory = spec.goes_on && spec.cell == Cell::kLstm ? Offset(i, "memory") : 0;
    spec.activation = ActivationNamed(node.Text("activation"), node);
    spec.gate = ActivationNamed(node.Text("gate"), node);
#define TRY(U, W)                                                                        \
  if constexpr (std::is_same_v<T, U>) {                                                  \
    if (options_.weights_dtype == kDType<W>)                                             \
      return std::make_unique<RecurrentInstruction<T, W>>(spec, Weights(node, "kernel"), \
                                                          Weights(node, "bias"));        \
  }
    CONTINUAL_TRANSFORMERS_FOR_PACKED_TYPES(TRY)
#undef TRY
    throw Error(ErrorCode::kInternal, "no recurrent cell for this weights dtype");
  }

  std::unique_ptr<Instruction> RotaryAngles(const Node& node) {
    std::vector<int64_t> turns = ElementsOf<int64_t>(file_.tensor(node.weights.at("turns")));
    other_weights_ += static_cast<int64_t>(turns.size() * sizeof(int64_t));
    return MakeRotaryAngles<T>(std::move(turns), Out(node), RowsAStep(plan_, node));
  }

  std::unique_ptr<Instruction> Rotary(const Node& node) const {
    const int x = In(node, 0), angles = In(node, 1);
    const int64_t size = ValueOf(node.inputs[0]).shape.back(), each = RowsAStep(plan_, node);
    return MakeRotary<T>(node.Bool("interleaved"), x, angles, Out(node), each,
                         Size(x) / size / each, size, Size(angles) / 2 / each);
  }

  std::unique_ptr<Instruction> Attention(int i) {
    const Node& node = plan_.nodes[i];
    AttentionSpec spec;
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
    spec.scale = node.Number("scale");
    spec.soft_cap = node.Number("soft_cap", 0);
    spec.threads = options_.threads;
    spec.key_ring = Offset(i, "key");
    spec.value_ring = Offset(i, "value");
    spec.mask_ring = Offset(i, "key_mask");
    if (options_.cache_dtype == DType::kInt8) {
      spec.key_scales = Offset(i, "key_scale");
      spec.value_scales = Offset(i, "value_scale");
    }
#define TRY(U, C)                                                                            \
  if constexpr (std::is_same_v<T, U>) {                                                      \
    if (options_.cache_dtype == kDType<C>)                                                   \
      return std::make_unique<AttentionInstruction<T, C>>(spec, Kept(Weights(node, "bias")), \
                                                          Kept(Weights(node, "sink")));      \
  }
    CONTINUAL_TRANSFORMERS_FOR_RING_TYPES(TRY)
#undef TRY
    throw Error(ErrorCode::kInternal, "no attention for this cache dtype");
  }

  std::unique_ptr<Instruction> RetroactiveAttentionOf(int i) {
    const Node& node = plan_.nodes[i];
    RetroactiveSpec spec;
    spec.query = In(node, 0);
    spec.key = In(node, 1);
    spec.value = In(node, 2);
    spec.output = Out(node);
    spec.key_mask = MaskOf(node, "key");
    spec.heads = node.Int("heads");
    spec.window = node.Int("window");
    spec.key_dim = Size(spec.key) / spec.heads;
    spec.value_dim = Size(spec.value) / spec.heads;
    spec.scale = node.Number("scale");
    spec.algorithm = node.Text("algorithm");
    spec.query_ring = Offset(i, "query");
    spec.key_ring = Offset(i, "key");
    spec.value_ring = Offset(i, "value");
    spec.softmax = Offset(i, "softmax");
    spec.weighted_sum = Offset(i, "weighted_sum");
    spec.made_with = Offset(i, "made_with");
    spec.mask_ring = Offset(i, "key_mask");
    return std::make_unique<RetroactiveInstruction<T>>(spec);
  }

  // Returns whether a node is attention that is faster without its keys and values, from the rows
  // that they are projections of.
  bool ProjectsItself(int i) const {
    const Node& node = plan_.nodes[i];
    // The scales of int8 kernels are for the columns of whole kernels, as the model has them.
    if (node.op != Op::kWindowAttention || options_.weights_dtype == DType::kInt8) return false;
    int64_t inputs[2];
    for (int i_input : {1, 2}) {
      const int root = In(node, i_input), producer = producer_[root];
      if (OnlyUser(root) != i || producer < 0 || plan_.nodes[producer].op != Op::kDense) {
        return false;
      }
      // A reshape between them may have cut the projection's rows in another way.
      if (ValueOf(root).shape.back() != ValueOf(node.inputs[i_input]).shape.back()) return false;
      inputs[i_input - 1] = file_.tensor(plan_.nodes[producer].weights.at("kernel")).shape[0];
    }
    const WindowAttentionSpec spec = WindowAttentionSpecOf(node);
    if (spec.queries > 1 && (spec.causal || spec.band > 0)) return false;
    const int64_t of_window =
        spec.window * spec.heads *
        (spec.key_dim * (inputs[0] + spec.queries) + spec.value_dim * (inputs[1] + spec.queries));
    // Threads share the projections of a window, and not those of few queries.
    const int64_t threads = spec.queries > 1 ? options_.threads : 1;
    return FewQueriesInstruction<T, T>::Products(spec, inputs[0], inputs[1]) < of_window / threads;
  }

  void TranslateFewQueries(int i) {
    const Node& node = plan_.nodes[i];
    std::string name, op;
    const RowProjection<T> key = Projection(node, 1, &name, &op);
    RowProjection<T> value = Projection(node, 2, &name, &op);
    std::vector<int> reads = {In(node), key.input, value.input};
    emitted_.push_back({2 * i, FewQueries(node, key, std::move(value)), name + node.name,
                        op + NameOf(node.op), std::move(reads), Out(node)});
  }

  // The dense layer behind an input of attention, with what is folded into it. Appends its name and
  // op, each with a plus.
  RowProjection<T> Projection(const Node& attention, int input, std::string* names,
                              std::string* ops) {
    const Node& node = plan_.nodes[producer_[In(attention, input)]];
    const std::vector<int64_t>& shape = file_.tensor(node.weights.at("kernel")).shape;
    DenseSpec<T> spec;
    DenseKernel kernel = {node.weights.at("kernel"), Weights(node, "kernel")};
    spec.bias = Weights(node, "bias");
    spec.inputs = shape[0];
    spec.outputs = shape[1];
    spec.input = In(node);
    std::string name = node.name, op = NameOf(node.op);
    FoldBefore(&spec, &kernel, &name, &op);
    *names += name + " + ";
    *ops += op + " + ";
    return {spec.input, std::move(kernel.elements), std::move(spec.bias), spec.inputs,
            spec.outputs};
  }

  std::unique_ptr<Instruction> FewQueries(const Node& node, const RowProjection<T>& key,
                                          RowProjection<T> value) const {
    const WindowAttentionSpec spec = WindowAttentionSpecOf(node);
#define TRY(U, W)                                                                        \
  if constexpr (std::is_same_v<T, U>) {                                                  \
    if (options_.weights_dtype == kDType<W>)                                             \
      return std::make_unique<FewQueriesInstruction<T, W>>(spec, key, std::move(value)); \
  }
    CONTINUAL_TRANSFORMERS_FOR_PACKED_TYPES(TRY)
#undef TRY
    throw Error(ErrorCode::kInternal, "no attention for this weights dtype");
  }

  WindowAttentionSpec WindowAttentionSpecOf(const Node& node) const {
    WindowAttentionSpec spec;
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
    spec.scale = node.Number("scale");
    spec.rows = node.Int("rows", 1);
    spec.first = node.Int("first", 1 - spec.window);
    spec.threads = options_.threads;
    return spec;
  }

  // ---- Order and placement ----

  // Computes attention's queries after its keys and values. The key and value stores have then
  // reached the cache before they are read.
  void PutQueriesLast() {
    for (size_t i = 0; i < plan_.nodes.size(); ++i) {
      if (plan_.nodes[i].op != Op::kAttention) continue;
      const int query = In(plan_.nodes[i], 0);
      for (Emitted& e : emitted_) {
        if (e.writes == query && uses_[query] == 1 && !is_output_[query] &&
            e.position < 2 * static_cast<int64_t>(i)) {
          e.position = 2 * static_cast<int64_t>(i) - 1;
        }
      }
    }
  }

  // Gives values that are live at the same time different bytes of the arena, the lowest free ones.
  // This keeps the arena small, so that what was just written is still cached when it is read.
  void PlaceValues() {
    const int64_t count = emitted_.size();
    std::vector<int64_t> last_read(plan_.values.size(), -1);
    for (int64_t e = 0; e < count; ++e) {
      for (int root : emitted_[e].reads) last_read[root] = e;
    }
    for (const Port& output : plan_.outputs) last_read[Root(output.value)] = count;
    result_.arena_offset.assign(plan_.values.size(), -1);
    struct Live {
      int64_t offset, bytes, until;
    };
    std::vector<Live> live;  // sorted by offset
    for (int64_t e = 0; e < count; ++e) {
      const int root = emitted_[e].writes;
      if (result_.arena_offset[root] >= 0) continue;  // It shares the storage of its input.
      live.erase(
          std::remove_if(live.begin(), live.end(), [e](const Live& l) { return l.until < e; }),
          live.end());
      const int64_t bytes = Align(Size(root) * SizeOf(ValueOf(root).dtype));
      int64_t offset = 0;
      size_t at = 0;
      for (; at < live.size() && offset + bytes > live[at].offset; ++at) {
        offset = live[at].offset + live[at].bytes;
      }
      // The earlier gaps are too small. This one fits.
      live.insert(live.begin() + at, {offset, bytes, std::max(e, last_read[root])});
      result_.arena_offset[root] = offset;
      result_.arena_bytes_a_row = std::max(result_.arena_bytes_a_row, offset + bytes);
    }
    std::vector<bool> taken(plan_.values.size(), false);
    for (const Port& output : plan_.outputs) {
      const int root = Root(output.value);
      result_.written_in_place.push_back(result_.arena_offset[root] >= 0 && !taken[root]);
      taken[root] = true;
    }
  }

  const ModelFile& file_;
  const Plan& plan_;
  const ExecutorOptions& options_;
  CompiledPlan result_;
  std::vector<Emitted> emitted_;
  std::vector<bool> absorbed_;  // one per node: whether it is fused into another
  // One per storage: the node that writes it or -1, the number of reads, and the last reader.
  std::vector<int> producer_, uses_, user_;
  std::vector<bool> is_output_;
  const std::vector<StateEntry> state_;
  std::map<std::string, std::shared_ptr<const void>> packed_;  // By the tensor's name.
  int64_t other_weights_ = 0;
};

}  // namespace

CompiledPlan Compile(const ModelFile& file, const ExecutorOptions& options) {
  const DType compute = file.plan().compute_dtype;
  const auto check = [&](const char* what, DType dtype, bool fits) {
    if (fits) return;
    throw Error(ErrorCode::kInvalidArgument,
                std::string("Expected ") + what + " that fits a model in " +
                    NameOf(file.plan().compute_dtype) + ", but got " + NameOf(dtype));
  };
  const DType cache = options.cache_dtype, weights = options.weights_dtype;
#define MATCHES_CACHE(T, C) || (compute == kDType<T> && cache == kDType<C>)
#define MATCHES_WEIGHTS(T, W) || (compute == kDType<T> && weights == kDType<W>)
  check("a cache dtype", cache, false CONTINUAL_TRANSFORMERS_FOR_RING_TYPES(MATCHES_CACHE));
  check("a weights dtype", weights, false CONTINUAL_TRANSFORMERS_FOR_PACKED_TYPES(MATCHES_WEIGHTS));
#undef MATCHES_CACHE
#undef MATCHES_WEIGHTS
  return compute == DType::kFloat64 ? Compiler<double>(file, options).Compile()
                                    : Compiler<float>(file, options).Compile();
}

}  // namespace continual_transformers
