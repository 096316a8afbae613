// Tests that another server rebuilds streams from the journal. Those that need a Redis start one,
// and are skipped if there is none on this machine.

#include "cc/server/journal.h"

#include <signal.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "cc/server/journal_entry.h"
#include "cc/server/log.h"
#include "cc/server/model_repository.h"
#include "cc/server/replay.h"
#include "cc/server/shard_log.h"
#include "cc/server/shards.h"
#include "cc/server/snapshots.h"
#include "gtest/gtest.h"
#include "tests/cc/refusals.h"
#include "tests/cc/server/redis_case.h"
#include "tests/cc/server/server_case.h"

namespace continual_transformers::server {
namespace {

using std::chrono::milliseconds;

std::array<int64_t, kShards> AllIn(int64_t epoch) {
  std::array<int64_t, kShards> epochs;
  epochs.fill(epoch);
  return epochs;
}

constexpr StepOptions kPlain = {false, false, false, 0};
constexpr StepOptions kEnd = {true, false, true, 0};

TEST(ShardsTest, IsCrc32) {
  // zlib.crc32(name) % 256 in Python.
  EXPECT_EQ(ShardOf(""), 0);
  EXPECT_EQ(ShardOf("123456789"), 0xcbf43926 % 256);
  EXPECT_EQ(ShardOf("stream-1"), 21);
}

TEST(JournalEntryTest, ComesBackAsItWas) {
  JournalEntryWriter writer({1, 2, 3, 4, 5});
  writer.AddRow(JournalRow::kBegan, "first", 0, 2, 6);
  writer.Append("abc", 3);
  writer.Append("def", 3);
  writer.AddRow(JournalRow::kEnded, std::string("\0x", 2), 7, 0, 0);
  const std::string bytes = writer.Finish();
  std::vector<JournalRow> rows;
  const JournalHeader header = ReadJournalEntry(bytes, &rows);
  EXPECT_EQ(header.plan, 1u);
  EXPECT_EQ(header.weights, 2u);
  EXPECT_EQ(header.server, 3u);
  EXPECT_EQ(header.writer, 4u);
  EXPECT_EQ(header.number, 5u);
  ASSERT_EQ(rows.size(), 2u);
  EXPECT_EQ(rows[0].name, "first");
  EXPECT_EQ(rows[0].steps, 2);
  EXPECT_EQ(rows[0].data, "abcdef");
  EXPECT_EQ(rows[1].name, std::string("\0x", 2));
  EXPECT_EQ(rows[1].first, 7);
  for (size_t size = 0; size < bytes.size(); ++size) {
    ExpectError(ErrorCode::kInvalidArgument, "damaged",
                [&] { ReadJournalEntry(bytes.substr(0, size), &rows); });
    std::string changed = bytes;
    changed[size] = static_cast<char>(changed[size] ^ 4);
    ExpectError(ErrorCode::kInvalidArgument, "damaged", [&] { ReadJournalEntry(changed, &rows); });
  }
}

TEST(RedisAddressTest, Parse) {
  RedisAddress address = RedisAddress::Parse("redis://localhost:1234/5");
  EXPECT_EQ(address.host, "localhost");
  EXPECT_EQ(address.port, 1234);
  EXPECT_EQ(address.database, 5);
  address = RedisAddress::Parse("redis://:se@cret@[::1]");
  EXPECT_EQ(address.host, "::1");
  EXPECT_EQ(address.port, 6379);
  EXPECT_EQ(address.password, "se@cret");
  EXPECT_EQ(address.text().find("cret"), std::string::npos);
  for (const char* const url : {"", "localhost", "redis://", "redis://h:0", "redis://h:99999",
                                "redis://h:1/x", "http://h:1", "redis://user:p@h"}) {
    ExpectError(ErrorCode::kInvalidArgument, "redis://host:port",
                [&] { RedisAddress::Parse(url); });
  }
}

// A stream that is rebuilt at any step, from the fewest inputs and from more, goes on like one that
// was never lost.
class ReplayTest : public ::testing::TestWithParam<bool> {};

INSTANTIATE_TEST_SUITE_P(Models, ReplayTest, ::testing::Values(false, true),
                         [](const auto& info) { return info.param ? "EveryOp" : "Small"; });

TEST_P(ReplayTest, GoesOnLikeTheLostStream) {
  PlanBuilder builder = GetParam() ? EveryOp() : SmallModel();
  // A state that goes on depends on all steps: the journal refuses such models.
  if (GetParam()) NodeOf(&builder, "recurrent")["attributes"]["goes_on"] = false;
  const auto file = builder.File();
  Session session(file, {});
  const Plan& plan = session.plan();
  const int64_t field = ReceptiveField(plan);
  if (!GetParam()) {
    EXPECT_EQ(field, plan.receptive_field);
  }
  Undisturbed undisturbed(file);
  const auto history = [&](int64_t begin, int64_t end, int64_t of_last) {
    StreamHistory of_stream;
    of_stream.name = "s";
    for (int64_t step = begin; step < end;) {
      const int64_t count = step < end - of_last ? 1 : of_last;
      StreamHistory::Steps steps = {step, count, "", true};
      for (size_t i = 0; i < plan.inputs.size(); ++i) {
        for (int64_t k = 0; k < count; ++k) {
          steps.inputs += InputsOf(plan, "s", 0, step + k)[i];
        }
      }
      of_stream.steps.push_back(std::move(steps));
      step += count;
    }
    return of_stream;
  };
  for (const int64_t end : {int64_t{1}, int64_t{2}, field - 1, field, field + 1, 2 * field + 3}) {
    for (const int64_t of_last : {int64_t{1}, int64_t{3}}) {
      if (end < of_last) continue;
      const int64_t needed = FirstNeeded(field, end - of_last);
      for (const int64_t begin : {needed, needed / 2, int64_t{0}}) {
        SCOPED_TRACE("steps " + std::to_string(begin) + " to " + std::to_string(end));
        const StreamCopy copy = Rebuild(&session, history(begin, end, of_last));
        StreamId id = OpenStreams(&session, 1)[0];
        session.SetState(id, copy.state.data(), static_cast<int64_t>(copy.state.size()));
        EXPECT_EQ(PositionsOf(session, {id})[0], end);
        // The last answer.
        EXPECT_EQ(copy.last_first, end - of_last);
        EXPECT_EQ(copy.last_steps, of_last);
        Arrays answer(plan.outputs.size()), expected(plan.outputs.size());
        size_t at = 0;
        for (size_t i = 0; i < answer.size(); ++i) {
          const int64_t bytes = of_last * RowBytes(plan, plan.outputs[i]);
          answer[i] = copy.answer.substr(at, bytes);
          at += bytes;
          for (int64_t k = 0; k < of_last; ++k) {
            expected[i] += undisturbed.Answer("s", 0, end - of_last + k)[i];
          }
        }
        ExpectClose(plan, answer, expected);
        for (int64_t step = end; step < end + field + 2; ++step) {
          ExpectClose(plan, TakeSteps(&session, {id}, 1, InputsOf(plan, "s", 0, step)),
                      undisturbed.Answer("s", 0, step));
        }
        session.Close(&id, 1);
      }
      if (needed > 0) {
        ExpectError(ErrorCode::kInvalidArgument, "missing",
                    [&] { Rebuild(&session, history(needed + 1, end, of_last)); });
      }
    }
  }
  EXPECT_EQ(session.store()->open_streams(), 0);
}

// Offsets of positional encodings are not in the inputs.
TEST(ReplayTest, KeepsOffsets) {
  const auto file = SmallModel().File();
  Session session(file, {});
  const Plan& plan = session.plan();
  StreamId id = OpenStreams(&session, 1)[0];
  std::string state = StateOf(session, id);
  EXPECT_FALSE(HasOffsets(session, state));
  const int64_t offset = 3;
  const int64_t header = session.state_bytes() - session.executor()->block_bytes();
  for (const StateEntry& entry : session.executor()->state()) {
    if (entry.name == "offset") {
      std::memcpy(state.data() + header + entry.offset, &offset, sizeof(offset));
    }
  }
  EXPECT_TRUE(HasOffsets(session, state));
  session.SetState(id, state.data(), static_cast<int64_t>(state.size()));
  StreamHistory history = {"s", state, 0, {}};
  const int64_t end = 15;
  for (int64_t step = 0; step < end; ++step) {
    TakeSteps(&session, {id}, 1, InputsOf(plan, "s", 0, step));
    history.steps.push_back({step, 1, InputsOf(plan, "s", 0, step)[0], false});
  }
  const StreamCopy copy = Rebuild(&session, history);
  EXPECT_EQ(copy.last_steps, 0);
  StreamId other = OpenStreams(&session, 1)[0];
  session.SetState(other, copy.state.data(), static_cast<int64_t>(copy.state.size()));
  for (int64_t step = end; step < end + 9; ++step) {
    const Arrays inputs = InputsOf(plan, "s", 0, step);
    ExpectClose(plan, TakeSteps(&session, {other}, 1, inputs),
                TakeSteps(&session, {id}, 1, inputs));
  }
}

std::vector<JournalRow> OneRow(const std::string& name, uint32_t flags, int64_t first,
                               int64_t steps) {
  return {{flags, name, first, steps, {}}};
}

TEST(ShardLogTest, KeepsWhatIsNeeded) {
  ShardLog log(4);
  uint64_t id = 0;
  const auto append = [&](const std::string& name, uint32_t flags, int64_t first, int64_t steps) {
    log.Append({++id, 0}, 100, OneRow(name, flags, first, steps));
  };
  ShardLog::Id oldest;
  append("idle", JournalRow::kBegan, 0, 1);
  for (int64_t step = 0; step < 50; ++step)
    append("busy", step == 0 ? uint32_t{JournalRow::kBegan} : 0, step, 1);
  EXPECT_EQ(log.Trim(0, &oldest), 0);  // the idle stream needs its first entry
  EXPECT_EQ(log.Behind(4000), std::vector<std::string>({"idle"}));
  EXPECT_TRUE(log.Behind(6000).empty());
  append("idle", JournalRow::kCopy, 1, 0);
  // Of the busy one, step 49 and the three before it.
  EXPECT_EQ(log.Trim(0, &oldest), 47);
  EXPECT_EQ(oldest.epoch, 48u);
  append("idle", 0, 1, 1);
  append("busy", JournalRow::kEnded, 50, 1);
  EXPECT_EQ(log.Trim(0, &oldest), 4);
  EXPECT_EQ(oldest.epoch, 52u);  // the copy
  // A copy with offsets is needed for ever.
  append("idle", JournalRow::kCopy | JournalRow::kHasOffsets, 2, 0);
  for (int64_t step = 2; step < 50; ++step) append("idle", 0, step, 1);
  log.Trim(0, &oldest);
  EXPECT_EQ(oldest.epoch, 55u);
  log.Forget("idle");
  log.Trim(5, &oldest);
  EXPECT_EQ(log.entries(), 5);
}

class JournalServer {
 public:
  JournalServer(const std::string& model, const JournalOptions& options,
                const std::string& state_dir = "") {
    if (!state_dir.empty()) {
      SnapshotOptions of_snapshots;
      of_snapshots.directory = state_dir;
      of_snapshots.every = std::chrono::hours(1);
      of_snapshots.power_loss = false;
      snapshots_ = std::make_unique<Snapshots>(of_snapshots);
      repository_.AddObserver(snapshots_.get());
    }
    journal_ = std::make_unique<Journal>(options);
    repository_.AddObserver(journal_.get());
    repository_.Add("m", model);
    repository_.Load("m");
    model_ = repository_.Find("m");
  }
  ~JournalServer() {
    journal_.reset();
    snapshots_.reset();
  }

