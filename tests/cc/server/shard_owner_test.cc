// Tests of a server that is one of several: its table of shards, and how shards come and go.

#include "cc/server/shard_owner.h"

#include <algorithm>
#include <functional>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <utility>
#include <vector>

#include "cc/server/http_api.h"
#include "cc/server/log.h"
#include "cc/server/model_repository.h"
#include "gtest/gtest.h"
#include "tests/cc/server/http_case.h"
#include "tests/cc/server/redis_case.h"
#include "tests/cc/server/server_case.h"

namespace continual_transformers::server {
namespace {

using Json = nlohmann::ordered_json;

// A table in which the shards for which `is_first` holds are the server n1's, the others n2's.
ShardTable TableOf(int64_t epoch, const std::string& self,
                   const std::function<bool(int)>& is_first) {
  ShardTable table;
  table.epoch = epoch;
  table.servers = {{"n1", {"10.0.0.1:8001", "10.0.0.1:8000"}}, {"n2", {"n2:8001", "n2:8000"}}};
  for (int shard = 0; shard < kShards; ++shard) {
    table.shards[shard] = is_first(shard) ? "n1" : "n2";
    table.since[shard] = epoch;
  }
  table.self = self;
  return table;
}

bool All(int /*shard*/) { return true; }
bool None(int /*shard*/) { return false; }

TEST(ShardTableTest, JsonAndBack) {
  ShardTable table = TableOf(7, "n2", [](int shard) { return shard % 3 == 0; });
  table.shards[5].clear();
  table.since[5] = 2;
  const ShardTable back = ShardTable::Parse(table.Json(true));
  EXPECT_EQ(back.Json(true), table.Json(true));
  EXPECT_EQ(back.epoch, 7);
  EXPECT_EQ(back.servers.at("n1").grpc, "10.0.0.1:8001");
  EXPECT_EQ(back.shards[3], "n1");
  EXPECT_EQ(back.shards[5], "");
  EXPECT_EQ(back.Own().count(), 169U);
  EXPECT_EQ(ShardTable::Parse(table.Json(false)).self, "");
  EXPECT_TRUE(ShardTable::Parse(table.Json(false)).Own().none());
}

TEST(ShardTableTest, RefusesWhatIsNoTable) {
  const Json good = Json::parse(TableOf(3, "n1", All).Json(true));
  ShardTable::Parse(good.dump());
  const auto refused = [&](const std::function<void(Json*)>& change) {
    Json bad = good;
    change(&bad);
    try {
      ShardTable::Parse(bad.dump());
      ADD_FAILURE() << bad.dump();
    } catch (const Refusal& refusal) {
      EXPECT_EQ(refusal.reason(), Reason::kInvalidArgument);
    }
  };
  for (const char* const key : {"epoch", "servers", "shards", "since"}) {
    refused([&](Json* json) { json->erase(key); });
    for (const Json& value : {Json(nullptr), Json("x"), Json(-1), Json(1.5), Json::array()}) {
      refused([&](Json* json) { (*json)[key] = value; });
    }
  }
  refused([](Json* json) { (*json)["shards"].push_back("n1"); });
  refused([](Json* json) { (*json)["shards"][9] = "n3"; });
  refused([](Json* json) { (*json)["shards"][9] = 1; });
  refused([](Json* json) { (*json)["since"][9] = 4; });
  refused([](Json* json) { (*json)["since"][9] = "3"; });
  refused([](Json* json) { (*json)["servers"]["n1"].erase("grpc"); });
  refused([](Json* json) { (*json)["servers"]["n1"] = "host"; });
  refused([](Json* json) { (*json)["epoch"] = uint64_t{1} << 60; });
  refused([](Json* json) { (*json)["self"] = 1; });
  for (const char* const text : {"", "[]", "{", "7"}) {
    EXPECT_THROW(ShardTable::Parse(text), Refusal) << text;
  }
}

// One server of several, with or without a journal.
class Member {
 public:
  explicit Member(const std::string& model, const std::string& redis = "",
                  const ModelOptions& options = ModelOptions())
      : repository_(options) {
    SetLogLevel(LogLevel::kOff);
    if (!redis.empty()) {
      JournalOptions of_journal;
      of_journal.url = redis;
      of_journal.rebuild = false;
      journal_ = std::make_unique<Journal>(of_journal);
      repository_.AddObserver(journal_.get());
    }
    owner_ = std::make_unique<ShardOwner>(journal_.get());
    repository_.AddObserver(owner_.get());
    repository_.Add("m", model);
    repository_.Load("m");
  }

