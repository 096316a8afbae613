// Tests that streams outlive the server: after an orderly end, after a kill at any moment, and with
// files that were damaged in between.

#include "cc/server/snapshots.h"

#include <fcntl.h>
#include <signal.h>
#include <sys/mount.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "cc/server/log.h"
#include "cc/server/model_repository.h"
#include "cc/server/stream_copy.h"
#include "gtest/gtest.h"
#include "tests/cc/server/server_case.h"

namespace continual_transformers::server {
namespace {

namespace fs = std::filesystem;
using std::chrono::milliseconds;

std::string ReadFile(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

void WriteFile(const std::string& path, const std::string& bytes) {
  std::ofstream(path, std::ios::binary | std::ios::trunc) << bytes;
}

// A server without its protocols.
class Server {
 public:
  Server(const std::string& model, const SnapshotOptions& options,
         const ModelOptions& model_options = {})
      : repository_(model_options), snapshots_(std::make_unique<Snapshots>(options)) {
    repository_.AddObserver(snapshots_.get());
    repository_.Add("m", model);
    repository_.Load("m");
    model_ = repository_.Find("m");
  }

  ~Server() {
    snapshots_.reset();
    model_.reset();
  }

  void Finish() {
    repository_.Drain();
    snapshots_->Finish();
  }

  ServedModel* model() { return model_.get(); }
  Snapshots* snapshots() { return snapshots_.get(); }
  ModelRepository* repository() { return &repository_; }
  SnapshotCounts counts() { return snapshots_->counts().at("m"); }
  int64_t open() {
    size_t all = 0;
    model_->ListStreams(0, false, &all);
    return static_cast<int64_t>(all);
  }

 private:
  ModelRepository repository_;
  std::unique_ptr<Snapshots> snapshots_;
  std::shared_ptr<ServedModel> model_;
};

class SnapshotsTest : public ::testing::Test {
 protected:
  SnapshotsTest() : model_(folder_ / "model"), undisturbed_(SmallModel().File()) {
    SetLogLevel(LogLevel::kOff);
    SmallModel().File()->Save(model_);
  }

  // Snapshots are written when a test says so.
  SnapshotOptions In(const std::string& directory) const {
    SnapshotOptions options;
    options.directory = folder_ / directory;
    options.every = std::chrono::hours(1);
    options.power_loss = false;  // no test pulls a plug
    return options;
  }

  // The directory as a kill at this moment would leave it.
  void Kill(const std::string& from, const std::string& to) {
    fs::copy(folder_ / from, folder_ / to, fs::copy_options::recursive);
  }

  // The same while files may not grow: that is for this process only.
  void KillWhileFull(const std::string& from, const std::string& to) {
    const std::string command =
        "ulimit -S -f unlimited && cp -r " + (folder_ / from) + " " + (folder_ / to);
    ASSERT_EQ(std::system(command.c_str()), 0);
  }

  void ExpectAnswer(const TestCall& call, const std::string& name, int64_t step, int64_t life = 0) {
    EXPECT_TRUE(call.outcome.ok()) << call.outcome.message;
    EXPECT_EQ(call.answers, undisturbed_.Answer(name, life, step)) << name << " step " << step;
    EXPECT_EQ(call.next_steps[0], step + 1);
  }

  void Steps(Server* server, const std::string& name, int64_t begin, int64_t end,
             const StepOptions& options = {}) {
    StepOptions how = options;  // only the first step begins anew
    for (int64_t step = begin; step < end; ++step, how.start = false) {
      ExpectAnswer(*Step(server->model(), name, step, how), name, step, how.life);
    }
  }

  void ExpectRefused(const TestCall& call, Reason reason, int64_t expected) {
    EXPECT_EQ(NameOf(call.outcome.reason), std::string(NameOf(reason))) << call.outcome.message;
    ASSERT_EQ(call.outcome.expected.size(), 1u);
    EXPECT_EQ(call.outcome.expected[0].step, expected);
  }

  Folder folder_;
  const std::string model_;
  Undisturbed undisturbed_;
};

constexpr StepOptions kPlain = {false, false, false, 0};
constexpr StepOptions kEnd = {true, false, true, 0};

TEST_F(SnapshotsTest, OrderlyEndForgetsNothing) {
  {
    Server server(model_, In("state"));
    Steps(&server, "numbered", 0, 9);
    Steps(&server, "plain", 0, 6, kPlain);
    server.Finish();
  }
  for (int round = 0; round < 3; ++round) {
    Server server(model_, In("state"));
    EXPECT_EQ(server.counts().restored, 2);
    // The last answer again, and then the next step.
    ExpectAnswer(*Step(server.model(), "numbered", 8 + round), "numbered", 8 + round);
    ExpectAnswer(*Step(server.model(), "numbered", 9 + round), "numbered", 9 + round);
    ExpectAnswer(*Step(server.model(), "plain", 6 + round, kPlain), "plain", 6 + round);
    server.Finish();
  }
}

TEST_F(SnapshotsTest, KilledServerGoesOnFromTheLastSnapshot) {
  Server server(model_, In("state"));
  Steps(&server, "numbered", 0, 5);
  Steps(&server, "plain", 0, 5, kPlain);
  EXPECT_TRUE(server.snapshots()->Write());
  Steps(&server, "numbered", 5, 8);
  Steps(&server, "plain", 5, 8, kPlain);
  Steps(&server, "new", 0, 2);
  Kill("state", "killed");

  for (const bool orderly : {false, true}) {
    Server other(model_, In("killed"));
    EXPECT_EQ(other.counts().restored, 2);
    ExpectRefused(*Step(other.model(), "numbered", 8), Reason::kOutOfStep, 5);
    // Nobody knows whether the client means step 5 or another.
    for (int i = 0; i < 3; ++i) {
      ExpectRefused(*Step(other.model(), "plain", 8, kPlain), Reason::kOutOfStep, 5);
    }
    if (!orderly) {
      // That is not forgotten in an orderly end.
      other.Finish();
      continue;
    }
    Steps(&other, "numbered", 5, 10);
    Steps(&other, "plain", 5, 6);
    Steps(&other, "plain", 6, 10, kPlain);
    Steps(&other, "new", 0, 3);
  }
  // Beginning anew is possible as well.
  {
    Server other(model_, In("killed"));
    Steps(&other, "plain", 0, 1, {false, true, false, 1});
    Steps(&other, "plain", 1, 4, {false, false, false, 1});
  }
}

TEST_F(SnapshotsTest, OnlyChangedStreamsAreWritten) {
  Server server(model_, In("state"));
  for (int i = 0; i < 200; ++i) Steps(&server, "s" + std::to_string(i), 0, 1);
  EXPECT_TRUE(server.snapshots()->Write());
  EXPECT_EQ(server.counts().written, 200);
  Steps(&server, "s7", 1, 4);
  Steps(&server, "s8", 1, 2);
  EXPECT_TRUE(server.snapshots()->Write());
  EXPECT_EQ(server.counts().written, 202);
  EXPECT_TRUE(server.snapshots()->Write());
  EXPECT_EQ(server.counts().written, 202);
  EXPECT_EQ(server.counts().stored, 200);
  server.Finish();
  Kill("state", "ended");
  // Those that were read back have not changed.
  Server again(model_, In("ended"));
  EXPECT_TRUE(again.snapshots()->Write());
  EXPECT_EQ(again.counts().written, 0);
  EXPECT_EQ(again.counts().stored, 200);
}

TEST_F(SnapshotsTest, NothingToWriteIsNoFailure) {
  Server server(model_, In("state"));
  EXPECT_TRUE(server.snapshots()->Write());
  EXPECT_EQ(server.counts().failures, 0);
  EXPECT_EQ(server.counts().written, 0);
  Steps(&server, "s", 0, 1);
  EXPECT_TRUE(server.snapshots()->Write());
  EXPECT_EQ(server.counts().failures, 0);
  EXPECT_EQ(server.counts().written, 1);
}

// Snapshots by themselves, in time.
TEST_F(SnapshotsTest, EverySoOften) {
  SnapshotOptions options = In("state");
  options.every = milliseconds(10);
  Server server(model_, options);
  Steps(&server, "s", 0, 3);
  while (server.counts().written == 0) std::this_thread::sleep_for(milliseconds(1));
  Steps(&server, "s", 3, 4);
  while (server.counts().written < 2) std::this_thread::sleep_for(milliseconds(1));
}

// When a client knows that a stream has ended or begun anew, a kill does not bring the old one
// back.
TEST_F(SnapshotsTest, EndedStreamsStayEnded) {
  ModelOptions model_options;
  model_options.idle_timeout = milliseconds(1);
  Server server(model_, In("state"), model_options);
  for (const char* const name : {"by_client", "plain", "anew", "anew_plain", "closed", "both"}) {
    Steps(&server, name, 0, 5);
  }
  EXPECT_TRUE(server.snapshots()->Write());
  Steps(&server, "by_client", 5, 6, kEnd);
  Steps(&server, "plain", 5, 6, {false, false, true, 0});
  Steps(&server, "anew", 0, 2, {true, true, false, 1});
  Steps(&server, "anew_plain", 0, 1, {false, true, false, 1});
  server.model()->CloseStream("closed", End::kClosed);
  // Of one request, begun and ended.
  Steps(&server, "both", 0, 1, {true, true, true, 1});
  // The answer to this waits as well, because it says that the stream has ended.
  EXPECT_EQ(Step(server.model(), "closed", 5)->outcome.reason, Reason::kEnded);
  Kill("state", "killed");
  {
    Server other(model_, In("killed"));
    EXPECT_EQ(other.open(), 0);
    Steps(&other, "by_client", 0, 3, {true, false, false, 1});
    Steps(&other, "plain", 0, 3, {false, false, false, 1});
    Steps(&other, "anew", 0, 3, {true, true, false, 2});
    Steps(&other, "closed", 0, 3, {true, false, false, 1});
  }
  // A stream that began anew has a row again, in the next snapshot.
  EXPECT_TRUE(server.snapshots()->Write());
  Kill("state", "killed_2");
  {
    Server other(model_, In("killed_2"));
    EXPECT_EQ(other.open(), 2);
    Steps(&other, "anew", 2, 4, {true, false, false, 1});
  }
  std::this_thread::sleep_for(milliseconds(2));
  server.model()->EvictIdle();
  EXPECT_TRUE(server.snapshots()->Write());
  EXPECT_EQ(server.counts().stored, 2);  // the answers of streams that their clients ended
  Kill("state", "killed_3");
  Server other(model_, In("killed_3"));
  EXPECT_EQ(other.open(), 0);
}

// Answers about other streams do not wait, and refusals are whole.
TEST_F(SnapshotsTest, RefusalsWhileAnEndIsWritten) {
  Server server(model_, In("state"));
  Steps(&server, "other", 0, 2);
  for (int i = 0; i < 20; ++i) Steps(&server, std::to_string(i), 0, 2);
  EXPECT_TRUE(server.snapshots()->Write());
  for (int i = 0; i < 20; ++i) {
    const auto end = SubmitStep(server.model(), std::to_string(i), 2, kEnd);
    ExpectRefused(*Step(server.model(), "other", 9), Reason::kOutOfStep, 2);
    end->Wait();
    EXPECT_TRUE(end->outcome.ok()) << end->outcome.message;
  }
}

// A client that did not get the answer to its last step may send it again after a kill.
TEST_F(SnapshotsTest, LastAnswerOfAnEndedStream) {
  Server server(model_, In("state"));
  Steps(&server, "s", 0, 5);
  EXPECT_TRUE(server.snapshots()->Write());
  Steps(&server, "s", 5, 6, kEnd);
  Kill("state", "killed");
  {
    Server other(model_, In("killed"));
    for (int i = 0; i < 2; ++i) ExpectAnswer(*Step(other.model(), "s", 5, kEnd), "s", 5);
    EXPECT_EQ(other.open(), 0);
    // Not for a stream of a single step that is another.
    Steps(&other, "s", 0, 8, {true, false, false, 1});
    EXPECT_TRUE(other.snapshots()->Write());
  }
  Server other(model_, In("killed"));
  ExpectAnswer(*Step(other.model(), "s", 7, {true, false, true, 1}), "s", 7, 1);
}

TEST_F(SnapshotsTest, BeginningsAndEndsWithoutAStep) {
  Server server(model_, In("state"));
  for (const char* const name : {"numbered", "anew", "ended"}) Steps(&server, name, 0, 5);
  Steps(&server, "plain", 0, 5, kPlain);
  EXPECT_TRUE(server.snapshots()->Write());
  EXPECT_TRUE(EndOnly(server.model(), {"numbered", "plain"}, {5, 5})->outcome.ok());
  EXPECT_TRUE(BeginOnly(server.model(), {"anew", "begun"}, {0, 0})->outcome.ok());
  Kill("state", "killed");
  {
    Server other(model_, In("killed"));
    EXPECT_EQ(other.open(), 1);  // "ended", which has not ended yet
    EXPECT_EQ(EndOnly(other.model(), {"numbered"}, {5})->next_steps, std::vector<int64_t>{5});
    // Its client may have answers to later steps. It need not say which one it means, to end it.
    ExpectRefused(*EndOnly(other.model(), {"ended"}, {7}), Reason::kOutOfStep, 5);
    EXPECT_TRUE(EndOnly(other.model(), {"ended"})->outcome.ok());
    EXPECT_EQ(other.open(), 0);
  }
  EXPECT_TRUE(server.snapshots()->Write());
  Kill("state", "killed_2");
  Server other(model_, In("killed_2"));
  EXPECT_EQ(other.open(), 3);
  Steps(&other, "anew", 0, 4, {true, false, false, 1});
  Steps(&other, "begun", 0, 4);
  Steps(&other, "ended", 5, 6);
  Steps(&other, "plain", 0, 4, {false, false, false, 1});
}

TEST_F(SnapshotsTest, UnloadEndsStreamsInTheFileToo) {
  Server server(model_, In("state"));
  Steps(&server, "s", 0, 5);
  EXPECT_TRUE(server.snapshots()->Write());
  server.repository()->Unload("m");
  Kill("state", "killed");
  {
    Server other(model_, In("killed"));
    EXPECT_EQ(other.open(), 0);
  }
  server.repository()->Load("m");
  const auto model = server.repository()->Find("m");
  ExpectAnswer(*Step(model.get(), "s", 0), "s", 0);
  EXPECT_TRUE(server.snapshots()->Write());
  EXPECT_EQ(server.counts().stored, 1);
}

// A start that fails, because the journal is away for example, is no crash.
TEST_F(SnapshotsTest, FailedLoadForgetsNothing) {
  {
    Server server(model_, In("state"));
    Steps(&server, "plain", 0, 6, kPlain);
    server.Finish();
  }
  struct Refuses : ModelObserver {
    void Loaded(ServedModel*) override { throw Error(ErrorCode::kIo, "not today"); }
    void Unloaded(ServedModel*) override {}
  } refuses;
  {
    ModelRepository repository({});
    Snapshots snapshots(In("state"));
    repository.AddObserver(&snapshots);
    repository.AddObserver(&refuses);
    repository.Add("m", model_);
    EXPECT_THROW(repository.Load("m"), Error);
  }
  Server server(model_, In("state"));
  EXPECT_EQ(server.counts().restored, 1);
  ExpectAnswer(*Step(server.model(), "plain", 6, kPlain), "plain", 6);
}

TEST_F(SnapshotsTest, CopyThatWasPutIn) {
  Server server(model_, In("state"));
  Steps(&server, "s", 0, 3);
  const StreamCopy copy = server.model()->CopyOut("s");
  Steps(&server, "s", 3, 7);
  EXPECT_TRUE(server.snapshots()->Write());
  server.model()->CopyIn(copy, false);
  Steps(&server, "s", 3, 4);
  Kill("state", "killed");
  {
    Server other(model_, In("killed"));
    EXPECT_EQ(other.open(), 0);  // not at step 7
  }
  server.Finish();
  Kill("state", "ended");
  Server other(model_, In("ended"));
  Steps(&other, "s", 4, 9);
}

TEST_F(SnapshotsTest, SecondServerIsRefused) {
  Server server(model_, In("state"));
  ExpectError(ErrorCode::kIo, "another server uses the directory",
              [&] { Server second(model_, In("state")); });
  WriteFile(folder_ / "file", "x");
  ExpectError(ErrorCode::kIo, "cannot make the directory",
              [&] { Snapshots none(In("file/state")); });
}

TEST_F(SnapshotsTest, OtherWeights) {
  {
    Server server(model_, In("state"));
    Steps(&server, "s", 0, 6);
    Steps(&server, "t", 0, 6);
    server.Finish();
  }
  Kill("state", "state_2");
  SmallModel(2).File()->Save(model_);
  {
    Server server(model_, In("state"));
    EXPECT_EQ(server.open(), 0);
    EXPECT_EQ(server.counts().set_aside, 2);
    server.Finish();
  }
  SnapshotOptions options = In("state_2");
  options.other_weights = true;
  {
    Server server(model_, options);
    EXPECT_EQ(server.open(), 2);
    EXPECT_TRUE(Step(server.model(), "s", 6)->outcome.ok());
    server.Finish();
  }
  // They have been written again, with these weights.
  {
    Server server(model_, In("state_2"));
    EXPECT_EQ(server.open(), 2);
    EXPECT_TRUE(Step(server.model(), "s", 7)->outcome.ok());
    server.Finish();
  }
  // What was set aside does not come back when its weights do.
  SmallModel().File()->Save(model_);
  Server server(model_, In("state"));
  EXPECT_EQ(server.open(), 0);
  EXPECT_EQ(server.counts().set_aside, 0);
}

TEST_F(SnapshotsTest, NewWeightsWhileItRuns) {
  Server server(model_, In("state"));
  Steps(&server, "s", 0, 6);
  EXPECT_TRUE(server.snapshots()->Write());
  SmallModel(2).File()->Save(model_);
  server.model()->LoadWeights();  // writes all streams
  EXPECT_EQ(server.counts().written, 2);
  Kill("state", "killed");
  Server other(model_, In("killed"));
  EXPECT_EQ(other.open(), 1);
}

// Not even to a client that begins with the input with which an earlier stream began.
TEST_F(SnapshotsTest, AnswersOfOldWeightsAreNotGivenAgain) {
  StepOptions once;
  once.start = once.end = true;
  const auto expect_fresh = [&](Server* server, const std::string& name) {
    ServedModel fresh("m", model_, ModelOptions());
    const auto call = Step(server->model(), name, 0, once);
    ASSERT_TRUE(call->outcome.ok()) << call->outcome.message;
    EXPECT_EQ(call->answers, Step(&fresh, name, 0, once)->answers) << name;
  };
  {
    Server server(model_, In("state"));
    Steps(&server, "open", 0, 1);
    Steps(&server, "ended", 0, 1);
    EXPECT_TRUE(server.snapshots()->Write());
    ASSERT_TRUE(Step(server.model(), "ended", 0, once)->outcome.ok());
    SmallModel(2).File()->Save(model_);
    server.model()->LoadWeights();
    expect_fresh(&server, "open");
    expect_fresh(&server, "ended");
    server.Finish();
  }
  SmallModel().File()->Save(model_);
  Server server(model_, In("state"));
  expect_fresh(&server, "ended");
}

// A file that may not be read or written is not damaged: it must not be moved aside.
TEST_F(SnapshotsTest, FilesOfAnotherUser) {
  // Bazel's sandbox knows only one user.
  if (setreuid(65534, -1) != 0) GTEST_SKIP() << "only root can be another user";
  ASSERT_EQ(setreuid(0, -1), 0);
  {
    Server server(model_, In("state"));
    Steps(&server, "s", 0, 3);
    server.Finish();
  }
  const fs::path folder = folder_ / "state";
  fs::permissions(folder_.path(), fs::perms(0755));
  const std::vector<fs::path> paths = {folder, folder / "m.note", folder / "m.sqlite3"};
  for (const fs::path& closed : paths) {
    for (const fs::path& path : paths) {
      fs::permissions(path, fs::perms(path == closed ? 0755 : 0777));
    }
    // The user who started the process, whom access() asks about.
    ASSERT_EQ(setreuid(65534, -1), 0);
    std::string said;
    try {
      Server server(model_, In("state"));
    } catch (const Error& error) {
      said = error.what();
    }
    ASSERT_EQ(setreuid(0, -1), 0);
    EXPECT_NE(said.find("cannot read and write " + closed.string()), std::string::npos) << said;
  }
  Server server(model_, In("state"));
  Steps(&server, "s", 3, 4);
}

// Opening a pipe would wait, and a link may lead to a file of something else.
TEST_F(SnapshotsTest, FilesOfOtherKinds) {
  for (const char* const name : {"m.note", "m.sqlite3"}) {
    fs::create_directories(folder_ / name);
    const std::string path = (folder_ / name) + std::string("/") + name;
    ASSERT_EQ(mkfifo(path.c_str(), 0600), 0);
    EXPECT_THROW(Server(model_, In(name)), Error);
    fs::remove(path);
    fs::create_symlink("/etc/hostname", path);
    EXPECT_THROW(Server(model_, In(name)), Error);
  }
}

TEST_F(SnapshotsTest, OtherModel) {
  {
    Server server(model_, In("state"));
    Steps(&server, "s", 0, 6);
    server.Finish();
  }
  EveryOp().File()->Save(model_);
  Server server(model_, In("state"));
  EXPECT_EQ(server.open(), 0);
  EXPECT_EQ(server.counts().set_aside, 1);
}

TEST_F(SnapshotsTest, FewerStreamsAllowed) {
  {
    Server server(model_, In("state"));
    for (const char* const name : {"a", "b", "c"}) Steps(&server, name, 0, 3);
    server.Finish();
  }
  ModelOptions model_options;
  model_options.max_streams = 2;
  Server server(model_, In("state"), model_options);
  EXPECT_EQ(server.open(), 2);
  EXPECT_EQ(server.counts().set_aside, 1);
}

// A directory with a history, and what its clients know.
class DamageTest : public SnapshotsTest {
 protected:
  struct Life {
    int64_t life, steps;
  };

  void SetUp() override {
    const auto server = std::make_unique<Server>(model_, In("state"));
    const auto steps = [&](const std::string& name, int64_t life, int64_t count) {
      for (int64_t i = 0; i < count; ++i) {
        const int64_t step = open_.count(name) != 0 ? open_[name].steps : 0;
        EXPECT_TRUE(
            Step(server->model(), name, step, {true, step == 0, false, life})->outcome.ok());
        open_[name] = {life, step + 1};
      }
    };
    for (int i = 0; i < 40; ++i) steps("s" + std::to_string(i), 0, 3 + i % 5);
    EXPECT_TRUE(server->snapshots()->Write());
    for (int i = 0; i < 40; i += 3) steps("s" + std::to_string(i), 0, 4);
    EXPECT_TRUE(server->snapshots()->Write());
    for (int i = 0; i < 40; i += 7) {
      const std::string name = "s" + std::to_string(i);
      EXPECT_TRUE(Step(server->model(), name, open_[name].steps, kEnd)->outcome.ok());
      open_.erase(name);
      if (i % 2 == 0) steps(name, 1, 9);
    }
    EXPECT_TRUE(server->snapshots()->Write());
    for (int i = 1; i < 40; i += 7) steps("s" + std::to_string(i), 0, 2);
    Kill("state", "killed");
    for (int i = 2; i < 40; i += 7) steps("s" + std::to_string(i), 0, 2);
    server->Finish();
  }

  // Starts a server on a directory. Every stream that it has is one of those that are open, at a
  // step that it had; with `clean`, at its last. Returns how many there are.
  int64_t Check(const std::string& directory, bool clean) {
    Server server(model_, In(directory));
    size_t all = 0;
    for (const StreamFacts& facts : server.model()->ListStreams(1000, false, &all)) {
      const auto found = open_.find(facts.name);
      if (found == open_.end()) {
        ADD_FAILURE() << facts.name << " has ended, and is open";
        continue;
      }
      const Life life = found->second;
      EXPECT_LE(facts.next_step, life.steps);
      if (clean) {
        EXPECT_EQ(facts.next_step, life.steps);
      }
      ExpectAnswer(
          *Step(server.model(), facts.name, facts.next_step, {true, false, false, life.life}),
          facts.name, facts.next_step, life.life);
    }
    // It works.
    const std::string name = "new";
    Steps(&server, name, 0, 2);
    EXPECT_TRUE(server.snapshots()->Write());
    server.Finish();
    return static_cast<int64_t>(all);
  }

  std::map<std::string, Life> open_;
};

TEST_F(DamageTest, None) {
  EXPECT_EQ(Check("state", true), static_cast<int64_t>(open_.size()));
  EXPECT_EQ(Check("killed", false), static_cast<int64_t>(open_.size()));
}

TEST_F(DamageTest, Truncated) {
  int64_t some = 0;
  for (const char* const from : {"state", "killed"}) {
    for (const char* const ending : {".sqlite3", ".sqlite3-wal", ".note"}) {
      const std::string whole = ReadFile(folder_ / from + "/m" + ending);
      for (int i = 0; i < 24; ++i) {
        const size_t size = i < 3   ? i
                            : i < 6 ? whole.size() - (i - 2)
                                    : whole.size() * (i - 6) / 18;
        if (size >= whole.size()) continue;
        SCOPED_TRACE(std::string(from) + ending + " cut to " + std::to_string(size));
        Kill(from, "damaged");
        WriteFile(folder_ / ("damaged/m" + std::string(ending)), whole.substr(0, size));
        some += Check("damaged", false) > 0 ? 1 : 0;
        fs::remove_all(folder_ / "damaged");
      }
    }
  }
  EXPECT_GT(some, 5);
}

TEST_F(DamageTest, FlippedBytes) {
  std::mt19937 random(7);
  int64_t some = 0, aside = 0;
  for (const char* const from : {"state", "killed"}) {
    for (const char* const ending : {".sqlite3", ".sqlite3-wal", ".note"}) {
      const std::string whole = ReadFile(folder_ / from + "/m" + ending);
      if (whole.empty()) continue;
      for (int i = 0; i < 60; ++i) {
        std::string bytes = whole;
        // Most of the structure is at the beginning of pages.
        size_t at = random() % bytes.size();
        if (i % 2 == 0) at = at / 16384 * 16384 + random() % 120;
        if (at >= bytes.size()) continue;
        const int times = 1 + i % 4;
        for (int k = 0; k < times && at + k < bytes.size(); ++k) {
          bytes[at + k] = static_cast<char>(bytes[at + k] ^ (1 << random() % 8));
        }
        SCOPED_TRACE(std::string(from) + ending + " changed at " + std::to_string(at));
        Kill(from, "damaged");
        WriteFile(folder_ / ("damaged/m" + std::string(ending)), bytes);
        some += Check("damaged", false) > 0 ? 1 : 0;
        for (const auto& entry : fs::directory_iterator(folder_ / "damaged")) {
          aside += entry.path().string().find(".damaged-1") != std::string::npos ? 1 : 0;
        }
        fs::remove_all(folder_ / "damaged");
      }
    }
  }
  EXPECT_GT(some, 20);
  EXPECT_GT(aside, 5);
}

TEST_F(DamageTest, MissingFiles) {
  for (const char* const from : {"state", "killed"}) {
    for (const char* const ending : {".sqlite3", ".sqlite3-wal", ".note"}) {
      SCOPED_TRACE(std::string(from) + ending);
      Kill(from, "damaged");
      fs::remove(folder_ / ("damaged/m" + std::string(ending)));
      Check("damaged", false);
      fs::remove_all(folder_ / "damaged");
    }
  }
}

TEST_F(DamageTest, SomethingElse) {
  for (const std::string& bytes : {std::string(5000, '\0'), std::string("SQLite format 3"),
                                   ReadFile(model_), std::string(100000, 'x')}) {
    Kill("state", "damaged");
    WriteFile(folder_ / "damaged/m.sqlite3", bytes);
    EXPECT_EQ(Check("damaged", false), 0);
    // It is kept, and the next one too.
    WriteFile(folder_ / "damaged/m.sqlite3", bytes);
    EXPECT_EQ(Check("damaged", false), 0);
    EXPECT_EQ(ReadFile(folder_ / "damaged/m.sqlite3.damaged-1"), bytes);
    EXPECT_EQ(ReadFile(folder_ / "damaged/m.sqlite3.damaged-2"), bytes);
    fs::remove_all(folder_ / "damaged");
  }
}

// A file that may not grow stands for a full disk. SQLite gets an error for every write past the
// limit.
class SmallFiles {
 public:
  explicit SmallFiles(rlim_t bytes) {
    signal(SIGXFSZ, SIG_IGN);
    getrlimit(RLIMIT_FSIZE, &before_);
    rlimit now = before_;
    now.rlim_cur = bytes;
    setrlimit(RLIMIT_FSIZE, &now);
  }
  ~SmallFiles() { setrlimit(RLIMIT_FSIZE, &before_); }

 private:
  rlimit before_;
};

TEST_F(SnapshotsTest, FullDisk) {
  Server server(model_, In("state"));
  Steps(&server, "old", 0, 3);
  Steps(&server, "anew", 0, 3);
  Steps(&server, "over", 0, 3);
  Steps(&server, "begun", 0, 3);
  EXPECT_TRUE(server.snapshots()->Write());
  {
    const SmallFiles full(20000);
    for (int i = 0; i < 50; ++i) Steps(&server, "s" + std::to_string(i), 0, 3);
    EXPECT_FALSE(server.snapshots()->Write());
    EXPECT_GE(server.counts().failures, 1);
    // Steps go on, also of streams that begin and end: they have no row.
    Steps(&server, "s0", 3, 4, kEnd);
    Steps(&server, "s1", 0, 2, {true, true, false, 1});
    Steps(&server, "old", 3, 4);
    // But nobody is told that these two have ended, as they would come back.
    EXPECT_EQ(Step(server.model(), "old", 4, kEnd)->outcome.reason, Reason::kUnavailable);
    EXPECT_EQ(Step(server.model(), "anew", 0, {true, true, false, 1})->outcome.reason,
              Reason::kUnavailable);
    EXPECT_EQ(EndOnly(server.model(), {"over"}, {3})->outcome.reason, Reason::kUnavailable);
    EXPECT_EQ(BeginOnly(server.model(), {"begun"})->outcome.reason, Reason::kUnavailable);
    KillWhileFull("state", "killed");
  }
  {
    Server other(model_, In("killed"));
    Steps(&other, "old", 3, 6);
    Steps(&other, "anew", 3, 6);
    Steps(&other, "over", 3, 6);
    Steps(&other, "begun", 3, 6);
  }
  // There is room again. The same requests have the same answers.
  ExpectAnswer(*Step(server.model(), "old", 4, kEnd), "old", 4);
  ExpectAnswer(*Step(server.model(), "anew", 0, {true, true, false, 1}), "anew", 0, 1);
  EXPECT_TRUE(EndOnly(server.model(), {"over"}, {3})->outcome.ok());
  EXPECT_TRUE(BeginOnly(server.model(), {"begun"})->outcome.ok());
  EXPECT_TRUE(server.snapshots()->Write());
  Kill("state", "killed_2");
  Server other(model_, In("killed_2"));
  EXPECT_EQ(other.open(), 51);  // 48 as they were, s1, anew and begun
  Steps(&other, "s1", 2, 3, {true, false, false, 1});
  Steps(&other, "s2", 3, 4);
  Steps(&other, "anew", 1, 4, {true, false, false, 1});
  Steps(&other, "begun", 0, 3, {true, false, false, 1});
}

TEST_F(SnapshotsTest, FullDiskFromTheBeginning) {
  std::unique_ptr<Server> server;
  {
    const SmallFiles full(0);
    server = std::make_unique<Server>(model_, In("state"));
    Steps(server.get(), "s", 0, 3);
    EXPECT_FALSE(server->snapshots()->Write());
    Steps(server.get(), "s", 3, 4);
  }
  EXPECT_TRUE(server->snapshots()->Write());
  Kill("state", "killed");
  Server other(model_, In("killed"));
  Steps(&other, "s", 4, 6);
}

// A note that says "clean" must not outlive the start of a server on a full disk.
TEST_F(SnapshotsTest, FullDiskAtRestart) {
  {
    Server server(model_, In("state"));
    Steps(&server, "s", 0, 3);
    server.Finish();
  }
  {
    const SmallFiles full(0);
    Server server(model_, In("state"));
    EXPECT_EQ(server.open(), 1);
    Steps(&server, "s", 3, 5, kPlain);
    EXPECT_FALSE(server.snapshots()->Write());
  }
  Server server(model_, In("state"));
  // It is refused, or begins: it does not go on from step 3.
  const auto call = Step(server.model(), "s", 5, kPlain);
  EXPECT_TRUE(!call->outcome.ok() || call->next_steps[0] == 1);
}

// A real file system without room.
TEST_F(SnapshotsTest, FullFileSystem) {
  fs::create_directory(folder_ / "small");
  if (mount("tmpfs", (folder_ / "small").c_str(), "tmpfs", 0, "size=256k") != 0) {
    GTEST_SKIP() << "a small file system can only be mounted by root";
  }
  {
    Server server(model_, In("small"));
    std::vector<int64_t> steps(600, 0);
    bool full = false;
    for (size_t i = 0; i < steps.size(); ++i) {
      Steps(&server, "s" + std::to_string(i), 0, 3);
      if (i % 20 == 19) full = !server.snapshots()->Write() || full;
    }
    EXPECT_TRUE(full);
    EXPECT_GE(server.counts().failures, 1);
    Steps(&server, "s0", 3, 5);
    EXPECT_EQ(server.open(), 600);
    // With room it goes on.
    EXPECT_EQ(mount("tmpfs", (folder_ / "small").c_str(), "tmpfs", MS_REMOUNT, "size=64m"), 0);
    EXPECT_TRUE(server.snapshots()->Write());
    EXPECT_EQ(server.counts().stored, 600);
    Kill("small", "killed");
  }
  umount((folder_ / "small").c_str());
  Server other(model_, In("killed"));
  EXPECT_EQ(other.open(), 600);
  Steps(&other, "s0", 5, 6);
  Steps(&other, "s599", 3, 5);
}

// Many threads step streams, end them and begin them anew while everything is written all the time.
TEST_F(SnapshotsTest, WhileStreamsComeAndGo) {
  SnapshotOptions options = In("state");
  options.every = milliseconds(1);
  Server server(model_, options);
  std::vector<std::thread> clients;
  for (int c = 0; c < 4; ++c) {
    clients.emplace_back([&, c] {
      Undisturbed undisturbed(SmallModel().File());
      std::mt19937 random(c);
      for (int64_t life = 0; life < 60; ++life) {
        const std::string name = "s" + std::to_string(c);
        const int64_t steps = 1 + random() % 12;
        for (int64_t step = 0; step < steps; ++step) {
          const StepOptions how = {true, step == 0, step + 1 == steps && random() % 2 == 0, life};
          const auto call = Step(server.model(), name, step, how);
          EXPECT_TRUE(call->outcome.ok()) << call->outcome.message;
          ExpectClose(server.model()->plan(), call->answers, undisturbed.Answer(name, life, step));
        }
      }
    });
  }
  for (std::thread& client : clients) client.join();
  server.Finish();
  EXPECT_EQ(server.counts().held, 0);
}

// What a client knows, in a file that outlives it: a line for each answer that it got, and one with
// 0 steps for each stream that it asks to begin.
struct Told {
  int64_t life = 0, steps = 0;
  bool ended = false;
};

// Steps streams until it is killed. A process of its own.
[[noreturn]] void StepUntilKilled(const std::string& model, const SnapshotOptions& options,
                                  const std::string& log, int round) {
  Server server(model, options);
  std::map<std::string, Told> told;
  std::mt19937 random(round * 1000 + 17);
  const int file = open(log.c_str(), O_WRONLY | O_CREAT | O_APPEND, 0600);
  // What the last round left.
  std::ifstream before(log + ".before");
  std::string name;
  for (Told one; before >> name >> one.life >> one.steps >> one.ended;) told[name] = one;
  size_t all = 0;
  std::map<std::string, int64_t> open;
  for (const StreamFacts& facts : server.model()->ListStreams(1000, false, &all)) {
    open[facts.name] = facts.next_step;
  }
  for (auto& [stream, one] : told) {
    // A beginning without an answer is sent again.
    if (one.ended || one.steps == 0) continue;
    // A stream that was lost begins anew; one that is there goes on from its step.
    const auto found = open.find(stream);
    one.ended = found == open.end();
    if (!one.ended) one.steps = found->second;
  }
  const auto write = [&](const std::string& stream, const Told& one) {
    const std::string line = stream + " " + std::to_string(one.life) + " " +
                             std::to_string(one.steps) + " " + (one.ended ? "1" : "0") + "\n";
    if (::write(file, line.data(), line.size()) < 0) _exit(3);
  };
  while (true) {
    const std::string stream = "s" + std::to_string(random() % 24);
    Told& one = told[stream];
    const bool anew = one.ended || (one.steps > 0 && random() % 16 == 0);
    if (anew) one = {one.life + 1, 0, false};
    if (one.steps == 0) write(stream, one);
    const bool end = random() % 16 == 0;
    const auto call =
        Step(server.model(), stream, one.steps, {true, one.steps == 0, end, one.life});
    if (!call->outcome.ok()) {
      std::fprintf(stderr, "%s\n", call->outcome.message.c_str());
      _exit(4);
    }
    one.steps += 1;
    one.ended = end;
    write(stream, one);
  }
}

// 25 times: a server is killed, and the next one goes on with its streams. No stream has a state
// but one that it had in the life that its client knows of; or in the one before, as long as its
// client has no answer of the new one.
TEST_F(SnapshotsTest, KilledAtAnyMoment) {
  SnapshotOptions options = In("state");
  options.every = milliseconds(3);
  std::mt19937 random(3);
  int64_t restored = 0;
  for (int round = 0; round < 25; ++round) {
    const std::string log = folder_ / "log";
    const pid_t child = fork();
    ASSERT_GE(child, 0);
    if (child == 0) StepUntilKilled(model_, options, log, round);
    std::this_thread::sleep_for(milliseconds(40 + random() % 80));
    kill(child, SIGKILL);
    int status = 0;
    waitpid(child, &status, 0);
    ASSERT_TRUE(WIFSIGNALED(status))
        << "the server ended by itself, status " << WEXITSTATUS(status);
    std::map<std::string, Told> told;
    for (const std::string& from : {log + ".before", log}) {
      std::ifstream lines(from);
      std::string name;
      for (Told one; lines >> name >> one.life >> one.steps >> one.ended;) told[name] = one;
    }
    {
      Kill("state", "check");
      Server server(model_, In("check"));
      EXPECT_EQ(server.counts().set_aside, 0);
      size_t all = 0;
      for (const StreamFacts& facts : server.model()->ListStreams(1000, false, &all)) {
        ++restored;
        const Told one = told[facts.name];
        bool fits = false;
        for (const int64_t life : {one.life, one.life - 1}) {
          if (one.ended || (life != one.life && one.steps > 0)) continue;
          const StreamCopy copy = server.model()->CopyOut(facts.name);
          const auto call =
              Step(server.model(), facts.name, facts.next_step, {true, false, false, life});
          ASSERT_TRUE(call->outcome.ok()) << call->outcome.message;
          fits = fits || call->answers == undisturbed_.Answer(facts.name, life, facts.next_step);
          server.model()->CopyIn(copy, false);
        }
        EXPECT_TRUE(fits) << facts.name << " at step " << facts.next_step
                          << ", its client knows life " << one.life << " and " << one.steps
                          << " steps" << (one.ended ? ", ended" : "");
      }
    }
    fs::remove_all(folder_ / "check");
    std::ofstream before(log + ".before", std::ios::trunc);
    for (const auto& [name, one] : told) {
      before << name << " " << one.life << " " << one.steps << " " << one.ended << "\n";
    }
    fs::remove(log);
  }
  EXPECT_GT(restored, 100);
}

}  // namespace
}  // namespace continual_transformers::server
