#include "cc/session/plan_ops.h"

#include <algorithm>
#include <cstring>

#include "cc/session/strict_json.h"

namespace continual_transformers {
namespace {

using Shape = std::vector<int64_t>;
using A = AttributeEntry;
using Weight = WeightEntry;

std::string Number(int64_t n) { return std::to_string(n); }

Shape WithoutAxis(Shape shape, int64_t axis) {
  shape.erase(shape.begin() + axis);
  return shape;
}

Shape WithLast(Shape shape, int64_t last) {
  shape.back() = last;
  return shape;
}

Shape WithFirst(int64_t first, const Shape& rest) {
  Shape shape = {first};
  shape.insert(shape.end(), rest.begin(), rest.end());
  return shape;
}

double Elements(const Value& value) { return static_cast<double>(value.size); }

// Returns the rows of a weight [R, ...], and at least 1, so that the comparison that follows
// refuses a wrong shape.
int64_t RowsOf(const Tensor& tensor) {
  return tensor.shape.empty() ? 1 : std::max<int64_t>(tensor.shape[0], 1);
}

void CheckDense(const NodeCheck& node) {
  node.ExpectSomeAxes(0);
  const Shape& out = node.output().shape;
  node.ExpectOutput(WithLast(node.input(0).shape, out.empty() ? 1 : out.back()));
  node.ExpectWeight("kernel", {node.input(0).shape.back(), out.back()});
  node.ExpectWeight("bias", {out.back()});
}

void CheckMatmul(const NodeCheck& node) {
  node.ExpectAxes(0, 3);
  node.ExpectAxes(1, 3);
  const Shape &x = node.input(0).shape, &y = node.input(1).shape;
  node.ExpectInput(1, {x[0], x[2], y[2]});
  node.ExpectOutput({x[0], x[1], y[2]});
}

void CheckDepthwise(const NodeCheck& node) {
  node.ExpectAxes(0, 2);
  const int64_t rows = node.input(0).shape[0], channels = node.input(0).shape[1];
  const int64_t taps = RowsOf(*node.weight("kernel"));
  const Shape& out = node.output().shape;
  // An output of a wrong shape is refused here, so that the rest may read its axes.
  if (out.size() != 2 || out[1] % channels != 0) {
    node.Fail("its output has shape " + ShapeText(out) + ", expected [R, k * " + Number(channels) +
              "]");
  }
  node.ExpectWeight("kernel", {taps, out[1]});
  node.ExpectWeight("bias", {out[1]});
  // All of these numbers are below 2^31, so no product overflows.
  const int64_t stride = node.node().Int("stride"), dilation = node.node().Int("dilation");
  const int64_t reach = (taps - 1) * dilation;
  if (reach >= rows || (out[0] - 1) * stride >= rows - reach) {
    node.Fail("reads row " + Number((out[0] - 1) * stride + reach) + " of its input, which has " +
              Number(rows) + " rows");
  }
}

void CheckSameShape(const NodeCheck& node) { node.ExpectOutput(node.input(0).shape); }

void CheckActivation(const NodeCheck& node) {
  CheckSameShape(node);
  const bool has_alpha = node.weight("alpha") != nullptr;
  if (has_alpha != (node.node().Text("function") == "prelu")) {
    node.Fail(has_alpha ? "has the weight \"alpha\", which only \"prelu\" has"
                        : "has no weight \"alpha\", which \"prelu\" needs");
  }
  node.ExpectWeight("alpha", node.input(0).shape);
}

void CheckAlongAxis(const NodeCheck& node) {
  CheckSameShape(node);
  node.ExpectAxis(0);
}

void CheckBinary(const NodeCheck& node) {
  node.ExpectInput(1, node.input(0).shape);
  CheckSameShape(node);
}

void CheckWhere(const NodeCheck& node) {
  node.ExpectInput(1, node.input(0).shape);
  node.ExpectInput(2, node.input(0).shape);
  CheckSameShape(node);
}

void CheckConstant(const NodeCheck& node) { node.ExpectWeight("value", node.output().shape); }

// Each weight that is given must have one number per feature.
void CheckFeatures(const NodeCheck& node) {
  node.ExpectSomeAxes(0);
  CheckSameShape(node);
  for (const auto& weight : node.node().weights) {
    node.ExpectWeight(weight.first, {node.input(0).shape.back()});
  }
}

void CheckConcat(const NodeCheck& node) {
  const int64_t axis = node.ExpectAxis(0);
  Shape shape = node.input(0).shape;
  for (size_t i = 1; i < node.inputs(); ++i) {
    const Value& input = node.input(i);
    if (input.dtype != node.input(0).dtype) {
      node.Fail("input " + Number(i) + " is " + NameOf(input.dtype) + ", but input 0 is " +
                NameOf(node.input(0).dtype));
    }
    const int64_t rows = static_cast<size_t>(axis) < input.shape.size() ? input.shape[axis] : 1;
    Shape expected = node.input(0).shape;
    expected[axis] = rows;
    node.ExpectInput(i, expected);
    shape[axis] += rows;  // Each is at most 2^31, and a file is too short for the sum to overflow.
  }
  node.ExpectOutput(shape);
}

void CheckStrided(const NodeCheck& node) {
  const int64_t offset = node.node().Int("offset");
  const Shape& strides = node.node().Ints("strides");
  const Shape& out = node.output().shape;
  if (strides.size() != out.size()) {
    node.Fail("has " + Number(strides.size()) + " strides, but its output has " +
              Number(out.size()) + " axes");
  }
  const int64_t size = node.input(0).size;
  // The smallest and largest index that is read. Each axis adds at most 2^62 to an index inside the
  // input, so nothing overflows.
  int64_t least = offset, greatest = offset;
  for (size_t axis = 0; axis <= out.size(); ++axis) {
    if (least < 0 || greatest >= size) {
      node.Fail("reads element " + Number(least < 0 ? least : greatest) +
                " of its input, which has " + Number(size) + " elements");
    }
    if (axis == out.size()) break;
    if (strides[axis] < -kMostElements || strides[axis] > kMostElements) {
      node.Fail("has the stride " + Number(strides[axis]) + ", expected at most 2^31 - 1");
    }
    (strides[axis] < 0 ? least : greatest) += (out[axis] - 1) * strides[axis];
  }
}

void CheckReshape(const NodeCheck& node) {
  if (node.output().size != node.input(0).size) {
    node.Fail("has an output of " + Number(node.output().size) + " elements, but an input of " +
              Number(node.input(0).size));
  }
}

void CheckReduce(const NodeCheck& node) {
  node.ExpectOutput(WithoutAxis(node.input(0).shape, node.ExpectAxis(0)));
}

void CheckEmbedding(const NodeCheck& node) {
  const Tensor& table = *node.weight("table");
  const Shape& out = node.output().shape;
  Shape expected = node.input(0).shape;
  expected.push_back(out.empty() ? 1 : out.back());
  node.ExpectOutput(expected);
  node.ExpectWeight("table", {RowsOf(table), out.back()});
  if (!node.InputIsToken(0)) {
    node.Fail(
        "has indices that another node computes; expected an input of the plan, perhaps reshaped "
        "or strided, because indices are checked before a step");
  }
}

void CheckNotEqual(const NodeCheck& node) { node.ExpectOutput({1}); }

void CheckMasked(const NodeCheck& node) {
  node.ExpectInput(1, {1});
  CheckSameShape(node);
}

void CheckMaskAnd(const NodeCheck& node) {
  node.ExpectAxes(0, 1);
  node.ExpectInput(1, node.input(0).shape);
  CheckSameShape(node);
}

void CheckPositional(const NodeCheck& node) {
  node.ExpectAxesOfRows(0);
  CheckSameShape(node);
  node.ExpectWeight("rows", {RowsOf(*node.weight("rows")), node.input(0).shape.back()});
  node.ExpectWeight("start", {});
  int64_t start;
  std::memcpy(&start, node.weight("start")->data, sizeof(start));
  // The sum of this and a stream's offset must fit in int64.
  if (start < 0 || start > int64_t{1} << 60) {
    node.Fail("has the start " + Number(start) + ", expected one from 0 to 2^60");
  }
}

void CheckRotaryAngles(const NodeCheck& node) {
  const int64_t pairs = RowsOf(*node.weight("turns"));
  const Shape& out = node.output().shape;
  node.ExpectOutput(out.size() == 3 ? Shape{out[0], 2, pairs} : Shape{2, pairs});
  node.ExpectWeight("turns", {pairs});
}

void CheckRotary(const NodeCheck& node) {
  node.ExpectSomeAxes(0);
  CheckSameShape(node);
  const Shape &x = node.input(0).shape, &angles = node.input(1).shape;
  const int64_t pairs = angles.empty() ? 1 : angles.back(), size = x.back();
  // If a step has several rows, each row has its own angles.
  node.ExpectInput(1, angles.size() == 3 ? Shape{x[0], 2, pairs} : Shape{2, pairs});
  if (2 * pairs > size) {
    node.Fail("turns " + Number(pairs) + " pairs of heads of " + Number(size) + " elements");
  }
}

void CheckWindow(const NodeCheck& node) {
  node.ExpectOutput(WithFirst(node.node().Int("window"), node.input(0).shape));
}

void CheckZeroUntaken(const NodeCheck& node) {
  node.ExpectSomeAxes(0);
  CheckSameShape(node);
}

void CheckPresent(const NodeCheck& node) {
  if (node.output().shape.size() != 1) {
    node.Fail("has an output of shape " + ShapeText(node.output().shape) + ", expected one axis");
  }
}

// Checks that the last axis of each input divides into heads of equal size, and that queries and
// keys have the same size.
void CheckHeads(const NodeCheck& node) {
  const int64_t query_heads = node.node().Int("heads");
  const int64_t key_heads = node.node().Int("key_heads", query_heads);
  static const char* const names[] = {"query", "key", "value"};
  for (size_t i = 0; i < 3; ++i) {
    const int64_t heads = i == 0 ? query_heads : key_heads;
    if (node.input(i).shape.back() % heads != 0) {
      node.Fail("has " + Number(heads) + " heads, which do not divide the " + names[i] + "'s " +
                Number(node.input(i).shape.back()) + " elements");
    }
  }
  if (node.input(0).shape.back() / query_heads != node.input(1).shape.back() / key_heads) {
    node.Fail("has a query of " + Number(node.input(0).shape.back()) + " elements and a key of " +
              Number(node.input(1).shape.back()));
  }
}

void CheckAttention(const NodeCheck& node) {
  node.ExpectAxesOfRows(0);
  const auto rows_of = [&](int64_t size) {
    return node.input(0).shape.size() == 2 ? Shape{node.input(0).shape[0], size} : Shape{size};
  };
  for (size_t i = 1; i < 3; ++i) {
    node.ExpectSomeAxes(i);
    node.ExpectInput(i, rows_of(node.input(i).shape.back()));
  }
  CheckHeads(node);
  const int64_t heads = node.node().Int("heads"), key_heads = node.node().Int("key_heads", heads);
  if (heads % key_heads != 0) {
    node.Fail("has " + Number(heads) + " heads of queries and " + Number(key_heads) +
              " of keys, which do not divide them");
  }
  node.ExpectOutput(rows_of(node.input(2).shape.back() / key_heads * heads));
  if (node.node().Number("soft_cap", 1) == 0) node.Fail("has a soft_cap of 0");
  node.ExpectWeight("bias", {heads, node.node().Int("window")});
  node.ExpectWeight("sink", {heads});
  const int64_t window = node.node().Int("window");
  const int64_t first = node.node().Int("first_column"), end = node.node().Int("end_column");
  if (first >= end || end > window) {
    node.Fail("attends to columns " + Number(first) + " to " + Number(end) +
              " - 1 of a window of " + Number(window));
  }
  if (node.node().Int("query_delay") >= window) {
    node.Fail("has a query_delay of " + Number(node.node().Int("query_delay")) +
              ", which is not in its window of " + Number(window));
  }
}

double AttentionStateBytes(const NodeCheck& node) {
  const auto last = [&](size_t i) { return static_cast<double>(node.input(i).shape.back()); };
  const double row = last(1) + last(2);
  return static_cast<double>(node.node().Int("window")) * (row * node.compute_bytes() + 1);
}

void CheckRetroactiveAttention(const NodeCheck& node) {
  for (size_t i = 0; i < 3; ++i) node.ExpectAxes(i, 1);
  CheckHeads(node);
  node.ExpectOutput(WithFirst(node.node().Int("window"), node.input(2).shape));
}

double RetroactiveStateBytes(const NodeCheck& node) {
  const double row = Elements(node.input(0)) + Elements(node.input(1)) + Elements(node.input(2));
  const double sums = 4.0 * static_cast<double>(node.node().Int("heads")) + Elements(node.input(2));
  return static_cast<double>(node.node().Int("window")) *
             (row * node.compute_bytes() + 8 * sums + 1) +
         16;
}

void CheckWindowAttention(const NodeCheck& node) {
  for (size_t i = 0; i < 3; ++i) node.ExpectAxes(i, 2);
  CheckHeads(node);
  const int64_t queries = node.input(0).shape[0], keys = node.input(1).shape[0];
  node.ExpectInput(2, {keys, node.input(2).shape[1]});
  node.ExpectOutput({queries, node.input(2).shape[1]});
  const bool along_time = node.node().Bool("causal") || node.node().Int("band") > 0;
  if (queries > keys && along_time) {
    node.Fail("has " + Number(queries) + " rows of queries, more than the " + Number(keys) +
              " rows of its window");
  }
}

void CheckRecurrent(const NodeCheck& node) {
  node.ExpectSomeAxes(0);
  const Shape& out = node.output().shape;
  const int64_t units = out.empty() ? 1 : out.back();
  const std::string& function = node.node().Text("function");
  const int64_t gates = function == "simple" ? 1 : function == "lstm" ? 4 : 3;
  node.ExpectInput(0, WithLast(out.empty() ? Shape{1} : out, gates * units));
  node.ExpectOutput(WithLast(node.input(0).shape, units));
  node.ExpectWeight("kernel", {units, gates * units});
  node.ExpectWeight("bias", {gates * units});
  if (function == "gru_reset_before" && node.weight("bias") != nullptr) {
    node.Fail("has a bias, which \"gru_reset_before\" adds to its input");
  }
}

double RecurrentStateBytes(const NodeCheck& node) {
  return 2.0 * static_cast<double>(node.output().shape.back()) * node.compute_bytes();
}

// In the order of docs/model_file.md.
std::vector<OpEntry> MakeEntries() {
  constexpr ValueKind F = ValueKind::kCompute, kAny = ValueKind::kAny, kMask = ValueKind::kBool;
  constexpr OutputKind kF = OutputKind::kCompute, kSame = OutputKind::kSameAsInput;
  const Weight::Kind compute = Weight::Kind::kCompute;
  const std::vector<FunctionEntry> activations = {
      {"celu", {A::Number("alpha")}},
      {"elu", {A::Number("alpha")}},
      {"exponential", {}},
      {"gelu", {}},
      {"gelu_tanh", {}},
      {"hard_shrink", {A::Number("threshold")}},
      {"hard_sigmoid", {}},
      {"hard_silu", {}},
      {"hard_tanh", {}},
      {"leaky_relu", {A::Number("negative_slope")}},
      {"linear", {}},
      {"log_sigmoid", {}},
      {"mish", {}},
      {"prelu", {}},
      {"relu", {A::Number("negative_slope"), A::NumberOrNull("max_value"), A::Number("threshold")}},
      {"relu6", {}},
      {"selu", {}},
      {"sigmoid", {}},
      {"silu", {}},
      {"soft_shrink", {A::Number("threshold")}},
      {"softplus", {}},
      {"softsign", {}},
      {"sparse_plus", {}},
      {"sparse_sigmoid", {}},
      {"squareplus", {A::Number("b")}},
      {"tanh", {}},
      {"tanh_shrink", {}},
      {"threshold", {A::Number("threshold"), A::Number("value")}},
      {"absolute", {}},
      {"arccos", {}},
      {"arccosh", {}},
      {"arcsin", {}},
      {"arcsinh", {}},
      {"arctan", {}},
      {"arctanh", {}},
      {"cbrt", {}},
      {"ceil", {}},
      {"cos", {}},
      {"cosh", {}},
      {"erf", {}},
      {"erfc", {}},
      {"expm1", {}},
      {"floor", {}},
      {"log", {}},
      {"log1p", {}},
      {"negative", {}},
      {"reciprocal", {}},
      {"round", {}},
      {"rsqrt", {}},
      {"sign", {}},
      {"sin", {}},
      {"sinc", {}},
      {"sinh", {}},
      {"sqrt", {}},
      {"square", {}},
      {"tan", {}},
      {"trunc", {}},
  };
  const auto functions = [](const std::vector<std::string>& names) {
    std::vector<FunctionEntry> entries;
    entries.reserve(names.size());
    for (const std::string& name : names) entries.push_back({name, {}});
    return entries;
  };
  // The functions of gates and new values in a recurrent cell have no numbers.
  const std::vector<std::string> of_cells = {"exponential", "gelu",     "hard_sigmoid", "linear",
                                             "relu",        "relu6",    "selu",         "sigmoid",
                                             "silu",        "softplus", "softsign",     "tanh"};
  const std::vector<AttributeEntry> attention = {A::Whole("heads", 1), A::Whole("window", 1),
                                                 A::Number("scale")};
  const auto and_more = [](std::vector<AttributeEntry> entries,
                           const std::vector<AttributeEntry>& more) {
    entries.insert(entries.end(), more.begin(), more.end());
    return entries;
  };

  std::vector<OpEntry> entries = {
      {Op::kDense,
       "dense",
       {F},
       kF,
       {{"kernel", Weight::Kind::kKernel}, {"bias", compute, false}},
       {},
       {},
       CheckDense},
      {Op::kMatmul, "matmul", {F, F}, kF, {}, {}, {}, CheckMatmul},
      {Op::kDepthwise,
       "depthwise",
       {F},
       kF,
       {{"kernel"}, {"bias", compute, false}},
       {},
       {A::Whole("stride", 1), A::Whole("dilation", 1)},
       CheckDepthwise},
      {Op::kActivation,
       "activation",
       {F},
       kF,
       {{"alpha", compute, false}},
       activations,
       {},
       CheckActivation},
      {Op::kSoftmax,
       "softmax",
       {F},
       kF,
       {},
       functions({"softmax", "log_softmax", "sparsemax"}),
       {A::Whole("axis", 0)},
       CheckAlongAxis},
      {Op::kBinary,
       "binary",
       {F, F},
       kF,
       {},
       functions({"add", "subtract", "multiply", "divide", "maximum", "minimum", "power", "arctan2",
                  "equal", "fmod", "greater", "greater_equal", "hypot", "logaddexp", "mod",
                  "not_equal"}),
       {},
       CheckBinary},
      {Op::kWhere, "where", {ValueKind::kBool, F, F}, kF, {}, {}, {}, CheckWhere},
      {Op::kConstant, "constant", {}, kF, {{"value"}}, {}, {}, CheckConstant},
      {Op::kAffine, "affine", {F}, kF, {{"scale"}, {"offset"}}, {}, {}, CheckFeatures},
      {Op::kBatchNorm,
       "batch_norm",
       {F},
       kF,
       {{"mean"}, {"variance"}, {"gamma", compute, false}, {"beta", compute, false}},
       {},
       {A::Number("epsilon", 0)},
       CheckFeatures},
      {Op::kNorm,
       "norm",
       {F},
       kF,
       {{"gamma", compute, false}, {"beta", compute, false}},
       functions({"layer", "rms", "unit"}),
       {A::Number("epsilon", 0)},
       CheckFeatures},
      {Op::kConcat, "concat", {kAny}, kSame, {}, {}, {A::Whole("axis", 0)}, CheckConcat},
      {Op::kStrided,
       "strided",
       {kAny},
       kSame,
       {},
       {},
       {A::Whole("offset", 0), A::Wholes("strides")},
       CheckStrided},
      {Op::kReshape, "reshape", {kAny}, kSame, {}, {}, {}, CheckReshape},
      {Op::kReduce,
       "reduce",
       {F},
       kF,
       {},
       functions({"sum", "mean", "max", "min", "product", "argmax", "argmin"}),
       {A::Whole("axis", 0)},
       CheckReduce},
      {Op::kCumulative,
       "cumulative",
       {F},
       kF,
       {},
       functions({"sum", "product"}),
       {A::Whole("axis", 0)},
       CheckAlongAxis},
      {Op::kSort,
       "sort",
       {F},
       kF,
       {},
       functions({"values", "indices"}),
       {A::Whole("axis", 0), A::Bool("descending")},
       CheckAlongAxis},
      {Op::kCast, "cast", {kAny}, OutputKind::kAny, {}, {}, {}, CheckSameShape},
      {Op::kEmbedding, "embedding", {ValueKind::kIndex}, kF, {{"table"}}, {}, {}, CheckEmbedding},
      {Op::kNotEqual,
       "not_equal",
       {kAny},
       OutputKind::kBool,
       {},
       {},
       {A::Number("value"), A::Bool("any")},
       CheckNotEqual},
      {Op::kMasked, "masked", {F, kMask}, kF, {}, {}, {}, CheckMasked},
      {Op::kMaskAnd, "mask_and", {kMask, kMask}, OutputKind::kBool, {}, {}, {}, CheckMaskAnd},
      {Op::kPositional,
       "positional",
       {F},
       kF,
       {{"rows"}, {"start", Weight::Kind::kInt64}},
       {},
       {},
       CheckPositional,
       [](const NodeCheck&) { return 8.0; }},
      {Op::kRotaryAngles,
       "rotary_angles",
       {},
       kF,
       {{"turns", Weight::Kind::kInt64}},
       {},
       {},
       CheckRotaryAngles},
      {Op::kRotary, "rotary", {F, F}, kF, {}, {}, {A::Bool("interleaved")}, CheckRotary},
      {Op::kDelay,
       "delay",
       {kAny},
       kSame,
       {},
       {},
       {A::Whole("steps", 1)},
       CheckSameShape,
       [](const NodeCheck& node) {
         return static_cast<double>(node.node().Int("steps")) * Elements(node.input(0)) *
                SizeOf(node.input(0).dtype);
       }},
      {Op::kWindow,
       "window",
       {F},
       kF,
       {},
       {},
       {A::Whole("window", 1)},
       CheckWindow,
       [](const NodeCheck& node) { return Elements(node.output()) * node.compute_bytes(); }},
      {Op::kZeroUntaken, "zero_untaken", {F}, kF, {}, {}, {}, CheckZeroUntaken},
      {Op::kPresent,
       "present",
       {},
       kF,
       {},
       {},
       {A::Whole("rows", 1), A::Whole("first", -kMostElements)},
       CheckPresent},
      {Op::kAttention,
       "attention",
       {F, F, F},
       kF,
       {{"bias", compute, false}, {"sink", compute, false}},
       {},
       and_more(attention,
                {A::Whole("first_column", 0), A::Whole("end_column", 1), A::Whole("query_delay", 0),
                 A::Optional(A::Whole("key_heads", 1)), A::Optional(A::Number("soft_cap", 0))}),
       CheckAttention,
       AttentionStateBytes,
       {"key", "query"}},
      {Op::kRetroactiveAttention,
       "retroactive_attention",
       {F, F, F},
       kF,
       {},
       {},
       and_more(attention, {A::Choice("algorithm", {"auto", "update", "recompute"})}),
       CheckRetroactiveAttention,
       RetroactiveStateBytes,
       {"key"}},
      {Op::kWindowAttention,
       "window_attention",
       {F, F, F},
       kF,
       {},
       {},
       {A::Whole("heads", 1), A::Number("scale"), A::Whole("band", 0), A::Bool("causal"),
        A::Optional(A::Whole("rows", 1)), A::Optional(A::Whole("first", -kMostElements))},
       CheckWindowAttention},
      {Op::kRecurrent,
       "recurrent",
       {F},
       kF,
       {{"kernel", Weight::Kind::kKernel}, {"bias", compute, false}},
       functions({"simple", "gru", "gru_reset_before", "lstm"}),
       {A::Choice("activation", of_cells), A::Choice("gate", of_cells), A::Bool("goes_on"),
        A::Whole("first", -kMostElements, 0)},
       CheckRecurrent,
       RecurrentStateBytes,
       {"step"}},
  };
  for (OpEntry& entry : entries) entry.more_inputs = entry.op == Op::kConcat;
  return entries;
}

}  // namespace

AttributeEntry AttributeEntry::Whole(std::string name, int64_t least, int64_t most) {
  return {std::move(name), Type::kWhole, least, most, 0, {}};
}
AttributeEntry AttributeEntry::Number(std::string name, double least) {
  return {std::move(name), Type::kNumber, 0, 0, least, {}};
}
AttributeEntry AttributeEntry::NumberOrNull(std::string name) {
  return {std::move(name), Type::kNumberOrNull, 0, 0, std::numeric_limits<double>::lowest(), {}};
}
AttributeEntry AttributeEntry::Bool(std::string name) {
  return {std::move(name), Type::kBool, 0, 0, 0, {}};
}
AttributeEntry AttributeEntry::Choice(std::string name, std::vector<std::string> choices) {
  return {std::move(name), Type::kChoice, 0, 0, 0, std::move(choices)};
}
AttributeEntry AttributeEntry::Wholes(std::string name) {
  return {std::move(name), Type::kWholes, 0, 0, 0, {}};
}
AttributeEntry AttributeEntry::Optional(AttributeEntry entry) {
  entry.needed = false;
  return entry;
}

const std::vector<OpEntry>& OpEntries() {
  static const std::vector<OpEntry>* entries = new std::vector<OpEntry>(MakeEntries());
  return *entries;
}

const OpEntry* FindOpEntry(const std::string& name) {
  const std::vector<OpEntry>& entries = OpEntries();
  const auto found = std::find_if(entries.begin(), entries.end(),
                                  [&](const OpEntry& entry) { return entry.name == name; });
  return found == entries.end() ? nullptr : &*found;
}

std::string ShapeText(const std::vector<int64_t>& shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); ++i) {
    text += (i == 0 ? "" : ", ") + std::to_string(shape[i]);
  }
  return text + "]";
}

