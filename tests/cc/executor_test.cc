// A plan with every op, run with every division into calls: all must give the same outputs. Another
// test compares the ops with a reference in Python (tests/plan_reference.py).

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "cc/session/cpu_executor.h"
#include "cc/session/error.h"
#include "gtest/gtest.h"
#include "tests/cc/model_file_case.h"

namespace continual_transformers {
namespace {

// An encoder block with E features, and F in its feed-forward part.
int Encoder(PlanBuilder* b, int x, int64_t e, int64_t f, int64_t heads, int64_t window) {
  const auto norm = [&](int y) {
    return b->Node("norm", {y}, {e}, {{"function", "layer"}, {"epsilon", 1e-6}},
                   {{"gamma", b->Random({e})}, {"beta", b->Random({e})}});
  };
  const int query = b->Dense(x, {e}), key = b->Dense(x, {e}), value = b->Dense(x, {e});
  int y = b->Dense(b->Attention(query, key, value, heads, window), {e});
  y = norm(b->Node("binary", {x, y}, {e}, {{"function", "add"}}));
  int hidden = b->Node("activation", {b->Dense(y, {f})}, {f}, {{"function", "gelu"}});
  hidden = b->Dense(hidden, {e});
  return norm(b->Node("binary", {y, hidden}, {e}, {{"function", "add"}}));
}

PlanBuilder Stack(const std::string& dtype, int64_t e, int64_t f, int64_t heads, int64_t window) {
  PlanBuilder b(dtype);
  int y = b.Dense(b.Input("x", {5}), {e});
  for (int i = 0; i < 2; ++i) y = Encoder(&b, y, e, f, heads, window);
  b.Output("y", b.Dense(y, {3}));
  return b;
}

// Streams of an executor, and the calls on them.
class Streams {
 public:
  Streams(std::shared_ptr<const ModelFile> file, const ExecutorOptions& options, int64_t count)
      : executor_(file, options), arena_(executor_.NewArena()), positions_(count, 0) {
    for (int64_t i = 0; i < count; ++i) {
      // Old memory that no step may read: NaN in every floating dtype, and no valid bool.
      blocks_.emplace_back(executor_.block_bytes() + 64, '\xff');
      char* p = blocks_.back().data();
      p += (64 - reinterpret_cast<uintptr_t>(p) % 64) % 64;
      executor_.InitBlock(p, &memory_);
      pointers_.push_back(p);
    }
  }

  // Takes `steps` steps of streams [first, first + count). Returns the outputs, [count, steps, ...]
  // each.
  std::vector<std::string> Take(int64_t first, int64_t count, int64_t steps,
                                const std::vector<std::string>& inputs,
                                const bool* key_mask = nullptr) {
    const Plan& plan = executor_.plan();
    std::vector<std::string> outputs;
    std::vector<const void*> from;
    std::vector<void*> to;
    for (const std::string& input : inputs) from.push_back(input.data());
    for (const Port& port : plan.outputs) {
      outputs.emplace_back(count * steps * RowBytes(port), '\x55');
    }
    for (std::string& output : outputs) to.push_back(output.data());
    const StepCall call = {from.data(),
                           to.data(),
                           key_mask,
                           count,
                           steps,
                           pointers_.data() + first,
                           positions_.data() + first};
    executor_.Check(call);
    executor_.Step(call, arena_.get());
    for (int64_t i = 0; i < count; ++i) positions_[first + i] += steps;
    return outputs;
  }

  int64_t RowBytes(const Port& port) const {
    const Value& value = executor_.plan().values[port.value];
    return value.size * SizeOf(value.dtype);
  }

  CpuExecutor& executor() { return executor_; }
  Arena* arena() { return arena_.get(); }

