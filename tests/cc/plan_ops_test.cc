#include "cc/session/plan_ops.h"

#include <cstdint>
#include <functional>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "cc/session/error.h"
#include "gtest/gtest.h"
#include "tests/cc/model_file_case.h"
#include "tests/cc/refusals.h"

namespace continual_transformers {
namespace {

// ---- Errors in every op, tested on all nodes of a plan that has every op.

class EveryOpTest : public ::testing::Test {
 protected:
  // Calls `change` for each node of EveryOp, each time on a new plan. Expects that exactly this
  // node is refused, with `part` in the message. Skips nodes for which `change` returns false.
  void ExpectEveryNodeRefused(
      const std::function<bool(PlanBuilder*, Json*, const OpEntry&)>& change,
      const std::string& part) {
    for (const char* dtype : {"float32", "float64"}) {
      const PlanBuilder every = EveryOp(dtype);
      for (size_t i = 0; i < every.plan["nodes"].size(); ++i) {
        PlanBuilder builder = every;
        Json& node = builder.plan["nodes"][i];
        const OpEntry& entry = *FindOpEntry(node["op"]);
        if (change(&builder, &node, entry)) ExpectNodeRefused(builder, i, part);
      }
    }
  }

  std::string ExpectNodeRefused(const PlanBuilder& builder, size_t place, const std::string& part) {
    ++refused_;
    const std::string refusal = Refusal(builder);
    ExpectIn(part, refusal);
    EXPECT_EQ(refusal.rfind("node " + std::to_string(place) + " ", 0), 0u)
        << refusal << builder.plan["nodes"][place];
    return refusal;
  }

  // Guards against a test that changes no node.
  void TearDown() override { EXPECT_GE(refused_, 15); }

