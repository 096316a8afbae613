// Tests one session called by several threads at once. Every step's numbers are compared with a
// replay by one thread. The model's second output says which step of its stream a call got, so the
// order of the calls is known afterwards. Run it under ThreadSanitizer.

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "cc/session/session.h"
#include "gtest/gtest.h"
#include "tests/cc/model_file_case.h"
#include "tests/cc/session_case.h"

namespace continual_transformers {
namespace {

constexpr int kThreads = 4;

// Runs f(0), f(1), ..., each in its own thread.
void RunThreads(int count, const std::function<void(int)>& f) {
  std::vector<std::thread> threads;
  for (int t = 0; t < count; ++t) threads.emplace_back(f, t);
  for (std::thread& thread : threads) thread.join();
}

float Number(const std::string& bytes, int64_t i) {
  float x;
  std::memcpy(&x, bytes.data() + i * sizeof(x), sizeof(x));
  return x;
}

// All threads step the same streams. Each call steps several of them in any order, with new inputs.
TEST(SessionThreads, StepsOfSharedStreamsAgainstAReplay) {
  constexpr int64_t kStreams = 6, kCalls = 40;
  Session session(SmallModel().File(), {}), replay(SmallModel().File(), {});
  const Ids ids = OpenStreams(&session, kStreams), same = OpenStreams(&replay, kStreams);
  struct Step {
    Arrays inputs, outputs;  // of one step of one stream
  };
  std::mutex mutex;
  // Keys: the stream, and which of its steps it was.
  std::map<std::pair<int64_t, int64_t>, Step> log;
  RunThreads(kThreads, [&](int t) {
    std::mt19937 random(t);
    for (int call = 0; call < kCalls; ++call) {
      std::vector<int64_t> places(kStreams);
      for (int64_t i = 0; i < kStreams; ++i) places[i] = i;
      std::shuffle(places.begin(), places.end(), random);
      places.resize(random() % 3);  // The model counts to 50: a stream takes 27 steps on average.
      const int64_t count = places.size(), steps = 1;
      Ids some;
      for (const int64_t place : places) some.push_back(ids[place]);
      const Arrays inputs = RandomInputs(session.plan(), count * steps, random());
      const Arrays outputs = TakeSteps(&session, some, steps, inputs);
      const Plan& plan = session.plan();
      for (int64_t i = 0; i < count; ++i) {
        const int64_t position = static_cast<int64_t>(Number(outputs[1], i));
        std::lock_guard<std::mutex> lock(mutex);
        const bool is_new = log.emplace(std::make_pair(places[i], position),
                                        Step{Rows(plan.inputs, plan, inputs, i, i + 1),
                                             Rows(plan.outputs, plan, outputs, i, i + 1)})
                                .second;
        EXPECT_TRUE(is_new) << "two calls took step " << position << " of a stream";
      }
    }
  });
  std::vector<int64_t> steps(kStreams, 0);
  for (const auto& [key, step] : log) {
    const auto& [place, position] = key;
    EXPECT_EQ(position, steps[place]++) << "a step is missing";
    ExpectClose(replay.plan(), TakeSteps(&replay, {same[place]}, 1, step.inputs), step.outputs);
  }
  EXPECT_EQ(PositionsOf(session, ids), steps);
}

// Every stream has its own input, the same at every step. So its outputs and its state depend only
// on its position, whatever other threads do.
class Expected {
 public:
  static constexpr int64_t kMost = 45;

  Expected(std::shared_ptr<const ModelFile> file, int64_t streams) : session_(std::move(file), {}) {
    for (int64_t i = 0; i < streams; ++i) {
      inputs.push_back(RandomInputs(session_.plan(), 1, i));
      const StreamId id = OpenStreams(&session_, 1)[0];
      for (int64_t p = 0; p < kMost; ++p) {
        states[{i, p}] = StateOf(session_, id);
        outputs[{i, p}] = TakeSteps(&session_, {id}, 1, inputs[i]);
      }
    }
  }

  const Plan& plan() const { return session_.plan(); }
  static int64_t PositionIn(const std::string& state) {
    int64_t position;
    std::memcpy(&position, state.data() + 32, sizeof(position));
    return position;
  }

  std::vector<Arrays> inputs;
  std::map<std::pair<int64_t, int64_t>, Arrays> outputs;
  std::map<std::pair<int64_t, int64_t>, std::string> states;

