#include "cc/session/plan.h"

#include <cfloat>
#include <cmath>
#include <limits>
#include <utility>

#include "cc/session/error.h"
#include "cc/session/fingerprint.h"
#include "cc/session/plan_ops.h"
#include "cc/session/strict_json.h"

namespace continual_transformers {
namespace {

using nlohmann::json;

constexpr size_t kMostNodes = 65536;
// The limit for the state of one stream, and for the values of one step. Larger than any real
// model, and far below where sizes in bytes overflow.
constexpr double kMostBytes = 1099511627776;  // 1 TiB
constexpr int kNone = -1;

struct DTypeEntry {
  DType dtype;
  const char* name;
  int64_t bytes;
};
constexpr DTypeEntry kDTypes[] = {
    {DType::kFloat32, "float32", 4},   {DType::kFloat64, "float64", 8},
    {DType::kBFloat16, "bfloat16", 2}, {DType::kFloat16, "float16", 2},
    {DType::kInt32, "int32", 4},       {DType::kInt64, "int64", 8},
    {DType::kBool, "bool", 1},         {DType::kInt8, "int8", 1},
};

const DTypeEntry* FindDType(const std::string& name) {
  for (const DTypeEntry& entry : kDTypes) {
    if (name == entry.name) return &entry;
  }
  return nullptr;
}

std::string Listed(const std::vector<std::string>& names) {
  std::string text;
  for (const std::string& name : names) text += (text.empty() ? "" : ", ") + Quoted(name);
  return text;
}

template <typename T>
const T& Get(const Node& node, const std::string& name) {
  const auto found = node.attributes.find(name);
  if (found == node.attributes.end() || !std::holds_alternative<T>(found->second)) {
    throw Error(ErrorCode::kInternal, std::string(NameOf(node.op)) + " has no attribute " + name +
                                          " of the requested type");
  }
  return std::get<T>(found->second);
}

class PlanParser {
 public:
  PlanParser(const std::string& text, const TensorLookup& tensors)
      : tensors_(tensors), root_(ParseJson(text.data(), text.size(), "the plan")) {
    plan_.json = text;
  }

  Plan Parse() {
    ObjectReader reader(root_, "the plan");
    plan_.producer = reader.Text("producer");
    plan_.name = reader.Text("name");
    plan_.compute_dtype = OneOf(&reader, "compute_dtype", {DType::kFloat32, DType::kFloat64});
    const bool is_float32 = plan_.compute_dtype == DType::kFloat32;
    plan_.cache_dtype =
        is_float32 ? OneOf(&reader, "cache_dtype",
                           {DType::kFloat32, DType::kBFloat16, DType::kFloat16, DType::kInt8})
                   : OneOf(&reader, "cache_dtype", {DType::kFloat64});
    plan_.weights_dtype = is_float32 ? OneOf(&reader, "weights_dtype",
                                             {DType::kFloat32, DType::kBFloat16, DType::kInt8})
                                     : OneOf(&reader, "weights_dtype", {DType::kFloat64});
    constexpr int64_t kMostSteps = int64_t{1} << 53;  // exact in every JSON reader
    plan_.receptive_field = reader.Whole("receptive_field", 1, kMostSteps);
    plan_.delay = reader.Whole("delay", 0, kMostSteps);
    plan_.block = reader.Whole("block", 1, kMostElements);
    ParseValues(reader.List("values"));
    plan_.inputs = ParsePorts(reader.List("inputs"), "input");
    for (const Port& input : plan_.inputs) {
      Produce(input.value, "input " + Quoted(input.name));
      is_token_[input.value] = true;
    }
    ParseNodes(reader.List("nodes"));
    plan_.outputs = ParsePorts(reader.List("outputs"), "output");
    for (size_t i = 0; i < plan_.values.size(); ++i) {
      if (!is_made_[i]) Refuse("no input and no node makes value " + std::to_string(i));
    }
    CheckStructure(reader.Need("input_structure"), "input_structure", plan_.inputs.size());
    CheckStructure(reader.Need("output_structure"), "output_structure", plan_.outputs.size());
    reader.Need("keras_state");  // only Python reads it
    reader.RefuseOthers();
    if (state_bytes_ > kMostBytes) Refuse("a stream of the plan has more than 2^40 bytes of state");
    plan_.architecture = Architecture();
    plan_.fingerprint = plan_.FingerprintWith(plan_.cache_dtype);
    return std::move(plan_);
  }

