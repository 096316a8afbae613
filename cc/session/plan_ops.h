// What ParsePlan knows about each op: one table entry per op. To add an op, add it to
// docs/model_file.md, to plan.h's Op, and here.

#ifndef CONTINUAL_TRANSFORMERS_SESSION_PLAN_OPS_H_
#define CONTINUAL_TRANSFORMERS_SESSION_PLAN_OPS_H_

#include <cstdint>
#include <limits>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "cc/session/plan.h"

namespace continual_transformers {

constexpr int64_t kMostElements = std::numeric_limits<int32_t>::max();
constexpr size_t kMostAxes = 8;

struct AttributeEntry {
  enum class Type { kWhole, kNumber, kNumberOrNull, kBool, kChoice, kWholes };

  std::string name;
  Type type;
  // The range of kWhole, both ends included, and the minimum of kNumber.
  int64_t least = 0, most = 0;
  double number_least = 0;
  std::vector<std::string> choices;
  bool needed = true;  // false: it may be left out, and is then not in the fingerprint

  static AttributeEntry Whole(std::string name, int64_t least, int64_t most = kMostElements);
  static AttributeEntry Number(std::string name,
                               double least = std::numeric_limits<double>::lowest());
  static AttributeEntry NumberOrNull(std::string name);  // may be absent
  static AttributeEntry Bool(std::string name);
  static AttributeEntry Choice(std::string name, std::vector<std::string> choices);
  static AttributeEntry Wholes(std::string name);
  static AttributeEntry Optional(AttributeEntry entry);
};

// One function of an op, and the attributes that only this function has.
struct FunctionEntry {
  std::string name;
  std::vector<AttributeEntry> attributes;
};

struct WeightEntry {
  enum class Kind {
    kCompute,  // the compute dtype
    kKernel,   // the compute dtype or the weights dtype
    kInt64,
  };

  std::string name;
  Kind kind = Kind::kCompute;
  bool needed = true;
};

enum class ValueKind { kCompute, kIndex, kBool, kAny };
enum class OutputKind { kCompute, kBool, kSameAsInput, kAny };

class NodeCheck;

struct OpEntry {
  Op op;
  std::string name;
  std::vector<ValueKind> inputs;
  OutputKind output;
  std::vector<WeightEntry> weights;
  std::vector<FunctionEntry> functions;  // values of `function`; empty: no such attribute
  std::vector<AttributeEntry> attributes;
  // Checks shapes, and everything else that this table does not cover.
  void (*check)(const NodeCheck& node);
  // An upper estimate of the node's state in a stream block, in bytes. Null: no state.
  double (*state_bytes)(const NodeCheck& node) = nullptr;
  std::vector<std::string> masks = {};  // each may be absent
  bool more_inputs = false;             // any number, at least one, each of the kind inputs[0]
};

const std::vector<OpEntry>& OpEntries();
const OpEntry* FindOpEntry(const std::string& name);  // null: no such op

// A node that has the inputs, outputs, masks, weights and attributes of its op. NodeCheck checks
// that they fit together.
class NodeCheck {
 public:
  // `is_token` has one entry per plan value: whether the value is an input of the plan, perhaps
  // reshaped or strided.
  NodeCheck(const Plan& plan, const Node& node, const std::map<std::string, const Tensor*>& weights,
            const std::vector<bool>& is_token, std::string where)
      : plan_(plan),
        node_(node),
        weights_(weights),
        is_token_(is_token),
        where_(std::move(where)) {}

  const Node& node() const { return node_; }
  size_t inputs() const { return node_.inputs.size(); }
  const Value& input(size_t i) const { return plan_.values[node_.inputs[i]]; }
  const Value& output() const { return plan_.values[node_.outputs[0]]; }
  bool InputIsToken(size_t i) const { return is_token_[node_.inputs[i]]; }
  const Tensor* weight(const std::string& name) const;  // null: absent
  int64_t compute_bytes() const { return SizeOf(plan_.compute_dtype); }

  // Each throws if the check fails.
  void ExpectAxes(size_t input, size_t axes) const;
  // That an input has one axis, or two: then each step has several rows.
  void ExpectAxesOfRows(size_t input) const;
  void ExpectSomeAxes(size_t input) const;
  void ExpectInput(size_t input, const std::vector<int64_t>& shape) const;
  void ExpectOutput(const std::vector<int64_t>& shape) const;
  void ExpectWeight(const std::string& name, const std::vector<int64_t>& shape) const;
  int64_t ExpectAxis(size_t input) const;  // Returns the attribute `axis`.
  [[noreturn]] void Fail(const std::string& sentence) const;

 private:
  const Plan& plan_;
  const Node& node_;
  const std::map<std::string, const Tensor*>& weights_;
  const std::vector<bool>& is_token_;
  std::string where_;
};

std::string ShapeText(const std::vector<int64_t>& shape);  // "[3, 4]"

}  // namespace continual_transformers

#endif  // CONTINUAL_TRANSFORMERS_SESSION_PLAN_OPS_H_