  ServedModel* model() { return repository_.Find("m").get(); }
  ModelRepository* repository() { return &repository_; }
  ShardOwner* owner() { return owner_.get(); }
  ServerParts parts() { return {&repository_, nullptr, journal_.get(), owner_.get()}; }
  size_t open(bool foreign = false) {
    size_t open = 0;
    model()->ListStreams(0, foreign, &open);
    return open;
  }

 private:
  ModelRepository repository_;
  std::unique_ptr<Journal> journal_;
  std::unique_ptr<ShardOwner> owner_;
};

class ShardOwnerTest : public ::testing::Test {
 protected:
  void SetUp() override { SmallModel().File()->Save(model_); }

  void ExpectStep(Member* member, const std::string& name, int64_t step) {
    const auto call = Step(member->model(), name, step);
    EXPECT_TRUE(call->outcome.ok()) << call->outcome.message;
    if (!call->outcome.ok()) return;
    ExpectClose(member->model()->plan(), call->answers, undisturbed_.Answer(name, 0, step));
  }

  static void ExpectWrongServer(Member* member, const std::string& name, int64_t step,
                                const std::string& says) {
    const auto call = Step(member->model(), name, step);
    EXPECT_EQ(call->outcome.reason, Reason::kWrongServer) << call->outcome.message;
    EXPECT_NE(call->outcome.message.find(says), std::string::npos) << call->outcome.message;
  }