 private:
  DType OneOf(ObjectReader* reader, const char* key, const std::vector<DType>& dtypes) {
    const std::string name = reader->Text(key);
    std::vector<std::string> names;
    for (DType dtype : dtypes) {
      if (name == NameOf(dtype)) return dtype;
      names.emplace_back(NameOf(dtype));
    }
    const std::string sentence = reader->where() + ": " + Quoted(key) + " is " + Quoted(name) +
                                 ", expected one of " + Listed(names);
    if (FindDType(name) == nullptr) RefuseAsNewer(sentence);
    Refuse(sentence);
  }

  void ParseValues(const json& list) {
    double bytes = 0;
    for (size_t i = 0; i < list.size(); ++i) {
      ObjectReader reader(list[i], "value " + std::to_string(i));
      Value value;
      value.dtype = OneOf(&reader, "dtype",
                          {plan_.compute_dtype, DType::kInt32, DType::kInt64, DType::kBool});
      const json& shape = reader.List("shape");
      if (shape.size() > kMostAxes) {
        Refuse(reader.where() + " has " + std::to_string(shape.size()) +
               " axes, expected at most " + std::to_string(kMostAxes));
      }
      value.size = 1;
      for (const json& axis : shape) {
        int64_t length;
        if (!IsWhole(axis, &length) || length < 1 || length > kMostElements / value.size) {
          Refuse(reader.where() + " has shape " + Shown(shape) +
                 ", expected axes of at least 1 and at most 2^31 - 1 elements in all");
        }
        value.shape.push_back(length);
        value.size *= length;
      }
      reader.RefuseOthers();
      bytes += static_cast<double>(value.size) * static_cast<double>(SizeOf(value.dtype));
      plan_.values.push_back(std::move(value));
    }
    if (bytes > kMostBytes) Refuse("the values of one step have more than 2^40 bytes");
    is_made_.assign(plan_.values.size(), false);
    is_token_.assign(plan_.values.size(), false);
  }

  // Reads a value number and checks that it exists. `where` names the reader in errors.
  int ValueNumber(const json& number, const std::string& where) {
    int64_t value;
    if (!IsWhole(number, &value) || value < 0 ||
        value >= static_cast<int64_t>(plan_.values.size())) {
      Refuse(where + " is value " + Shown(number) + ", but the plan has " +
             std::to_string(plan_.values.size()) + " values, counted from 0");
    }
    return static_cast<int>(value);
  }

  // Reads a value number and checks that an earlier node or an input makes the value.
  int MadeValue(const json& number, const std::string& where) {
    const int value = ValueNumber(number, where);
    if (!is_made_[value]) {
      Refuse(where + " is value " + std::to_string(value) +
             ", but no input of the plan and no earlier node makes it");
    }
    return value;
  }

  void Produce(int value, const std::string& where) {
    if (is_made_[value]) {
      Refuse(where + " is value " + std::to_string(value) +
             ", which an input or an earlier node already makes");
    }
    is_made_[value] = true;
  }

  std::vector<Port> ParsePorts(const json& list, const std::string& kind) {
    if (list.empty()) Refuse("the plan has no " + kind + "s");
    std::vector<Port> ports;
    for (size_t i = 0; i < list.size(); ++i) {
      const std::string where = kind + " " + std::to_string(i);
      ObjectReader reader(list[i], where);
      Port port;
      port.name = reader.Text("name");
      port.value = kind == "input" ? ValueNumber(reader.Need("value"), where)
                                   : MadeValue(reader.Need("value"), where);
      reader.RefuseOthers();
      ports.push_back(std::move(port));
    }
    return ports;
  }

  void ParseNodes(const json& list) {
    if (list.size() > kMostNodes) {
      Refuse("the plan has " + std::to_string(list.size()) + " nodes, expected at most " +
             std::to_string(kMostNodes));
    }
    for (size_t i = 0; i < list.size(); ++i) ParseNode(list[i], i);
  }

