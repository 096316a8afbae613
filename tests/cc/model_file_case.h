// Writes model files for tests: a plan, node by node, and weights with chosen values.
#ifndef CONTINUAL_TRANSFORMERS_TESTS_CC_MODEL_FILE_CASE_H_
#define CONTINUAL_TRANSFORMERS_TESTS_CC_MODEL_FILE_CASE_H_

#include <cmath>
#include <cstdint>
#include <cstring>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "cc/session/model_file.h"

namespace continual_transformers {

using Json = nlohmann::json;
using Shape = std::vector<int64_t>;

// One tensor of a safetensors file.
struct TensorBytes {
  std::string dtype;  // as in a plan: "float32", "bfloat16", "int64"
  Shape shape;
  std::string bytes;
};

inline int64_t Elements(const Shape& shape) {
  int64_t elements = 1;
  for (int64_t axis : shape) elements *= axis;
  return elements;
}

// "float32" -> "F32"
inline std::string SafetensorsName(const std::string& dtype) {
  static const std::map<std::string, std::string> names = {
      {"float32", "F32"}, {"float64", "F64"}, {"bfloat16", "BF16"}, {"float16", "F16"},
      {"int32", "I32"},   {"int64", "I64"},   {"bool", "BOOL"}};
  return names.at(dtype);
}

template <typename T>
std::string BytesOf(const std::vector<T>& values) {
  return std::string(reinterpret_cast<const char*>(values.data()), values.size() * sizeof(T));
}

// Rounds values to a dtype of weights.
inline std::string BytesOf(const std::string& dtype, const std::vector<double>& values) {
  if (dtype == "float64") return BytesOf(values);
  if (dtype == "float32") return BytesOf(std::vector<float>(values.begin(), values.end()));
  if (dtype == "int64") return BytesOf(std::vector<int64_t>(values.begin(), values.end()));
  if (dtype == "int32") return BytesOf(std::vector<int32_t>(values.begin(), values.end()));
  if (dtype == "bfloat16") {
    std::vector<uint16_t> rounded;
    for (double value : values) {
      const float single = static_cast<float>(value);
      uint32_t bits;
      std::memcpy(&bits, &single, sizeof(bits));
      // Rounds to nearest, ties to even. The weights of tests have no NaN.
      rounded.push_back(static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16));
    }
    return BytesOf(rounded);
  }
  throw std::invalid_argument("no weights have dtype " + dtype);
}

// Returns the bytes of a safetensors file: 8 bytes of header length, the header, the tensors'
// bytes.
inline std::string SafetensorsFile(const std::string& header, const std::string& data) {
  const uint64_t length = header.size();
  return std::string(reinterpret_cast<const char*>(&length), sizeof(length)) + header + data;
}

// Builds a plan and its weights:
//
//   PlanBuilder builder;
//   int x = builder.Input("x", {6});
//   int y = builder.Node("dense", {x}, {4}, {}, {{"kernel", builder.Random({6, 4})}});
//   builder.Output("y", y);
//   auto file = builder.File();
//
// To make a wrong file, change `plan` and `tensors` by hand before Bytes or File.
class PlanBuilder {
 public:
  explicit PlanBuilder(const std::string& compute_dtype = "float32", uint32_t seed = 1)
      : random_(seed) {
    plan = {{"producer", "PlanBuilder"},
            {"name", "model"},
            {"compute_dtype", compute_dtype},
            {"cache_dtype", compute_dtype},
            {"weights_dtype", compute_dtype},
            {"receptive_field", 1},
            {"delay", 0},
            {"block", 1},
            {"values", Json::array()},
            {"inputs", Json::array()},
            {"outputs", Json::array()},
            {"input_structure", Json::array()},
            {"output_structure", Json::array()},
            {"nodes", Json::array()},
            {"keras_state", Json::array()}};
  }