  Folder folder_;
  const std::string model_ = folder_ / "model";
  Undisturbed undisturbed_{SmallModel().File()};
};

TEST_F(ShardOwnerTest, TakesStepsOfItsShardsOnly) {
  Member member(model_);
  ExpectWrongServer(&member, "a", 0, "in epoch 0");
  const int shard = ShardOf("a");
  const ShardOwner::Change change =
      member.owner()->SetTable(TableOf(1, "n1", [&](int i) { return i == shard; }));
  EXPECT_EQ(change.gained, 1);
  EXPECT_EQ(change.lost, 0);
  ExpectStep(&member, "a", 0);
  ExpectWrongServer(&member, "b", 0, "is the server \"n2\"'s (n2:8001)");
  // The same table again.
  EXPECT_EQ(member.owner()->SetTable(TableOf(1, "n1", [&](int i) { return i == shard; })).gained,
            0);
  ExpectStep(&member, "a", 1);
  // A request is taken whole or not at all.
  {
    const Plan& plan = member.model()->plan();
    TestCall call(plan, {"a", "b"}, 1, RandomInputs(plan, 2, 1));
    member.model()->Submit(&call);
    call.Wait();
    EXPECT_EQ(call.outcome.reason, Reason::kWrongServer);
    EXPECT_NE(call.outcome.shards, nullptr);
  }
  ExpectStep(&member, "a", 2);
  // A client that knows a newer table.
  {
    const Plan& plan = member.model()->plan();
    TestCall call(plan, {"a"}, 1, InputsOf(plan, "a", 0, 3));
    call.first_steps = {3};
    call.shard_epoch = 2;
    member.model()->Submit(&call);
    call.Wait();
    EXPECT_EQ(call.outcome.reason, Reason::kWrongServer);
  }
  // An older table, and another one of the same epoch.
  EXPECT_THROW(member.owner()->SetTable(TableOf(1, "n1", All)), Refusal);
  EXPECT_THROW(member.owner()->SetTable(TableOf(0, "n1", All)), Refusal);
  ExpectStep(&member, "a", 3);
}

TEST_F(ShardOwnerTest, WithoutAJournalStreamsAreMovedAsCopies) {
  Member one(model_), two(model_);
  one.owner()->SetTable(TableOf(1, "n1", All));
  two.owner()->SetTable(TableOf(1, "n2", All));
  for (int64_t step = 0; step < 5; ++step) ExpectStep(&one, "a", step);
  ExpectWrongServer(&two, "a", 5, "\"n1\"");

  EXPECT_EQ(one.owner()->SetTable(TableOf(2, "n1", None)).lost, kShards);
  ExpectWrongServer(&one, "a", 5, "\"n2\"");
  EXPECT_EQ(one.open(true), 1U);
  two.model()->CopyIn(one.model()->CopyOut("a"), false);
  ExpectWrongServer(&two, "a", 5, "\"n1\"");
  two.owner()->SetTable(TableOf(2, "n2", None));
  one.model()->CloseStream("a", End::kMoved);
  EXPECT_EQ(one.open(), 0U);
  ExpectStep(&two, "a", 4);  // the last answer again
  for (int64_t step = 5; step < 9; ++step) ExpectStep(&two, "a", step);
}

TEST_F(ShardOwnerTest, WithoutAJournalOldStreamsDoNotComeBack) {
  Member one(model_);
  one.owner()->SetTable(TableOf(1, "n1", All));
  ExpectStep(&one, "a", 0);
  // Another server had the shards in epoch 2, of which this one has heard nothing.
  EXPECT_THROW(one.owner()->SetTable(TableOf(3, "n1", All)), Refusal);
  ExpectStep(&one, "a", 1);
  one.owner()->SetTable(TableOf(3, "n1", None));
  one.owner()->SetTable(TableOf(4, "n1", All));
  // It has had them all the time.
  ShardTable table = TableOf(5, "n1", All);
  table.since.fill(4);
  one.owner()->SetTable(std::move(table));
}

TEST_F(ShardOwnerTest, ModelThatIsLoadedLater) {
  Member member(model_);
  member.owner()->SetTable(TableOf(1, "n1", All));
  ExpectStep(&member, "a", 0);
  member.repository()->Unload("m");
  ShardTable table = TableOf(2, "n1", [](int i) { return i == ShardOf("a"); });
  table.since[ShardOf("a")] = 1;
  member.owner()->SetTable(std::move(table));
  member.repository()->Load("m");
  ExpectStep(&member, "a", 0);
  ExpectWrongServer(&member, "b", 0, "\"n2\"");
}

class ShardJournalTest : public ShardOwnerTest {
 protected:
  void SetUp() override {
    ShardOwnerTest::SetUp();
    if (!Redis::Exists()) GTEST_SKIP() << "there is no redis-server on this machine";
    redis_ = std::make_unique<Redis>();
  }