  void ParseNode(const json& object, size_t place) {
    ObjectReader reader(object, "node " + std::to_string(place));
    Node node;
    node.name = reader.Text("name");
    const std::string op = reader.Text("op");
    const OpEntry* entry = FindOpEntry(op);
    if (entry == nullptr) {
      RefuseAsNewer("node " + std::to_string(place) + " (" + Quoted(node.name) + ") has the op " +
                    Quoted(op) + ", which this version does not know");
    }
    node.op = entry->op;
    where_ = "node " + std::to_string(place) + " (" + Quoted(node.name) + ", " + op + ")";
    reader.set_where(where_);
    ParseInputs(reader.List("inputs"), *entry, &node);
    ParseMasks(reader.Find("masks"), *entry, &node);
    ParseOutput(reader.List("outputs"), *entry, &node);
    const std::map<std::string, const Tensor*> weights =
        ParseWeights(reader.Find("weights"), *entry, &node);
    ParseAttributes(reader.Find("attributes"), *entry, &node);
    reader.RefuseOthers();
    const NodeCheck check(plan_, node, weights, is_token_, where_);
    entry->check(check);
    if (entry->state_bytes != nullptr) state_bytes_ += entry->state_bytes(check) + 64;
    if (node.op == Op::kReshape || node.op == Op::kStrided) {
      is_token_[node.outputs[0]] = is_token_[node.inputs[0]];
    }
    plan_.nodes.push_back(std::move(node));
  }

  void ParseInputs(const json& list, const OpEntry& entry, Node* node) {
    const bool fits = entry.more_inputs ? !list.empty() : list.size() == entry.inputs.size();
    if (!fits) {
      Refuse(where_ + " has " + std::to_string(list.size()) + " inputs, expected " +
             (entry.more_inputs ? "at least 1" : std::to_string(entry.inputs.size())));
    }
    for (size_t i = 0; i < list.size(); ++i) {
      const std::string where = where_ + ": input " + std::to_string(i);
      const int value = MadeValue(list[i], where);
      const DType dtype = plan_.values[value].dtype;
      std::string expected;
      switch (entry.inputs[entry.more_inputs ? 0 : i]) {
        case ValueKind::kCompute:
          if (dtype != plan_.compute_dtype) expected = NameOf(plan_.compute_dtype);
          break;
        case ValueKind::kIndex:
          if (dtype != DType::kInt32 && dtype != DType::kInt64) expected = "int32 or int64";
          break;
        case ValueKind::kBool:
          if (dtype != DType::kBool) expected = "bool";
          break;
        case ValueKind::kAny:
          break;
      }
      if (!expected.empty()) {
        Refuse(where + " is " + NameOf(dtype) + ", expected " + expected);
      }
      node->inputs.push_back(value);
    }
  }

  void ParseMasks(const json* masks, const OpEntry& entry, Node* node) {
    if (masks == nullptr) return;
    ObjectReader reader(*masks, where_ + ": \"masks\"");
    for (const std::string& name : entry.masks) {
      const json* number = reader.Find(name.c_str());
      if (number == nullptr) continue;
      const std::string where = where_ + ": the mask " + Quoted(name);
      const int value = MadeValue(*number, where);
      const Value& mask = plan_.values[value];
      const std::vector<int64_t> shape = {RowsAStep(plan_, *node)};
      if (mask.dtype != DType::kBool || mask.shape != shape) {
        Refuse(where + " is " + NameOf(mask.dtype) + " " + ShapeText(mask.shape) +
               ", expected bool " + ShapeText(shape));
      }
      node->masks[name] = value;
    }
    reader.RefuseOthers();
  }

  void ParseOutput(const json& list, const OpEntry& entry, Node* node) {
    if (list.size() != 1) {
      Refuse(where_ + " has " + std::to_string(list.size()) + " outputs, expected 1");
    }
    const std::string where = where_ + ": its output";
    const int value = ValueNumber(list[0], where);
    Produce(value, where);
    node->outputs.push_back(value);
    DType expected = plan_.values[value].dtype;
    switch (entry.output) {
      case OutputKind::kCompute:
        expected = plan_.compute_dtype;
        break;
      case OutputKind::kBool:
        expected = DType::kBool;
        break;
      case OutputKind::kSameAsInput:
        expected = plan_.values[node->inputs[0]].dtype;
        break;
      case OutputKind::kAny:
        break;
    }
    if (plan_.values[value].dtype != expected) {
      Refuse(where + " is " + NameOf(plan_.values[value].dtype) + ", expected " + NameOf(expected));
    }
  }

