#include "cc/server/shard_owner.h"

#include <string>
#include <utility>
#include <vector>

#include "cc/server/log.h"
#include "cc/server/outcome.h"
#include "cc/server/served_model.h"

namespace continual_transformers::server {
namespace {

std::vector<int> ListOf(const ShardSet& shards) {
  std::vector<int> list;
  for (int shard = 0; shard < kShards; ++shard) {
    if (shards[shard]) list.push_back(shard);
  }
  return list;
}

}  // namespace

ShardOwner::ShardOwner(Journal* journal)
    : journal_(journal), table_(std::make_shared<ShardTable>()) {}

void ShardOwner::Loaded(ServedModel* model) {
  std::lock_guard<std::mutex> one(changing_);
  model->SetShards(table(), {}, false);
  if (journal_ != nullptr) journal_->TakeOver(ListOf(own_), model);
  model->SetShards(table(), own_, false);
  models_.insert(model);
}

void ShardOwner::Unloaded(ServedModel* model) {
  std::lock_guard<std::mutex> one(changing_);
  models_.erase(model);
}

std::shared_ptr<const ShardTable> ShardOwner::table() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return table_;
}

ShardOwner::Change ShardOwner::SetTable(ShardTable next) {
  std::lock_guard<std::mutex> one(changing_);
  const std::shared_ptr<const ShardTable> last = table();
  const bool same = next.epoch == last->epoch && next.Json(true) == last->Json(true);
  if (same && applied_) return {};
  if (next.epoch <= last->epoch && !same) {
    throw Refusal(Reason::kOutOfStep, "this server has a table of shards of epoch " +
                                          std::to_string(last->epoch) + ", got one of epoch " +
                                          std::to_string(next.epoch) +
                                          ": read the newer one, and give it a higher epoch");
  }
  const ShardSet wanted = next.Own();
  // Also those that another server had meanwhile.
  ShardSet lost = own_ & ~wanted;
  for (int shard = 0; shard < kShards; ++shard) {
    if (own_[shard] && next.since[shard] > last->epoch) lost.set(shard);
  }
  if (journal_ == nullptr && (lost & wanted).any()) {
    throw Refusal(
        Reason::kOutOfStep,
        "this server had lost some of these shards meanwhile, and its streams of them are "
        "old: give it a table in which it has none of them, then move them to it");
  }
  const ShardSet kept = own_ & ~lost, gained = wanted & ~kept;
  Change change;
  change.gained = static_cast<int64_t>(gained.count());
  change.lost = static_cast<int64_t>(lost.count());
  const int64_t epoch = next.epoch;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    table_ = std::make_shared<ShardTable>(std::move(next));
  }
  applied_ = false;
  own_ = kept;
  // From here on no step of a lost shard is taken. Only then may the journal have the new epochs:
  // an entry of a lost shard in its new epoch would be valid.
  Apply(own_, journal_ != nullptr);
  if (journal_ != nullptr) {
    // Also those that an earlier table, which Redis was not there for, gave away.
    journal_->GiveUp(ListOf(~own_));
    journal_->SetEpochs(table()->since, table()->self);
    change.rebuilt = journal_->TakeOver(ListOf(gained));
  }
  own_ = wanted;
  Apply(own_, false);
  applied_ = true;
  Log(LogLevel::kInfo, "shards",
      {{"epoch", epoch},
       {"own", own_.count()},
       {"gained", change.gained},
       {"lost", change.lost},
       {"streams_rebuilt", change.rebuilt.streams},
       {"streams_lost", change.rebuilt.lost}});
  return change;
}

void ShardOwner::Apply(const ShardSet& own, bool end_others) {
  for (ServedModel* const model : models_) model->SetShards(table(), own, end_others);
}

}  // namespace continual_transformers::server
