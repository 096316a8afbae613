// Tests of a served model without a protocol: what requests from many threads do to its streams,
// and which are refused.

#include "cc/server/served_model.h"

#include <atomic>
#include <chrono>
#include <cstdint>
#include <deque>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "gtest/gtest.h"
#include "tests/cc/server/server_case.h"

namespace continual_transformers::server {
namespace {

class ServedModelTest : public ::testing::Test {
 protected:
  std::unique_ptr<ServedModel> Model(const ModelOptions& options = {}) {
    SmallModel().File()->Save(folder_ / "small.safetensors");
    return std::make_unique<ServedModel>("small", folder_ / "small.safetensors", options);
  }

  Folder folder_;
};

// Takes a request of many streams. `steps`: the number of each stream's step, also its input.
std::unique_ptr<TestCall> SubmitMany(ServedModel* model, const std::vector<std::string>& names,
                                     const std::vector<int64_t>& steps, bool numbered) {
  Arrays data(model->plan().inputs.size());
  for (size_t m = 0; m < names.size(); ++m) {
    const Arrays row = InputsOf(model->plan(), names[m], 0, steps[m]);
    for (size_t i = 0; i < data.size(); ++i) data[i] += row[i];
  }
  auto call = std::make_unique<TestCall>(model->plan(), names, 1, data);
  if (numbered) call->first_steps = steps;
  model->Submit(call.get());
  return call;
}

// Threads share no streams, and each sends its next request before the last one is answered.
// Answers and order must be those of one stream after another.
TEST_F(ServedModelTest, ManyThreadsAnswerLikeStreamsThatAreAlone) {
  constexpr int kThreads = 4, kStreams = 5, kRequests = 60;
  for (const bool numbered : {false, true}) {
    const std::unique_ptr<ServedModel> model = Model();
    std::vector<std::vector<std::unique_ptr<TestCall>>> calls(kThreads);
    std::vector<std::vector<std::vector<int64_t>>> steps(kThreads);
    std::vector<std::thread> threads;
    for (int thread = 0; thread < kThreads; ++thread) {
      threads.emplace_back([&, thread] {
        std::minstd_rand random(thread);
        std::vector<int64_t> next(kStreams, 0);
        for (int request = 0; request < kRequests; ++request) {
          std::vector<std::string> names;
          std::vector<int64_t> numbers;
          for (int s = 0; s < kStreams; ++s) {
            if (random() % 3 == 0) continue;
            names.push_back(std::to_string(thread) + " " + std::to_string(s));
            numbers.push_back(next[s]++);
          }
          steps[thread].push_back(numbers);
          calls[thread].push_back(SubmitMany(model.get(), names, numbers, numbered));
          if (random() % 4 == 0) calls[thread].back()->Wait();
        }
      });
    }
    // Others look at the streams meanwhile.
    std::atomic<bool> ended{false};
    std::thread watcher([&] {
      while (!ended) {
        size_t all = 0;
        model->ListStreams(3, false, &all);
        model->statistics();
        model->EvictIdle();
        std::this_thread::yield();
      }
    });
    for (std::thread& thread : threads) thread.join();
    Undisturbed undisturbed(SmallModel().File());
    int64_t rows = 0;
    for (int thread = 0; thread < kThreads; ++thread) {
      for (int request = 0; request < kRequests; ++request) {
        TestCall* const call = calls[thread][request].get();
        call->Wait();
        ASSERT_TRUE(call->outcome.ok()) << call->outcome.message;
        for (size_t m = 0; m < call->streams.size(); ++m, ++rows) {
          const int64_t step = steps[thread][request][m];
          EXPECT_EQ(call->next_steps[m], step + 1);
          ExpectClose(model->plan(),
                      Rows(model->plan().outputs, model->plan(), call->answers, m, m + 1),
                      undisturbed.Answer(call->streams[m], 0, step));
        }
      }
    }
    ended = true;
    watcher.join();
    EXPECT_EQ(model->statistics().steps, rows);
  }
}

// Every thread sends every step, so each step is taken once, and all its senders get one answer.
TEST_F(ServedModelTest, RepeatsFromManyThreadsMoveNothing) {
  constexpr int kThreads = 3, kSteps = 100;
  const std::unique_ptr<ServedModel> model = Model();
  std::atomic<int> wrong{0};
  for (int step = 0; step < kSteps; ++step) {
    std::vector<std::thread> threads;
    std::vector<std::unique_ptr<TestCall>> calls(kThreads);
    for (int thread = 0; thread < kThreads; ++thread) {
      threads.emplace_back([&, thread] { calls[thread] = Step(model.get(), "a", step); });
    }
    for (std::thread& thread : threads) thread.join();
    for (const auto& call : calls) {
      ASSERT_TRUE(call->outcome.ok()) << call->outcome.message;
      wrong += call->answers != calls[0]->answers;
    }
  }
  EXPECT_EQ(wrong, 0);
  EXPECT_EQ(model->statistics().steps, kSteps);
  EXPECT_EQ(model->statistics().repeats, (kThreads - 1) * kSteps);
}

// Blocks the queue until it is destroyed, from within a batch's answer.
class Plug : public TestCall {
 public:
  Plug(ServedModel* model, const std::string& name)
      : TestCall(model->plan(), {name}, 1, InputsOf(model->plan(), name, 0, 0)) {
    thread_ = std::thread([this, model] { model->Submit(this); });
    while (!holds_) std::this_thread::yield();
  }
  ~Plug() override { Pull(); }