  // Adds a value that no node makes yet, and returns its number. dtype "": the compute dtype.
  int Value(const Shape& shape, const std::string& dtype = "") {
    plan["values"].push_back(
        {{"shape", shape}, {"dtype", dtype.empty() ? compute_dtype() : dtype}});
    return static_cast<int>(plan["values"].size()) - 1;
  }

  // Adds an input of the plan and returns its value.
  int Input(const std::string& name, const Shape& shape, const std::string& dtype = "") {
    const int value = Value(shape, dtype);
    plan["input_structure"].push_back(plan["inputs"].size());
    plan["inputs"].push_back({{"name", name}, {"value", value}});
    return value;
  }

  void Output(const std::string& name, int value) {
    plan["output_structure"].push_back(plan["outputs"].size());
    plan["outputs"].push_back({{"name", name}, {"value", value}});
  }

  // Returns a weight with these values, in a dtype ("": the compute dtype).
  TensorBytes Weight(const Shape& shape, const std::vector<double>& values,
                     const std::string& dtype = "") const {
    if (Elements(shape) != static_cast<int64_t>(values.size())) {
      throw std::invalid_argument("a weight's values do not fill its shape");
    }
    const std::string name = dtype.empty() ? compute_dtype() : dtype;
    return {name, shape, BytesOf(name, values)};
  }

  // Returns a weight of normally distributed values, the same on every run.
  TensorBytes Random(const Shape& shape, double scale = 0.5, const std::string& dtype = "") {
    std::vector<double> values(Elements(shape));
    for (double& value : values) value = scale * Normal();
    return Weight(shape, values, dtype);
  }

  // Adds a node with one output, of `shape` and `dtype` ("": the compute dtype), and returns the
  // output's value. `weights` maps the op's names of weights to weights, and `masks` the names of
  // masks to values.
  int Node(const std::string& op, const std::vector<int>& inputs, const Shape& shape,
           const Json& attributes = Json::object(),
           const std::vector<std::pair<std::string, TensorBytes>>& weights = {},
           const std::map<std::string, int>& masks = {}, const std::string& dtype = "") {
    const std::string name = op + "_" + std::to_string(plan["nodes"].size());
    const int output = Value(shape, dtype);
    Json node = {{"op", op},
                 {"name", name},
                 {"inputs", inputs},
                 {"outputs", {output}},
                 {"weights", Json::object()},
                 {"attributes", attributes.is_null() ? Json::object() : attributes}};
    for (const auto& [role, weight] : weights) {
      node["weights"][role] = name + "/" + role;
      tensors[name + "/" + role] = weight;
    }
    if (!masks.empty()) node["masks"] = masks;
    plan["nodes"].push_back(node);
    return output;
  }

  // Adds a `dense` node with a random kernel and bias.
  int Dense(int input, const Shape& shape, const std::string& kernel_dtype = "") {
    const int64_t in = plan["values"][input]["shape"].back();
    const int64_t out = shape.back();
    TensorBytes kernel = Random({in, out}, 1.0 / std::sqrt(static_cast<double>(in)), kernel_dtype);
    return Node("dense", {input}, shape, Json::object(),
                {{"kernel", std::move(kernel)}, {"bias", Random({out}, 0.1)}});
  }

  // Adds an `attention` node over its whole window. `changes` replaces attributes.
  int Attention(int query, int key, int value, int64_t heads, int64_t window,
                const Json& changes = Json::object(),
                const std::map<std::string, int>& masks = {}) {
    const int64_t features = plan["values"][query]["shape"][0];
    Json attributes = {
        {"heads", heads},    {"window", window},
        {"first_column", 0}, {"end_column", window},
        {"query_delay", 0},  {"scale", 1 / std::sqrt(static_cast<double>(features / heads))}};
    attributes.update(changes);
    return Node("attention", {query, key, value}, plan["values"][value]["shape"], attributes, {},
                masks);
  }