const Tensor* NodeCheck::weight(const std::string& name) const {
  const auto found = weights_.find(name);
  return found == weights_.end() ? nullptr : found->second;
}

void NodeCheck::ExpectAxes(size_t i, size_t axes) const {
  if (input(i).shape.size() != axes) {
    Fail("input " + Number(i) + " has shape " + ShapeText(input(i).shape) + ", expected " +
         Number(axes) + (axes == 1 ? " axis" : " axes"));
  }
}

void NodeCheck::ExpectAxesOfRows(size_t i) const {
  const size_t axes = input(i).shape.size();
  if (axes != 1 && axes != 2) {
    Fail("input " + Number(i) + " has shape " + ShapeText(input(i).shape) +
         ", expected 1 axis, or 2 for several rows in each step");
  }
}

void NodeCheck::ExpectSomeAxes(size_t i) const {
  if (input(i).shape.empty()) {
    Fail("input " + Number(i) + " has shape [], expected at least one axis");
  }
}

void NodeCheck::ExpectInput(size_t i, const Shape& shape) const {
  if (input(i).shape != shape) {
    Fail("input " + Number(i) + " has shape " + ShapeText(input(i).shape) + ", expected " +
         ShapeText(shape));
  }
}

void NodeCheck::ExpectOutput(const Shape& shape) const {
  if (output().shape != shape) {
    Fail("its output has shape " + ShapeText(output().shape) + ", expected " + ShapeText(shape));
  }
}

void NodeCheck::ExpectWeight(const std::string& name, const Shape& shape) const {
  const Tensor* tensor = weight(name);
  if (tensor != nullptr && tensor->shape != shape) {
    Fail("its weight " + Quoted(name) + ", the tensor " + Quoted(node_.weights.at(name)) +
         ", has shape " + ShapeText(tensor->shape) + ", expected " + ShapeText(shape));
  }
}

int64_t NodeCheck::ExpectAxis(size_t i) const {
  const int64_t axis = node_.Int("axis");
  if (axis >= static_cast<int64_t>(input(i).shape.size())) {
    Fail("\"axis\" is " + Number(axis) + ", but input " + Number(i) + " has shape " +
         ShapeText(input(i).shape));
  }
  return axis;
}

void NodeCheck::Fail(const std::string& sentence) const { Refuse(where_ + ": " + sentence); }

}  // namespace continual_transformers
