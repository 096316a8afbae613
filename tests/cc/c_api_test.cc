// Tests the C interface against the C++ that it wraps, and the C++ wrapper of it.

#include <continual_transformers.h>
#include <unistd.h>

#include <cmath>
#include <continual_transformers.hpp>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <limits>
#include <string>
#include <thread>
#include <vector>

#include "cc/session/session.h"
#include "gtest/gtest.h"
#include "tests/cc/model_file_case.h"
#include "tests/cc/session_case.h"

namespace continual_transformers {
namespace {

// A file that is deleted at the end of the test.
class TemporaryFile {
 public:
  explicit TemporaryFile(const std::string& bytes) {
    path_ = ::testing::TempDir() + "c_api_test_XXXXXX";
    const int file = mkstemp(path_.data());
    EXPECT_EQ(write(file, bytes.data(), bytes.size()), static_cast<ssize_t>(bytes.size()));
    close(file);
  }
  ~TemporaryFile() { std::remove(path_.c_str()); }
  const char* path() const { return path_.c_str(); }

 private:
  std::string path_;
};

class CApi : public ::testing::Test {
 protected:
  CApi() : bytes_(SmallModel().Bytes()) {
    EXPECT_EQ(ct_session_load_memory(bytes_.data(), bytes_.size(), nullptr, &session_), CT_OK)
        << ct_last_error();
  }
  ~CApi() override { ct_session_free(session_); }

  std::vector<ct_stream> Open(int64_t count) {
    std::vector<ct_stream> streams(count);
    EXPECT_EQ(ct_session_open(session_, count, streams.data()), CT_OK) << ct_last_error();
    return streams;
  }

  // Takes one step of streams with 3 features each, and returns y.
  std::vector<float> Step(const std::vector<ct_stream>& streams, const std::vector<float>& x) {
    std::vector<float> y(5 * streams.size());
    const void* inputs[] = {x.data()};
    void* outputs[] = {y.data(), nullptr};
    EXPECT_EQ(ct_session_step(session_, streams.data(), streams.size(), inputs, outputs), CT_OK)
        << ct_last_error();
    return y;
  }

  int64_t Position(ct_stream stream) {
    int64_t position = -1;
    EXPECT_EQ(ct_session_positions(session_, &stream, 1, &position), CT_OK) << ct_last_error();
    return position;
  }