  // Returns the header of the file: where each tensor lies, and the plan in the metadata.
  Json Header() const {
    Json header;
    int64_t offset = 0;
    for (const auto& [name, tensor] : tensors) {
      const int64_t end = offset + static_cast<int64_t>(tensor.bytes.size());
      header[name] = {{"dtype", SafetensorsName(tensor.dtype)},
                      {"shape", tensor.shape},
                      {"data_offsets", {offset, end}}};
      offset = end;
    }
    header["__metadata__"] = {
        {"format", "continual-transformers"}, {"format_version", "1"}, {"plan", plan.dump()}};
    return header;
  }

  std::string Data() const {
    std::string data;
    for (const auto& [name, tensor] : tensors) data += tensor.bytes;
    return data;
  }

  // Returns the file's bytes. The header is padded to a multiple of 8 bytes, as safetensors does.
  std::string Bytes() const {
    std::string header = Header().dump();
    header.append((8 - header.size() % 8) % 8, ' ');
    return SafetensorsFile(header, Data());
  }

  std::shared_ptr<const ModelFile> File() const {
    const std::string bytes = Bytes();
    return ModelFile::Copy(bytes.data(), bytes.size());
  }

  std::string compute_dtype() const { return plan["compute_dtype"]; }

  Json plan;
  std::map<std::string, TensorBytes> tensors;

 private:
  // Uses Box-Muller, as std::normal_distribution differs between standard libraries.
  double Normal() {
    const double radius = std::sqrt(-2 * std::log((random_() + 1.0) / 4294967296.0));
    return radius * std::cos(6.283185307179586 * (random_() / 4294967296.0));
  }

  std::mt19937 random_;
};

