// Helpers to run sessions in tests: random inputs for any plan, and outputs as bytes or numbers.
#ifndef CONTINUAL_TRANSFORMERS_TESTS_CC_SESSION_CASE_H_
#define CONTINUAL_TRANSFORMERS_TESTS_CC_SESSION_CASE_H_

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "cc/session/error.h"
#include "cc/session/session.h"
#include "gtest/gtest.h"
#include "tests/cc/model_file_case.h"

namespace continual_transformers {

using Ids = std::vector<StreamId>;

// The bytes of every input or output of a call: [M, T, ...] each.
using Arrays = std::vector<std::string>;

inline int64_t RowBytes(const Plan& plan, const Port& port) {
  const Value& value = plan.values[port.value];
  return value.size * SizeOf(value.dtype);
}

// Returns inputs of `rows` rows: normally distributed numbers, tokens 0 to 2, bools.
inline Arrays RandomInputs(const Plan& plan, int64_t rows, uint32_t seed) {
  std::mt19937 random(seed);
  std::normal_distribution<double> normal;
  Arrays inputs;
  for (const Port& port : plan.inputs) {
    const Value& value = plan.values[port.value];
    std::vector<double> numbers(rows * value.size);
    const bool is_float = value.dtype == DType::kFloat32 || value.dtype == DType::kFloat64;
    for (double& x : numbers) x = is_float ? normal(random) : random() % 3;
    if (value.dtype == DType::kBool) {
      inputs.emplace_back();
      for (const double x : numbers) inputs.back().push_back(x > 0);
    } else {
      inputs.push_back(BytesOf(NameOf(value.dtype), numbers));
    }
  }
  return inputs;
}

// Takes `steps` steps of streams (null: the default streams) and returns the outputs.
inline Arrays TakeSteps(Session* session, const StreamId* ids, int64_t count, int64_t steps,
                        const Arrays& inputs, const bool* key_mask = nullptr) {
  const Plan& plan = session->plan();
  Arrays outputs;
  std::vector<const void*> from;
  std::vector<void*> to;
  for (const std::string& input : inputs) from.push_back(input.data());
  for (const Port& port : plan.outputs) {
    outputs.emplace_back(count * steps * RowBytes(plan, port), '\xee');
  }
  for (std::string& output : outputs) to.push_back(output.data());
  session->Step(ids, count, steps, from.data(), to.data(), key_mask);
  return outputs;
}

inline Arrays TakeSteps(Session* session, const Ids& ids, int64_t steps, const Arrays& inputs) {
  return TakeSteps(session, ids.data(), ids.size(), steps, inputs);
}

// Takes one step of one stream, with inputs from `seed`.
inline Arrays StepOne(Session* session, StreamId id, uint32_t seed) {
  return TakeSteps(session, {id}, 1, RandomInputs(session->plan(), 1, seed));
}

inline Ids OpenStreams(Session* session, int64_t count) {
  Ids ids(count);
  session->Open(count, ids.data());
  return ids;
}

inline std::string StateOf(const Session& session, StreamId id) {
  std::string state(session.state_bytes(), '\xee');
  session.GetState(id, state.data());
  return state;
}

inline std::vector<int64_t> PositionsOf(const Session& session, const Ids& ids) {
  std::vector<int64_t> positions(ids.size());
  session.Positions(ids.data(), ids.size(), positions.data());
  return positions;
}

// Returns the rows [begin, end) of every array.
inline Arrays Rows(const std::vector<Port>& ports, const Plan& plan, const Arrays& arrays,
                   int64_t begin, int64_t end) {
  Arrays rows;
  for (size_t i = 0; i < arrays.size(); ++i) {
    const int64_t bytes = RowBytes(plan, ports[i]);
    rows.push_back(arrays[i].substr(begin * bytes, (end - begin) * bytes));
  }
  return rows;
}

// Compares outputs of calls with another number or order of rows, which round differently.
inline void ExpectClose(const Plan& plan, const Arrays& actual, const Arrays& expected,
                        double tolerance = 1e-5) {
  ASSERT_EQ(actual.size(), expected.size());
  for (size_t i = 0; i < actual.size(); ++i) {
    ASSERT_EQ(actual[i].size(), expected[i].size());
    const auto compare = [&](auto zero) {
      using T = decltype(zero);
      for (size_t k = 0; k < actual[i].size(); k += sizeof(T)) {
        T a, b;
        std::memcpy(&a, actual[i].data() + k, sizeof(T));
        std::memcpy(&b, expected[i].data() + k, sizeof(T));
        ASSERT_NEAR(a, b, tolerance * (1 + std::abs(b))) << "output " << i << ", byte " << k;
      }
    };
    switch (plan.values[plan.outputs[i].value].dtype) {
      case DType::kFloat32:
        compare(0.0f);
        break;
      case DType::kFloat64:
        compare(0.0);
        break;
      default:
        EXPECT_EQ(actual[i], expected[i]) << "output " << i;
    }
  }
}

// Expects an Error with this code whose message contains `part`.
inline void ExpectError(ErrorCode code, const std::string& part,
                        const std::function<void()>& call) {
  try {
    call();
    ADD_FAILURE() << "no error";
  } catch (const Error& error) {
    EXPECT_EQ(static_cast<int>(error.code()), static_cast<int>(code)) << error.what();
    EXPECT_NE(std::string(error.what()).find(part), std::string::npos) << error.what();
  }
}

// A small typical model: attention over four steps among dense nodes, with positions. Its second
// output is the number of steps that the stream took before, as long as that is below 50.
inline PlanBuilder SmallModel(uint32_t seed = 1) {
  PlanBuilder b("float32", seed);
  b.plan["receptive_field"] = 4;
  const int x = b.Input("x", {3});
  int y = b.Dense(x, {4});
  y = b.Node("positional", {y}, {4}, {},
             {{"rows", b.Random({9, 4})}, {"start", b.Weight({}, {0}, "int64")}});
  const int query = b.Dense(y, {4}), key = b.Dense(y, {4}), value = b.Dense(y, {4});
  y = b.Attention(query, key, value, 2, 4);
  b.Output("y", b.Dense(y, {5}));
  std::vector<double> count(50);
  for (int i = 0; i < 50; ++i) count[i] = i;
  const int zero = b.Node("constant", {}, {1}, {}, {{"value", b.Weight({1}, {0})}});
  b.Output("position",
           b.Node("positional", {zero}, {1}, {},
                  {{"rows", b.Weight({50, 1}, count)}, {"start", b.Weight({}, {0}, "int64")}}));
  return b;
}

}  // namespace continual_transformers

#endif  // CONTINUAL_TRANSFORMERS_TESTS_CC_SESSION_CASE_H_