  const std::string bytes_;
  ct_session* session_ = nullptr;
};

// Expects an error whose message contains `part`.
void ExpectStatus(ct_status actual, ct_status expected, const std::string& part) {
  EXPECT_EQ(actual, expected) << ct_last_error();
  EXPECT_NE(std::string(ct_last_error()).find(part), std::string::npos) << ct_last_error();
}

TEST_F(CApi, StepsAreThoseOfTheSession) {
  Session session(SmallModel().File(), {});
  const Ids ids = OpenStreams(&session, 3);
  const std::vector<ct_stream> streams = Open(3);
  for (uint32_t seed = 0; seed < 6; ++seed) {
    const Arrays inputs = RandomInputs(session.plan(), 3, seed);
    const Arrays expected = TakeSteps(&session, ids, 1, inputs);
    std::vector<float> y(15), positions(3);
    const void* const from[] = {inputs[0].data()};
    void* const to[] = {y.data(), positions.data()};
    ASSERT_EQ(ct_session_step(session_, streams.data(), 3, from, to), CT_OK) << ct_last_error();
    EXPECT_EQ(BytesOf(y), expected[0]);
    EXPECT_EQ(BytesOf(positions), expected[1]);
  }
  // Several steps at once, with a gap, of the default streams.
  const Arrays inputs = RandomInputs(session.plan(), 6, 7);
  const bool key_mask[] = {true, false, true, true, true, false};
  const Arrays expected = TakeSteps(&session, nullptr, 2, 3, inputs, key_mask);
  std::vector<float> y(30);
  const void* const from[] = {inputs[0].data()};
  void* const to[] = {y.data(), nullptr};
  ASSERT_EQ(ct_session_steps(session_, nullptr, 2, 3, from, to, key_mask), CT_OK);
  EXPECT_EQ(BytesOf(y), expected[0]);
  int64_t positions[3];
  ASSERT_EQ(ct_session_positions(session_, nullptr, 3, positions), CT_OK);
  EXPECT_EQ(positions[0], 3);
  EXPECT_EQ(positions[1], 3);
  EXPECT_EQ(positions[2], 0);
  EXPECT_EQ(ct_session_open_streams(session_), 5);
  bool ready[] = {false, false, false};
  ASSERT_EQ(ct_session_ready(session_, streams.data(), 3, ready), CT_OK);
  EXPECT_TRUE(ready[0] && ready[1] && ready[2]);
  ASSERT_EQ(ct_session_ready(session_, nullptr, 1, ready), CT_OK);
  EXPECT_FALSE(ready[0]);
}

TEST_F(CApi, WhatTheModelIs) {
  EXPECT_EQ(ct_session_inputs(session_), 1);
  EXPECT_EQ(ct_session_outputs(session_), 2);
  ct_value value;
  ASSERT_EQ(ct_session_input(session_, 0, &value), CT_OK);
  EXPECT_STREQ(value.name, "x");
  EXPECT_EQ(value.dtype, CT_FLOAT32);
  ASSERT_EQ(value.rank, 1);
  EXPECT_EQ(value.shape[0], 3);
  EXPECT_EQ(value.elements, 3);
  EXPECT_EQ(value.bytes, 12);
  ASSERT_EQ(ct_session_output(session_, 1, &value), CT_OK);
  EXPECT_STREQ(value.name, "position");
  ExpectStatus(ct_session_output(session_, 2, &value), CT_INVALID_ARGUMENT, "2 outputs");
  ExpectStatus(ct_session_input(session_, -1, &value), CT_INVALID_ARGUMENT, "-1");
  EXPECT_STREQ(ct_session_name(session_), "model");
  EXPECT_EQ(std::string(ct_session_plan(session_)), SmallModel().plan.dump());
  EXPECT_EQ(ct_session_receptive_field(session_), 4);
  EXPECT_EQ(ct_session_delay(session_), 0);
  EXPECT_EQ(ct_session_cache_dtype(session_), CT_FLOAT32);
  EXPECT_EQ(ct_session_weights_dtype(session_), CT_FLOAT32);
  EXPECT_GT(ct_session_estimate(session_, 1, 1), 0);
  EXPECT_STREQ(ct_version(), "0.2.0");
  Session session(SmallModel().File(), {});
  EXPECT_EQ(ct_session_plan_fingerprint(session_), session.plan_fingerprint());
  EXPECT_EQ(ct_session_weights_fingerprint(session_), session.weights_fingerprint());
  EXPECT_EQ(ct_session_state_bytes(session_), session.state_bytes());
}

// Every dtype that a value may have.
TEST(CApiValues, Dtypes) {
  for (const std::string compute : {"float32", "float64"}) {
    const std::string bytes = EveryOp(compute).Bytes();
    ct_session* session;
    ASSERT_EQ(ct_session_load_memory(bytes.data(), bytes.size(), nullptr, &session), CT_OK);
    const ct_dtype expected = compute == "float32" ? CT_FLOAT32 : CT_FLOAT64;
    EXPECT_EQ(ct_session_cache_dtype(session), expected);
    ct_value value;
    ASSERT_EQ(ct_session_input(session, 0, &value), CT_OK);
    EXPECT_EQ(value.dtype, expected);
    ASSERT_EQ(ct_session_input(session, 1, &value), CT_OK);
    EXPECT_EQ(value.dtype, CT_INT32);
    ASSERT_EQ(ct_session_input(session, 2, &value), CT_OK);
    EXPECT_EQ(value.dtype, CT_INT64);
    EXPECT_EQ(value.rank, 0);
    EXPECT_EQ(value.elements, 1);
    ASSERT_EQ(ct_session_output(session, 3, &value), CT_OK);
    EXPECT_EQ(value.dtype, CT_BOOL);
    ct_session_free(session);
  }
}

TEST_F(CApi, Streams) {
  const std::vector<ct_stream> streams = Open(3);
  Step(streams, std::vector<float>(9, 1));
  ASSERT_EQ(ct_session_clean(session_, &streams[1], 1), CT_OK);
  EXPECT_EQ(Position(streams[0]), 1);
  EXPECT_EQ(Position(streams[1]), 0);
  // A count of 0 cleans no streams, not all.
  ASSERT_EQ(ct_session_clean(session_, nullptr, 0), CT_OK);
  EXPECT_EQ(Position(streams[0]), 1);
  ASSERT_EQ(ct_session_clean_all(session_), CT_OK);
  EXPECT_EQ(Position(streams[0]), 0);
  ASSERT_EQ(ct_session_close(session_, &streams[0], 2), CT_OK);
  EXPECT_EQ(ct_session_open_streams(session_), 1);
  ExpectStatus(ct_session_close(session_, &streams[0], 2), CT_UNKNOWN_STREAM, "was closed");
  int64_t position;
  ExpectStatus(ct_session_positions(session_, &streams[0], 1, &position), CT_UNKNOWN_STREAM,
               "was closed");
  const ct_stream twice[] = {streams[2], streams[2]};
  ExpectStatus(ct_session_clean(session_, twice, 2), CT_INVALID_ARGUMENT, "twice");
  ASSERT_EQ(ct_session_close(session_, nullptr, 0), CT_OK);
  ASSERT_EQ(ct_session_open(session_, 0, nullptr), CT_OK);
}

TEST_F(CApi, CopiesOfStreams) {
  const std::vector<ct_stream> streams = Open(3);
  for (int i = 0; i < 3; ++i) Step({streams[0]}, {1.0f * i, 2, 3});
  const int64_t bytes = ct_session_state_bytes(session_);
  std::vector<char> state(bytes), other(bytes);
  ASSERT_EQ(ct_session_get_state(session_, streams[0], state.data(), bytes), CT_OK);
  ASSERT_EQ(ct_session_set_state(session_, streams[1], state.data(), bytes, false), CT_OK);
  EXPECT_EQ(Position(streams[1]), 3);
  ASSERT_EQ(ct_session_get_state(session_, streams[1], other.data(), bytes), CT_OK);
  EXPECT_EQ(state, other);
  EXPECT_EQ(Step({streams[0]}, {7, 8, 9}), Step({streams[1]}, {7, 8, 9}));
  ExpectStatus(ct_session_get_state(session_, streams[0], state.data(), bytes - 1),
               CT_INVALID_ARGUMENT, std::to_string(bytes - 1));
  ExpectStatus(ct_session_set_state(session_, streams[0], state.data(), bytes - 1, false),
               CT_INVALID_ARGUMENT, "cut off");
  ExpectStatus(ct_session_set_state(session_, streams[0], nullptr, 0, false), CT_INVALID_ARGUMENT,
               "not a copy");
  state[24] ^= 1;  // the weights' fingerprint
  ExpectStatus(ct_session_set_state(session_, streams[0], state.data(), bytes, false),
               CT_OTHER_MODEL, "other weights");
  ASSERT_EQ(ct_session_set_state(session_, streams[0], state.data(), bytes, true), CT_OK);
  const void* const states[] = {other.data(), state.data()};
  const int64_t sizes[] = {bytes, bytes};
  ExpectStatus(ct_session_set_states(session_, &streams[1], 2, states, sizes, false),
               CT_OTHER_MODEL, "other weights");
  EXPECT_EQ(Position(streams[1]), 4);
  ASSERT_EQ(ct_session_set_states(session_, &streams[1], 2, states, sizes, true), CT_OK);
  EXPECT_EQ(Position(streams[1]), 3);
  EXPECT_EQ(Position(streams[2]), 3);
}

TEST_F(CApi, Options) {
  ct_options options = CT_OPTIONS_DEFAULT;
  options.streams = 2;
  options.threads = 2;
  options.cache_dtype = CT_BFLOAT16;
  options.weights_dtype = CT_BFLOAT16;
  ct_session* session = nullptr;
  const auto load = [&] {
    return ct_session_load_memory(bytes_.data(), bytes_.size(), &options, &session);
  };
  ASSERT_EQ(load(), CT_OK) << ct_last_error();
  EXPECT_EQ(ct_session_cache_dtype(session), CT_BFLOAT16);
  EXPECT_EQ(ct_session_weights_dtype(session), CT_BFLOAT16);
  ct_stream streams[3];
  ExpectStatus(ct_session_open(session, 3, streams), CT_TOO_MANY_STREAMS, "at most 2");
  ct_session_free(session);

  options.threads = 0;
  ExpectStatus(load(), CT_INVALID_ARGUMENT, "thread");
  EXPECT_EQ(session, nullptr);
  options.threads = 1;
  options.streams = -1;
  ExpectStatus(load(), CT_INVALID_ARGUMENT, "-1");
  options.streams = 0;
  options.cache_dtype = CT_INT32;
  ExpectStatus(load(), CT_INVALID_ARGUMENT, "cache_dtype");
  options.cache_dtype = CT_FLOAT64;
  ExpectStatus(load(), CT_INVALID_ARGUMENT, "float64");
  const int none = 99;
  std::memcpy(&options.cache_dtype, &none, sizeof(none));
  ExpectStatus(load(), CT_INVALID_ARGUMENT, "99");
  options.cache_dtype = CT_DTYPE_OF_FILE;
  options.device = "tpu:0";
  ExpectStatus(load(), CT_INVALID_ARGUMENT, "cuda:0");
  options.device = "cpu";
  ASSERT_EQ(load(), CT_OK) << ct_last_error();
  ct_session_free(session);
  // The options of the first version ended before the device.
  options.device = "tpu:0";
  options.size = offsetof(ct_options, device);
  ASSERT_EQ(load(), CT_OK) << ct_last_error();
  ct_session_free(session);
  options.device = nullptr;
  options.size = 4;
  ExpectStatus(load(), CT_INVALID_ARGUMENT, "CT_OPTIONS_DEFAULT");

  // Options of a newer header are accepted if the new fields are zero.
  struct {
    ct_options options;
    int64_t newer;
  } newer = {CT_OPTIONS_DEFAULT, 0};
  newer.options.size = sizeof(newer);
  ASSERT_EQ(ct_session_load_memory(bytes_.data(), bytes_.size(), &newer.options, &session), CT_OK);
  ct_session_free(session);
  newer.newer = 1;
  ExpectStatus(ct_session_load_memory(bytes_.data(), bytes_.size(), &newer.options, &session),
               CT_INVALID_ARGUMENT, "newer library");
}

TEST_F(CApi, Files) {
  const TemporaryFile file(bytes_), saved(""), garbage("{}"), trained(SmallModel(2).Bytes());
  ct_session* session;
  ASSERT_EQ(ct_session_load(file.path(), nullptr, &session), CT_OK) << ct_last_error();
  ASSERT_EQ(ct_session_save(session, saved.path()), CT_OK) << ct_last_error();
  ct_session_free(session);
  ASSERT_EQ(ct_session_load(saved.path(), nullptr, &session), CT_OK) << ct_last_error();
  const uint64_t fingerprint = ct_session_weights_fingerprint(session);
  EXPECT_EQ(fingerprint, ct_session_weights_fingerprint(session_));
  ASSERT_EQ(ct_session_load_weights(session, trained.path()), CT_OK) << ct_last_error();
  EXPECT_NE(ct_session_weights_fingerprint(session), fingerprint);
  ASSERT_EQ(ct_session_load_weights_memory(session, bytes_.data(), bytes_.size()), CT_OK);
  EXPECT_EQ(ct_session_weights_fingerprint(session), fingerprint);
  const std::string other = EveryOp().Bytes();
  ExpectStatus(ct_session_load_weights_memory(session, other.data(), other.size()), CT_OTHER_MODEL,
               "another model");
  ExpectStatus(ct_session_load_weights(session, garbage.path()), CT_BAD_MODEL_FILE, "");
  EXPECT_EQ(ct_session_weights_fingerprint(session), fingerprint);
  ExpectStatus(ct_session_save(session, "/nowhere/model.safetensors"), CT_IO, "/nowhere");
  ct_session_free(session);
  ExpectStatus(ct_session_load("/nowhere/model.safetensors", nullptr, &session), CT_IO, "/nowhere");
  EXPECT_EQ(session, nullptr);
  ExpectStatus(ct_session_load(garbage.path(), nullptr, &session), CT_BAD_MODEL_FILE, "");
  ExpectStatus(ct_session_load_memory(bytes_.data(), 100, nullptr, &session), CT_BAD_MODEL_FILE,
               "");
  ExpectStatus(ct_session_load_memory(nullptr, 0, nullptr, &session), CT_BAD_MODEL_FILE, "");
}

// Arguments that C's types allow and the library refuses. Each must give a message, not a crash.
TEST_F(CApi, NullPointersAndNegativeCounts) {
  const ct_stream stream = Open(1)[0];
  float x[3] = {1, 2, 3}, y[5];
  const void* inputs[] = {x};
  void* outputs[] = {y, nullptr};
  int64_t position;
  bool ready;
  const std::function<ct_status()> calls[] = {
      [&] { return ct_session_load(nullptr, nullptr, &session_); },
      [&] { return ct_session_load("x", nullptr, nullptr); },
      [&] { return ct_session_load_memory(nullptr, 5, nullptr, &session_); },
      [&] { return ct_session_save(nullptr, "x"); },
      [&] { return ct_session_save(session_, nullptr); },
      [&] { return ct_session_load_weights(nullptr, "x"); },
      [&] { return ct_session_load_weights(session_, nullptr); },
      [&] { return ct_session_open(nullptr, 0, nullptr); },
      [&] { return ct_session_open(session_, 1, nullptr); },
      [&] { return ct_session_open(session_, -1, nullptr); },
      [&] { return ct_session_close(nullptr, &stream, 1); },
      [&] { return ct_session_close(session_, nullptr, 1); },
      [&] { return ct_session_close(session_, &stream, -1); },
      [&] { return ct_session_step(nullptr, &stream, 1, inputs, outputs); },
      [&] { return ct_session_step(session_, &stream, 1, nullptr, outputs); },
      [&] { return ct_session_step(session_, &stream, 1, inputs, nullptr); },
      [&] {
        const void* none[] = {nullptr};
        return ct_session_step(session_, &stream, 1, none, outputs);
      },
      [&] { return ct_session_step(session_, &stream, -1, inputs, outputs); },
      [&] { return ct_session_steps(session_, &stream, 1, -1, inputs, outputs, nullptr); },
      [&] { return ct_session_clean(nullptr, &stream, 1); },
      [&] { return ct_session_clean(session_, nullptr, 1); },
      [&] { return ct_session_clean(session_, &stream, -1); },
      [&] { return ct_session_clean_all(nullptr); },
      [&] { return ct_session_positions(nullptr, &stream, 1, &position); },
      [&] { return ct_session_positions(session_, &stream, 1, nullptr); },
      [&] { return ct_session_positions(session_, &stream, -1, &position); },
      [&] { return ct_session_ready(session_, &stream, 1, nullptr); },
      [&] { return ct_session_ready(session_, &stream, -1, &ready); },
      [&] { return ct_session_get_state(session_, stream, nullptr, 0); },
      [&] { return ct_session_get_state(nullptr, stream, x, 0); },
      [&] { return ct_session_set_states(session_, &stream, 1, nullptr, nullptr, false); },
      [&] { return ct_session_set_states(session_, &stream, -1, nullptr, nullptr, false); },
      [&] { return ct_session_set_state(session_, stream, nullptr, 100, false); },
      [&] { return ct_session_set_state(session_, stream, x, -1, false); },
      [&] { return ct_session_input(session_, 0, nullptr); },
      [&] { return ct_session_memory(session_, nullptr, sizeof(ct_memory)); },
  };
  ct_session* const session = session_;
  for (size_t i = 0; i < sizeof(calls) / sizeof(calls[0]); ++i) {
    session_ = session;
    EXPECT_EQ(calls[i](), CT_INVALID_ARGUMENT) << "call " << i << ": " << ct_last_error();
    EXPECT_STRNE(ct_last_error(), "") << "call " << i;
  }
  session_ = session;
  ct_session_free(nullptr);
  EXPECT_EQ(Position(stream), 0);
}

TEST_F(CApi, ErrorsAreTheThreadsOwn) {
  ExpectStatus(ct_session_open(session_, -5, nullptr), CT_INVALID_ARGUMENT, "-5");
  std::thread([&] {
    EXPECT_STREQ(ct_last_error(), "");
    ExpectStatus(ct_session_open(session_, -6, nullptr), CT_INVALID_ARGUMENT, "-6");
  }).join();
  EXPECT_NE(std::string(ct_last_error()).find("-5"), std::string::npos);
}

TEST_F(CApi, Memory) {
  Step(Open(10), std::vector<float>(30, 1));
  ct_memory memory;
  ASSERT_EQ(ct_session_memory(session_, &memory, sizeof(memory)), CT_OK);
  EXPECT_GT(memory.weights, 0);
  EXPECT_EQ(memory.model_file, static_cast<int64_t>(bytes_.size()));
  EXPECT_GT(memory.streams, 0);
  EXPECT_GT(memory.streams_overhead, 0);
  EXPECT_GT(memory.arenas, 0);
  ExpectStatus(ct_session_memory(session_, &memory, 8), CT_INVALID_ARGUMENT, "8");
}

// For the C++ wrapper: a model with one input and one output, like most models.
PlanBuilder OneOutput() {
  PlanBuilder model = SmallModel();
  model.plan["outputs"].erase(1);
  model.plan["output_structure"].erase(1);
  return model;
}

TEST(Wrapper, StreamsOfAModel) {
  const std::string bytes = OneOutput().Bytes();
  const TemporaryFile file(bytes);
  ct::Session session(file.path());
  EXPECT_EQ(session.name(), "model");
  EXPECT_EQ(session.receptive_field(), 4);
  EXPECT_EQ(session.delay(), 0);
  ASSERT_EQ(session.inputs().size(), 1u);
  EXPECT_EQ(session.inputs()[0].name, "x");
  EXPECT_EQ(session.inputs()[0].shape, std::vector<int64_t>({3}));
  EXPECT_EQ(session.outputs()[0].elements, 5);
  EXPECT_EQ(session.outputs()[0].dtype, CT_FLOAT32);

  ct::Options options;
  options.streams = 3;
  ct::Session other = ct::Session::FromMemory(bytes.data(), bytes.size(), options);
  const std::vector<ct_stream> streams = other.Open(3);
  EXPECT_THROW(other.Open(), ct::Error);
  {
    ct::Stream stream = session.OpenStream();
    for (int i = 0; i < 5; ++i) {
      EXPECT_EQ(stream.position(), i);
      EXPECT_EQ(stream.ready(), i >= 4);
      const std::vector<float> x = {1.0f * i, 2, -1};
      std::vector<float> y(5), expected(5);
      stream.Step(x.data(), y.data());
      other.Step({streams[1]}, x.data(), expected.data());
      EXPECT_EQ(y, expected);
    }
    other.Close(streams[0]);
    EXPECT_EQ(other.Positions({streams[1], streams[2]}), std::vector<int64_t>({5, 0}));
    other.SetState(streams[2], stream.GetState());
    EXPECT_EQ(other.Position(streams[2]), 5);
    EXPECT_TRUE(other.Ready(streams[2]));
    stream.Clean();
    EXPECT_EQ(stream.position(), 0);
    stream.SetState(other.GetState(streams[1]));
    EXPECT_EQ(stream.position(), 5);
    other.Clean({streams[1], streams[2]});
    EXPECT_EQ(other.Position(streams[2]), 0);
    other.CleanAll();
    EXPECT_EQ(session.open_streams(), 1);
    ct::Stream moved = std::move(stream);
    EXPECT_EQ(moved.position(), 5);
    EXPECT_EQ(session.open_streams(), 1);
    EXPECT_GT(session.memory().streams, 0);
  }
  EXPECT_EQ(session.open_streams(), 0);
  // No streams: nothing happens.
  other.Clean(std::vector<ct_stream>());
  other.Close(std::vector<ct_stream>());
  other.Step(std::vector<ct_stream>(), static_cast<float*>(nullptr), static_cast<float*>(nullptr));
  EXPECT_EQ(other.open_streams(), 2);
  ct::Session moved = std::move(session);
  EXPECT_EQ(moved.inputs()[0].name, "x");
  other = std::move(moved);
  EXPECT_EQ(other.open_streams(), 0);
}

TEST(Wrapper, SeveralInputsAndOutputs) {
  PlanBuilder builder("float32");
  const int a = builder.Input("a", {2}), b = builder.Input("b", {2});
  builder.Output("sum", builder.Node("binary", {a, b}, {2}, {{"function", "add"}}));
  builder.Output("late", builder.Node("delay", {b}, {2}, {{"steps", 1}}));
  const std::string bytes = builder.Bytes();
  ct::Session session = ct::Session::FromMemory(bytes.data(), bytes.size());
  const std::vector<float> x = {1, 2, 3, 4}, z = {10, 20, 30, 40};
  std::vector<float> sum(4), late(4);

  ct::Stream stream = session.OpenStream();
  stream.Step({&x[0], &z[0]}, {sum.data(), late.data()});
  EXPECT_EQ(late, std::vector<float>({0, 0, 0, 0}));
  stream.Step({&x[2], &z[2]}, {nullptr, late.data()}, /*key_mask=*/true);
  EXPECT_EQ(sum, std::vector<float>({11, 22, 0, 0}));
  EXPECT_EQ(late, std::vector<float>({10, 20, 0, 0}));

  const std::vector<ct_stream> streams = session.Open(2);
  session.Step(streams, {x.data(), z.data()}, {sum.data(), late.data()});
  EXPECT_EQ(sum, std::vector<float>({11, 22, 33, 44}));
  session.Steps(&streams[1], 1, 2, {x.data(), z.data()}, {sum.data(), late.data()});
  EXPECT_EQ(late, std::vector<float>({30, 40, 10, 20}));
  EXPECT_EQ(session.Positions(streams), std::vector<int64_t>({1, 3}));
}

// Every way to give gaps gives the same outputs as the C interface.
TEST(Wrapper, Gaps) {
  const std::string bytes = OneOutput().Bytes();
  ct::Session session = ct::Session::FromMemory(bytes.data(), bytes.size());
  constexpr int kSteps = 6, kFeatures = 3, kOutputs = 5;
  const bool key_mask[kSteps] = {true, false, true, true, false, true};
  std::vector<float> x(kSteps * kFeatures), expected(kSteps * kOutputs), without(kSteps * kOutputs);
  for (size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(i % 5) - 2;
  const std::vector<ct_stream> streams = session.Open(6);
  const auto steps = [&](int stream, const bool* mask, std::vector<float>* y) {
    const void* const inputs[] = {x.data()};
    void* const outputs[] = {y->data()};
    ct::Check(ct_session_steps(session.get(), &streams[stream], 1, kSteps, inputs, outputs, mask));
  };
  steps(0, key_mask, &expected);
  steps(1, nullptr, &without);
  EXPECT_GT(std::abs(expected.back() - without.back()), 1e-3);

  std::vector<float> y(expected.size());
  const auto expect_same = [&](const char* way) {
    // Several steps at once are rounded in another way than one after the other.
    for (size_t i = 0; i < y.size(); ++i) EXPECT_NEAR(y[i], expected[i], 1e-5) << way;
    y.assign(y.size(), 0);
  };
  session.Steps(&streams[2], 1, kSteps, x.data(), y.data(), key_mask);
  expect_same("Session::Steps");
  session.Steps(&streams[3], 1, kSteps, {x.data()}, {y.data()}, key_mask);
  expect_same("Session::Steps with vectors");
  ct::Stream stream = session.OpenStream(), of_vectors = session.OpenStream();
  for (int t = 0; t < kSteps; ++t) {
    session.Step({streams[4]}, &x[t * kFeatures], &y[t * kOutputs], &key_mask[t]);
  }
  expect_same("Session::Step");
  for (int t = 0; t < kSteps; ++t) {
    session.Step({streams[5]}, {&x[t * kFeatures]}, {&y[t * kOutputs]}, &key_mask[t]);
  }
  expect_same("Session::Step with vectors");
  for (int t = 0; t < kSteps; ++t) {
    stream.Step(&x[t * kFeatures], &y[t * kOutputs], key_mask[t]);
  }
  expect_same("Stream::Step");
  for (int t = 0; t < kSteps; ++t) {
    of_vectors.Step({&x[t * kFeatures]}, {&y[t * kOutputs]}, key_mask[t]);
  }
  expect_same("Stream::Step with vectors");
}

TEST(Wrapper, Errors) {
  const std::string bytes = OneOutput().Bytes(), two = SmallModel().Bytes();
  ct::Session session = ct::Session::FromMemory(bytes.data(), bytes.size());
  ct::Session outputs = ct::Session::FromMemory(two.data(), two.size());
  const ct_stream stream = session.Open(), of_two = outputs.Open();
  float x[3] = {1, 2, 3}, y[5], position;
  double wrong[3];
  const auto expect = [](ct_status status, const std::string& part, const auto& call) {
    try {
      call();
      ADD_FAILURE() << "no error";
    } catch (const ct::Error& error) {
      EXPECT_EQ(error.status(), status);
      EXPECT_NE(std::string(error.what()).find(part), std::string::npos) << error.what();
    }
  };
  expect(CT_INVALID_ARGUMENT, "float32, got float64", [&] { session.Step({stream}, wrong, y); });
  const std::string names = outputs.outputs()[0].name + ", " + outputs.outputs()[1].name;
  const std::string too_few = "2 outputs (" + names + "), got 1: pass a vector";
  expect(CT_INVALID_ARGUMENT, too_few, [&] { outputs.Step({of_two}, x, y); });
  expect(CT_INVALID_ARGUMENT, too_few, [&] { outputs.Step({of_two}, {x}, {y}); });
  expect(CT_INVALID_ARGUMENT, "1 input (x), got 2",
         [&] { outputs.Step({of_two}, {x, x}, {y, &position}); });
  expect(CT_INVALID_ARGUMENT, "1 input (x), got 0", [&] { outputs.Step({of_two}, {}, {y, y}); });
  expect(CT_INVALID_ARGUMENT, "NULL", [&] { outputs.Step({of_two}, {nullptr}, {y, &position}); });
  EXPECT_EQ(outputs.Position(of_two), 0);
  outputs.Step({of_two}, {x}, {y, &position});
  EXPECT_EQ(position, 0);
  expect(CT_UNKNOWN_STREAM, "77", [&] { session.Step({77}, x, y); });
  expect(CT_OTHER_MODEL, "another model",
         [&] { session.SetState(stream, outputs.GetState(of_two)); });
  expect(CT_IO, "/nowhere", [&] { ct::Session("/nowhere"); });
  expect(CT_IO, "/nowhere", [&] { session.LoadWeights("/nowhere"); });
  expect(CT_IO, "/nowhere", [&] { session.Save("/nowhere/x"); });
}

}  // namespace
}  // namespace continual_transformers