  std::map<std::string, const Tensor*> ParseWeights(const json* names, const OpEntry& entry,
                                                    Node* node) {
    static const json& none = *new json(json::object());
    ObjectReader reader(names == nullptr ? none : *names, where_ + ": \"weights\"");
    std::map<std::string, const Tensor*> weights;
    for (const WeightEntry& weight : entry.weights) {
      const char* name = weight.name.c_str();
      if (reader.Find(name) == nullptr) {
        if (weight.needed) Refuse(where_ + " has no weight " + Quoted(name));
        continue;
      }
      const std::string tensor_name = reader.Text(name);
      const Tensor* tensor = tensors_(tensor_name);
      if (tensor == nullptr) {
        Refuse(where_ + ": its weight " + Quoted(name) + " is the tensor " + Quoted(tensor_name) +
               ", which the file does not have");
      }
      const DType expected =
          weight.kind == WeightEntry::Kind::kInt64 ? DType::kInt64 : plan_.compute_dtype;
      // Kernels in int8 are rounded when the file is loaded.
      const bool may_be_packed =
          weight.kind == WeightEntry::Kind::kKernel && plan_.weights_dtype != DType::kInt8;
      if (tensor->dtype != expected && !(may_be_packed && tensor->dtype == plan_.weights_dtype)) {
        Refuse(where_ + ": its weight " + Quoted(name) + ", the tensor " + Quoted(tensor_name) +
               ", is " + NameOf(tensor->dtype) + ", expected " + NameOf(expected) +
               (may_be_packed && plan_.weights_dtype != expected
                    ? std::string(" or ") + NameOf(plan_.weights_dtype)
                    : ""));
      }
      node->weights[name] = tensor_name;
      weights[name] = tensor;
    }
    reader.RefuseOthers();
    return weights;
  }

  void ParseAttributes(const json* attributes, const OpEntry& entry, Node* node) {
    static const json& none = *new json(json::object());
    ObjectReader reader(attributes == nullptr ? none : *attributes, where_ + ": \"attributes\"");
    if (!entry.functions.empty()) {
      const std::string name = reader.Text("function");
      const FunctionEntry* function = nullptr;
      for (const FunctionEntry& candidate : entry.functions) {
        if (candidate.name == name) function = &candidate;
      }
      if (function == nullptr) {
        RefuseAsNewer(where_ + " has the function " + Quoted(name) +
                      ", which this version does not know");
      }
      node->attributes["function"] = name;
      for (const AttributeEntry& attribute : function->attributes) {
        ParseAttribute(&reader, attribute, node);
      }
    }
    for (const AttributeEntry& attribute : entry.attributes) {
      ParseAttribute(&reader, attribute, node);
    }
    reader.RefuseOthers();
  }

  void ParseAttribute(ObjectReader* reader, const AttributeEntry& entry, Node* node) {
    using Type = AttributeEntry::Type;
    const char* name = entry.name.c_str();
    // One that is left out is not in the fingerprint, which older plans of the op then keep.
    if (!entry.needed && reader->Find(name) == nullptr) return;
    Attribute& attribute = node->attributes[entry.name];
    if (entry.type == Type::kWhole) {
      attribute = reader->Whole(name, entry.least, entry.most);
      return;
    }
    if (entry.type == Type::kNumberOrNull) {
      const json* value = reader->Find(name);
      if (value == nullptr || value->is_null()) return;
    }
    const json& value = reader->Need(name);
    const auto refuse = [&](const std::string& expected) {
      Refuse(where_ + ": " + Quoted(entry.name) + " is " + Shown(value) + ", expected " + expected);
    };
    switch (entry.type) {
      case Type::kWhole:
        break;
      case Type::kNumber:
      case Type::kNumberOrNull: {
        const double most = plan_.compute_dtype == DType::kFloat32 ? FLT_MAX : DBL_MAX;
        if (!value.is_number()) refuse("a number");
        const double number = value.get<double>();
        if (!(number >= entry.number_least) || !(std::abs(number) <= most)) {
          refuse(entry.number_least == 0
                     ? std::string("a number of at least 0 that fits in ") +
                           NameOf(plan_.compute_dtype)
                     : std::string("a number that fits in ") + NameOf(plan_.compute_dtype));
        }
        attribute = number;
        break;
      }
      case Type::kBool:
        if (!value.is_boolean()) refuse("true or false");
        attribute = value.get<bool>();
        break;
      case Type::kChoice: {
        bool known = false;
        for (const std::string& choice : entry.choices) known |= value == choice;
        if (!known) refuse("one of " + Listed(entry.choices));
        attribute = value.get<std::string>();
        break;
      }
      case Type::kWholes: {
        std::vector<int64_t> wholes;
        if (!value.is_array()) refuse("a list of whole numbers");
        for (const json& element : value) {
          int64_t whole;
          if (!IsWhole(element, &whole)) refuse("a list of whole numbers");
          wholes.push_back(whole);
        }
        attribute = std::move(wholes);
        break;
      }
    }
  }

