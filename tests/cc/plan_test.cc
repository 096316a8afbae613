#include "cc/session/plan.h"

#include <cstdint>
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

TEST(PlanTest, RefusesATopLevelThatIsWrong) {
  const auto expect = [](const std::string& pointer, const Json& value, const std::string& part) {
    PlanBuilder builder = EveryOp();
    builder.plan[Json::json_pointer(pointer)] = value;
    ExpectIn(part, Refusal(builder));
  };
  expect("/producer", 1, "the plan: \"producer\" is 1, expected a string");
  expect("/name", nullptr, "\"name\" is null");
  expect("/compute_dtype", "bfloat16", "\"compute_dtype\" is \"bfloat16\", expected one of");
  expect("/compute_dtype", "int8", "\"compute_dtype\" is \"int8\"");
  expect("/compute_dtype", "int4", "newer version");
  expect("/cache_dtype", "float64", "\"cache_dtype\" is \"float64\"");
  expect("/cache_dtype", "int4", "newer version");
  expect("/weights_dtype", "float16", "\"weights_dtype\" is \"float16\"");
  expect("/receptive_field", 0, "\"receptive_field\" is 0, expected a whole number from 1");
  expect("/receptive_field", 1.5, "\"receptive_field\" is 1.5");
  expect("/receptive_field", std::numeric_limits<int64_t>::max(), "\"receptive_field\" is");
  expect("/delay", -1, "\"delay\" is -1");
  expect("/block", 0, "\"block\" is 0");
  expect("/block", "1", "\"block\" is \"1\"");
  expect("/values", Json::object(), "\"values\" is an object, expected a list");
  expect("/values/0", 3, "value 0 is 3, expected a JSON object");
  expect("/values/0/dtype", "float64", "value 0: \"dtype\" is \"float64\", expected one of");
  expect("/values/0/dtype", "bfloat16", "value 0: \"dtype\"");
  expect("/values/0/dtype", "complex64", "newer version");
  expect("/values/0/strides", 1, "value 0 has \"strides\", which this version does not know");
  expect("/values/0/shape", {0}, "value 0 has shape [0]");
  expect("/values/0/shape", {-6}, "value 0 has shape [-6]");
  expect("/values/0/shape", {6.0}, "value 0 has shape [6.0]");
  expect("/values/0/shape", {int64_t{1} << 31}, "at most 2^31 - 1 elements");
  expect("/values/0/shape", {65536, 32768}, "at most 2^31 - 1 elements");
  expect("/values/0/shape", {int64_t{1} << 32, int64_t{1} << 32}, "at most 2^31 - 1 elements");
  expect("/values/0/shape", {1, 1, 1, 1, 1, 1, 1, 1, 6}, "value 0 has 9 axes, expected at most 8");
  expect("/inputs", Json::array(), "the plan has no inputs");
  expect("/outputs", Json::array(), "the plan has no outputs");
  expect("/inputs/0/value", 1000, "input 0 is value 1000, but the plan has");
  expect("/inputs/0/value", -1, "input 0 is value -1");
  expect("/inputs/0/value", 0.0, "input 0 is value 0.0");
  expect("/inputs/1/value", 0,
         "input \"tokens\" is value 0, which an input or an earlier node already makes");
  expect("/inputs/0/dtype", "float32", "input 0 has \"dtype\", which this version does not know");
  expect("/outputs/0/value", 1000, "output 0 is value 1000");
  expect("/input_structure", 0, "\"input_structure\" has 1 leaves, expected 3");
  expect("/input_structure", {0, 1, 1}, "has the leaf 1 twice");
  expect("/input_structure", {0, 1, 3}, "has the leaf 3");
  expect("/input_structure", {0, 1, -1}, "has the leaf -1");
  expect("/input_structure", {0, 1, "x"}, "has the leaf \"x\"");
  expect("/input_structure", {0, 1, nullptr}, "has the leaf null");
  expect("/output_structure", {{"y", 0}}, "\"output_structure\" has 1 leaves, expected 6");
  expect("/nodes", 1, "\"nodes\" is 1, expected a list");
  expect("/nodes/0", 1, "node 0 is 1, expected a JSON object");
  expect("/sampling", 1, "the plan has \"sampling\", which this version does not know");
  const Json every = EveryOp().plan;
  for (const auto& member : every.items()) {
    PlanBuilder builder = EveryOp();
    builder.plan.erase(member.key());
    ExpectIn("the plan has no \"" + member.key() + "\"", Refusal(builder));
  }
}