  ServedModel* model() { return model_.get(); }
  Journal* journal() { return journal_.get(); }
  Snapshots* snapshots() { return snapshots_.get(); }
  ModelRepository* repository() { return &repository_; }
  JournalCounts counts() { return journal_->counts().at("m"); }
  std::map<std::string, int64_t> open() {
    std::map<std::string, int64_t> open;
    size_t all = 0;
    for (const StreamFacts& facts : model_->ListStreams(100000, false, &all)) {
      open[facts.name] = facts.next_step;
    }
    return open;
  }

 private:
  ModelRepository repository_{ModelOptions()};
  std::unique_ptr<Snapshots> snapshots_;
  std::unique_ptr<Journal> journal_;
  std::shared_ptr<ServedModel> model_;
};

class JournalTest : public ::testing::Test {
 protected:
  void SetUp() override {
    SetLogLevel(LogLevel::kOff);
    if (!Redis::Exists()) GTEST_SKIP() << "there is no redis-server on this machine";
    redis_ = std::make_unique<Redis>();
    SmallModel().File()->Save(model_);
    options_.url = redis_->url();
  }

  void ExpectAnswer(JournalServer* server, const TestCall& call, const std::string& name,
                    int64_t step, int64_t life = 0) {
    EXPECT_TRUE(call.outcome.ok()) << call.outcome.message;
    if (!call.outcome.ok()) return;
    ExpectClose(server->model()->plan(), call.answers, undisturbed_.Answer(name, life, step));
    EXPECT_EQ(call.next_steps[0], step + 1);
  }

