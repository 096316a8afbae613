// Tests sessions on real plans: steps, copies of streams, weights and refusals. The executor's
// tests check the numbers of the nodes; these check which state they work on.

#include "cc/session/session.h"

#include <sys/wait.h>
#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <string>
#include <vector>

#include "cc/session/error.h"
#include "gtest/gtest.h"
#include "tests/cc/model_file_case.h"
#include "tests/cc/session_case.h"

namespace continual_transformers {
namespace {

constexpr int64_t kHeaderBytes = 64;

// Every test runs with two models: a typical one, and one with every op.
class SessionTest : public ::testing::TestWithParam<bool> {
 protected:
  PlanBuilder Model(const std::string& compute_dtype = "float32") const {
    return GetParam() ? EveryOp(compute_dtype) : SmallModel();
  }
  std::shared_ptr<const ModelFile> File() const { return Model().File(); }
};

INSTANTIATE_TEST_SUITE_P(Models, SessionTest, ::testing::Values(false, true),
                         [](const auto& info) { return info.param ? "EveryOp" : "Small"; });

// Streams of different ages, in any order, give the same as each one alone.
TEST_P(SessionTest, StreamsOfOneCallAreStrangers) {
  Session together(File(), {}), alone(File(), {});
  const Ids ids = OpenStreams(&together, 7), own = OpenStreams(&alone, 7);
  uint32_t seed = 0;
  for (int round = 0; round < 12; ++round) {
    Ids some, some_alone;
    for (int i = 0; i < 7; ++i) {
      const int place = (i * 3 + round) % 7;
      if (place > round) continue;
      some.push_back(ids[place]);
      some_alone.push_back(own[place]);
    }
    const int64_t count = some.size(), steps = 1 + round % 3;
    const Arrays inputs = RandomInputs(together.plan(), count * steps, ++seed);
    const Arrays outputs = TakeSteps(&together, some, steps, inputs);
    for (int64_t m = 0; m < count; ++m) {
      for (int64_t t = 0; t < steps; ++t) {
        const int64_t row = m * steps + t;
        const Arrays expected =
            TakeSteps(&alone, {some_alone[m]}, 1,
                      Rows(alone.plan().inputs, alone.plan(), inputs, row, row + 1));
        ExpectClose(alone.plan(),
                    Rows(together.plan().outputs, together.plan(), outputs, row, row + 1),
                    expected);
      }
    }
  }
  EXPECT_EQ(PositionsOf(together, ids), PositionsOf(alone, own));
}

TEST_P(SessionTest, NoStreamsAndNoSteps) {
  Session session(File(), {});
  const Ids ids = OpenStreams(&session, 1);
  StepOne(&session, ids[0], 1);
  const std::string before = StateOf(session, ids[0]);
  const Arrays none = RandomInputs(session.plan(), 0, 1);
  TakeSteps(&session, ids.data(), 0, 1, none);
  TakeSteps(&session, ids, 0, none);
  TakeSteps(&session, nullptr, 0, 1, none);
  TakeSteps(&session, nullptr, 3, 0, none);
  EXPECT_EQ(session.store()->open_streams(), 1);
  EXPECT_EQ(StateOf(session, ids[0]), before);
  // Ids and counts are checked even without steps.
  ExpectError(ErrorCode::kUnknownStream, "77", [&] { TakeSteps(&session, Ids{77}, 0, none); });
  ExpectError(ErrorCode::kInvalidArgument, "-1",
              [&] { session.Step(ids.data(), -1, 1, nullptr, nullptr); });
  session.Clean(ids.data(), 0);
  session.Close(ids.data(), 0);
  session.Open(0, nullptr);
}

TEST_P(SessionTest, OutputsThatAreNotWanted) {
  Session session(File(), {}), other(File(), {});
  const StreamId id = OpenStreams(&session, 1)[0], same = OpenStreams(&other, 1)[0];
  for (uint32_t seed = 0; seed < 6; ++seed) {
    const Arrays inputs = RandomInputs(session.plan(), 1, seed);
    std::vector<const void*> from;
    for (const std::string& input : inputs) from.push_back(input.data());
    std::vector<void*> to(session.plan().outputs.size(), nullptr);
    session.Step(&id, 1, 1, from.data(), to.data());
    TakeSteps(&other, {same}, 1, inputs);
  }
  EXPECT_EQ(StateOf(session, id), StateOf(other, same));
}

TEST_P(SessionTest, DefaultStreams) {
  Session session(File(), {}), other(File(), {});
  const StreamId taken = OpenStreams(&session, 1)[0];
  const Ids ids = OpenStreams(&other, 3);
  for (uint32_t seed = 0; seed < 5; ++seed) {
    const int64_t count = 1 + seed % 3;
    const Arrays inputs = RandomInputs(session.plan(), count, seed);
    const Arrays expected = TakeSteps(&other, ids.data(), count, 1, inputs);
    EXPECT_EQ(TakeSteps(&session, nullptr, count, 1, inputs), expected);
  }
  EXPECT_EQ(session.store()->open_streams(), 4);
  EXPECT_EQ(PositionsOf(session, {taken}), std::vector<int64_t>({0}));
  std::vector<int64_t> positions(4);
  session.Positions(nullptr, 4, positions.data());
  EXPECT_EQ(positions, std::vector<int64_t>({5, 3, 1, 0}));
  // A closed default stream begins again.
  Ids defaults(3);
  session.store()->Defaults(3, defaults.data());
  session.Close(&defaults[0], 1);
  other.Clean(&ids[0], 1);
  const Arrays inputs = RandomInputs(session.plan(), 2, 77);
  EXPECT_EQ(TakeSteps(&session, nullptr, 2, 1, inputs),
            TakeSteps(&other, ids.data(), 2, 1, inputs));
  ExpectError(ErrorCode::kUnknownStream, "was closed", [&] { StepOne(&session, defaults[0], 1); });
}

// A refused step opens no default streams and changes no stream.
TEST(Session, ARefusedStepChangesNothing) {
  PlanBuilder model = EveryOp();
  SessionOptions options;
  options.streams = 3;
  Session session(model.File(), options);
  Arrays inputs = RandomInputs(session.plan(), 2, 1);
  const int32_t token = 5;  // the table has 5
  std::memcpy(inputs[1].data() + 12, &token, sizeof(token));
  ExpectError(ErrorCode::kInvalidArgument, "5",
              [&] { TakeSteps(&session, nullptr, 2, 1, inputs); });
  EXPECT_EQ(session.store()->open_streams(), 0);
  const Ids ids = OpenStreams(&session, 2);
  TakeSteps(&session, ids, 1, RandomInputs(session.plan(), 2, 2));
  const std::string before = StateOf(session, ids[0]) + StateOf(session, ids[1]);
  ExpectError(ErrorCode::kInvalidArgument, "5", [&] { TakeSteps(&session, ids, 1, inputs); });
  inputs = RandomInputs(session.plan(), 2, 3);
  ExpectError(ErrorCode::kInvalidArgument, "twice",
              [&] { TakeSteps(&session, {ids[0], ids[0]}, 1, inputs); });
  ExpectError(ErrorCode::kUnknownStream, "9", [&] { TakeSteps(&session, {ids[0], 9}, 1, inputs); });
  // There is no room for two default streams.
  ExpectError(ErrorCode::kTooManyStreams, "2 of at most 3",
              [&] { TakeSteps(&session, nullptr, 2, 1, inputs); });
  EXPECT_EQ(session.store()->open_streams(), 2);
  EXPECT_EQ(StateOf(session, ids[0]) + StateOf(session, ids[1]), before);
  EXPECT_EQ(PositionsOf(session, ids), std::vector<int64_t>({1, 1}));
}

// A copy continues where its stream was, in this session and in another one, at every age.
TEST_P(SessionTest, CopiesGoOnWhereTheStreamWas) {
  Session session(File(), {}), other(File(), {});
  for (int64_t age = 0; age < 12; ++age) {
    const StreamId id = OpenStreams(&session, 1)[0];
    // Streams that other data was stepped through before.
    const Ids copies = {OpenStreams(&session, 1)[0], OpenStreams(&other, 1)[0]};
    for (uint32_t seed = 0; seed < 9; ++seed) {
      StepOne(&session, copies[0], 1000 + seed);
      StepOne(&other, copies[1], 2000 + seed);
    }
    for (int64_t i = 0; i < age; ++i) StepOne(&session, id, i);
    const std::string state = StateOf(session, id);
    session.SetState(copies[0], state.data(), state.size());
    other.SetState(copies[1], state.data(), state.size());
    EXPECT_EQ(PositionsOf(session, {copies[0]})[0], age);
    EXPECT_EQ(StateOf(session, copies[0]), state);
    EXPECT_EQ(StateOf(other, copies[1]), state);
    for (int64_t i = age; i < age + 9; ++i) {
      const Arrays expected = StepOne(&session, id, i);
      EXPECT_EQ(StepOne(&session, copies[0], i), expected) << "step " << i << " from " << age;
      EXPECT_EQ(StepOne(&other, copies[1], i), expected) << "step " << i << " from " << age;
    }
    EXPECT_EQ(StateOf(other, copies[1]), StateOf(session, id));
    session.Close(&id, 1);
    session.Close(&copies[0], 1);
    other.Close(&copies[1], 1);
  }
}

// A copy holds only its own stream's data, whatever was in the block before.
TEST_P(SessionTest, CopiesHoldNothingOfOthers) {
  for (const bool clean : {false, true}) {
    for (int64_t age = 0; age < 7; ++age) {
      Session fresh(File(), {}), used(File(), {});
      StreamId id = OpenStreams(&used, 1)[0];
      for (uint32_t seed = 0; seed < 20; ++seed) StepOne(&used, id, 500 + seed);
      if (clean) {
        used.Clean(&id, 1);
      } else {
        used.Close(&id, 1);
        id = OpenStreams(&used, 1)[0];
      }
      const StreamId same = OpenStreams(&fresh, 1)[0];
      for (int64_t i = 0; i < age; ++i) {
        EXPECT_EQ(StepOne(&used, id, i), StepOne(&fresh, same, i));
      }
      EXPECT_EQ(StateOf(used, id), StateOf(fresh, same)) << "after " << age << " steps";
      // The same after a copy was restored into a used block.
      const std::string state = StateOf(fresh, same);
      for (uint32_t seed = 0; seed < 20; ++seed) StepOne(&used, id, 500 + seed);
      used.SetState(id, state.data(), state.size());
      EXPECT_EQ(StateOf(used, id), state);
    }
  }
}

TEST_P(SessionTest, CleanStreamsBeginAgain) {
  Session session(File(), {});
  const Ids ids = OpenStreams(&session, 3);
  const Arrays first = RandomInputs(session.plan(), 3, 1),
               second = RandomInputs(session.plan(), 3, 2);
  const Arrays expected = TakeSteps(&session, ids, 1, first);
  TakeSteps(&session, ids, 1, second);
  session.Clean(nullptr, 0);
  EXPECT_EQ(PositionsOf(session, ids), std::vector<int64_t>({0, 0, 0}));
  EXPECT_EQ(TakeSteps(&session, ids, 1, first), expected);
  TakeSteps(&session, ids, 1, second);
  session.Clean(&ids[1], 1);
  EXPECT_EQ(PositionsOf(session, ids), std::vector<int64_t>({2, 0, 2}));
  const Arrays outputs = TakeSteps(&session, ids, 1, first);
  ExpectClose(session.plan(), Rows(session.plan().outputs, session.plan(), outputs, 1, 2),
              Rows(session.plan().outputs, session.plan(), expected, 1, 2));
}

// A wrong copy is refused with a message, and the stream continues.
TEST_P(SessionTest, CopiesThatAreRefused) {
  PlanBuilder model = Model();
  Session session(model.File(), {});
  const StreamId id = OpenStreams(&session, 1)[0];
  for (uint32_t seed = 0; seed < 3; ++seed) StepOne(&session, id, seed);
  const std::string before = StateOf(session, id);
  const auto refused = [&](ErrorCode code, const std::string& part, const std::string& state) {
    ExpectError(code, part, [&] { session.SetState(id, state.data(), state.size()); });
    EXPECT_EQ(StateOf(session, id), before);
  };
  const auto changed = [&](int64_t offset, auto value) {
    std::string state = before;
    std::memcpy(state.data() + offset, &value, sizeof(value));
    return state;
  };
  const ErrorCode invalid = ErrorCode::kInvalidArgument;
  refused(invalid, "not a copy of a stream", "");
  refused(invalid, "not a copy of a stream", "pickle");
  refused(invalid, "not a copy of a stream", std::string(before.size(), '\0'));
  for (const int64_t bytes : {1, 8, 63}) refused(invalid, "cut off", before.substr(0, bytes));
  for (const int64_t bytes : {kHeaderBytes, kHeaderBytes + 1, session.state_bytes() - 1}) {
    refused(invalid, "cut off", before.substr(0, bytes));
  }
  refused(invalid, "extra bytes at its end", before + '\0');
  refused(invalid, "format 2", changed(8, uint32_t{2}));
  refused(invalid, "format 1", changed(12, uint32_t{128}));
  refused(ErrorCode::kOtherModel, "another model", changed(16, uint64_t{1}));
  refused(ErrorCode::kOtherModel, "other weights", changed(24, uint64_t{1}));
  refused(invalid, "position", changed(32, int64_t{-1}));
  refused(invalid, "position", changed(32, std::numeric_limits<int64_t>::max()));
  refused(invalid, "cut off", changed(40, int64_t{64}));
  // The mask of the first attention: which steps of the ring have a key.
  for (const StateEntry& entry : session.executor()->state()) {
    if (entry.name != "key_mask") continue;
    refused(invalid, "bool", changed(kHeaderBytes + entry.offset, char{2}));
    break;
  }

  // Copies of a session with another model, another cache dtype, or other weights.
  PlanBuilder wider = Model();
  wider.plan["nodes"][1]["attributes"]["changed"] = 1;
  PlanBuilder sizes("float32");
  sizes.Output("y", sizes.Dense(sizes.Input("x", {2}), {2}));
  Session another(sizes.File(), {});
  refused(ErrorCode::kOtherModel, "another model", StateOf(another, OpenStreams(&another, 1)[0]));
  SessionOptions half;
  half.cache_dtype = DType::kBFloat16;
  Session bfloat16(model.File(), half);
  refused(ErrorCode::kOtherModel,
          "the same model with the cache_dtype bfloat16, and this session has the cache_dtype "
          "float32",
          StateOf(bfloat16, OpenStreams(&bfloat16, 1)[0]));
  EXPECT_NE(bfloat16.plan_fingerprint(), session.plan_fingerprint());
  PlanBuilder trained = Model();
  std::string& bytes = trained.tensors.begin()->second.bytes;
  bytes[bytes.size() - 1] ^= 1;
  Session other(trained.File(), {});
  EXPECT_EQ(other.plan_fingerprint(), session.plan_fingerprint());
  EXPECT_NE(other.weights_fingerprint(), session.weights_fingerprint());
  const StreamId from = OpenStreams(&other, 1)[0];
  StepOne(&other, from, 5);
  const std::string state = StateOf(other, from);
  refused(ErrorCode::kOtherModel, "other weights", state);
  session.SetState(id, state.data(), state.size(), /*other_weights=*/true);
  EXPECT_EQ(StateOf(session, id).substr(kHeaderBytes), state.substr(kHeaderBytes));
  EXPECT_EQ(PositionsOf(session, {id})[0], 1);
}

TEST_P(SessionTest, SeveralCopiesOrNone) {
  Session session(File(), {});
  const Ids ids = OpenStreams(&session, 3);
  for (uint32_t seed = 0; seed < 5; ++seed) StepOne(&session, ids[0], seed);
  for (uint32_t seed = 0; seed < 2; ++seed) StepOne(&session, ids[1], seed);
  const std::string a = StateOf(session, ids[0]), b = StateOf(session, ids[1]),
                    c = StateOf(session, ids[2]);
  const auto set = [&](const Ids& to, const std::vector<std::string>& from) {
    std::vector<const void*> states;
    std::vector<int64_t> bytes;
    for (const std::string& state : from) {
      states.push_back(state.data());
      bytes.push_back(state.size());
    }
    session.SetStates(to.data(), to.size(), states.data(), bytes.data());
  };
  const auto now = [&] {
    return StateOf(session, ids[0]) + StateOf(session, ids[1]) + StateOf(session, ids[2]);
  };
  ExpectError(ErrorCode::kInvalidArgument, "cut off",
              [&] { set({ids[1], ids[2]}, {a, a.substr(0, 70)}); });
  ExpectError(ErrorCode::kUnknownStream, "", [&] { set({ids[1], 5}, {a, a}); });
  ExpectError(ErrorCode::kInvalidArgument, "twice", [&] { set({ids[1], ids[1]}, {a, b}); });
  EXPECT_EQ(now(), a + b + c);
  set({ids[2], ids[0], ids[1]}, {a, b, c});
  EXPECT_EQ(now(), b + c + a);
  EXPECT_EQ(PositionsOf(session, ids), std::vector<int64_t>({2, 0, 5}));
}

TEST_P(SessionTest, AStateFromABlock) {
  Session session(File(), {});
  const StreamId id = OpenStreams(&session, 1)[0];
  for (uint32_t seed = 0; seed < 6; ++seed) StepOne(&session, id, seed);
  const std::string state = StateOf(session, id);
  std::string made(session.state_bytes(), '\xee');
  session.MakeState(state.data() + kHeaderBytes, 6, made.data());
  EXPECT_EQ(made, state);
  ExpectError(ErrorCode::kInvalidArgument, "-3",
              [&] { session.MakeState(state.data() + kHeaderBytes, -3, made.data()); });
}

// With new weights, streams continue as if their state had been moved to a session with those
// weights.
TEST_P(SessionTest, NewWeights) {
  PlanBuilder trained = Model();
  for (auto& [name, tensor] : trained.tensors) {
    if (tensor.dtype == "float32") tensor = trained.Random(tensor.shape);
    // A variance and a row's length must stay positive.
    if (name.find("variance") != std::string::npos) tensor = Model().tensors.at(name);
  }
  Session session(File(), {}), other(trained.File(), {});
  const StreamId id = OpenStreams(&session, 1)[0], same = OpenStreams(&other, 1)[0];
  for (uint32_t seed = 0; seed < 3; ++seed) StepOne(&session, id, seed);
  const std::string before = StateOf(session, id);
  const int64_t arenas = session.memory().arenas;

  PlanBuilder sizes("float32");
  sizes.Output("y", sizes.Dense(sizes.Input("x", {2}), {2}));
  ExpectError(ErrorCode::kOtherModel, "another model", [&] { session.LoadWeights(sizes.File()); });
  EXPECT_EQ(StateOf(session, id), before);

  session.LoadWeights(trained.File());
  EXPECT_EQ(session.weights_fingerprint(), other.weights_fingerprint());
  EXPECT_EQ(StateOf(session, id).substr(kHeaderBytes), before.substr(kHeaderBytes));
  other.SetState(same, before.data(), before.size(), /*other_weights=*/true);
  for (uint32_t seed = 3; seed < 9; ++seed) {
    EXPECT_EQ(StepOne(&session, id, seed), StepOne(&other, same, seed));
  }
  EXPECT_EQ(session.memory().arenas, arenas);
  // A copy made with the old weights is refused, unless other weights are allowed.
  ExpectError(ErrorCode::kOtherModel, "other weights",
              [&] { session.SetState(id, before.data(), before.size()); });
}

TEST_P(SessionTest, ProfilesTouchNoStream) {
  Session session(File(), {});
  const StreamId id = OpenStreams(&session, 1)[0];
  for (uint32_t seed = 0; seed < 3; ++seed) StepOne(&session, id, seed);
  const std::string before = StateOf(session, id);
  const auto entries = session.Profile(5, 20);
  EXPECT_FALSE(entries.empty());
  double seconds = 0;
  for (const auto& entry : entries) seconds += entry.seconds;
  EXPECT_GT(seconds, 0);
  EXPECT_EQ(StateOf(session, id), before);
  EXPECT_EQ(session.store()->open_streams(), 1);
  ExpectError(ErrorCode::kInvalidArgument, "at least 1", [&] { session.Profile(0, 1); });
  ExpectError(ErrorCode::kInvalidArgument, "at least 1", [&] { session.Profile(1, 0); });
}

TEST_P(SessionTest, Memory) {
  Session session(File(), {});
  const auto before = session.memory();
  EXPECT_GT(before.weights, 0);
  EXPECT_EQ(before.model_file, static_cast<int64_t>(Model().Bytes().size()));
  EXPECT_EQ(before.streams, 0);
  EXPECT_EQ(before.arenas, 0);
  const Ids ids = OpenStreams(&session, 100);
  TakeSteps(&session, ids, 1, RandomInputs(session.plan(), 100, 1));
  const auto after = session.memory();
  EXPECT_GE(after.streams, 100 * session.executor()->block_bytes());
  EXPECT_GT(after.arenas, 0);
  EXPECT_GT(after.streams_overhead, 0);
  TakeSteps(&session, ids, 1, RandomInputs(session.plan(), 100, 1));
  EXPECT_EQ(session.memory().arenas, after.arenas);
  // New weights need new arenas. Those of the old are counted as long as they are there.
  session.LoadWeights(File());
  EXPECT_EQ(session.memory().arenas, 0);
  TakeSteps(&session, ids, 1, RandomInputs(session.plan(), 100, 1));
  EXPECT_EQ(session.memory().arenas, after.arenas);
}

TEST_P(SessionTest, Threads) {
  for (const int64_t threads : {2, 3}) {
    SessionOptions options;
    options.threads = threads;
    Session session(File(), options), other(File(), {});
    const Ids ids = OpenStreams(&session, 300), same = OpenStreams(&other, 300);
    for (uint32_t seed = 0; seed < 6; ++seed) {
      const Arrays inputs = RandomInputs(session.plan(), 300, seed);
      ExpectClose(session.plan(), TakeSteps(&session, ids, 1, inputs),
                  TakeSteps(&other, same, 1, inputs));
    }
  }
  SessionOptions options;
  options.threads = 0;
  ExpectError(ErrorCode::kInvalidArgument, "thread", [&] { Session(File(), options); });
}

}  // namespace

// Allocations of this thread.
thread_local int64_t allocations = 0;

namespace {

#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)

// This test does not use the plan with every op: the kernel of retroactive_attention allocates.
TEST(Session, AStepAllocatesNothing) {
  Session session(SmallModel().File(), {});
  const Ids ids = OpenStreams(&session, 40);
  const Arrays inputs = RandomInputs(session.plan(), 40, 1);
  std::vector<const void*> from;
  std::vector<void*> to;
  Arrays outputs = TakeSteps(&session, ids, 1, inputs);
  for (const std::string& input : inputs) from.push_back(input.data());
  for (std::string& output : outputs) to.push_back(output.data());
  const int64_t before = allocations;
  for (int64_t i = 0; i < 100; ++i) {
    session.Step(ids.data() + i % 10, 1 + i % 30, 1, from.data(), to.data());
  }
  EXPECT_EQ(allocations, before);
  // Default streams do not allocate either, once they are open.
  session.Step(nullptr, 40, 1, from.data(), to.data());
  const int64_t opened = allocations;
  for (int64_t i = 0; i < 100; ++i) session.Step(nullptr, 1 + i % 40, 1, from.data(), to.data());
  EXPECT_EQ(allocations, opened);
}

#endif

#if !defined(__SANITIZE_THREAD__)

// A child process has the streams, and its own threads.
TEST_P(SessionTest, Fork) {
  for (const int64_t threads : {1, 2}) {
    SessionOptions options;
    options.threads = threads;
    Session session(File(), options);
    const Ids ids = OpenStreams(&session, 300);
    const Arrays first = RandomInputs(session.plan(), 300, 1),
                 second = RandomInputs(session.plan(), 300, 2);
    TakeSteps(&session, ids, 1, first);
    const pid_t pid = fork();
    if (pid == 0) {
      alarm(30);  // instead of waiting for ever
      const Arrays outputs = TakeSteps(&session, ids, 1, second);
      Session other(File(), options);
      const Ids same = OpenStreams(&other, 300);
      TakeSteps(&other, same, 1, first);
      _exit(outputs == TakeSteps(&other, same, 1, second) ? 0 : 1);
    }
    int status = 0;
    waitpid(pid, &status, 0);
    EXPECT_TRUE(WIFEXITED(status));
    EXPECT_EQ(WEXITSTATUS(status), 0);
    TakeSteps(&session, ids, 1, second);
    EXPECT_EQ(PositionsOf(session, {ids[7]})[0], 2);
  }
}

#endif

}  // namespace
}  // namespace continual_transformers

#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)

void* operator new(size_t bytes) {
  ++continual_transformers::allocations;
  void* const memory = std::malloc(bytes);
  if (memory == nullptr) throw std::bad_alloc();
  return memory;
}
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, size_t) noexcept { std::free(memory); }

#endif