 private:
  Session session_;
};

// Threads step, copy, restore, clean and read the positions of streams that they share, and open
// and close others.
TEST(SessionThreads, EverythingAtOnce) {
  constexpr int64_t kStreams = 5, kCalls = 400;
  Session session(SmallModel().File(), {});
  const Expected expected(SmallModel().File(), kStreams);
  const Ids ids = OpenStreams(&session, kStreams);
  std::atomic<int64_t> copies{0}, steps{0};
  RunThreads(kThreads, [&](int t) {
    std::mt19937 random(100 + t);
    Ids own;
    for (int call = 0; call < kCalls; ++call) {
      const int64_t place = random() % kStreams;
      const StreamId id = ids[place];
      const int what = random() % 16;
      if (what == 0) {
        session.Clean(&id, 1);
      } else if (what == 1) {
        // A copy holds one moment: it is never torn.
        const std::string state = StateOf(session, id);
        const int64_t position = Expected::PositionIn(state);
        ASSERT_LT(position, Expected::kMost);
        ASSERT_EQ(state, expected.states.at({place, position}));
        ++copies;
      } else if (what == 2) {
        const std::string& state = expected.states.at({place, random() % 9});
        session.SetState(id, state.data(), state.size());
      } else if (what == 3) {
        const Ids more = OpenStreams(&session, random() % 3);
        own.insert(own.end(), more.begin(), more.end());
      } else if (what == 4 && !own.empty()) {
        const StreamId closed = own.back();
        own.pop_back();
        session.Close(&closed, 1);
        ASSERT_THROW(StepOne(&session, closed, 1), Error);
      } else if (what == 5) {
        for (const int64_t position : PositionsOf(session, ids)) {
          ASSERT_GE(position, 0);
          ASSERT_LE(position, Expected::kMost);
        }
      } else if (what == 6) {
        // Fresh streams that only this thread uses.
        for (StreamId& mine : own) {
          session.Clean(&mine, 1);
          ASSERT_EQ(TakeSteps(&session, {mine}, 1, expected.inputs[place]),
                    expected.outputs.at({place, 0}));
        }
      } else {
        // The limit leaves room for the other threads' steps after this reading of the position.
        if (PositionsOf(session, {id})[0] > Expected::kMost - kThreads - 2) {
          session.Clean(&id, 1);
        }
        const Arrays outputs = TakeSteps(&session, {id}, 1, expected.inputs[place]);
        const int64_t position = static_cast<int64_t>(Number(outputs[1], 0));
        ASSERT_LT(position, Expected::kMost);
        ASSERT_EQ(outputs, expected.outputs.at({place, position}));
        ++steps;
      }
    }
    session.Close(own.data(), own.size());
  });
  EXPECT_EQ(session.store()->open_streams(), kStreams);
  EXPECT_GT(copies, 0);
  EXPECT_GT(steps, 0);
  for (int64_t i = 0; i < kStreams; ++i) {
    const std::string state = StateOf(session, ids[i]);
    EXPECT_EQ(state, expected.states.at({i, Expected::PositionIn(state)}));
  }
}

// Threads call all streams and default streams, and clean all streams.
TEST(SessionThreads, CallsOfAllStreams) {
  constexpr int64_t kStreams = 8;
  Session session(SmallModel().File(), {});
  const Expected expected(SmallModel().File(), kStreams);
  Arrays all;
  for (int64_t i = 0; i < kStreams; ++i) {
    for (size_t k = 0; k < expected.inputs[i].size(); ++k) {
      if (i == 0) all.emplace_back();
      all[k] += expected.inputs[i][k];
    }
  }
  RunThreads(kThreads, [&](int t) {
    for (int call = 0; call < 60; ++call) {
      if (t == 0) {
        session.Clean(nullptr, 0);
        std::this_thread::yield();
        continue;
      }
      if (t == 1) {
        // One of them is closed, and the next step opens it again.
        StreamId id;
        session.store()->Defaults(1, &id);
        try {
          if (call % 8 == 0) session.Close(&id, 1);
        } catch (const Error& error) {
          FAIL() << error.what();
        }
      }
      std::vector<int64_t> positions(kStreams);
      session.Positions(nullptr, kStreams, positions.data());
      for (const int64_t position : positions) {
        if (position > Expected::kMost - 5) session.Clean(nullptr, 0);
      }
      const Arrays outputs = TakeSteps(&session, nullptr, kStreams, 1, all);
      for (int64_t i = 0; i < kStreams; ++i) {
        const int64_t position = static_cast<int64_t>(Number(outputs[1], i));
        ASSERT_LT(position, Expected::kMost);
        ExpectClose(expected.plan(),
                    Rows(expected.plan().outputs, expected.plan(), outputs, i, i + 1),
                    expected.outputs.at({i, position}));
      }
    }
  });
  EXPECT_EQ(session.store()->open_streams(), kStreams);
}

// A call uses the old weights or the new ones, in all of its nodes.
TEST(SessionThreads, NewWeightsBetweenSteps) {
  const std::shared_ptr<const ModelFile> files[] = {SmallModel(1).File(), SmallModel(2).File()};
  Session session(files[0], {});
  // For each set of weights: the outputs that fresh streams must give.
  const Expected expected[] = {Expected(files[0], 3), Expected(files[1], 3)};
  std::atomic<bool> stop{false};
  std::atomic<int64_t> with[2] = {};
  RunThreads(3, [&](int t) {
    if (t == 0) {
      for (int i = 1; i <= 30 || with[0] == 0 || with[1] == 0; ++i) {
        session.LoadWeights(files[i % 2]);
      }
      stop = true;
      return;
    }
    const StreamId id = OpenStreams(&session, 1)[0];
    while (!stop) {
      session.Clean(&id, 1);
      const Arrays outputs = TakeSteps(&session, {id}, 1, expected[0].inputs[t]);
      const bool is_new = outputs == expected[1].outputs.at({t, 0});
      ASSERT_TRUE(is_new || outputs == expected[0].outputs.at({t, 0}));
      ++with[is_new];
    }
  });
}

// Several threads call a session that has its own threads.
TEST(SessionThreads, ThreadsOfItsOwn) {
  SessionOptions options;
  options.threads = 2;
  Session session(EveryOp().File(), options), replay(EveryOp().File(), {});
  RunThreads(3, [&](int t) {
    const Ids ids = OpenStreams(&session, 200);
    for (int call = 0; call < 4; ++call) {
      TakeSteps(&session, ids, 1, RandomInputs(session.plan(), 200, 10 * t + call));
    }
    const Arrays outputs = TakeSteps(&session, ids, 1, RandomInputs(session.plan(), 200, t));
    const Ids same = OpenStreams(&replay, 200);
    for (int call = 0; call < 4; ++call) {
      TakeSteps(&replay, same, 1, RandomInputs(replay.plan(), 200, 10 * t + call));
    }
    ExpectClose(replay.plan(), outputs,
                TakeSteps(&replay, same, 1, RandomInputs(replay.plan(), 200, t)));
  });
}

// Tests which calls wait for a step of stream a. The step is a lease that the test holds as long as
// it needs.
class WhoWaits : public ::testing::Test {
 protected:
  WhoWaits() : session_(SmallModel().File(), {}), ids_(OpenStreams(&session_, 3)) {
    StepOne(&session_, ids_[0], 1);
    step_.Take(session_.store(), &ids_[0], 1);
  }