  void Steps(JournalServer* server, const std::string& name, int64_t begin, int64_t end,
             const StepOptions& options = {}) {
    SCOPED_TRACE(name);
    StepOptions how = options;
    for (int64_t step = begin; step < end; ++step, how.start = false) {
      ExpectAnswer(server, *Step(server->model(), name, step, how), name, step, how.life);
    }
  }

  Folder folder_;
  const std::string model_ = folder_ / "model";
  std::unique_ptr<Redis> redis_;
  JournalOptions options_;
  Undisturbed undisturbed_{SmallModel().File()};
};

// The other server reads the journal while the first one is still there, as if it had been killed
// at this moment.
TEST_F(JournalTest, AnotherServerGoesOn) {
  JournalServer server(model_, options_);
  for (const int64_t steps : {1, 2, 3, 4, 5, 9, 30}) {
    Steps(&server, "n" + std::to_string(steps), 0, steps);
    Steps(&server, "p" + std::to_string(steps), 0, steps, kPlain);
  }
  Steps(&server, "anew", 0, 7);
  Steps(&server, "anew", 0, 3, {true, true, false, 1});
  Steps(&server, "ended", 0, 5);
  Steps(&server, "ended", 5, 6, kEnd);
  Steps(&server, "closed", 0, 5);
  server.model()->CloseStream("closed", End::kClosed);
  Steps(&server, "moved", 0, 5);
  const StreamCopy copy = server.model()->CopyOut("n30");
  server.model()->CloseStream("n30", End::kClosed);
  server.model()->CopyIn(copy, false);
  // Does not end it for others.
  server.model()->CloseStream("moved", End::kMoved);
  // Several streams, and several steps, in one request.
  {
    const Plan& plan = server.model()->plan();
    Arrays inputs(1);
    for (const char* const name : {"x", "y"}) {
      for (int64_t step = 0; step < 6; ++step) inputs[0] += InputsOf(plan, name, 0, step)[0];
    }
    TestCall call(plan, {"x", "y"}, 6, inputs);
    call.first_steps = {0, 0};
    server.model()->Submit(&call);
    call.Wait();
    EXPECT_TRUE(call.outcome.ok());
  }

  JournalServer other(model_, options_);
  EXPECT_EQ(other.counts().lost, 0);
  std::map<std::string, int64_t> expected = server.open();
  expected["moved"] = 5;
  EXPECT_EQ(other.open(), expected);
  for (const int64_t steps : {1, 2, 3, 4, 5, 9, 30}) {
    // The last answer again.
    Steps(&other, "n" + std::to_string(steps), steps - 1, steps + 6);
    Steps(&other, "p" + std::to_string(steps), steps, steps + 6, kPlain);
  }
  Steps(&other, "anew", 2, 6, {true, false, false, 1});
  Steps(&other, "moved", 4, 9);
  Steps(&other, "x", 6, 9);
  Steps(&other, "y", 6, 9);
  // A client that did not get the last answer of a stream asks again.
  ExpectAnswer(&other, *Step(other.model(), "ended", 5, kEnd), "ended", 5);
  EXPECT_EQ(other.open().count("ended"), 0u);
  Steps(&other, "closed", 0, 2, {true, false, false, 1});
}

// What began or ended without a step is no other stream to the other server.
TEST_F(JournalTest, BeginningsAndEndsWithoutAStep) {
  JournalServer server(model_, options_);
  ServedModel* const model = server.model();
  Steps(&server, "n", 0, 9);
  Steps(&server, "p", 0, 9, kPlain);
  EXPECT_TRUE(EndOnly(model, {"n", "p"}, {9, 9})->outcome.ok());
  EXPECT_TRUE(BeginOnly(model, {"begun", "stepped", "ended"})->outcome.ok());
  Steps(&server, "stepped", 0, 9);
  EXPECT_TRUE(EndOnly(model, {"ended"}, {0})->outcome.ok());
  Steps(&server, "anew", 0, 9);
  EXPECT_TRUE(BeginOnly(model, {"anew"}, {0})->outcome.ok());
  EXPECT_EQ(server.open(),
            (std::map<std::string, int64_t>{{"anew", 0}, {"begun", 0}, {"stepped", 9}}));

  JournalServer other(model_, options_);
  EXPECT_EQ(other.counts().lost, 0);
  EXPECT_EQ(other.open(), server.open());
  // A client that did not get the answer to the end of a stream asks again.
  EXPECT_EQ(EndOnly(other.model(), {"n"}, {9})->next_steps, std::vector<int64_t>{9});
  EXPECT_TRUE(EndOnly(other.model(), {"n", "p", "ended"})->outcome.ok());
  Steps(&other, "n", 0, 3, {true, false, false, 1});
  Steps(&other, "begun", 0, 9);
  Steps(&other, "stepped", 8, 12);
  Steps(&other, "anew", 0, 9, {true, false, false, 1});
  EXPECT_TRUE(EndOnly(other.model(), {"begun"}, {9})->outcome.ok());

  JournalServer third(model_, options_);
  EXPECT_EQ(third.open(), (std::map<std::string, int64_t>{{"anew", 9}, {"n", 3}, {"stepped", 12}}));
  Steps(&third, "anew", 8, 12, {true, false, false, 1});
}

// An idle stream is not lost when a thousand steps of others are trimmed, and Redis does not keep
// these.
TEST_F(JournalTest, TrimsAndKeepsIdleStreams) {
  JournalServer server(model_, options_);
  // All of one shard.
  std::vector<std::string> names;
  for (int i = 0; names.size() < 4; ++i) {
    if (ShardOf(std::to_string(i)) == 7) names.push_back(std::to_string(i));
  }
  Steps(&server, names[0], 0, 3);
  Steps(&server, names[1], 0, 8, kPlain);
  const int64_t many = 9000;
  for (int64_t step = 0; step < many; ++step) {
    const auto call = Step(server.model(), names[2], step);
    ASSERT_TRUE(call->outcome.ok());
    if (step == 20) Steps(&server, names[3], 0, 5);
  }
  EXPECT_GT(server.counts().copies, 0);
  EXPECT_GT(server.counts().trimmed, many / 4);
  {
    RedisConnection redis(RedisAddress::Parse(options_.url));
    const RedisReply length = redis.Call({"XLEN", "ct:m:7"});
    // The other shards have only the entry that fences them.
    EXPECT_EQ(length->integer, server.counts().kept - (kShards - 1));
    EXPECT_LT(length->integer, many);
  }
  JournalServer other(model_, options_);
  EXPECT_EQ(other.counts().lost, 0);
  EXPECT_EQ(other.open(), server.open());
  Steps(&other, names[0], 2, 9);
  Steps(&other, names[1], 8, 12, kPlain);
  Steps(&other, names[2], many - 1, many + 5);
  Steps(&other, names[3], 4, 9);
}

TEST_F(JournalTest, RedisGoesAwayAndComesBackEmpty) {
  JournalServer server(model_, options_);
  Steps(&server, "a", 0, 9);
  Steps(&server, "b", 0, 3);
  redis_->Stop(SIGKILL);
  // The first one is taken, and not answered; those after it are not taken.
  Outcome outcome = Step(server.model(), "a", 9)->outcome;
  EXPECT_EQ(outcome.reason, Reason::kUnavailable) << outcome.message;
  outcome = Step(server.model(), "b", 3)->outcome;
  EXPECT_EQ(outcome.reason, Reason::kUnavailable) << outcome.message;
  EXPECT_EQ(server.open()["b"], 3);
  EXPECT_FALSE(server.counts().connected);
  // No Redis, no server.
  ExpectError(ErrorCode::kIo, "cannot connect", [&] { JournalServer none(model_, options_); });
  redis_->Start();
  while (!server.counts().connected) std::this_thread::sleep_for(milliseconds(5));
  Steps(&server, "a", 9, 11);
  Steps(&server, "b", 3, 4);
  EXPECT_EQ(server.counts().failures, 1);
  // It was empty, and has everything again.
  JournalServer other(model_, options_);
  EXPECT_EQ(other.open(), server.open());
  Steps(&other, "a", 10, 20);
  Steps(&other, "b", 4, 9);
}

// What an operator does counts when the journal has it.
TEST_F(JournalTest, CopiesAndEndsWhileRedisIsAway) {
  JournalServer server(model_, options_);
  Steps(&server, "a", 0, 5);
  const StreamCopy copy = server.model()->CopyOut("a");
  server.model()->CloseStream("a", End::kClosed);
  server.model()->CopyIn(copy, false);
  {
    JournalServer other(model_, options_);
    EXPECT_EQ(other.open(), (std::map<std::string, int64_t>{{"a", 5}}));
    Steps(&other, "a", 5, 7);
  }
  JournalServer last(model_, options_);
  Steps(&last, "a", 6, 8);
  redis_->Stop(SIGKILL);
  EXPECT_THROW(last.model()->CloseStream("a", End::kClosed), Refusal);
  // From here on, it knows.
  EXPECT_THROW(last.model()->CloseStream("b", End::kClosed), Refusal);
  StreamCopy another = copy;
  another.name = "c";
  EXPECT_THROW(last.model()->CopyIn(another, false), Refusal);
  EXPECT_EQ(last.open().count("c"), 0u);
}

TEST_F(JournalTest, RedisHangs) {
  JournalServer server(model_, options_);
  Steps(&server, "a", 0, 5);
  kill(redis_->pid(), SIGSTOP);
  // It is taken, and refused when the server gives Redis up.
  EXPECT_EQ(Step(server.model(), "a", 5)->outcome.reason, Reason::kUnavailable);
  EXPECT_EQ(Step(server.model(), "a", 6)->outcome.reason, Reason::kUnavailable);
  kill(redis_->pid(), SIGCONT);
  while (!server.counts().connected) std::this_thread::sleep_for(milliseconds(5));
  Steps(&server, "a", 5, 9);
  JournalServer other(model_, options_);
  Steps(&other, "a", 8, 12);
}

// The connection breaks, and Redis still has everything: entries that are sent again count once.
TEST_F(JournalTest, BrokenConnections) {
  JournalServer server(model_, options_);
  std::thread breaks([&] {
    RedisConnection redis(RedisAddress::Parse(options_.url));
    for (int i = 0; i < 30; ++i) {
      redis.Call({"CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes"});
      std::this_thread::sleep_for(milliseconds(20));
    }
  });
  std::map<std::string, int64_t> life, next;
  std::mt19937 random(5);
  const auto until = Clock::now() + milliseconds(800);
  while (Clock::now() < until) {
    const std::string name = "s" + std::to_string(random() % 6);
    const bool begins = next[name] == 0 || random() % 12 == 0;
    const bool ends = random() % 12 == 0;
    if (begins) {
      next[name] = 0;
      ++life[name];
    }
    const StepOptions how = {true, begins, ends, life[name]};
    auto call = Step(server.model(), name, next[name], how);
    while (call->outcome.reason == Reason::kUnavailable) {
      std::this_thread::sleep_for(milliseconds(5));
      call = Step(server.model(), name, next[name], how);
    }
    ExpectAnswer(&server, *call, name, next[name], life[name]);
    next[name] = ends ? 0 : next[name] + 1;
  }
  breaks.join();
  JournalServer other(model_, options_);
  for (const auto& [name, step] : next) {
    EXPECT_EQ(other.open().count(name), step == 0 ? 0u : 1u) << name;
    if (step > 0) Steps(&other, name, step - 1, step + 6, {true, false, false, life[name]});
  }
}

// A connection that breaks after Redis has stored entries, and before it says so.
TEST_F(JournalTest, EntriesThatWereSentTwice) {
  JournalServer server(model_, options_);
  for (int i = 0; i < 20; ++i) {
    const std::string name = "s" + std::to_string(i);
    Steps(&server, name, 0, 5);
    if (i % 3 == 1) Steps(&server, name, 5, 6, kEnd);
    if (i % 3 == 2) Steps(&server, name, 0, 2, {true, true, false, 1});
  }
  RedisConnection redis(RedisAddress::Parse(options_.url));
  for (int shard = 0; shard < kShards; ++shard) {
    const std::string key = "ct:m:" + std::to_string(shard);
    const RedisReply entries = redis.Call({"XREVRANGE", key, "+", "-", "COUNT", "3"});
    for (size_t i = entries->elements; i > 0; --i) {
      const redisReply* const value = entries->element[i - 1]->element[1]->element[1];
      redis.Call({"XADD", key, "0-*", "e", {value->str, value->len}});
    }
  }
  JournalServer other(model_, options_);
  EXPECT_EQ(other.counts().lost, 0);
  EXPECT_EQ(other.open(), server.open());
  Steps(&other, "s0", 4, 9);
  ExpectAnswer(&other, *Step(other.model(), "s1", 5, kEnd), "s1", 5);
  Steps(&other, "s2", 1, 6, {true, false, false, 1});
}

TEST_F(JournalTest, NewWeights) {
  JournalServer server(model_, options_);
  Steps(&server, "a", 0, 9);
  Steps(&server, "idle", 0, 9);
  SmallModel(2).File()->Save(model_);
  server.model()->LoadWeights();
  // Its state is of both weights.
  std::vector<Arrays> answers;
  for (int64_t step = 9; step < 11; ++step) {
    const auto call = Step(server.model(), "a", step);
    ASSERT_TRUE(call->outcome.ok()) << call->outcome.message;
  }
  ServedModel same("m", model_, ModelOptions());
  for (const char* const name : {"a", "idle"}) {
    same.CopyIn(server.model()->CopyOut(name), false);
  }
  JournalServer other(model_, options_);
  EXPECT_EQ(other.open(), server.open());
  for (const char* const name : {"a", "idle"}) {
    for (int64_t step = server.open()[name], end = step + 6; step < end; ++step) {
      const auto call = Step(other.model(), name, step), expected = Step(&same, name, step);
      ASSERT_TRUE(call->outcome.ok()) << call->outcome.message;
      ExpectClose(same.plan(), call->answers, expected->answers);
    }
  }
}

// When the weights are loaded, the journal has the states of all streams.
TEST_F(JournalTest, KilledAfterNewWeights) {
  JournalServer server(model_, options_);
  for (int i = 0; i < 200; ++i) Steps(&server, "s" + std::to_string(i), 0, 3);
  SmallModel(2).File()->Save(model_);
  server.model()->LoadWeights();
  JournalServer other(model_, options_);
  EXPECT_EQ(other.counts().lost, 0);
  EXPECT_EQ(other.open().size(), 200u);
}

// A server with other weights does not rebuild streams, unless it is told to.
TEST_F(JournalTest, OtherWeights) {
  {
    JournalServer server(model_, options_);
    Steps(&server, "a", 0, 9);
  }
  SmallModel(2).File()->Save(model_);
  {
    JournalOptions options = options_;
    options.other_weights = true;
    JournalServer server(model_, options);
    EXPECT_EQ(server.open()["a"], 9);
  }
  JournalServer server(model_, options_);
  EXPECT_TRUE(server.open().empty());
  EXPECT_EQ(server.counts().lost, 1);
}

TEST_F(JournalTest, ServerThatHasLostItsShard) {
  JournalServer server(model_, options_);
  server.journal()->SetEpochs(AllIn(1), "n1");
  Steps(&server, "a", 0, 9);
  JournalOptions options = options_;
  options.rebuild = false;
  JournalServer other(model_, options);
  EXPECT_TRUE(other.open().empty());
  other.journal()->SetEpochs(AllIn(2), "n2");
  EXPECT_EQ(other.journal()->TakeOver({ShardOf("a")}).streams, 1);
  // The first one does not know it yet. Its answer is in no journal, so nobody gets it.
  const auto late = Step(server.model(), "a", 9);
  EXPECT_EQ(late->outcome.reason, Reason::kUnavailable) << late->outcome.message;
  EXPECT_TRUE(server.open().empty());
  EXPECT_EQ(server.counts().fenced, 1);
  EXPECT_EQ(EndOnly(server.model(), {"a"}, {9})->outcome.reason, Reason::kWrongServer);
  EXPECT_EQ(Step(server.model(), "a", 9)->outcome.reason, Reason::kWrongServer);
  // Its other shards are its own.
  Steps(&server, "b", 0, 3);
  Steps(&other, "a", 9, 10);
  JournalServer third(model_, options_);
  EXPECT_EQ(third.open()["a"], 10);
  Steps(&third, "a", 9, 16);
  // Back again, with the newest table.
  ExpectError(ErrorCode::kInvalidArgument, "it needs the newer table of shards",
              [&] { server.journal()->TakeOver({ShardOf("a")}); });
  server.journal()->SetEpochs(AllIn(4), "n1");
  EXPECT_EQ(server.journal()->TakeOver({ShardOf("a")}).streams, 1);
  server.model()->SetShards(nullptr, ShardSet().set(), false);
  Steps(&server, "a", 16, 18);
}

TEST_F(JournalTest, UnloadEndsStreams) {
  JournalServer server(model_, options_);
  Steps(&server, "a", 0, 9);
  server.repository()->Unload("m");
  {
    JournalServer other(model_, options_);
    EXPECT_TRUE(other.open().empty());
  }
  server.repository()->Load("m");
  EXPECT_TRUE(Step(server.repository()->Find("m").get(), "a", 0)->outcome.ok());
}

// A server ran without the journal meanwhile. A stream must not go on where the journal is, unless
// its client says so.
TEST_F(JournalTest, JournalThatIsOlderThanASnapshot) {
  const std::string state = folder_ / "state";
  {
    JournalServer server(model_, options_, state);
    Steps(&server, "plain", 0, 5, kPlain);
    Steps(&server, "same", 0, 5, kPlain);
    server.repository()->Drain();
    server.journal()->Finish();
    server.snapshots()->Finish();
  }
  {
    ModelRepository repository{ModelOptions()};
    SnapshotOptions of_snapshots;
    of_snapshots.directory = state;
    of_snapshots.power_loss = false;
    Snapshots snapshots(of_snapshots);
    repository.AddObserver(&snapshots);
    repository.Add("m", model_);
    repository.Load("m");
    for (int64_t step = 5; step < 8; ++step) {
      EXPECT_TRUE(Step(repository.Find("m").get(), "plain", step, kPlain)->outcome.ok());
    }
    repository.Drain();
    snapshots.Finish();
  }
  JournalServer server(model_, options_, state);
  Steps(&server, "same", 5, 6, kPlain);
  const auto call = Step(server.model(), "plain", 8, kPlain);
  EXPECT_EQ(call->outcome.reason, Reason::kOutOfStep) << call->outcome.message;
  EXPECT_EQ(call->outcome.expected.at(0).step, 5);
  Steps(&server, "plain", 5, 9);
}

TEST_F(JournalTest, WithSnapshots) {
  {
    JournalServer server(model_, options_, folder_ / "state");
    Steps(&server, "behind", 0, 3);
    Steps(&server, "ended", 0, 3);
    Steps(&server, "anew", 0, 5);
    EXPECT_TRUE(server.snapshots()->Write());
    Steps(&server, "behind", 3, 9);
    Steps(&server, "ended", 3, 4, kEnd);
    Steps(&server, "anew", 0, 5, {true, true, false, 1});
    Steps(&server, "new", 0, 5);
  }
  {
    JournalServer server(model_, options_, folder_ / "state");
    EXPECT_EQ(server.open(),
              (std::map<std::string, int64_t>{{"behind", 9}, {"anew", 5}, {"new", 5}}));
    Steps(&server, "behind", 8, 14);
    ExpectAnswer(&server, *Step(server.model(), "ended", 3, kEnd), "ended", 3);
    Steps(&server, "anew", 5, 9, {true, false, false, 1});
    EXPECT_TRUE(server.snapshots()->Write());
  }
  // Redis has lost everything: the snapshots are there, and the journal is filled again.
  redis_->Stop(SIGKILL);
  redis_->Start();
  {
    JournalServer server(model_, options_, folder_ / "state");
    EXPECT_EQ(server.open(),
              (std::map<std::string, int64_t>{{"behind", 14}, {"anew", 9}, {"new", 5}}));
    Steps(&server, "new", 5, 6);
  }
  JournalServer other(model_, options_);
  EXPECT_EQ(other.open(),
            (std::map<std::string, int64_t>{{"behind", 14}, {"anew", 9}, {"new", 6}}));
  Steps(&other, "behind", 14, 16);
}

// Steps streams until it is killed, and writes down every answer that it got. A process of its own.
[[noreturn]] void StepUntilKilled(const std::string& model, const JournalOptions& options,
                                  const std::string& log, int round) {
  JournalServer server(model, options);
  std::FILE* const file = std::fopen(log.c_str(), "w");
  std::map<std::string, int64_t> next = server.open();
  std::vector<std::thread> clients;
  for (int c = 0; c < 3; ++c) {
    clients.emplace_back([&, c, mine = next]() mutable {
      std::mt19937 random(round * 10 + c);
      while (true) {
        const std::string name = "c" + std::to_string(c) + "_" + std::to_string(random() % 8);
        const auto call = Step(server.model(), name, mine[name]);
        if (!call->outcome.ok()) _exit(4);
        ++mine[name];
        std::fprintf(file, "%s %lld\n", name.c_str(), static_cast<long long>(mine[name]));
        std::fflush(file);
      }
    });
  }
  while (true) pause();
}

TEST_F(JournalTest, KilledAtAnyMoment) {
  std::mt19937 random(11);
  std::map<std::string, int64_t> told;
  for (int round = 0; round < 20; ++round) {
    const std::string log = folder_ / ("log" + std::to_string(round));
    const pid_t child = fork();
    ASSERT_GE(child, 0);
    if (child == 0) StepUntilKilled(model_, options_, log, round);
    const auto least = static_cast<std::streamoff>(200 + random() % 2000);
    while (std::ifstream(log, std::ios::ate).tellg() < least) {
      ASSERT_EQ(waitpid(child, nullptr, WNOHANG), 0) << "the server ended by itself";
      std::this_thread::sleep_for(milliseconds(1));
    }
    kill(child, SIGKILL);
    int status = 0;
    waitpid(child, &status, 0);
    ASSERT_TRUE(WIFSIGNALED(status))
        << "the server ended by itself, status " << WEXITSTATUS(status);
    std::ifstream lines(log);
    std::string name;
    for (int64_t steps = 0; lines >> name >> steps;) told[name] = steps;
    // Every answered step is there, and at most the one that was not answered.
    JournalServer other(model_, options_);
    EXPECT_EQ(other.counts().lost, 0);
    auto open = other.open();
    for (const auto& [stream, steps] : told) {
      EXPECT_GE(open[stream], steps) << stream;
      EXPECT_LE(open[stream], steps + 1) << stream;
      told[stream] = open[stream] + 1;
      Steps(&other, stream, open[stream], open[stream] + 1);
    }
  }
  EXPECT_GT(told.size(), 10u);
}

}  // namespace
}  // namespace continual_transformers::server