 private:
  HostMemory memory_;
  CpuExecutor executor_;
  std::unique_ptr<Arena> arena_;
  std::vector<std::string> blocks_;
  std::vector<char*> pointers_;
  std::vector<int64_t> positions_;
};

// Inputs for `steps` steps of `streams` streams. Inputs for a part of them are cut from these.
class Recording {
 public:
  Recording(const Plan& plan, int64_t streams, int64_t steps) : plan_(plan), steps_(steps) {
    uint32_t state = 1;
    const auto random = [&state] { return (state = state * 1664525u + 1013904223u) >> 8; };
    for (const Port& port : plan.inputs) {
      const Value& value = plan.values[port.value];
      std::vector<double> numbers(streams * steps * value.size);
      const bool is_float = value.dtype == DType::kFloat32 || value.dtype == DType::kFloat64;
      for (double& x : numbers) x = is_float ? random() % 1000 / 250.0 - 2 : random() % 3;
      inputs_.push_back(BytesOf(NameOf(value.dtype), numbers));
    }
    for (int64_t i = 0; i < streams * steps; ++i) gaps_.push_back(random() % 5 != 0);
  }

  std::vector<std::string> Cut(int64_t first, int64_t count, int64_t step, int64_t steps) const {
    std::vector<std::string> cut;
    for (size_t i = 0; i < inputs_.size(); ++i) {
      const Value& value = plan_.values[plan_.inputs[i].value];
      const int64_t row = value.size * SizeOf(value.dtype);
      cut.emplace_back();
      for (int64_t m = first; m < first + count; ++m) {
        cut.back() += inputs_[i].substr((m * steps_ + step) * row, steps * row);
      }
    }
    return cut;
  }

  std::string Gaps(int64_t first, int64_t count, int64_t step, int64_t steps) const {
    std::string cut;
    for (int64_t m = first; m < first + count; ++m) {
      cut += gaps_.substr(m * steps_ + step, steps);
    }
    return cut;
  }