 private:
  int refused_ = 0;
};

TEST_F(EveryOpTest, NeedsItsKeys) {
  for (const char* key : {"inputs", "outputs"}) {
    ExpectEveryNodeRefused(
        [&](PlanBuilder*, Json* node, const OpEntry&) {
          (*node)[key] = 3;
          return true;
        },
        "\"" + std::string(key) + "\" is 3, expected a list");
  }
  for (const char* key : {"weights", "attributes", "masks"}) {
    ExpectEveryNodeRefused(
        [&](PlanBuilder*, Json* node, const OpEntry&) {
          (*node)[key] = Json::array();
          return true;
        },
        "expected a JSON object");
  }
}

TEST_F(EveryOpTest, RefusesWhatItDoesNotKnow) {
  const std::string newer = "newer version of continual-transformers-tf";
  ExpectEveryNodeRefused(
      [](PlanBuilder*, Json* node, const OpEntry&) {
        (*node)["device"] = "gpu";
        return true;
      },
      newer);
  ExpectEveryNodeRefused(
      [](PlanBuilder*, Json* node, const OpEntry&) {
        (*node)["op"] = (*node)["op"].get<std::string>() + "2";
        return true;
      },
      "2\", which this version does not know");
  ExpectEveryNodeRefused(
      [](PlanBuilder*, Json* node, const OpEntry&) {
        (*node)["attributes"]["sparsity"] = 1;
        return true;
      },
      "has \"sparsity\", which this version does not know");
  ExpectEveryNodeRefused(
      [](PlanBuilder* builder, Json* node, const OpEntry&) {
        (*node)["weights"]["zero_point"] = "zero_point";
        builder->tensors["zero_point"] = builder->Random({1});
        return true;
      },
      newer);
  ExpectEveryNodeRefused(
      [](PlanBuilder* builder, Json* node, const OpEntry&) {
        (*node)["masks"]["new"] = builder->plan["inputs"][0]["value"];
        return true;
      },
      newer);
  ExpectEveryNodeRefused(
      [](PlanBuilder*, Json* node, const OpEntry& entry) {
        (*node)["attributes"]["function"] = "new";
        return !entry.functions.empty();
      },
      newer);
}

TEST_F(EveryOpTest, ChecksEveryInput) {
  ExpectEveryNodeRefused(
      [](PlanBuilder*, Json* node, const OpEntry& entry) {
        if (entry.inputs.empty()) return false;
        if (entry.more_inputs) {
          (*node)["inputs"] = Json::array();
        } else {
          (*node)["inputs"].erase(0);
        }
        return true;
      },
      "inputs, expected ");
  ExpectEveryNodeRefused(
      [](PlanBuilder*, Json* node, const OpEntry& entry) {
        (*node)["inputs"].push_back(0);
        return !entry.more_inputs;
      },
      "inputs, expected ");
  for (size_t i = 0; i < 3; ++i) {
    const auto put = [&](const std::function<Json(const PlanBuilder&, const Json&)>& value) {
      return [=](PlanBuilder* builder, Json* node, const OpEntry&) {
        if ((*node)["inputs"].size() <= i) return false;
        (*node)["inputs"][i] = value(*builder, *node);
        return true;
      };
    };
    const std::string input = "input " + std::to_string(i) + " is value ";
    ExpectEveryNodeRefused(put([](const PlanBuilder&, const Json&) { return -1; }), input + "-1");
    ExpectEveryNodeRefused(put([](const PlanBuilder&, const Json&) { return 0.0; }), input + "0.0");
    ExpectEveryNodeRefused(put([](const PlanBuilder&, const Json&) { return "x"; }),
                           input + "\"x\"");
    ExpectEveryNodeRefused(
        put([](const PlanBuilder& b, const Json&) { return b.plan["values"].size(); }), input);
    ExpectEveryNodeRefused(
        put([](const PlanBuilder&, const Json& node) { return node["outputs"][0]; }),
        "no earlier node makes it");
    ExpectEveryNodeRefused(put([](const PlanBuilder&, const Json&) { return uint64_t{0} - 1; }),
                           input);
  }
}

TEST_F(EveryOpTest, ChecksTheDtypeOfEveryInput) {
  for (size_t i = 0; i < 3; ++i) {
    for (const char* dtype : {"compute", "int32", "int64", "bool"}) {
      ExpectEveryNodeRefused(
          [&](PlanBuilder* builder, Json* node, const OpEntry& entry) {
            if ((*node)["inputs"].size() <= i) return false;
            const ValueKind kind = entry.inputs[entry.more_inputs ? 0 : i];
            const std::string name =
                dtype == std::string("compute") ? builder->compute_dtype() : dtype;
            const bool fits = kind == ValueKind::kAny ||
                              (kind == ValueKind::kCompute && name == builder->compute_dtype()) ||
                              (kind == ValueKind::kBool && name == "bool") ||
                              (kind == ValueKind::kIndex && (name == "int32" || name == "int64"));
            if (fits) return false;
            // Another input of the plan, with the same shape and this dtype.
            const Shape shape = builder->plan["values"][(*node)["inputs"][i].get<int>()]["shape"];
            (*node)["inputs"][i] = builder->Input("other", shape, name);
            return true;
          },
          ", expected ");
    }
  }
}

TEST_F(EveryOpTest, ChecksItsOutput) {
  ExpectEveryNodeRefused(
      [](PlanBuilder*, Json* node, const OpEntry&) {
        (*node)["outputs"] = Json::array();
        return true;
      },
      "has 0 outputs, expected 1");
  ExpectEveryNodeRefused(
      [](PlanBuilder* builder, Json* node, const OpEntry&) {
        (*node)["outputs"].push_back(builder->Value({1}));
        return true;
      },
      "has 2 outputs, expected 1");
  for (const Json& value : {Json(-1), Json(100000), Json("x"), Json(1.0)}) {
    ExpectEveryNodeRefused(
        [&](PlanBuilder*, Json* node, const OpEntry&) {
          (*node)["outputs"][0] = value;
          return true;
        },
        "its output is value ");
  }
  ExpectEveryNodeRefused(
      [](PlanBuilder*, Json* node, const OpEntry&) {
        (*node)["outputs"][0] = 0;
        return true;
      },
      "already makes");
  for (const char* dtype : {"compute", "int32", "bool"}) {
    ExpectEveryNodeRefused(
        [&](PlanBuilder* builder, Json* node, const OpEntry& entry) {
          Json& value = builder->plan["values"][(*node)["outputs"][0].get<int>()];
          const std::string name =
              dtype == std::string("compute") ? builder->compute_dtype() : dtype;
          if (entry.output == OutputKind::kAny || value["dtype"] == name) return false;
          value["dtype"] = name;
          return true;
        },
        "its output is ");
  }
  // Wrong shapes: one more axis, one less, or one more element in an axis.
  const auto shape = [](const std::function<bool(Json*)>& change, bool longer = false) {
    return [=](PlanBuilder* builder, Json* node, const OpEntry& entry) {
      if (longer && entry.op == Op::kPresent) return false;  // Any number of rows is right.
      return change(&builder->plan["values"][(*node)["outputs"][0].get<int>()]["shape"]);
    };
  };
  ExpectEveryNodeRefused(shape([](Json* shape) {
                           shape->push_back(2);
                           return true;
                         }),
                         "");
  ExpectEveryNodeRefused(shape([](Json* shape) {
                           if (shape->empty()) return false;
                           const bool reshaped = shape->back() == 1;
                           shape->erase(shape->size() - 1);
                           return !reshaped;
                         }),
                         "");
  for (size_t axis = 0; axis < 3; ++axis) {
    ExpectEveryNodeRefused(shape(
                               [&](Json* shape) {
                                 if (shape->size() <= axis) return false;
                                 (*shape)[axis] = (*shape)[axis].get<int>() + 1;
                                 return true;
                               },
                               true),
                           "");
  }
}

TEST_F(EveryOpTest, ChecksEveryWeight) {
  for (size_t i = 0; i < 4; ++i) {
    const auto weight = [&](const std::function<bool(PlanBuilder*, Json*, const WeightEntry&,
                                                     TensorBytes*)>& change) {
      return [=](PlanBuilder* builder, Json* node, const OpEntry& entry) {
        if (entry.weights.size() <= i) return false;
        const WeightEntry& weight = entry.weights[i];
        if (!(*node)["weights"].contains(weight.name)) return false;
        const std::string name = (*node)["weights"][weight.name];
        return change(builder, node, weight, &builder->tensors.at(name));
      };
    };
    ExpectEveryNodeRefused(
        weight([](PlanBuilder*, Json* node, const WeightEntry& entry, TensorBytes*) {
          (*node)["weights"].erase(entry.name);
          const bool prelu = (*node)["attributes"].value("function", "") == "prelu";
          return entry.needed || prelu;
        }),
        "has no weight ");
    ExpectEveryNodeRefused(
        weight([](PlanBuilder*, Json* node, const WeightEntry& entry, TensorBytes*) {
          (*node)["weights"][entry.name] = "no such tensor";
          return true;
        }),
        "is the tensor \"no such tensor\", which the file does not have");
    ExpectEveryNodeRefused(
        weight([](PlanBuilder*, Json* node, const WeightEntry& entry, TensorBytes*) {
          (*node)["weights"][entry.name] = 1;
          return true;
        }),
        "is 1, expected a string");
    for (const char* dtype : {"float32", "float64", "bfloat16", "int32", "int64"}) {
      ExpectEveryNodeRefused(
          weight([&](PlanBuilder* builder, Json*, const WeightEntry&, TensorBytes* tensor) {
            if (tensor->dtype == dtype) return false;
            *tensor = builder->Random(tensor->shape, 1, dtype);
            return true;
          }),
          "expected ");
    }
    for (const int change : {-1, 1, 2}) {
      ExpectEveryNodeRefused(
          weight([&](PlanBuilder* builder, Json*, const WeightEntry&, TensorBytes* tensor) {
            Shape shape = tensor->shape;
            if (change == 2) {
              shape.push_back(2);
            } else {
              if (shape.empty()) return false;
              shape.back() += change;
            }
            const std::string dtype = tensor->dtype;
            *tensor = builder->Random(shape, 1, dtype);
            return true;
          }),
          "has shape ");
    }
  }
}

TEST_F(EveryOpTest, ChecksEveryAttribute) {
  const auto check = [&](const Json& value,
                         const std::function<bool(const AttributeEntry&)>& fits) {
    const PlanBuilder every = EveryOp();
    for (size_t i = 0; i < every.plan["nodes"].size(); ++i) {
      const Json& node = every.plan["nodes"][i];
      const OpEntry& entry = *FindOpEntry(node["op"]);
      std::vector<AttributeEntry> entries = entry.attributes;
      for (const FunctionEntry& function : entry.functions) {
        if (function.name != node["attributes"]["function"]) continue;
        entries.insert(entries.end(), function.attributes.begin(), function.attributes.end());
      }
      if (!entry.functions.empty()) {
        entries.push_back(AttributeEntry::Choice("function", {}));
      }
      for (const AttributeEntry& attribute : entries) {
        const bool in_range = attribute.type == AttributeEntry::Type::kWhole &&
                              value.is_number_integer() && value >= attribute.least &&
                              value <= attribute.most;
        if (in_range || fits(attribute)) continue;
        PlanBuilder builder = every;
        Json& changed = builder.plan["nodes"][i]["attributes"];
        if (value.is_discarded()) {
          changed.erase(attribute.name);
        } else {
          changed[attribute.name] = value;
        }
        ExpectNodeRefused(builder, i, "\"" + attribute.name + "\"");
      }
    }
  };
  using Type = AttributeEntry::Type;
  const auto none = [](const AttributeEntry&) { return false; };
  const auto nullable = [](const AttributeEntry& a) { return a.type == Type::kNumberOrNull; };
  const auto number = [](const AttributeEntry& a) {
    return a.type == Type::kNumber || a.type == Type::kNumberOrNull;
  };
  check(Json(Json::value_t::discarded),  // absent
        [&](const AttributeEntry& a) { return nullable(a) || !a.needed; });
  check(nullptr, nullable);
  check(Json::object(), none);
  check({1, "2"}, none);
  check({1, 2.0}, none);
  // Such an attribute `function` is not a known function either, but has another message.
  const auto choice = [](const AttributeEntry& a) {
    return a.type == Type::kChoice && a.name == "function";
  };
  check("", choice);
  check("1", choice);
  check(true, [](const AttributeEntry& a) { return a.type == Type::kBool; });
  check(1.5, number);
  check(-1e300, none);  // beyond float32
  check(-1, [&](const AttributeEntry& a) { return number(a) && a.number_least < 0; });
  check(int64_t{1} << 40, number);
  check(std::numeric_limits<uint64_t>::max(), number);
}

TEST_F(EveryOpTest, ChecksEveryMask) {
  for (const char* op : {"attention", "retroactive_attention"}) {
    for (const char* name : {"key", "query"}) {
      if (op == std::string("retroactive_attention") && name == std::string("query")) continue;
      const auto refusal = [&](const std::function<Json(PlanBuilder*)>& value) {
        PlanBuilder builder = EveryOp();
        const Json number = value(&builder);
        NodeOf(&builder, op)["masks"][name] = number;
        return ExpectNodeRefused(builder, PlaceOf(builder, op),
                                 "the mask \"" + std::string(name) + "\"");
      };
      ExpectIn("is value -1", refusal([](PlanBuilder*) { return -1; }));
      ExpectIn("is value 1000", refusal([](PlanBuilder*) { return 1000; }));
      ExpectIn("no earlier node makes it",
               refusal([](PlanBuilder* b) { return b->plan["values"].size() - 1; }));
      ExpectIn("is float32 [6], expected bool [1]", refusal([](PlanBuilder*) { return 0; }));
      ExpectIn("is bool [2], expected bool [1]",
               refusal([](PlanBuilder* b) { return b->Input("m", {2}, "bool"); }));
      ExpectIn("is bool [], expected bool [1]",
               refusal([](PlanBuilder* b) { return b->Input("m", {}, "bool"); }));
    }
  }
}

// ---- Errors in single ops.

// Returns the refusal of a plan with one node of this op, on inputs of these shapes.
std::string RefusalOfNode(const std::string& op, const std::vector<Shape>& inputs,
                          const Shape& output, const Json& attributes,
                          const std::vector<std::pair<std::string, Shape>>& weights = {}) {
  PlanBuilder builder;
  std::vector<int> values;
  for (size_t i = 0; i < inputs.size(); ++i) {
    values.push_back(builder.Input("x" + std::to_string(i), inputs[i]));
  }
  std::vector<std::pair<std::string, TensorBytes>> tensors;
  for (const auto& [name, shape] : weights) tensors.push_back({name, builder.Random(shape)});
  if (values.empty()) builder.Input("x", {1});
  builder.Output("y", builder.Node(op, values, output, attributes, tensors));
  return Refusal(builder);
}

TEST(DenseTest, TakesAnyLeadingAxes) {
  const auto refusal = [](const Shape& in, const Shape& out, const Shape& kernel) {
    return RefusalOfNode("dense", {in}, out, {}, {{"kernel", kernel}});
  };
  EXPECT_EQ(refusal({3}, {5}, {3, 5}), "");
  EXPECT_EQ(refusal({2, 7, 3}, {2, 7, 5}, {3, 5}), "");
  ExpectIn("expected at least one axis", refusal({}, {5}, {1, 5}));
  ExpectIn("expected [1]", refusal({3}, {}, {3, 1}));
  ExpectIn("expected [2, 5]", refusal({2, 3}, {3, 5}, {3, 5}));
  ExpectIn("has shape [5, 3], expected [3, 5]", refusal({3}, {5}, {5, 3}));
}

TEST(ActivationTest, HasTheNumbersOfItsFunction) {
  const std::vector<std::pair<std::string, Json>> functions = {
      {"celu", {{"alpha", 1}}},
      {"elu", {{"alpha", 1}}},
      {"exponential", {}},
      {"gelu", {}},
      {"gelu_tanh", {}},
      {"hard_shrink", {{"threshold", 0.5}}},
      {"hard_sigmoid", {}},
      {"hard_silu", {}},
      {"hard_tanh", {}},
      {"leaky_relu", {{"negative_slope", 0.2}}},
      {"linear", {}},
      {"log_sigmoid", {}},
      {"mish", {}},
      {"prelu", {}},
      {"relu", {{"negative_slope", 0}, {"max_value", nullptr}, {"threshold", 0}}},
      {"relu6", {}},
      {"selu", {}},
      {"sigmoid", {}},
      {"silu", {}},
      {"soft_shrink", {{"threshold", 0.5}}},
      {"softplus", {}},
      {"softsign", {}},
      {"sparse_plus", {}},
      {"sparse_sigmoid", {}},
      {"squareplus", {{"b", 4}}},
      {"tanh", {}},
      {"tanh_shrink", {}},
      {"threshold", {{"threshold", 0.5}, {"value", -20}}},
      {"absolute", {}},
      {"cos", {}},
      {"log", {}},
      {"log1p", {}},
      {"negative", {}},
      {"reciprocal", {}},
      {"rsqrt", {}},
      {"sign", {}},
      {"sin", {}},
      {"sqrt", {}},
      {"square", {}},
      {"arccos", {}},
      {"arccosh", {}},
      {"arcsin", {}},
      {"arcsinh", {}},
      {"arctan", {}},
      {"arctanh", {}},
      {"cbrt", {}},
      {"ceil", {}},
      {"cosh", {}},
      {"erf", {}},
      {"erfc", {}},
      {"expm1", {}},
      {"floor", {}},
      {"round", {}},
      {"sinc", {}},
      {"sinh", {}},
      {"tan", {}},
      {"trunc", {}},
  };
  EXPECT_EQ(functions.size(), FindOpEntry("activation")->functions.size());
  for (const auto& [name, numbers] : functions) {
    Json attributes = {{"function", name}};
    if (!numbers.is_null()) attributes.update(numbers);
    std::vector<std::pair<std::string, Shape>> weights;
    if (name == "prelu") weights.push_back({"alpha", {2, 3}});
    EXPECT_EQ(RefusalOfNode("activation", {{2, 3}}, {2, 3}, attributes, weights), "") << name;
    EXPECT_EQ(
        RefusalOfNode(
            "activation", {{}}, {}, attributes,
            name == "prelu" ? std::vector<std::pair<std::string, Shape>>{{"alpha", {}}} : weights),
        "")
        << name;
    if (name != "prelu") {
      ExpectIn("which only \"prelu\" has",
               RefusalOfNode("activation", {{2, 3}}, {2, 3}, attributes, {{"alpha", {2, 3}}}));
    }
    for (const auto& number : numbers.items()) {
      if (number.value().is_null()) continue;
      Json less = attributes;
      less.erase(number.key());
      ExpectIn("has no \"" + number.key() + "\"",
               RefusalOfNode("activation", {{2, 3}}, {2, 3}, less, weights));
    }
  }
}

TEST(SoftmaxAndReduceTest, HaveAnAxisOfTheInput) {
  for (const char* function : {"softmax", "log_softmax", "sparsemax"}) {
    const auto refusal = [&](const Shape& shape, int axis) {
      return RefusalOfNode("softmax", {shape}, shape, {{"function", function}, {"axis", axis}});
    };
    EXPECT_EQ(refusal({2, 3}, 0), "");
    EXPECT_EQ(refusal({2, 3}, 1), "");
    ExpectIn("\"axis\" is 2, but input 0 has shape [2, 3]", refusal({2, 3}, 2));
    ExpectIn("\"axis\" is 0, but input 0 has shape []", refusal({}, 0));
    ExpectIn("\"axis\" is -1", refusal({2, 3}, -1));
  }
  for (const char* function : {"sum", "mean", "max", "min", "product", "argmax", "argmin"}) {
    const auto refusal = [&](const Shape& in, const Shape& out, int axis) {
      return RefusalOfNode("reduce", {in}, out, {{"function", function}, {"axis", axis}});
    };
    EXPECT_EQ(refusal({2, 3}, {3}, 0), "");
    EXPECT_EQ(refusal({2, 3}, {2}, 1), "");
    EXPECT_EQ(refusal({2}, {}, 0), "");
    ExpectIn("expected [2]", refusal({2, 3}, {3}, 1));
    ExpectIn("expected [3]", refusal({2, 3}, {1, 3}, 0));
    ExpectIn("\"axis\" is 2", refusal({2, 3}, {2, 3}, 2));
  }
}

TEST(MatmulTest, MultipliesMatricesThatFit) {
  const auto refusal = [](const Shape& x, const Shape& y, const Shape& out) {
    return RefusalOfNode("matmul", {x, y}, out, Json::object());
  };
  EXPECT_EQ(refusal({2, 3, 4}, {2, 4, 5}, {2, 3, 5}), "");
  EXPECT_EQ(refusal({1, 1, 4}, {1, 4, 1}, {1, 1, 1}), "");
  ExpectIn("input 0 has shape [3, 4], expected 3 axes", refusal({3, 4}, {1, 4, 5}, {3, 5}));
  ExpectIn("input 1 has shape [4, 5], expected 3 axes", refusal({1, 3, 4}, {4, 5}, {3, 5}));
  ExpectIn("input 1 has shape [1, 4, 5], expected [2, 4, 5]",
           refusal({2, 3, 4}, {1, 4, 5}, {2, 3, 5}));
  ExpectIn("input 1 has shape [2, 3, 5], expected [2, 4, 5]",
           refusal({2, 3, 4}, {2, 3, 5}, {2, 3, 5}));
  ExpectIn("its output has shape [2, 5, 3], expected [2, 3, 5]",
           refusal({2, 3, 4}, {2, 4, 5}, {2, 5, 3}));
}

TEST(DepthwiseTest, ReadsRowsOfItsInput) {
  const auto refusal = [](const Shape& in, const Shape& out, const Shape& kernel, int64_t stride,
                          int64_t dilation, const Shape& bias = {}) {
    std::vector<std::pair<std::string, Shape>> weights = {{"kernel", kernel}};
    if (!bias.empty()) weights.emplace_back("bias", bias);
    return RefusalOfNode("depthwise", {in}, out, {{"stride", stride}, {"dilation", dilation}},
                         weights);
  };
  EXPECT_EQ(refusal({5, 4}, {3, 4}, {3, 4}, 1, 1, {4}), "");
  EXPECT_EQ(refusal({5, 4}, {2, 8}, {2, 8}, 2, 2), "");
  EXPECT_EQ(refusal({5, 4}, {1, 4}, {1, 4}, 9, 9), "");
  ExpectIn("reads row 5 of its input, which has 5 rows", refusal({5, 4}, {4, 4}, {3, 4}, 1, 1));
  ExpectIn("reads row 6 of its input, which has 5 rows", refusal({5, 4}, {1, 4}, {3, 4}, 1, 3));
  const int64_t most = std::numeric_limits<int32_t>::max();
  ExpectIn("its input, which has 5 rows", refusal({5, 4}, {4, 4}, {3, 4}, most, most));
  ExpectIn("its output has shape [3, 6], expected [R, k * 4]",
           refusal({5, 4}, {3, 6}, {3, 6}, 1, 1));
  ExpectIn("its output has shape [4], expected [R, k * 4]", refusal({5, 4}, {4}, {3, 4}, 1, 1));
  ExpectIn("input 0 has shape [5], expected 2 axes", refusal({5}, {3, 4}, {3, 4}, 1, 1));
  ExpectIn("has shape [3, 5], expected [3, 4]", refusal({5, 4}, {3, 4}, {3, 5}, 1, 1));
  ExpectIn("has shape [3], expected [4]", refusal({5, 4}, {3, 4}, {3, 4}, 1, 1, {3}));
  ExpectIn("\"stride\" is 0", refusal({5, 4}, {3, 4}, {3, 4}, 0, 1));
}

TEST(BinaryTest, HasTwoOfOneShape) {
  for (const char* function :
       {"add", "subtract", "multiply", "divide", "maximum", "minimum", "power", "arctan2", "equal",
        "fmod", "greater", "greater_equal", "hypot", "logaddexp", "mod", "not_equal"}) {
    const Json attributes = {{"function", function}};
    EXPECT_EQ(RefusalOfNode("binary", {{2}, {2}}, {2}, attributes), "");
    ExpectIn("input 1 has shape [1], expected [2]",
             RefusalOfNode("binary", {{2}, {1}}, {2}, attributes));
    ExpectIn("its output has shape [3], expected [2]",
             RefusalOfNode("binary", {{2}, {2}}, {3}, attributes));
  }
}

TEST(WhereTest, HasThreeOfOneShape) {
  PlanBuilder builder;
  const int x = builder.Input("x", {3});
  const int condition = builder.Input("c", {3}, "bool"), one = builder.Input("o", {1}, "bool");
  const auto refusal = [&](const std::vector<int>& inputs, const Shape& shape) {
    PlanBuilder with = builder;
    with.Output("y", with.Node("where", inputs, shape));
    return Refusal(with);
  };
  EXPECT_EQ(refusal({condition, x, x}, {3}), "");
  ExpectIn("input 1 has shape [3], expected [1]", refusal({one, x, x}, {3}));
  ExpectIn("expected bool", refusal({x, x, x}, {3}));
  ExpectIn("its output has shape [1], expected [3]", refusal({condition, x, x}, {1}));
}

TEST(CumulativeAndSortTest, HaveAnAxisOfTheInput) {
  const auto refusal = [](const std::string& op, const Json& more, int axis) {
    Json attributes = {{"axis", axis}};
    attributes.update(more);
    return RefusalOfNode(op, {{2, 3}}, {2, 3}, attributes);
  };
  for (const char* function : {"sum", "product"}) {
    EXPECT_EQ(refusal("cumulative", {{"function", function}}, 1), "");
    ExpectIn("\"axis\" is 2", refusal("cumulative", {{"function", function}}, 2));
  }
  for (const char* function : {"values", "indices"}) {
    EXPECT_EQ(refusal("sort", {{"function", function}, {"descending", true}}, 0), "");
    ExpectIn("\"axis\" is 2", refusal("sort", {{"function", function}, {"descending", false}}, 2));
    ExpectIn("has no \"descending\"", refusal("sort", {{"function", function}}, 0));
  }
}

TEST(ConcatTest, JoinsAlongOneAxis) {
  const auto refusal = [](const std::vector<Shape>& inputs, const Shape& out, int axis) {
    return RefusalOfNode("concat", inputs, out, {{"axis", axis}});
  };
  EXPECT_EQ(refusal({{2, 3}}, {2, 3}, 1), "");
  EXPECT_EQ(refusal({{2, 3}, {2, 1}, {2, 4}}, {2, 8}, 1), "");
  EXPECT_EQ(refusal({{1, 3}, {4, 3}}, {5, 3}, 0), "");
  ExpectIn("its output has shape [2, 7], expected [2, 8]", refusal({{2, 3}, {2, 5}}, {2, 7}, 1));
  ExpectIn("input 1 has shape [3, 3], expected [2, 3]", refusal({{2, 3}, {3, 3}}, {2, 6}, 1));
  ExpectIn("input 1 has shape [2], expected", refusal({{2, 3}, {2}}, {2, 4}, 1));
  ExpectIn("input 1 has shape [2, 3, 1], expected", refusal({{2, 3}, {2, 3, 1}}, {2, 6}, 1));
  ExpectIn("\"axis\" is 2", refusal({{2, 3}, {2, 3}}, {2, 6}, 2));
  ExpectIn("\"axis\" is 0", refusal({{}, {}}, {2}, 0));

  PlanBuilder builder;
  const int x = builder.Input("x", {2}), m = builder.Input("m", {2}, "bool");
  builder.Output("y", builder.Node("concat", {m, m}, {4}, {{"axis", 0}}, {}, {}, "bool"));
  EXPECT_EQ(Refusal(builder), "");
  builder.Output("z", builder.Node("concat", {x, m}, {4}, {{"axis", 0}}));
  ExpectIn("input 1 is bool, but input 0 is float32", Refusal(builder));
}

TEST(StridedTest, ReadsOnlyItsInput) {
  const auto refusal = [](const Shape& in, const Shape& out, int64_t offset,
                          const std::vector<int64_t>& strides) {
    return RefusalOfNode("strided", {in}, out, {{"offset", offset}, {"strides", strides}});
  };
  const int64_t most = std::numeric_limits<int64_t>::max();
  const int64_t least = std::numeric_limits<int64_t>::min();
  EXPECT_EQ(refusal({3, 4}, {4, 3}, 0, {1, 4}), "");     // transposed
  EXPECT_EQ(refusal({3, 4}, {3, 4}, 11, {-4, -1}), "");  // flipped
  EXPECT_EQ(refusal({3, 4}, {100, 4}, 8, {0, 1}), "");   // broadcast
  EXPECT_EQ(refusal({3, 4}, {}, 11, {}), "");            // one element
  EXPECT_EQ(refusal({}, {5}, 0, {0}), "");
  EXPECT_EQ(refusal({12}, {1, 1}, 0, {2147483647, -2147483647}), "");  // never taken
  ExpectIn("reads element 12 of its input, which has 12 elements",
           refusal({3, 4}, {3, 4}, 1, {4, 1}));
  ExpectIn("reads element -1 of its input", refusal({3, 4}, {3, 4}, 10, {-4, -1}));
  ExpectIn("reads element 12 of its input", refusal({3, 4}, {}, 12, {}));
  ExpectIn("\"offset\" is -1", refusal({3, 4}, {3, 4}, -1, {4, 1}));
  ExpectIn("\"offset\" is 9223372036854775807", refusal({3, 4}, {3, 4}, most, {4, 1}));
  ExpectIn("has 1 strides, but its output has 2 axes", refusal({3, 4}, {3, 4}, 0, {4}));
  ExpectIn("has the stride 9223372036854775807", refusal({3, 4}, {3, 4}, 0, {most, 1}));
  ExpectIn("has the stride -9223372036854775808", refusal({3, 4}, {3, 4}, 0, {1, least}));
  ExpectIn("reads element", refusal({3, 4}, {3, 715827882}, 0, {0, 2147483647}));
  ExpectIn("reads element -", refusal({3, 4}, {2147483647}, 11, {-2147483647}));
  // Two strides that cancel in the sum: each one must be checked.
  ExpectIn("reads element", refusal({3, 4}, {13, 13}, 0, {1, -1}));

  // Compares every slice of 12 elements with the list of all elements that it reads.
  for (int64_t offset = 0; offset < 13; ++offset) {
    for (int64_t a : {-5, -1, 0, 2, 4}) {
      for (int64_t b : {-3, 0, 1, 6}) {
        bool inside = true;
        for (int64_t i = 0; i < 3; ++i) {
          for (int64_t j = 0; j < 2; ++j) {
            const int64_t place = offset + i * a + j * b;
            inside &= 0 <= place && place < 12;
          }
        }
        EXPECT_EQ(refusal({12}, {3, 2}, offset, {a, b}).empty(), inside)
            << offset << " " << a << " " << b;
      }
    }
  }
}

TEST(ReshapeTest, KeepsTheElements) {
  EXPECT_EQ(RefusalOfNode("reshape", {{2, 6}}, {3, 4}, {}), "");
  EXPECT_EQ(RefusalOfNode("reshape", {{1}}, {}, {}), "");
  ExpectIn("has an output of 11 elements, but an input of 12",
           RefusalOfNode("reshape", {{2, 6}}, {11}, {}));
}

TEST(FeaturesTest, HaveAWeightForEach) {
  EXPECT_EQ(RefusalOfNode("affine", {{2, 3}}, {2, 3}, {}, {{"scale", {3}}, {"offset", {3}}}), "");
  ExpectIn("expected [3]",
           RefusalOfNode("affine", {{2, 3}}, {2, 3}, {}, {{"scale", {2}}, {"offset", {3}}}));
  ExpectIn("at least one axis",
           RefusalOfNode("affine", {{}}, {}, {}, {{"scale", {1}}, {"offset", {1}}}));
  for (const char* function : {"layer", "rms", "unit"}) {
    const Json attributes = {{"function", function}, {"epsilon", 1e-6}};
    EXPECT_EQ(RefusalOfNode("norm", {{2, 3}}, {2, 3}, attributes), "");
    EXPECT_EQ(RefusalOfNode("norm", {{3}}, {3}, attributes, {{"beta", {3}}}), "");
    ExpectIn("expected [3]", RefusalOfNode("norm", {{2, 3}}, {2, 3}, attributes, {{"gamma", {2}}}));
    ExpectIn("at least one axis", RefusalOfNode("norm", {{}}, {}, attributes));
  }
  ExpectIn("a number of at least 0",
           RefusalOfNode("norm", {{3}}, {3}, {{"function", "layer"}, {"epsilon", -1e-6}}));
  EXPECT_EQ(
      RefusalOfNode("batch_norm", {{3}}, {3}, {{"epsilon", 0}}, {{"mean", {3}}, {"variance", {3}}}),
      "");
  ExpectIn("has no weight \"variance\"",
           RefusalOfNode("batch_norm", {{3}}, {3}, {{"epsilon", 0}}, {{"mean", {3}}}));
}

TEST(EmbeddingTest, LooksUpOnlyWhatComesFromAnInput) {
  PlanBuilder builder;
  const int x = builder.Input("x", {2}, "int32");
  const int seen = builder.Node("delay", {x}, {2}, {{"steps", 1}}, {}, {}, "int32");
  const int whole = builder.Node("cast", {builder.Input("f", {2})}, {2}, {}, {}, {}, "int64");
  const int flipped =
      builder.Node("strided", {x}, {2}, {{"offset", 1}, {"strides", {-1}}}, {}, {}, "int32");
  const int shaped = builder.Node("reshape", {flipped}, {2, 1}, {}, {}, {}, "int32");
  const int delayed = builder.Node("reshape", {seen}, {2, 1}, {}, {}, {}, "int32");
  builder.Output("seen", seen);
  builder.Output("whole", whole);
  const auto refusal = [&](int value, const Shape& shape) {
    PlanBuilder with = builder;
    with.Output("y", with.Node("embedding", {value}, shape, {}, {{"table", with.Random({5, 3})}}));
    return Refusal(with);
  };
  EXPECT_EQ(refusal(x, {2, 3}), "");
  EXPECT_EQ(refusal(flipped, {2, 3}), "");
  EXPECT_EQ(refusal(shaped, {2, 1, 3}), "");
  ExpectIn("has indices that another node computes", refusal(seen, {2, 3}));
  ExpectIn("has indices that another node computes", refusal(whole, {2, 3}));
  ExpectIn("has indices that another node computes", refusal(delayed, {2, 1, 3}));
  ExpectIn("has shape [5, 3], expected [5, 4]", refusal(x, {2, 4}));
  ExpectIn("expected [2, 3]", refusal(x, {1, 3}));
  ExpectIn("expected [2, 1]", refusal(x, {}));
}

TEST(EmbeddingTest, HasAtLeastOneRow) {
  PlanBuilder builder;
  const int x = builder.Input("x", {}, "int32");
  builder.Output("y", builder.Node("embedding", {x}, {3}, {}, {{"table", builder.Random({0, 3})}}));
  ExpectIn("has shape [0, 3], expected [1, 3]", Refusal(builder));
}

TEST(PositionalTest, ChecksRowsAndStart) {
  const auto refusal = [](const Shape& rows, int64_t start, const Shape& x = {4}) {
    PlanBuilder builder;
    const int input = builder.Input("x", x);
    TensorBytes starts = {"int64", {}, BytesOf(std::vector<int64_t>{start})};
    builder.Output("y", builder.Node("positional", {input}, x, {},
                                     {{"rows", builder.Random(rows)}, {"start", starts}}));
    return Refusal(builder);
  };
  EXPECT_EQ(refusal({7, 4}, 0), "");
  EXPECT_EQ(refusal({1, 4}, int64_t{1} << 60), "");
  ExpectIn("has shape [0, 4], expected [1, 4]", refusal({0, 4}, 0));
  ExpectIn("has shape [7, 3], expected [7, 4]", refusal({7, 3}, 0));
  ExpectIn("has the start -1", refusal({7, 4}, -1));
  ExpectIn("has the start", refusal({7, 4}, std::numeric_limits<int64_t>::max()));
  EXPECT_EQ(refusal({7, 4}, 0, {2, 4}), "");
  ExpectIn("expected 1 axis, or 2", refusal({7, 4}, 0, {1, 2, 4}));
}

TEST(WindowTest, HasRowsOfTheNewestSteps) {
  const auto refusal = [](const Shape& in, const Shape& out, int64_t window) {
    return RefusalOfNode("window", {in}, out, {{"window", window}});
  };
  EXPECT_EQ(refusal({3}, {5, 3}, 5), "");
  EXPECT_EQ(refusal({}, {5}, 5), "");
  EXPECT_EQ(refusal({2, 3}, {1, 2, 3}, 1), "");
  ExpectIn("expected [5, 3]", refusal({3}, {4, 3}, 5));
  ExpectIn("\"window\" is 0", refusal({3}, {1, 3}, 0));
  EXPECT_EQ(RefusalOfNode("zero_untaken", {{5}}, {5}, {}), "");
  ExpectIn("at least one axis", RefusalOfNode("zero_untaken", {{}}, {}, {}));
}

TEST(PresentTest, GivesOneAxis) {
  const Json attributes = {{"rows", 2}, {"first", -3}};
  EXPECT_EQ(RefusalOfNode("present", {}, {5}, attributes), "");
  ExpectIn("expected one axis", RefusalOfNode("present", {}, {5, 1}, attributes));
  ExpectIn("\"rows\" is 0", RefusalOfNode("present", {}, {5}, {{"rows", 0}, {"first", 0}}));
}

TEST(RecurrentTest, ChecksUnitsAndGates) {
  const auto refusal = [](const char* function, const Shape& in, const Shape& out,
                          const Shape& kernel, const Shape& bias) {
    std::vector<std::pair<std::string, Shape>> weights = {{"kernel", kernel}};
    if (!bias.empty()) weights.push_back({"bias", bias});
    const Json attributes = {{"function", function},
                             {"activation", "tanh"},
                             {"gate", "sigmoid"},
                             {"goes_on", true},
                             {"first", -2}};
    return RefusalOfNode("recurrent", {in}, out, attributes, weights);
  };
  EXPECT_EQ(refusal("lstm", {20}, {5}, {5, 20}, {20}), "");
  EXPECT_EQ(refusal("gru", {3, 15}, {3, 5}, {5, 15}, {}), "");
  EXPECT_EQ(refusal("simple", {5}, {5}, {5, 5}, {5}), "");
  ExpectIn("expected [20]", refusal("lstm", {15}, {5}, {5, 20}, {}));
  ExpectIn("expected [3, 15]", refusal("gru", {2, 15}, {3, 5}, {5, 15}, {}));
  ExpectIn("expected [5, 15]", refusal("gru", {15}, {5}, {15, 5}, {}));
  ExpectIn("adds to its input", refusal("gru_reset_before", {15}, {5}, {5, 15}, {15}));
  ExpectIn("at least one axis", refusal("simple", {}, {}, {1, 1}, {}));
}

TEST(AttentionTest, ChecksHeadsAndColumns) {
  const auto refusal = [](const Json& changes, int64_t qk = 6, int64_t key = 6, int64_t value = 9,
                          int64_t out = 9) {
    Json attributes = {{"heads", 3},      {"window", 4},      {"first_column", 0},
                       {"end_column", 4}, {"query_delay", 0}, {"scale", 0.5}};
    attributes.update(changes);
    return RefusalOfNode("attention", {{qk}, {key}, {value}}, {out}, attributes);
  };
  const Json none = Json::object();
  EXPECT_EQ(refusal(none), "");
  EXPECT_EQ(refusal({{"first_column", 3}}), "");
  EXPECT_EQ(refusal({{"end_column", 1}}), "");
  EXPECT_EQ(refusal({{"query_delay", 3}}), "");
  EXPECT_EQ(refusal({{"scale", -2}}), "");
  ExpectIn("attends to columns 4 to 4 - 1", refusal({{"first_column", 4}}));
  ExpectIn("attends to columns 2 to 2 - 1", refusal({{"first_column", 2}, {"end_column", 2}}));
  ExpectIn("attends to columns 0 to 5 - 1 of a window of 4", refusal({{"end_column", 5}}));
  ExpectIn("\"end_column\" is 0", refusal({{"end_column", 0}}));
  ExpectIn("\"first_column\" is -1", refusal({{"first_column", -1}}));
  ExpectIn("query_delay of 4, which is not in its window of 4", refusal({{"query_delay", 4}}));
  ExpectIn("\"heads\" is 0", refusal({{"heads", 0}}));
  ExpectIn("do not divide the query's 6", refusal({{"heads", 4}}));
  ExpectIn("do not divide the value's 9", refusal({{"heads", 2}}));
  ExpectIn("do not divide the key's 7", refusal(none, 6, 7));
  ExpectIn("a query of 6 elements and a key of 9", refusal(none, 6, 9));
  ExpectIn("expected [9]", refusal(none, 6, 6, 9, 6));
  EXPECT_EQ(refusal({{"heads", 6}, {"key_heads", 3}}, 12, 6, 9, 18), "");
  EXPECT_EQ(refusal({{"soft_cap", 2}}), "");
  ExpectIn("expected [18]", refusal({{"heads", 6}, {"key_heads", 3}}, 12, 6, 9, 9));
  ExpectIn("\"key_heads\" is 0", refusal({{"key_heads", 0}}));
  ExpectIn("3 heads of queries and 2 of keys", refusal({{"key_heads", 2}}, 6, 4, 4, 6));
  ExpectIn("do not divide the key's 7", refusal({{"key_heads", 2}}, 6, 7));
  ExpectIn("a query of 6 elements and a key of 6", refusal({{"key_heads", 1}}, 6, 6, 9, 27));
  ExpectIn("has a soft_cap of 0", refusal({{"soft_cap", 0}}));
  ExpectIn("\"soft_cap\" is -1", refusal({{"soft_cap", -1}}));
}

TEST(AttentionTest, TakesSeveralRows) {
  const auto refusal = [](const std::vector<Shape>& inputs, const Shape& out) {
    return RefusalOfNode("attention", inputs, out,
                         {{"heads", 3},
                          {"window", 4},
                          {"first_column", 0},
                          {"end_column", 4},
                          {"query_delay", 0},
                          {"scale", 0.5}});
  };
  EXPECT_EQ(refusal({{2, 6}, {2, 6}, {2, 9}}, {2, 9}), "");
  EXPECT_EQ(refusal({{1, 6}, {1, 6}, {1, 9}}, {1, 9}), "");
  ExpectIn("input 1 has shape [1, 6], expected [6]", refusal({{6}, {1, 6}, {9}}, {9}));
  ExpectIn("input 1 has shape [3, 6], expected [2, 6]", refusal({{2, 6}, {3, 6}, {2, 9}}, {2, 9}));
  ExpectIn("input 2 has shape [9], expected [2, 9]", refusal({{2, 6}, {2, 6}, {9}}, {2, 9}));
  ExpectIn("shape [9], expected [2, 9]", refusal({{2, 6}, {2, 6}, {2, 9}}, {9}));
  ExpectIn("expected 1 axis, or 2", refusal({{2, 1, 6}, {2, 6}, {2, 9}}, {2, 9}));
  ExpectIn("expected 1 axis, or 2", refusal({{}, {2, 6}, {2, 9}}, {2, 9}));
  ExpectIn("at least one axis", refusal({{6}, {}, {9}}, {9}));
}

TEST(AttentionTest, HasAMaskForEachRow) {
  const auto refusal = [](const char* name, int64_t rows) {
    PlanBuilder b;
    const int x = b.Input("x", {2, 6}), mask = b.Input("m", {rows}, "bool");
    b.Output("y", b.Node("attention", {x, x, x}, {2, 6},
                         {{"heads", 3},
                          {"window", 4},
                          {"first_column", 0},
                          {"end_column", 4},
                          {"query_delay", 0},
                          {"scale", 0.5}},
                         {}, {{name, mask}}));
    return Refusal(b);
  };
  for (const char* name : {"key", "query"}) {
    EXPECT_EQ(refusal(name, 2), "");
    ExpectIn("is bool [1], expected bool [2]", refusal(name, 1));
  }
}

TEST(AttentionTest, ChecksItsBiasAndSink) {
  const auto refusal = [](const std::string& name, const Shape& shape) {
    PlanBuilder b;
    const int x = b.Input("x", {4});
    b.Output("y", b.Node("attention", {x, x, x}, {4},
                         {{"heads", 2},
                          {"window", 3},
                          {"first_column", 0},
                          {"end_column", 3},
                          {"query_delay", 0},
                          {"scale", 0.5}},
                         {{name, b.Random(shape)}}));
    return Refusal(b);
  };
  EXPECT_EQ(refusal("bias", {2, 3}), "");
  EXPECT_EQ(refusal("sink", {2}), "");
  ExpectIn("expected [2, 3]", refusal("bias", {3, 2}));
  ExpectIn("expected [2]", refusal("sink", {1}));
}

// A plan of an earlier version has the fingerprint that it had.
TEST(AttentionTest, WhatIsLeftOutIsNotInTheFingerprint) {
  const auto attributes = [](const Json& changes) {
    PlanBuilder b;
    const int x = b.Input("x", {4});
    b.Output("y", b.Attention(x, x, x, 2, 3, changes));
    return b.File()->plan().nodes[0].attributes;
  };
  EXPECT_EQ(attributes(Json::object()).count("key_heads"), 0u);
  EXPECT_EQ(attributes(Json::object()).count("soft_cap"), 0u);
  EXPECT_EQ(attributes({{"soft_cap", 2}}).count("soft_cap"), 1u);
  EXPECT_EQ(attributes({{"key_heads", 2}}).count("key_heads"), 1u);
}

TEST(RotaryTest, ChecksItsAngles) {
  const auto refusal = [](const Shape& x, const Shape& turns, const Shape& angles) {
    PlanBuilder b;
    const int in = b.Input("x", x);
    const std::vector<double> some(Elements(turns), 1e18);
    const int of =
        b.Node("rotary_angles", {}, angles, {}, {{"turns", b.Weight(turns, some, "int64")}});
    b.Output("y", b.Node("rotary", {in, of}, x, {{"interleaved", false}}));
    return Refusal(b);
  };
  EXPECT_EQ(refusal({3, 4}, {2}, {2, 2}), "");
  EXPECT_EQ(refusal({7}, {3}, {2, 3}), "");
  EXPECT_EQ(refusal({5, 3, 4}, {2}, {5, 2, 2}), "");
  EXPECT_EQ(refusal({5, 4}, {2}, {5, 2, 2}), "");
  ExpectIn("expected [3, 2, 2]", refusal({3, 4}, {2}, {5, 2, 2}));
  ExpectIn("expected [2, 2]", refusal({3, 4}, {2}, {2, 3}));
  ExpectIn("expected [2]", refusal({3, 4}, {2, 1}, {2, 2}));
  ExpectIn("turns 2 pairs of heads of 3 elements", refusal({4, 3}, {2}, {2, 2}));
  ExpectIn("at least one axis", refusal({}, {1}, {2, 1}));
}

TEST(RetroactiveAttentionTest, ChecksHeadsAndWindow) {
  const auto refusal = [](const Json& changes, const std::vector<Shape>& inputs, const Shape& out) {
    Json attributes = {{"heads", 3}, {"window", 4}, {"scale", 0.5}, {"algorithm", "update"}};
    attributes.update(changes);
    return RefusalOfNode("retroactive_attention", inputs, out, attributes);
  };
  EXPECT_EQ(refusal(Json::object(), {{6}, {6}, {9}}, {4, 9}), "");
  EXPECT_EQ(refusal({{"algorithm", "recompute"}}, {{6}, {6}, {9}}, {4, 9}), "");
  ExpectIn("\"algorithm\" is \"fast\", expected one of \"auto\", \"update\", \"recompute\"",
           refusal({{"algorithm", "fast"}}, {{6}, {6}, {9}}, {4, 9}));
  ExpectIn("expected [5, 9]", refusal({{"window", 5}}, {{6}, {6}, {9}}, {4, 9}));
  ExpectIn("expected [4, 9]", refusal(Json::object(), {{6}, {6}, {9}}, {9}));
  ExpectIn("do not divide the value's 8", refusal(Json::object(), {{6}, {6}, {8}}, {4, 8}));
  ExpectIn("expected 1 axis", refusal(Json::object(), {{1, 6}, {6}, {9}}, {4, 9}));
}

TEST(WindowAttentionTest, ChecksRowsAndHeads) {
  const auto refusal = [](const Json& changes, const std::vector<Shape>& inputs, const Shape& out) {
    Json attributes = {{"heads", 3}, {"scale", 0.5}, {"band", 0}, {"causal", false}};
    attributes.update(changes);
    return RefusalOfNode("window_attention", inputs, out, attributes);
  };
  EXPECT_EQ(refusal(Json::object(), {{1, 6}, {5, 6}, {5, 9}}, {1, 9}), "");
  EXPECT_EQ(refusal({{"band", 100}}, {{5, 6}, {5, 6}, {5, 9}}, {5, 9}), "");
  ExpectIn("\"band\" is -1", refusal({{"band", -1}}, {{1, 6}, {5, 6}, {5, 9}}, {1, 9}));
  ExpectIn("has 6 rows of queries, more than the 5 rows of its window",
           refusal({{"causal", true}}, {{6, 6}, {5, 6}, {5, 9}}, {6, 9}));
  EXPECT_EQ(refusal({{"rows", 2}, {"first", -3}}, {{6, 6}, {5, 6}, {5, 9}}, {6, 9}), "");
  ExpectIn("\"rows\" is 0", refusal({{"rows", 0}}, {{1, 6}, {5, 6}, {5, 9}}, {1, 9}));
  ExpectIn("input 2 has shape [4, 9], expected [5, 9]",
           refusal(Json::object(), {{1, 6}, {5, 6}, {4, 9}}, {1, 9}));
  ExpectIn("expected [1, 9]", refusal(Json::object(), {{1, 6}, {5, 6}, {5, 9}}, {1, 6}));
  ExpectIn("a query of 6 elements and a key of 3",
           refusal(Json::object(), {{1, 6}, {5, 3}, {5, 9}}, {1, 9}));
  ExpectIn("expected 2 axes", refusal(Json::object(), {{6}, {5, 6}, {5, 9}}, {1, 9}));
}

TEST(MaskTest, HasOneElement) {
  PlanBuilder builder;
  const int x = builder.Input("x", {3});
  const int m = builder.Input("m", {1}, "bool"), n = builder.Input("n", {3}, "bool");
  const auto refusal = [&](const std::string& op, const std::vector<int>& inputs,
                           const Shape& shape, const std::string& dtype,
                           const Json& attributes = {}) {
    PlanBuilder with = builder;
    with.Output("y", with.Node(op, inputs, shape, attributes, {}, {}, dtype));
    return Refusal(with);
  };
  EXPECT_EQ(refusal("masked", {x, m}, {3}, ""), "");
  ExpectIn("input 1 has shape [3], expected [1]", refusal("masked", {x, n}, {3}, ""));
  EXPECT_EQ(refusal("mask_and", {m, m}, {1}, "bool"), "");
  EXPECT_EQ(refusal("mask_and", {n, n}, {3}, "bool"), "");
  ExpectIn("input 1 has shape [1], expected [3]", refusal("mask_and", {n, m}, {3}, "bool"));
  ExpectIn("input 1 has shape [3], expected [1]", refusal("mask_and", {m, n}, {1}, "bool"));
  ExpectIn("expected [3]", refusal("mask_and", {n, n}, {1}, "bool"));
  const Json attributes = {{"value", -1}, {"any", false}};
  EXPECT_EQ(refusal("not_equal", {x}, {1}, "bool", attributes), "");
  EXPECT_EQ(refusal("not_equal", {n}, {1}, "bool", attributes), "");
  ExpectIn("expected [1]", refusal("not_equal", {x}, {3}, "bool", attributes));
}

TEST(CastTest, GoesFromAnyToAny) {
  const std::vector<std::string> dtypes = {"float32", "int32", "int64", "bool"};
  for (const std::string& from : dtypes) {
    for (const std::string& to : dtypes) {
      PlanBuilder builder;
      const int x = builder.Input("x", {2, 3}, from);
      builder.Output("y", builder.Node("cast", {x}, {2, 3}, {}, {}, {}, to));
      EXPECT_EQ(Refusal(builder), "");
    }
  }
  ExpectIn("expected [2]", RefusalOfNode("cast", {{2}}, {1, 2}, {}));
}

}  // namespace
}  // namespace continual_transformers