  std::unique_ptr<Redis> redis_;
};

TEST_F(ShardJournalTest, StreamsAreRebuiltByTheirNewServer) {
  Member one(model_, redis_->url()), two(model_, redis_->url());
  one.owner()->SetTable(TableOf(1, "n1", All));
  two.owner()->SetTable(TableOf(1, "n2", All));
  for (int64_t step = 0; step < 9; ++step) {
    ExpectStep(&one, "a", step);
    ExpectStep(&one, "b", step);
  }
  // As planned: the old server first.
  const auto of_b = [](int shard) { return shard == ShardOf("b"); };
  ShardTable table = TableOf(2, "n1", of_b);
  table.since[ShardOf("b")] = 1;
  one.owner()->SetTable(table);
  EXPECT_EQ(one.open(), 1U);
  ExpectWrongServer(&one, "a", 9, "\"n2\"");
  table.self = "n2";
  EXPECT_EQ(two.owner()->SetTable(table).rebuilt.streams, 1);
  ExpectStep(&two, "a", 8);  // the last answer again
  ExpectStep(&two, "a", 9);
  ExpectStep(&one, "b", 9);
  // And back.
  ShardTable back = TableOf(3, "n2", All);
  back.since[ShardOf("b")] = 1;
  two.owner()->SetTable(back);
  back.self = "n1";
  EXPECT_EQ(one.owner()->SetTable(back).rebuilt.streams, 1);
  ExpectStep(&one, "a", 10);
  ExpectStep(&one, "b", 10);
}

TEST_F(ShardJournalTest, ServerThatWasThoughtDead) {
  Member one(model_, redis_->url()), two(model_, redis_->url());
  one.owner()->SetTable(TableOf(1, "n1", All));
  for (int64_t step = 0; step < 9; ++step) ExpectStep(&one, "a", step);
  // The first server hears nothing of this.
  two.owner()->SetTable(TableOf(2, "n2", None));
  ExpectStep(&two, "a", 9);
  EXPECT_EQ(Step(one.model(), "a", 9)->outcome.reason, Reason::kUnavailable);
  ExpectWrongServer(&one, "a", 9, "does not have now");
  EXPECT_EQ(one.open(), 0U);
  ExpectStep(&two, "a", 10);
  // It gets the shards again. Its own streams were old.
  two.owner()->SetTable(TableOf(3, "n2", All));
  EXPECT_EQ(one.owner()->SetTable(TableOf(3, "n1", All)).rebuilt.streams, 1);
  ExpectStep(&one, "a", 11);
}

// It has not tried to take a step since, so it does not know that it lost the shards meanwhile.
TEST_F(ShardJournalTest, ServerThatLostItsShardsAndHasThemAgain) {
  Member one(model_, redis_->url()), two(model_, redis_->url());
  one.owner()->SetTable(TableOf(1, "n1", All));
  for (int64_t step = 0; step < 9; ++step) ExpectStep(&one, "a", step);
  two.owner()->SetTable(TableOf(2, "n2", None));
  for (int64_t step = 9; step < 12; ++step) ExpectStep(&two, "a", step);
  two.owner()->SetTable(TableOf(3, "n2", All));
  const ShardOwner::Change change = one.owner()->SetTable(TableOf(3, "n1", All));
  EXPECT_EQ(change.gained, kShards);
  EXPECT_EQ(change.rebuilt.streams, 1);
  ExpectStep(&one, "a", 11);
  ExpectStep(&one, "a", 12);
}

// Two controllers, which do not know of each other, made two tables of the same epoch.
TEST_F(ShardJournalTest, TwoTablesOfOneEpoch) {
  Member two(model_, redis_->url());
  {
    Member one(model_, redis_->url());
    one.owner()->SetTable(TableOf(1, "n1", All));
    ExpectStep(&one, "a", 0);
    ExpectError(ErrorCode::kInvalidArgument, "in the same epoch, 1",
                [&] { two.owner()->SetTable(TableOf(1, "n2", None)); });
    ExpectWrongServer(&two, "a", 1, "does not have now");
    ExpectStep(&one, "a", 1);
  }
  // A new process on the same node, with the same table.
  Member one(model_, redis_->url());
  EXPECT_EQ(one.owner()->SetTable(TableOf(1, "n1", All)).rebuilt.streams, 1);
  ExpectStep(&one, "a", 2);
  // The controllers agree.
  EXPECT_EQ(two.owner()->SetTable(TableOf(2, "n2", None)).rebuilt.streams, 1);
  ExpectStep(&two, "a", 3);
  EXPECT_EQ(Step(one.model(), "a", 3)->outcome.reason, Reason::kUnavailable);
  // By one table of the next epoch the second server keeps the shard, by the other one the first
  // server gets it.
  ShardTable keeps = TableOf(3, "n2", None);
  keeps.since.fill(2);
  two.owner()->SetTable(keeps);
  ExpectStep(&two, "a", 4);
  one.owner()->SetTable(TableOf(3, "n1", All));
  ExpectStep(&one, "a", 5);
  EXPECT_EQ(Step(two.model(), "a", 5)->outcome.reason, Reason::kUnavailable);
  ExpectStep(&one, "a", 6);
}

// What a server has no room for stays in the journal for a while, for a server that has.
TEST_F(ShardJournalTest, NoRoomForAStream) {
  ModelOptions small;
  small.max_streams = 1;
  Member one(model_, redis_->url()), two(model_, redis_->url(), small);
  std::vector<std::string> names;  // of one shard
  for (int i = 0; names.size() < 3; ++i) {
    if (ShardOf(std::to_string(i)) == 7) names.push_back(std::to_string(i));
  }
  one.owner()->SetTable(TableOf(1, "n1", All));
  for (const std::string& name : names) {
    for (int64_t step = 0; step < 5; ++step) ExpectStep(&one, name, step);
  }
  const ShardOwner::Change change = two.owner()->SetTable(TableOf(2, "n2", None));
  EXPECT_EQ(change.rebuilt.streams, 1);
  EXPECT_EQ(change.rebuilt.lost, 2);
  std::sort(names.begin(), names.end());  // names[0] is open
  int64_t step = 5;
  const auto go_on = [&](Member* member, int64_t until) {
    for (; step < until; ++step) ASSERT_TRUE(Step(member->model(), names[0], step)->outcome.ok());
  };
  // The shard is trimmed after 256 entries.
  go_on(&two, 600);
  EXPECT_EQ(one.owner()->SetTable(TableOf(3, "n1", All)).rebuilt.streams, 3);
  ExpectStep(&one, names[1], 5);
  ExpectStep(&one, names[2], 5);
  // They do not keep the journal from being trimmed for ever.
  EXPECT_EQ(two.owner()->SetTable(TableOf(4, "n2", None)).rebuilt.lost, 2);
  go_on(&two, 6000);
  EXPECT_LT(two.parts().journal->counts().at("m").kept, 4000);
  EXPECT_EQ(one.owner()->SetTable(TableOf(5, "n1", All)).rebuilt.streams, 1);
}

TEST_F(ShardJournalTest, WhileRedisIsAwayNothingIsGained) {
  Member one(model_, redis_->url());
  one.owner()->SetTable(TableOf(1, "n1", None));
  redis_->Stop(SIGKILL);
  EXPECT_THROW(one.owner()->SetTable(TableOf(2, "n1", All)), Error);
  EXPECT_FALSE(one.owner()->applied());
  EXPECT_FALSE(Step(one.model(), "a", 0)->outcome.ok());
  redis_->Start();
  // The same table again.
  ShardOwner::Change change;
  for (int tries = 0; change.gained == 0 && tries < 100; ++tries) {
    try {
      change = one.owner()->SetTable(TableOf(2, "n1", All));
    } catch (const Error&) {
      std::this_thread::sleep_for(std::chrono::milliseconds(50));
    }
  }
  EXPECT_EQ(change.gained, kShards);
  EXPECT_TRUE(one.owner()->applied());
  ExpectStep(&one, "a", 0);
}

TEST_F(ShardOwnerTest, OverHttp) {
  Member member(model_);
  Security security;
  security.operator_token = "secret";
  HttpApi api(security, member.parts());
  const auto put = [&](const std::string& body, const std::string& token) {
    HttpRequest request;
    request.method = "PUT";
    request.target = "/v2/shards";
    request.body = body;
    request.authorization = "Bearer " + token;
    return Call(&api, std::move(request));
  };
  const std::string table = TableOf(4, "n1", All).Json(true);
  EXPECT_EQ(put(table, "wrong").status, 401);
  EXPECT_EQ(put("{}", "secret").status, 400);
  const Json change = Json::parse(put(table, "secret").body);
  EXPECT_EQ(change,
            Json({{"gained", kShards}, {"lost", 0}, {"streams_rebuilt", 0}, {"streams_lost", 0}}));
  EXPECT_EQ(put(TableOf(3, "n1", All).Json(true), "secret").status, 409);
  Json expected = Json::parse(table);
  expected["applied"] = true;
  EXPECT_EQ(Get(&api, "/v2/shards").body, expected.dump());
  EXPECT_EQ(Get(&api, "/v2/models/m/streams").status, 401);
  EXPECT_EQ(Get(&api, "/v2/models/m/streams?foreign=true", "secret").status, 200);
  EXPECT_NE(Get(&api, "/metrics").body.find("continual_transformers_shard_epoch 4"),
            std::string::npos);

  OneModel alone;
  HttpApi other({}, {&alone.repository});
  EXPECT_EQ(Get(&other, "/v2/shards").status, 404);
}

}  // namespace
}  // namespace continual_transformers::server