TEST(PlanTest, Float64HasOtherDtypes) {
  for (const char* key : {"cache_dtype", "weights_dtype"}) {
    PlanBuilder builder = EveryOp("float64");
    builder.plan[key] = "float32";
    ExpectIn("expected one of \"float64\"", Refusal(builder));
  }
}

TEST(PlanTest, RefusesValuesThatNothingMakesOrThatAreMadeTwice) {
  PlanBuilder builder = EveryOp();
  builder.Value({3});
  ExpectIn("no input and no node makes value ", Refusal(builder));

  PlanBuilder twice = EveryOp();
  twice.plan["nodes"].push_back(twice.plan["nodes"][0]);
  ExpectIn("its output is value 3, which an input or an earlier node already makes",
           Refusal(twice));

  PlanBuilder input;
  const int x = input.Input("x", {2});
  const int y = input.Dense(x, {2});
  input.Output("y", y);
  input.plan["nodes"][0]["outputs"][0] = x;
  ExpectIn("already makes", Refusal(input));

  PlanBuilder late = EveryOp();
  std::swap(late.plan["nodes"][0], late.plan["nodes"][1]);
  ExpectIn("but no input of the plan and no earlier node makes it", Refusal(late));
}

TEST(PlanTest, RefusesMoreNodesThanItSays) {
  const auto refusal = [](int nodes) {
    PlanBuilder builder;
    int y = builder.Input("x", {1});
    for (int i = 0; i < nodes; ++i) y = builder.Node("reshape", {y}, {1});
    builder.Output("y", y);
    return Refusal(builder);
  };
  EXPECT_EQ(refusal(65536), "");
  ExpectIn("the plan has 65537 nodes, expected at most 65536", refusal(65537));
}

TEST(PlanTest, RefusesSizesBeyondAnyMemory) {
  const auto attention = [](int64_t features, int64_t window) {
    PlanBuilder builder;
    const int x = builder.Input("x", {features});
    builder.Output("y", builder.Attention(x, x, x, 1, window));
    return Refusal(builder);
  };
  EXPECT_EQ(attention(1 << 10, 1 << 26), "");  // 512 GiB
  ExpectIn("more than 2^40 bytes of state", attention(1 << 10, 1 << 27));
  ExpectIn("more than 2^40 bytes of state", attention(1 << 28, 2147483647));
  ExpectIn("\"window\" is 2147483648", attention(1, int64_t{1} << 31));

  const auto delay = [](int64_t steps) {
    PlanBuilder builder;
    const int x = builder.Input("x", {1 << 20}, "int64");
    builder.Output("y", builder.Node("delay", {x}, {1 << 20}, {{"steps", steps}}, {}, {}, "int64"));
    return Refusal(builder);
  };
  EXPECT_EQ(delay(1 << 16), "");
  ExpectIn("more than 2^40 bytes of state", delay(1 << 17));

  PlanBuilder values;
  int y = values.Input("x", {1});
  for (int i = 0; i < 129; ++i) {
    y = values.Node("strided", {y}, {2147483647}, {{"offset", 0}, {"strides", {0}}});
  }
  values.Output("y", y);
  ExpectIn("the values of one step have more than 2^40 bytes", Refusal(values));
}

TEST(DTypeTest, HasNamesAndSizes) {
  const std::vector<std::pair<std::string, int64_t>> expected = {
      {"float32", 4}, {"float64", 8}, {"bfloat16", 2}, {"float16", 2},
      {"int32", 4},   {"int64", 8},   {"bool", 1}};
  for (const auto& [name, bytes] : expected) {
    EXPECT_EQ(NameOf(DTypeOf(name)), name);
    EXPECT_EQ(SizeOf(DTypeOf(name)), bytes);
  }
  EXPECT_THROW(DTypeOf("float8"), Error);
}

}  // namespace
}  // namespace continual_transformers
