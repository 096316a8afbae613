// The plan: one step of a model as a list of nodes over values, as docs/model_file.md defines it.
// ParsePlan checks everything that can be checked without running it. The executor can then trust
// sizes, dtypes and attributes.

#ifndef CONTINUAL_TRANSFORMERS_SESSION_PLAN_H_
#define CONTINUAL_TRANSFORMERS_SESSION_PLAN_H_

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <string>
#include <variant>
#include <vector>

namespace continual_transformers {

enum class DType { kFloat32, kFloat64, kBFloat16, kFloat16, kInt32, kInt64, kBool, kInt8 };

int64_t SizeOf(DType dtype);             // in bytes
const char* NameOf(DType dtype);         // "float32"
DType DTypeOf(const std::string& name);  // throws Error

// A tensor of the model file. `data` may be unaligned.
struct Tensor {
  DType dtype;
  std::vector<int64_t> shape;
  const void* data;
  int64_t bytes;

  int64_t elements() const;
};

enum class Op {
  kDense,
  kMatmul,
  kDepthwise,
  kActivation,
  kSoftmax,
  kBinary,
  kWhere,
  kConstant,
  kAffine,
  kBatchNorm,
  kNorm,
  kConcat,
  kStrided,
  kReshape,
  kReduce,
  kCumulative,
  kSort,
  kCast,
  kEmbedding,
  kNotEqual,
  kMasked,
  kMaskAnd,
  kPositional,
  kRotaryAngles,
  kRotary,
  kDelay,
  kWindow,
  kZeroUntaken,
  kPresent,
  kAttention,
  kRetroactiveAttention,
  kWindowAttention,
  kRecurrent,
};

const char* NameOf(Op op);  // "retroactive_attention"

// An intermediate result of the model, for one step of one stream.
struct Value {
  std::vector<int64_t> shape;
  DType dtype;
  int64_t size;  // number of elements
};

// JSON's null, booleans, integers, other numbers, strings, and lists of integers.
using Attribute =
    std::variant<std::monostate, bool, int64_t, double, std::string, std::vector<int64_t>>;

struct Node {
  Op op;
  std::string name;
  std::vector<int> inputs;   // indices in Plan::values
  std::vector<int> outputs;  // always one today
  std::map<std::string, int> masks;
  std::map<std::string, std::string> weights;  // to names of tensors
  std::map<std::string, Attribute> attributes;

  // ParsePlan has checked that the attributes of the op exist and have the right type.
  int64_t Int(const std::string& attribute) const;
  double Number(const std::string& attribute) const;  // integer or not
  // The same for an attribute that may be left out.
  int64_t Int(const std::string& attribute, int64_t otherwise) const;
  double Number(const std::string& attribute, double otherwise) const;
  bool Bool(const std::string& attribute) const;
  const std::string& Text(const std::string& attribute) const;
  const std::vector<int64_t>& Ints(const std::string& attribute) const;
  bool IsNull(const std::string& attribute) const;  // null or absent
};

struct Port {
  std::string name;
  int value;
};

struct Plan {
  std::string name;
  std::string producer;
  DType compute_dtype, cache_dtype, weights_dtype;
  int64_t receptive_field, delay;  // in steps of the inputs
  int64_t block;                   // how many steps of the inputs a step of the plan takes
  std::vector<Value> values;
  std::vector<Port> inputs, outputs;
  std::vector<Node> nodes;
  std::string json;       // the complete text as it was read
  uint64_t architecture;  // the fingerprint before the cache dtype is added
  uint64_t fingerprint;   // with the plan's own cache dtype; see docs/model_file.md

  // Whether a stream that has taken `position` steps of the plan has a full receptive field.
  bool IsReadyAt(int64_t position) const {
    return position >= receptive_field / block + (receptive_field % block > 0);
  }

  // Whether outputs depend on all earlier steps of a stream, through a recurrent node.
  bool GoesOn() const;

  // The fingerprint with another cache dtype, which a session may choose.
  uint64_t FingerprintWith(DType cache_dtype) const;
};

// Returns how many rows of a sequence a step gives to a node of attention, of positions or of a
// recurrent cell. Where a later node has strides, there are several.
int64_t RowsAStep(const Plan& plan, const Node& node);

// Returns the tensor with that name, or null.
using TensorLookup = std::function<const Tensor*(const std::string& name)>;

// Throws Error (kBadModelFile) with a message that names the node.
Plan ParsePlan(const std::string& json, const TensorLookup& tensors);

}  // namespace continual_transformers

#endif  // CONTINUAL_TRANSFORMERS_SESSION_PLAN_H_