  // Checks that a structure's leaves are the numbers 0 to `ports` - 1, each once.
  void CheckStructure(const json& structure, const std::string& name, size_t ports) {
    std::vector<bool> seen(ports, false);
    size_t leaves = 0;
    CheckLeaves(structure, name, &seen, &leaves);
    if (leaves != ports) {
      Refuse("the plan's " + Quoted(name) + " has " + std::to_string(leaves) +
             " leaves, expected " + std::to_string(ports));
    }
  }

  // Recursive. ParseJson limits the depth.
  void CheckLeaves(const json& structure, const std::string& name, std::vector<bool>* seen,
                   size_t* leaves) {
    if (structure.is_array() || structure.is_object()) {
      for (const json& part : structure) CheckLeaves(part, name, seen, leaves);
      return;
    }
    int64_t place;
    if (!IsWhole(structure, &place) || place < 0 || place >= static_cast<int64_t>(seen->size())) {
      Refuse("the plan's " + Quoted(name) + " has the leaf " + Shown(structure) +
             ", expected a number from 0 to " + std::to_string(seen->size() - 1));
    }
    if ((*seen)[place]) {
      Refuse("the plan's " + Quoted(name) + " has the leaf " + std::to_string(place) + " twice");
    }
    (*seen)[place] = true;
    ++*leaves;
  }

  uint64_t Architecture() const {
    Fingerprint print;
    const auto add_shape = [&](const std::vector<int64_t>& shape) {
      print.Add(static_cast<int64_t>(shape.size()));
      for (int64_t axis : shape) print.Add(axis);
    };
    const auto add_count = [&](size_t count) { print.Add(static_cast<int64_t>(count)); };
    print.Add(std::string(NameOf(plan_.compute_dtype)));
    for (int64_t number : {plan_.receptive_field, plan_.delay, plan_.block}) print.Add(number);
    add_count(plan_.values.size());
    for (const Value& value : plan_.values) {
      print.Add(std::string(NameOf(value.dtype)));
      add_shape(value.shape);
    }
    for (const std::vector<Port>* ports : {&plan_.inputs, &plan_.outputs}) {
      add_count(ports->size());
      for (const Port& port : *ports) print.Add(static_cast<int64_t>(port.value));
    }
    add_count(plan_.nodes.size());
    for (const Node& node : plan_.nodes) {
      print.Add(std::string(NameOf(node.op)));
      for (const std::vector<int>* numbers : {&node.inputs, &node.outputs}) {
        add_count(numbers->size());
        for (int number : *numbers) print.Add(static_cast<int64_t>(number));
      }
      add_count(node.masks.size());
      for (const auto& [name, value] : node.masks) {
        print.Add(name);
        print.Add(static_cast<int64_t>(value));
      }
      add_count(node.weights.size());
      for (const auto& [name, tensor] : node.weights) {
        print.Add(name);
        add_shape(tensors_(tensor)->shape);
      }
      add_count(node.attributes.size());
      for (const auto& [name, attribute] : node.attributes) {
        print.Add(name);
        AddAttribute(attribute, &print);
      }
    }
    return print.Hash();
  }