  void Done(const Outcome& outcome) noexcept override {
    holds_ = true;
    while (!pulled_) std::this_thread::yield();
    TestCall::Done(outcome);
  }
  void Pull() {
    pulled_ = true;
    if (thread_.joinable()) thread_.join();
  }

 private:
  std::atomic<bool> holds_{false}, pulled_{false};
  std::thread thread_;
};

TEST_F(ServedModelTest, RequestsThatArriveDuringABatchFormTheNextOne) {
  const std::unique_ptr<ServedModel> model = Model();
  std::vector<std::unique_ptr<TestCall>> calls;
  {
    Plug plug(model.get(), "plug");
    for (int i = 0; i < 5; ++i) calls.push_back(SubmitStep(model.get(), std::to_string(i), 0));
    // A second step of a stream is in the batch after the next.
    calls.push_back(SubmitStep(model.get(), "0", 1));
    EXPECT_EQ(model->waiting(), 6);
  }
  for (const auto& call : calls) {
    call->Wait();
    EXPECT_TRUE(call->outcome.ok()) << call->outcome.message;
  }
  EXPECT_EQ(model->statistics().batches, 3);
}

TEST_F(ServedModelTest, AFullQueueRefusesAtOnce) {
  ModelOptions options;
  options.queue.requests = 2;
  const std::unique_ptr<ServedModel> model = Model(options);
  std::vector<std::unique_ptr<TestCall>> calls;
  {
    Plug plug(model.get(), "plug");
    for (int i = 0; i < 3; ++i) calls.push_back(SubmitStep(model.get(), std::to_string(i), 0));
    ASSERT_TRUE(calls[2]->done());
    EXPECT_EQ(calls[2]->outcome.reason, Reason::kQueueFull);
    EXPECT_FALSE(calls[1]->done());
  }
  for (int i = 0; i < 2; ++i) {
    calls[i]->Wait();
    EXPECT_TRUE(calls[i]->outcome.ok());
  }
  EXPECT_TRUE(Step(model.get(), "2", 0)->outcome.ok());
  EXPECT_EQ(model->statistics().refused[static_cast<int>(Reason::kQueueFull)], 1);
}

TEST_F(ServedModelTest, AStepWhoseDeadlinePassedOrWhoseClientWentDoesNotMoveItsStream) {
  const std::unique_ptr<ServedModel> model = Model();
  struct GoneCall : TestCall {
    using TestCall::TestCall;
    bool Cancelled() const override { return true; }
  };
  TestCall late(model->plan(), {"a"}, 1, InputsOf(model->plan(), "a", 0, 0));
  late.deadline = Clock::now() - std::chrono::seconds(1);
  GoneCall gone(model->plan(), {"a"}, 1, InputsOf(model->plan(), "a", 0, 0));
  std::unique_ptr<TestCall> after;
  {
    Plug plug(model.get(), "plug");
    model->Submit(&late);
    model->Submit(&gone);
    after = SubmitStep(model.get(), "a", 0);
  }
  late.Wait();
  gone.Wait();
  after->Wait();
  EXPECT_EQ(late.outcome.reason, Reason::kDeadline);
  EXPECT_EQ(gone.outcome.reason, Reason::kCancelled);
  EXPECT_TRUE(after->outcome.ok()) << after->outcome.message;
  const Statistics statistics = model->statistics();
  EXPECT_EQ(statistics.refused[static_cast<int>(Reason::kDeadline)], 1);
  EXPECT_EQ(statistics.refused[static_cast<int>(Reason::kCancelled)], 1);
}

TEST_F(ServedModelTest, TheMostStreams) {
  ModelOptions options;
  options.max_streams = 2;
  const std::unique_ptr<ServedModel> model = Model(options);
  EXPECT_TRUE(Step(model.get(), "a", 0)->outcome.ok());
  auto refused = SubmitMany(model.get(), {"b", "c"}, {0, 0}, true);
  EXPECT_EQ(refused->outcome.reason, Reason::kTooManyStreams);
  EXPECT_TRUE(Step(model.get(), "b", 0)->outcome.ok());
  EXPECT_EQ(Step(model.get(), "c", 0)->outcome.reason, Reason::kTooManyStreams);
  // A stream that begins anew, and one that ends, need no room.
  StepOptions anew;
  anew.start = anew.end = true;
  anew.life = 1;
  EXPECT_TRUE(Step(model.get(), "a", 0, anew)->outcome.ok());
  EXPECT_TRUE(Step(model.get(), "c", 0)->outcome.ok());
  EXPECT_EQ(model->statistics().open_streams, 2);
}

TEST_F(ServedModelTest, AnIdleStreamEndsAndItsClientIsToldOnce) {
  ModelOptions options;
  options.idle_timeout = std::chrono::milliseconds(1);
  const std::unique_ptr<ServedModel> model = Model(options);
  for (const bool numbered : {false, true}) {
    StepOptions step;
    step.numbered = numbered;
    EXPECT_TRUE(Step(model.get(), "a", 0, step)->outcome.ok());
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
    model->EvictIdle();
    EXPECT_EQ(model->statistics().open_streams, 0);
    auto told = Step(model.get(), "a", 1, step);
    EXPECT_EQ(told->outcome.reason, Reason::kEnded);
    EXPECT_NE(told->outcome.message.find("idle"), std::string::npos);
    // The next one begins a new stream, which a numbered step 1 cannot.
    auto next = Step(model.get(), "a", numbered ? 0 : 1, step);
    EXPECT_TRUE(next->outcome.ok()) << next->outcome.message;
    EXPECT_EQ(next->next_steps[0], 1);
    model->CloseStream("a", End::kClient);
  }
  EXPECT_EQ(model->statistics().ended[static_cast<int>(End::kIdle)], 2);
}

TEST_F(ServedModelTest, StrictStart) {
  ModelOptions options;
  options.strict_start = true;
  const std::unique_ptr<ServedModel> model = Model(options);
  EXPECT_EQ(Step(model.get(), "a", 0)->outcome.reason, Reason::kNotStarted);
  StepOptions start;
  start.start = true;
  EXPECT_TRUE(Step(model.get(), "a", 0, start)->outcome.ok());
  EXPECT_TRUE(Step(model.get(), "a", 1)->outcome.ok());
}

void ExpectOk(const TestCall& call, const std::vector<int64_t>& next) {
  EXPECT_TRUE(call.outcome.ok()) << call.outcome.message;
  EXPECT_EQ(call.next_steps, next);
}

void ExpectOutOfStep(const TestCall& call, int64_t expected, const std::string& says) {
  EXPECT_EQ(call.outcome.reason, Reason::kOutOfStep) << call.outcome.message;
  ASSERT_EQ(call.outcome.expected.size(), 1u);
  EXPECT_EQ(call.outcome.expected[0].step, expected);
  EXPECT_NE(call.outcome.message.find(says), std::string::npos) << call.outcome.message;
}

TEST_F(ServedModelTest, AnEndWithoutAStep) {
  using Numbers = std::vector<int64_t>;
  Undisturbed undisturbed(SmallModel().File());
  for (const bool numbered : {false, true}) {
    const std::unique_ptr<ServedModel> model = Model();
    StepOptions how;
    how.numbered = numbered;
    for (int64_t step = 0; step < 3; ++step) Step(model.get(), "a", step, how);
    if (numbered) {
      for (const int64_t wrong : {0, 2, 4}) {
        ExpectOutOfStep(*EndOnly(model.get(), {"a"}, {wrong}), 3, "expects step 3, got step");
      }
      EXPECT_EQ(model->statistics().open_streams, 1);
    }
    const Numbers number = numbered ? Numbers{3} : Numbers{};
    // A client that did not get the answer sends it again.
    for (int i = 0; i < 3; ++i) ExpectOk(*EndOnly(model.get(), {"a"}, number), {3});
    Statistics statistics = model->statistics();
    EXPECT_EQ(statistics.open_streams, 0);
    EXPECT_EQ(statistics.steps, 3);
    EXPECT_EQ(statistics.repeats, 0);
    EXPECT_EQ(statistics.ended[static_cast<int>(End::kClient)], 1);
    ExpectOutOfStep(*EndOnly(model.get(), {"a"}, {2}), 0, "is not open and so expects step 0");
    ExpectOk(*EndOnly(model.get(), {"a"}, {0}), {0});
    // Another stream of that name.
    how.life = 1;
    const auto anew = Step(model.get(), "a", 0, how);
    ExpectOk(*anew, {1});
    ExpectClose(model->plan(), anew->answers, undisturbed.Answer("a", 1, 0));
    ExpectOutOfStep(*EndOnly(model.get(), {"a"}, {3}), 1, "expects step 1, got step 3");
    // One that ended with its last step has ended.
    how.end = true;
    Step(model.get(), "a", 1, how);
    ExpectOk(*EndOnly(model.get(), {"a"}, numbered ? Numbers{2} : Numbers{}), {2});
    // One that never was.
    ExpectOk(*EndOnly(model.get(), {"b"}, numbered ? Numbers{0} : Numbers{}), {0});
    ExpectOutOfStep(*EndOnly(model.get(), {"b"}, {5}), 0, "is not open and so expects step 0");
    statistics = model->statistics();
    EXPECT_EQ(statistics.opened, 2);
    EXPECT_EQ(statistics.ended[static_cast<int>(End::kClient)], 2);
  }
}

// Then its client knows, and is not told any more.
TEST_F(ServedModelTest, AnEndWithoutAStepOfAStreamThatTheServerEnded) {
  const std::unique_ptr<ServedModel> model = Model();
  StepOptions plain;
  plain.numbered = false;
  for (const char* const name : {"a", "b"}) Step(model.get(), name, 0);
  model->CloseStream("a", End::kIdle);
  // A request that is refused changes nothing.
  ExpectOutOfStep(*EndOnly(model.get(), {"a", "b"}, {1, 5}), 1, "stream \"b\" expects step 1");
  for (int i = 0; i < 2; ++i) ExpectOk(*EndOnly(model.get(), {"a"}, {1}), {1});
  ExpectOk(*Step(model.get(), "a", 0, plain), {1});
  model->CloseStream("a", End::kIdle);
  EXPECT_EQ(Step(model.get(), "a", 1, plain)->outcome.reason, Reason::kEnded);
  model->CloseStream("b", End::kIdle);
  ExpectOk(*EndOnly(model.get(), {"b"}), {1});
  ExpectOk(*Step(model.get(), "b", 0, plain), {1});
}

TEST_F(ServedModelTest, AnEndWithoutAStepIsTakenInOrder) {
  const std::unique_ptr<ServedModel> model = Model();
  Undisturbed undisturbed(SmallModel().File());
  StepOptions plain, second;
  plain.numbered = second.numbered = false;
  second.life = 1;
  std::vector<std::unique_ptr<TestCall>> calls;
  {
    Plug plug(model.get(), "plug");
    calls.push_back(SubmitStep(model.get(), "a", 0, plain));
    calls.push_back(SubmitStep(model.get(), "a", 1, plain));
    calls.push_back(SubmitNoStep(model.get(), {"a", "b"}, {}, false, true));
    calls.push_back(SubmitStep(model.get(), "b", 0, plain));
    calls.push_back(SubmitNoStep(model.get(), {"a"}, {0}, true, false));
    calls.push_back(SubmitStep(model.get(), "a", 0, second));
    calls.push_back(SubmitStep(model.get(), "a", 1, second));
    calls.push_back(SubmitNoStep(model.get(), {"a"}, {2}, false, true));
    EXPECT_EQ(model->waiting(), static_cast<int64_t>(calls.size()));
    EXPECT_FALSE(calls[2]->done());
  }
  for (const auto& call : calls) call->Wait();
  const std::vector<std::vector<int64_t>> next = {{1}, {2}, {2, 0}, {1}, {0}, {1}, {2}, {2}};
  for (size_t i = 0; i < calls.size(); ++i) ExpectOk(*calls[i], next[i]);
  ExpectClose(model->plan(), calls[1]->answers, undisturbed.Answer("a", 0, 1));
  ExpectClose(model->plan(), calls[3]->answers, undisturbed.Answer("b", 0, 0));
  ExpectClose(model->plan(), calls[5]->answers, undisturbed.Answer("a", 1, 0));
  ExpectClose(model->plan(), calls[6]->answers, undisturbed.Answer("a", 1, 1));
  EXPECT_EQ(model->statistics().open_streams, 2);  // b, and the plug's
}

TEST_F(ServedModelTest, ManyStreamsEndWithoutAStepOrNone) {
  const std::unique_ptr<ServedModel> model = Model();
  for (const char* const name : {"a", "b", "c"}) Step(model.get(), name, 0);
  Step(model.get(), "c", 1);
  ExpectOutOfStep(*EndOnly(model.get(), {"a", "b", "c"}, {1, 1, 1}), 2, "stream \"c\" expects");
  EXPECT_EQ(EndOnly(model.get(), {"a", "a"})->outcome.reason, Reason::kInvalidArgument);
  EXPECT_EQ(model->statistics().open_streams, 3);
  ExpectOk(*EndOnly(model.get(), {"a", "b", "c"}, {1, 1, 2}), {1, 1, 2});
  EXPECT_EQ(model->statistics().open_streams, 0);
}

TEST_F(ServedModelTest, AStreamBeginsWithoutAStep) {
  ModelOptions options;
  options.max_streams = 2;
  options.strict_start = true;
  const std::unique_ptr<ServedModel> model = Model(options);
  Undisturbed undisturbed(SmallModel().File());
  struct Counter : StreamWatcher {
    void Stepped(int64_t, const std::vector<const char*>&) noexcept override { ++steps; }
    int steps = 0;
  };
  const auto watcher = std::make_shared<Counter>();
  model->Watch("a", watcher);
  ExpectOutOfStep(*BeginOnly(model.get(), {"a"}, {1}), 0, "begins anew and so expects step 0");
  ExpectOk(*EndOnly(model.get(), {"a"}), {0});
  EXPECT_EQ(model->statistics().open_streams, 0);
  // Also a second time, by a client that did not get the answer.
  for (int i = 0; i < 2; ++i) ExpectOk(*BeginOnly(model.get(), {"a"}, {0}), {0});
  EXPECT_EQ(model->statistics().open_streams, 1);
  EXPECT_EQ(watcher->steps, 0);
  for (int64_t step = 0; step < 3; ++step) {
    const auto call = Step(model.get(), "a", step);
    ExpectOk(*call, {step + 1});
    ExpectClose(model->plan(), call->answers, undisturbed.Answer("a", 0, step));
  }
  EXPECT_EQ(watcher->steps, 3);
  // Both have room, or none begins.
  EXPECT_EQ(BeginOnly(model.get(), {"b", "c"})->outcome.reason, Reason::kTooManyStreams);
  ExpectOk(*BeginOnly(model.get(), {"a", "b"}), {0, 0});
  EXPECT_EQ(model->statistics().open_streams, 2);
  EXPECT_EQ(BeginOnly(model.get(), {"c"})->outcome.reason, Reason::kTooManyStreams);
  StepOptions anew;
  anew.life = 1;
  const auto call = Step(model.get(), "a", 0, anew);
  ExpectClose(model->plan(), call->answers, undisturbed.Answer("a", 1, 0));
  // Where they are is what an end has to say.
  ExpectOk(*EndOnly(model.get(), {"a", "b"}, {1, 0}), {1, 0});
  const auto both = SubmitNoStep(model.get(), {"c"}, {}, true, true);
  both->Wait();
  ExpectOk(*both, {0});
  EXPECT_EQ(model->statistics().open_streams, 0);
  EXPECT_EQ(model->statistics().steps, 4);
}

// A request without steps that neither begins nor ends a stream asks nothing.
TEST_F(ServedModelTest, NothingToDo) {
  const std::unique_ptr<ServedModel> model = Model();
  Step(model.get(), "a", 0);
  const auto call = SubmitNoStep(model.get(), {"a", "b"}, {}, false, false);
  call->Wait();
  ExpectOk(*call, {});
  EXPECT_EQ(model->statistics().open_streams, 1);
  EXPECT_TRUE(Step(model.get(), "a", 1)->outcome.ok());
}

// A new stream may have the name of one that ended with its first request.
TEST_F(ServedModelTest, AnEndedStreamsAnswerIsNotANewOnes) {
  const std::unique_ptr<ServedModel> model = Model();
  const Arrays first = Step(model.get(), "a", 0, {true, false, true, 0})->answers;
  EXPECT_EQ(Step(model.get(), "a", 0, {true, false, true, 0})->answers, first);  // a retry
  Undisturbed undisturbed(SmallModel().File());
  // Other inputs.
  const auto second = Step(model.get(), "a", 0, {true, false, true, 1});
  EXPECT_EQ(second->answers, undisturbed.Answer("a", 1, 0));
  EXPECT_NE(second->answers, first);
  // An open stream does not begin anew by itself.
  Step(model.get(), "b", 0);
  const auto other = Step(model.get(), "b", 0, {true, false, false, 1});
  EXPECT_EQ(other->outcome.reason, Reason::kOutOfStep) << other->outcome.message;
  EXPECT_TRUE(Step(model.get(), "b", 0)->outcome.ok());
  EXPECT_TRUE(Step(model.get(), "b", 1)->outcome.ok());
}

// Whoever looks after the server does not wait for a batch that takes long.
TEST_F(ServedModelTest, StatisticsDuringABatch) {
  const std::unique_ptr<ServedModel> model = Model();
  Step(model.get(), "a", 0);
  Plug plug(model.get(), "plug");
  EXPECT_EQ(model->statistics().steps, 2);  // its own, too
}

TEST_F(ServedModelTest, ACopyGoesOnWhereItsStreamWas) {
  const std::unique_ptr<ServedModel> model = Model(), other = Model();
  Undisturbed undisturbed(SmallModel().File());
  for (int64_t step = 0; step < 7; ++step) Step(model.get(), "a", step);
  other->CopyIn(model->CopyOut("a"), false);
  // The last answer came along.
  EXPECT_EQ(Step(other.get(), "a", 6)->answers, Step(model.get(), "a", 6)->answers);
  for (int64_t step = 7; step < 12; ++step) {
    ExpectClose(model->plan(), Step(other.get(), "a", step)->answers,
                undisturbed.Answer("a", 0, step));
  }
  EXPECT_THROW(model->CopyOut("b"), Refusal);
  StreamCopy damaged = model->CopyOut("a");
  damaged.state.resize(damaged.state.size() / 2);
  EXPECT_THROW(other->CopyIn(damaged, false), std::exception);
  damaged = model->CopyOut("a");
  damaged.answer += "x";
  EXPECT_THROW(other->CopyIn(damaged, false), Refusal);
  EXPECT_TRUE(Step(other.get(), "a", 12)->outcome.ok());
}

}  // namespace
}  // namespace continual_transformers::server