 private:
  const Plan& plan_;
  const int64_t steps_;
  std::vector<std::string> inputs_;
  std::string gaps_;
};

template <typename T>
double Largest(const std::string& bytes) {
  double largest = 0;
  for (size_t i = 0; i + sizeof(T) <= bytes.size(); i += sizeof(T)) {
    T x;
    std::memcpy(&x, bytes.data() + i, sizeof(T));
    if (!std::isfinite(static_cast<double>(x))) return std::numeric_limits<double>::infinity();
    largest = std::max(largest, std::abs(static_cast<double>(x)));
  }
  return largest;
}

template <typename T>
void ExpectClose(const std::string& got, const std::string& expected, double bound) {
  ASSERT_EQ(got.size(), expected.size());
  const double scale = Largest<T>(expected);
  ASSERT_TRUE(std::isfinite(scale));
  for (size_t i = 0; i + sizeof(T) <= got.size(); i += sizeof(T)) {
    T x, y;
    std::memcpy(&x, got.data() + i, sizeof(T));
    std::memcpy(&y, expected.data() + i, sizeof(T));
    ASSERT_NEAR(static_cast<double>(x), static_cast<double>(y), bound * scale);
  }
}

void ExpectEqual(const Plan& plan, const std::vector<std::string>& got,
                 const std::vector<std::string>& expected, double bound) {
  for (size_t i = 0; i < plan.outputs.size(); ++i) {
    SCOPED_TRACE(plan.outputs[i].name);
    switch (plan.values[plan.outputs[i].value].dtype) {
      case DType::kFloat32:
        ExpectClose<float>(got[i], expected[i], bound);
        break;
      case DType::kFloat64:
        ExpectClose<double>(got[i], expected[i], bound);
        break;
      default:
        ASSERT_EQ(got[i], expected[i]);
    }
  }
}

ExecutorOptions OptionsOf(const Plan& plan, int64_t threads = 1) {
  return {plan.cache_dtype, plan.weights_dtype, threads};
}

class ExecutorTest : public ::testing::TestWithParam<std::string> {};

// Steps of one stream, one at a time, must equal calls with any number of streams and steps.
TEST_P(ExecutorTest, CallsMayBeCutInAnyWay) {
  const auto file = EveryOp(GetParam()).File();
  const Plan& plan = file->plan();
  const double bound = plan.compute_dtype == DType::kFloat32 ? 1e-5 : 1e-13;
  constexpr int64_t kStreams = 7, kSteps = 230;
  const Recording recording(plan, kStreams, kSteps);
  for (bool gaps : {false, true}) {
    Streams alone(file, OptionsOf(plan), kStreams);
    std::vector<std::vector<std::string>> expected(kStreams);
    for (int64_t m = 0; m < kStreams; ++m) {
      expected[m].resize(plan.outputs.size());
      for (int64_t t = 0; t < kSteps; ++t) {
        const std::string mask = recording.Gaps(m, 1, t, 1);
        const auto outputs =
            alone.Take(m, 1, 1, recording.Cut(m, 1, t, 1),
                       gaps ? reinterpret_cast<const bool*>(mask.data()) : nullptr);
        for (size_t i = 0; i < outputs.size(); ++i) expected[m][i] += outputs[i];
      }
    }
    for (int64_t threads : {1, 2, 3}) {
      for (const std::vector<int64_t>& pieces :
           {std::vector<int64_t>{230}, {1, 2, 3, 90, 97, 37}, {96, 134}}) {
        SCOPED_TRACE("threads " + std::to_string(threads) + ", first piece of " +
                     std::to_string(pieces[0]));
        Streams together(file, OptionsOf(plan, threads), kStreams);
        int64_t step = 0;
        for (int64_t steps : pieces) {
          const std::string mask = recording.Gaps(0, kStreams, step, steps);
          const auto outputs =
              together.Take(0, kStreams, steps, recording.Cut(0, kStreams, step, steps),
                            gaps ? reinterpret_cast<const bool*>(mask.data()) : nullptr);
          std::vector<std::string> due(plan.outputs.size());
          for (size_t i = 0; i < due.size(); ++i) {
            const int64_t row = together.RowBytes(plan.outputs[i]);
            for (int64_t m = 0; m < kStreams; ++m) {
              due[i] += expected[m][i].substr(step * row, steps * row);
            }
          }
          ExpectEqual(plan, outputs, due, bound);
          step += steps;
        }
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(DTypes, ExecutorTest, ::testing::Values("float32", "float64"),
                         [](const auto& info) { return info.param; });

TEST(ExecutorTest, ManyStreamsOverSeveralThreads) {
  const auto file = Stack("float32", 48, 96, 4, 9).File();
  const Plan& plan = file->plan();
  constexpr int64_t kStreams = 211, kSteps = 21;
  const Recording recording(plan, kStreams, kSteps);
  Streams one(file, OptionsOf(plan), kStreams), several(file, OptionsOf(plan, 3), kStreams);
  for (int64_t t = 0; t < kSteps; ++t) {
    const auto inputs = recording.Cut(0, kStreams, t, 1);
    ExpectEqual(plan, several.Take(0, kStreams, 1, inputs), one.Take(0, kStreams, 1, inputs), 1e-5);
  }
}

// The threads share the wide layers of a single stream.
TEST(ExecutorTest, WideLayersOverSeveralThreads) {
  const auto file = Stack("float32", 512, 700, 8, 40).File();
  const Plan& plan = file->plan();
  const Recording recording(plan, 1, 45);
  Streams one(file, OptionsOf(plan), 1), several(file, OptionsOf(plan, 2), 1);
  for (int64_t t = 0; t < 45; ++t) {
    const auto inputs = recording.Cut(0, 1, t, 1);
    ExpectEqual(plan, several.Take(0, 1, 1, inputs), one.Take(0, 1, 1, inputs), 1e-5);
  }
}

// The threads share the rows of a long window, whether or not there are enough heads for them.
TEST(ExecutorTest, LongWindowsOverSeveralThreads) {
  for (const auto& [heads, threads] : {std::pair<int64_t, int64_t>{1, 5}, {4, 2}}) {
    const auto file = Stack("float32", 256, 96, heads, 700).File();
    const Plan& plan = file->plan();
    constexpr int64_t kSteps = 780, kPiece = 60;
    const Recording recording(plan, 1, kSteps);
    std::string mask(kSteps, 1);
    for (int64_t t = 0; t < kSteps; ++t) mask[t] = t % 7 != 3 && (t < 300 || t > 420);
    const bool* gaps = reinterpret_cast<const bool*>(mask.data());
    for (DType cache : {DType::kFloat32, DType::kFloat16, DType::kInt8}) {
      SCOPED_TRACE(std::string(NameOf(cache)) + " heads " + std::to_string(heads));
      Streams one(file, {cache, DType::kFloat32, 1}, 1);
      Streams several(file, {cache, DType::kFloat32, threads}, 1);
      for (int64_t t = 0; t < kSteps; t += kPiece) {
        const auto inputs = recording.Cut(0, 1, t, kPiece);
        // A last bit may round a number in the second layer's ring up instead of down.
        ExpectEqual(plan, several.Take(0, 1, kPiece, inputs, gaps + t),
                    one.Take(0, 1, kPiece, inputs, gaps + t),
                    cache == DType::kFloat32 ? 1e-5 : 1e-3);
      }
    }
  }
}

TEST(ExecutorTest, NarrowCachesAndWeights) {
  const auto file = Stack("float32", 32, 64, 4, 17).File();
  const Plan& plan = file->plan();
  const Recording recording(plan, 5, 40);
  const auto inputs = recording.Cut(0, 5, 0, 40);
  const auto exact = Streams(file, OptionsOf(plan), 5).Take(0, 5, 40, inputs);
  for (DType cache : {DType::kFloat32, DType::kBFloat16, DType::kFloat16, DType::kInt8}) {
    for (DType weights : {DType::kFloat32, DType::kBFloat16, DType::kInt8}) {
      SCOPED_TRACE(std::string(NameOf(cache)) + " " + NameOf(weights));
      Streams narrow(file, {cache, weights, 1}, 5);
      ExpectEqual(plan, narrow.Take(0, 5, 40, inputs), exact, 0.05);
    }
  }
  EXPECT_THROW(Streams(file, {DType::kFloat64, DType::kFloat32, 1}, 1), Error);
  EXPECT_THROW(Streams(file, {DType::kFloat32, DType::kFloat16, 1}, 1), Error);
  EXPECT_THROW(Streams(file, {DType::kFloat32, DType::kFloat32, 0}, 1), Error);
}

TEST(ExecutorTest, TokensOutOfRangeAreRefused) {
  const auto file = EveryOp().File();
  Streams streams(file, OptionsOf(file->plan()), 2);
  const Recording recording(file->plan(), 2, 1);
  auto inputs = recording.Cut(0, 2, 0, 1);
  for (int32_t token : {-1, 5, std::numeric_limits<int32_t>::max()}) {
    auto wrong = inputs;
    std::memcpy(&wrong[1][4 * 3], &token, sizeof(token));  // stream 1's second token
    try {
      streams.Take(0, 2, 1, wrong);
      FAIL() << "expected an error for token " << token;
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ErrorCode::kInvalidArgument);
      EXPECT_NE(std::string(error.what()).find("but got " + std::to_string(token)),
                std::string::npos)
          << error.what();
    }
  }
  streams.Take(0, 2, 1, inputs);
}

// An output may be an input, a constant, or another output.
TEST(ExecutorTest, OutputsThatNoInstructionWrites) {
  PlanBuilder b;
  const int x = b.Input("x", {4});
  const int flat = b.Node("reshape", {x}, {2, 2});
  const int y = b.Node("activation", {x}, {4}, {{"function", "negative"}});
  b.Output("x", x);
  b.Output("flat", flat);
  b.Output("y", y);
  b.Output("again", y);
  b.Output("constant", b.Node("constant", {}, {2}, {}, {{"value", b.Weight({2}, {8, 9})}}));
  Streams streams(b.File(), {DType::kFloat32, DType::kFloat32, 1}, 3);
  const std::vector<float> numbers = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11};
  const auto outputs = streams.Take(0, 3, 1, {BytesOf(numbers)});
  std::vector<float> negative;
  for (float v : numbers) negative.push_back(-v);
  EXPECT_EQ(outputs[0], BytesOf(numbers));
  EXPECT_EQ(outputs[1], BytesOf(numbers));
  EXPECT_EQ(outputs[2], BytesOf(negative));
  EXPECT_EQ(outputs[3], BytesOf(negative));
  EXPECT_EQ(outputs[4], BytesOf(std::vector<float>{8, 9, 8, 9, 8, 9}));
}

// A node fused into a dense layer gives the same result as on its own.
TEST(ExecutorTest, NeighboursOfDenseLayersAreFolded) {
  for (bool used_twice : {false, true}) {
    PlanBuilder b;
    const int x = b.Input("x", {4});
    const int scaled =
        b.Node("affine", {x}, {4}, {},
               {{"scale", b.Weight({4}, {1, 2, 3, 4})}, {"offset", b.Weight({4}, {4, 3, 2, 1})}});
    const int dense = b.Node("dense", {scaled}, {2}, {},
                             {{"kernel", b.Weight({4, 2}, {1, 0, 0, 1, 1, 0, 0, 1})}});
    const int normal = b.Node("batch_norm", {dense}, {2}, {{"epsilon", 0.0}},
                              {{"mean", b.Weight({2}, {1, 2})},
                               {"variance", b.Weight({2}, {4, 16})},
                               {"gamma", b.Weight({2}, {2, 4})}});
    const int other = b.Node("strided", {x}, {2}, {{"offset", 1}, {"strides", {1}}});
    const int sum = b.Node("binary", {other, normal}, {2}, {{"function", "add"}});
    const int y = b.Node("activation", {sum}, {2}, {{"function", "relu6"}});
    b.Output("y", y);
    if (used_twice) {  // then nothing may be fused
      b.Output("scaled", scaled);
      b.Output("dense", dense);
      b.Output("normal", normal);
      b.Output("sum", sum);
    }
    Streams streams(b.File(), {DType::kFloat32, DType::kFloat32, 1}, 1);
    // scaled: 5, 1, 5, -3; dense: 10, -2; normal: 9, -4; sum: 8, -3.
    const auto outputs = streams.Take(0, 1, 1, {BytesOf(std::vector<float>{1, -1, 1, -1})});
    EXPECT_EQ(outputs[0], BytesOf(std::vector<float>{6, 0}));
    if (used_twice) {
      EXPECT_EQ(outputs[1], BytesOf(std::vector<float>{5, 1, 5, -3}));
      EXPECT_EQ(outputs[2], BytesOf(std::vector<float>{10, -2}));
      EXPECT_EQ(outputs[3], BytesOf(std::vector<float>{9, -4}));
      EXPECT_EQ(outputs[4], BytesOf(std::vector<float>{8, -3}));
    }
    streams.executor().BeginProfile(streams.arena());
    streams.Take(0, 1, 1, {BytesOf(std::vector<float>{1, 1, 1, 1})});
    const size_t parts = streams.executor().EndProfile(streams.arena()).size();
    EXPECT_EQ(parts, used_twice ? 6u : 2u);
  }
}

// A depthwise convolution of a window reads the window's ring, if nothing else reads the window.
TEST(ExecutorTest, DepthwiseConvolutionsReadRings) {
  for (const char* dtype : {"float32", "float64"}) {
    for (int64_t dilation : {1, 2, 4}) {
      SCOPED_TRACE(std::string(dtype) + ", dilation " + std::to_string(dilation));
      PlanBuilder b(dtype);
      const int x = b.Input("x", {5});
      const int64_t taps = dilation == 4 ? 2 : 3, window = (taps - 1) * dilation + 1;
      const TensorBytes kernel = b.Random({taps, 10}), bias = b.Random({10});
      const auto convolve = [&](int rows, const std::string& name) {
        const int y = b.Node("depthwise", {rows}, {1, 10}, {{"stride", 1}, {"dilation", dilation}},
                             {{"kernel", kernel}, {"bias", bias}});
        b.Output(name, y);
      };
      const int ring = b.Node("window", {x}, {window, 5}, {{"window", window}});
      convolve(ring, "in_its_ring");
      const int rows = b.Node("window", {x}, {window, 5}, {{"window", window}});
      convolve(rows, "as_a_value");
      b.Output("rows", rows);
      const auto file = b.File();
      Streams streams(file, OptionsOf(file->plan()), 3);
      const Recording recording(file->plan(), 3, 40);
      int64_t step = 0;
      for (int64_t steps : {1, 1, 2, 5, 1, 20, 10}) {
        const auto outputs = streams.Take(0, 3, steps, recording.Cut(0, 3, step, steps));
        if (b.compute_dtype() == "float32") {
          ExpectClose<float>(outputs[0], outputs[1], 1e-6);
        } else {
          ExpectClose<double>(outputs[0], outputs[1], 1e-14);
        }
        step += steps;
      }
      // One of the two windows is written as a value.
      streams.executor().BeginProfile(streams.arena());
      streams.Take(0, 1, 1, recording.Cut(0, 1, 0, 1));
      EXPECT_EQ(streams.executor().EndProfile(streams.arena()).size(), 3u);
    }
  }
}

// Layers with tied weights hold them once, however many there are. A layer into which something was
// folded has a kernel of its own.
TEST(ExecutorTest, LayersThatShareAKernelPackItOnce) {
  const auto bytes_of = [](int layers, bool fold) {
    PlanBuilder b;
    int x = b.Input("x", {64});
    for (int i = 0; i < layers; ++i) {
      x = b.Node("dense", {x}, {64}, {}, {{"kernel", b.Random({64, 64}, 0.1)}});
      b.plan["nodes"].back()["weights"]["kernel"] = "dense_0/kernel";
      if (i > 0) b.tensors.erase(b.plan["nodes"].back()["name"].get<std::string>() + "/kernel");
    }
    if (fold) {
      x = b.Node("affine", {x}, {64}, {},
                 {{"scale", b.Weight({64}, std::vector<double>(64, 2))},
                  {"offset", b.Weight({64}, std::vector<double>(64, 1))}});
    }
    b.Output("y", x);
    const auto file = b.File();
    Streams streams(file, OptionsOf(file->plan()), 2);
    const Recording recording(file->plan(), 2, 1);
    const auto inputs = recording.Cut(0, 2, 0, 1);
    const auto outputs = streams.Take(0, 2, 1, inputs);
    std::vector<double> kernel(64 * 64), row(64);
    const auto* w = reinterpret_cast<const float*>(b.tensors.at("dense_0/kernel").bytes.data());
    const auto* in = reinterpret_cast<const float*>(inputs[0].data());
    const auto* out = reinterpret_cast<const float*>(outputs[0].data());
    for (int stream = 0; stream < 2; ++stream) {
      std::copy_n(in + 64 * stream, 64, row.begin());
      for (int layer = 0; layer < layers; ++layer) {
        std::vector<double> next(64, 0);
        for (int i = 0; i < 64; ++i) {
          for (int o = 0; o < 64; ++o) next[o] += row[i] * w[64 * i + o];
        }
        row = next;
      }
      for (int o = 0; o < 64; ++o) {
        EXPECT_NEAR(out[64 * stream + o], fold ? 2 * row[o] + 1 : row[o], 1e-5);
      }
    }
    return streams.executor().weights_bytes();
  };
  const int64_t kernel = 64 * 64 * 4, bias = 64 * 4;
  EXPECT_EQ(bytes_of(1, false), kernel);
  EXPECT_EQ(bytes_of(5, false), kernel);
  EXPECT_EQ(bytes_of(5, true), 2 * kernel + bias);
}

// A number with a fraction differs from every integer.
TEST(ExecutorTest, NotEqualToAnyNumber) {
  for (const char* dtype : {"int32", "int64"}) {
    for (double number : {7.0, -2147483648.0, 2147483648.0, 0.5, 1e30, -1e30, 9.3e18}) {
      SCOPED_TRACE(std::string(dtype) + " " + std::to_string(number));
      PlanBuilder b;
      const int x = b.Input("x", {2}, dtype);
      for (bool any : {false, true}) {
        b.Output(any ? "any" : "all",
                 b.Node("not_equal", {x}, {1}, {{"value", number}, {"any", any}}, {}, {}, "bool"));
      }
      const auto file = b.File();
      Streams streams(file, OptionsOf(file->plan()), 1);
      const std::vector<double> values = {7, -2147483648.0};
      const auto outputs = streams.Take(0, 1, 1, {BytesOf(dtype, values)});
      const bool first = number != values[0], second = number != values[1];
      EXPECT_EQ(outputs[0], std::string(1, first && second));
      EXPECT_EQ(outputs[1], std::string(1, first || second));
    }
  }
}

TEST(ExecutorTest, EstimatesOfAnySize) {
  const auto file = Stack("float32", 32, 64, 4, 17).File();
  const CpuExecutor executor(file, OptionsOf(file->plan()));
  const int64_t most = std::numeric_limits<int64_t>::max();
  const int64_t some = executor.EstimatedNanoseconds(1 << 21, 1);
  EXPECT_NEAR(static_cast<double>(executor.EstimatedNanoseconds(1 << 21, 8)) / some, 8, 0.1);
  EXPECT_GE(executor.EstimatedNanoseconds(most, most), int64_t{1} << 62);
}

}  // namespace
}  // namespace continual_transformers