  static void AddAttribute(const Attribute& attribute, Fingerprint* print) {
    print->Add(static_cast<int64_t>(attribute.index()));
    if (const bool* truth = std::get_if<bool>(&attribute)) print->Add(int64_t{*truth});
    if (const int64_t* whole = std::get_if<int64_t>(&attribute)) print->Add(*whole);
    if (const double* number = std::get_if<double>(&attribute)) print->Add(*number);
    if (const std::string* text = std::get_if<std::string>(&attribute)) print->Add(*text);
    if (const auto* wholes = std::get_if<std::vector<int64_t>>(&attribute)) {
      print->Add(static_cast<int64_t>(wholes->size()));
      for (int64_t whole : *wholes) print->Add(whole);
    }
  }

  const TensorLookup& tensors_;
  const json root_;
  Plan plan_{};
  std::vector<bool> is_made_, is_token_;  // one per plan value
  double state_bytes_ = 0;
  std::string where_;  // the node being read, as the start of an error message
};

}  // namespace

int64_t SizeOf(DType dtype) { return kDTypes[static_cast<int>(dtype)].bytes; }

const char* NameOf(DType dtype) { return kDTypes[static_cast<int>(dtype)].name; }

DType DTypeOf(const std::string& name) {
  const DTypeEntry* entry = FindDType(name);
  if (entry == nullptr) {
    throw Error(ErrorCode::kInvalidArgument,
                "got the dtype " + Quoted(name) +
                    ", expected float32, float64, bfloat16, float16, int32, int64, bool or int8");
  }
  return entry->dtype;
}

int64_t Tensor::elements() const {
  int64_t elements = 1;
  for (int64_t axis : shape) elements *= axis;
  return elements;
}

const char* NameOf(Op op) {
  for (const OpEntry& entry : OpEntries()) {
    if (entry.op == op) return entry.name.c_str();
  }
  return "an op that is not in the table";
}

int64_t Node::Int(const std::string& attribute) const { return Get<int64_t>(*this, attribute); }

double Node::Number(const std::string& attribute) const { return Get<double>(*this, attribute); }

int64_t Node::Int(const std::string& attribute, int64_t otherwise) const {
  return IsNull(attribute) ? otherwise : Int(attribute);
}

double Node::Number(const std::string& attribute, double otherwise) const {
  return IsNull(attribute) ? otherwise : Number(attribute);
}

bool Node::Bool(const std::string& attribute) const { return Get<bool>(*this, attribute); }

const std::string& Node::Text(const std::string& attribute) const {
  return Get<std::string>(*this, attribute);
}

const std::vector<int64_t>& Node::Ints(const std::string& attribute) const {
  return Get<std::vector<int64_t>>(*this, attribute);
}

bool Node::IsNull(const std::string& attribute) const {
  const auto found = attributes.find(attribute);
  return found == attributes.end() || std::holds_alternative<std::monostate>(found->second);
}

int64_t RowsAStep(const Plan& plan, const Node& node) {
  // The value that has an axis of rows before the axes of one row.
  const auto rows_of = [&](int value, size_t axes) -> int64_t {
    const std::vector<int64_t>& shape = plan.values[value].shape;
    return shape.size() > axes ? shape[0] : 1;
  };
  switch (node.op) {
    case Op::kAttention:
    case Op::kPositional:
      return rows_of(node.inputs[0], 1);
    case Op::kRecurrent: {
      const Value& input = plan.values[node.inputs[0]];
      return input.shape.empty() ? 1 : input.size / input.shape.back();
    }
    case Op::kRotary:
      return rows_of(node.inputs[1], 2);
    case Op::kRotaryAngles:
      return rows_of(node.outputs[0], 2);
    default:
      return 1;
  }
}

bool Plan::GoesOn() const {
  return std::any_of(nodes.begin(), nodes.end(), [](const Node& node) {
    return node.op == Op::kRecurrent && node.Bool("goes_on");
  });
}

uint64_t Plan::FingerprintWith(DType cache) const {
  Fingerprint print;
  print.Add(std::string(NameOf(cache)));
  return print.Hash(architecture);
}

Plan ParsePlan(const std::string& json, const TensorLookup& tensors) {
  return PlanParser(json, tensors).Parse();
}

}  // namespace continual_transformers