// A small plan with every op, each between other ops where possible.
inline PlanBuilder EveryOp(const std::string& compute_dtype = "float32") {
  PlanBuilder b(compute_dtype);
  b.plan["receptive_field"] = 4;
  const int x = b.Input("x", {6});
  const int tokens = b.Input("tokens", {2}, "int32");
  const int id = b.Input("id", {}, "int64");

  const auto function = [](const char* name) { return Json{{"function", name}}; };
  int y = b.Dense(x, {4});
  y = b.Node(
      "activation", {y}, {4},
      {{"function", "relu"}, {"negative_slope", 0.1}, {"max_value", nullptr}, {"threshold", 0}});
  y = b.Node("activation", {y}, {4}, function("prelu"), {{"alpha", b.Random({4})}});
  y = b.Node("affine", {y}, {4}, {}, {{"scale", b.Random({4})}, {"offset", b.Random({4})}});
  y = b.Node("batch_norm", {y}, {4}, {{"epsilon", 1e-3}},
             {{"mean", b.Random({4})},
              {"variance", b.Weight({4}, {1, 2, 0.5, 3})},
              {"gamma", b.Random({4})},
              {"beta", b.Random({4})}});
  y = b.Node("positional", {y}, {4}, {},
             {{"rows", b.Random({7, 4})}, {"start", b.Weight({}, {3}, "int64")}});
  const int normal = b.Node("norm", {y}, {4}, {{"function", "layer"}, {"epsilon", 1e-6}},
                            {{"gamma", b.Random({4})}, {"beta", b.Random({4})}});
  const int angles =
      b.Node("rotary_angles", {}, {2, 1}, {}, {{"turns", b.Weight({1}, {-3e18}, "int64")}});
  const int turned = b.Node("rotary", {normal, angles}, {4}, {{"interleaved", true}});

  // Tokens, reversed, as [1, 2], and looked up.
  int t = b.Node("strided", {tokens}, {2}, {{"offset", 1}, {"strides", {-1}}}, {}, {}, "int32");
  t = b.Node("reshape", {t}, {1, 2}, {}, {}, {}, "int32");
  const int embedded = b.Node("embedding", {t}, {1, 2, 3}, {}, {{"table", b.Random({5, 3})}});
  const int one = b.Node("embedding", {id}, {6}, {}, {{"table", b.Random({3, 6})}});

  const int differs = b.Node("not_equal", {t}, {1}, {{"value", 0}, {"any", true}}, {}, {}, "bool");
  const int nonzero =
      b.Node("not_equal", {x}, {1}, {{"value", 0.5}, {"any", false}}, {}, {}, "bool");
  const int mask = b.Node("mask_and", {differs, nonzero}, {1}, {}, {}, {}, "bool");
  const int late = b.Node("delay", {mask}, {1}, {{"steps", 1}}, {}, {}, "bool");

  const int query = b.Node("delay", {turned}, {4}, {{"steps", 1}});
  const int seen = b.Attention(query, turned, x, 2, 4, {{"query_delay", 1}, {"first_column", 1}},
                               {{"key", mask}, {"query", late}});
  const int all = b.Node("retroactive_attention", {normal, normal, x}, {4, 6},
                         {{"heads", 2}, {"window", 4}, {"scale", 0.7}, {"algorithm", "auto"}}, {},
                         {{"key", mask}});
  const int rows = b.Node("window", {y}, {4, 4}, {{"window", 4}});
  // Both read windows of y: one in its ring, the other as a value.
  const int deep = b.Node("depthwise", {b.Node("window", {y}, {3, 4}, {{"window", 3}})}, {1, 8},
                          {{"stride", 1}, {"dilation", 2}},
                          {{"kernel", b.Random({2, 8})}, {"bias", b.Random({8})}});
  const int wide = b.Node("depthwise", {rows}, {2, 4}, {{"stride", 2}, {"dilation", 1}},
                          {{"kernel", b.Random({2, 4})}});
  const int pair =
      b.Node("matmul", {b.Node("reshape", {deep}, {1, 2, 4}), b.Node("reshape", {wide}, {1, 4, 2})},
             {1, 2, 2});
  const int taken = b.Node("zero_untaken", {rows}, {4, 4});
  const int newest = b.Node("strided", {taken}, {1, 4}, {{"offset", 12}, {"strides", {4, 1}}});
  const int windowed = b.Node("window_attention", {newest, taken, all}, {1, 6},
                              {{"heads", 2}, {"scale", 1}, {"band", 3}, {"causal", true}});

  const int flat = b.Node("reshape", {embedded}, {6});
  const int added = b.Node("binary", {flat, one}, {6}, function("add"));
  const int ordered =
      b.Node("sort", {added}, {6}, {{"function", "values"}, {"axis", 0}, {"descending", true}});
  const int sums = b.Node("cumulative", {ordered}, {6}, {{"function", "sum"}, {"axis", 0}});
  const int positive = b.Node("cast", {sums}, {6}, {}, {}, {}, "bool");
  const int sum = b.Node("where", {positive, sums, added}, {6});
  const int masked = b.Node("masked", {sum, mask}, {6});
  const int constant = b.Node("constant", {}, {6}, {}, {{"value", b.Random({6})}});
  const int newer = b.Node("reduce", {windowed}, {6}, {{"function", "mean"}, {"axis", 0}});
  const int present = b.Node("present", {}, {6}, {{"rows", 1}, {"first", -2}});
  const int there = b.Node("binary", {newer, present}, {6}, function("add"));
  const int joined = b.Node("concat", {seen, masked, constant, there}, {24}, {{"axis", 0}});
  const int state =
      b.Node("recurrent", {joined}, {6},
             {{"function", "lstm"},
              {"activation", "tanh"},
              {"gate", "sigmoid"},
              {"goes_on", true},
              {"first", -1}},
             {{"kernel", b.Random({6, 24})}, {"bias", b.Random({24})}}, {{"step", mask}});
  const int soft = b.Node("softmax", {joined}, {24}, {{"function", "softmax"}, {"axis", 0}});
  const int whole = b.Node("cast", {soft}, {24}, {}, {}, {}, "int32");
  b.Output("y", soft);
  b.Output("all", all);
  b.Output("whole", whole);
  b.Output("mask", mask);
  b.Output("state", state);
  b.Output("pair", pair);
  return b;
}

}  // namespace continual_transformers

#endif  // CONTINUAL_TRANSFORMERS_TESTS_CC_MODEL_FILE_CASE_H_