  // Expects that `call` ends while the step is in progress.
  void DoesNotWait(const std::function<void()>& call) { std::thread(call).join(); }

  // Expects that `call` ends only after the step.
  void Waits(const std::function<void()>& call) {
    std::atomic<bool> done{false};
    std::thread thread([&] {
      call();
      done = true;
    });
    std::this_thread::sleep_for(std::chrono::milliseconds(30));
    EXPECT_FALSE(done);
    step_.Advance(1);
    step_.Release();
    thread.join();
  }

  Session session_;
  const Ids ids_;
  StreamStore::Lease step_;
};

TEST_F(WhoWaits, AStepOfAnotherStreamDoesNot) {
  DoesNotWait([&] { StepOne(&session_, ids_[1], 1); });
}

TEST_F(WhoWaits, CopyingCleaningAndClosingAnotherStreamDoNot) {
  DoesNotWait([&] {
    const std::string state = StateOf(session_, ids_[1]);
    session_.SetState(ids_[2], state.data(), state.size());
    session_.Clean(&ids_[1], 1);
    session_.Close(&ids_[1], 1);
  });
}

TEST_F(WhoWaits, OpeningDoesNot) {
  DoesNotWait([&] {
    OpenStreams(&session_, 5000);
    TakeSteps(&session_, nullptr, 2, 1, RandomInputs(session_.plan(), 2, 1));
  });
}

TEST_F(WhoWaits, PositionsDoNot) {
  DoesNotWait([&] {
    EXPECT_EQ(PositionsOf(session_, ids_), std::vector<int64_t>({1, 0, 0}));
    EXPECT_EQ(session_.store()->OpenStreams(), ids_);
  });
}

TEST_F(WhoWaits, NewWeightsDoNot) {
  DoesNotWait([&] { session_.LoadWeights(SmallModel(2).File()); });
}

TEST_F(WhoWaits, AStepOfTheSameStream) {
  Waits([&] {
    const Arrays outputs =
        TakeSteps(&session_, {ids_[1], ids_[0]}, 1, RandomInputs(session_.plan(), 2, 1));
    EXPECT_EQ(Number(outputs[1], 1), 2);
  });
}

TEST_F(WhoWaits, CopyingTheSameStream) {
  Waits([&] { EXPECT_EQ(Expected::PositionIn(StateOf(session_, ids_[0])), 2); });
}

TEST_F(WhoWaits, PuttingACopyBackIntoTheSameStream) {
  const std::string state = StateOf(session_, ids_[1]);
  Waits([&] { session_.SetState(ids_[0], state.data(), state.size()); });
  EXPECT_EQ(PositionsOf(session_, {ids_[0]})[0], 0);
}

TEST_F(WhoWaits, CleaningTheSameStream) {
  Waits([&] { session_.Clean(nullptr, 0); });
  EXPECT_EQ(PositionsOf(session_, {ids_[0]})[0], 0);
}

TEST_F(WhoWaits, ClosingTheSameStream) {
  Waits([&] { session_.Close(&ids_[0], 1); });
  EXPECT_FALSE(session_.store()->IsOpen(ids_[0]));
}

}  // namespace
}  // namespace continual_transformers
