// The shards of this server, where it is one of several.
//
// A new table comes from outside, over HTTP. What holds at every moment, for each shard:
//
// - A server takes steps of a shard only by the newest table that it was given.
// - With a journal, a server takes steps only after it has rebuilt the shard's streams, and a
// server
//   that had the shard before, and does not know yet that it has lost it, can append no entry any
//   more. So its steps are refused, as no answer goes out before its entry is in the journal.
// - Without a journal, a server that was thought dead goes on by its old table, for clients that
//   have an old one, too. A client that knows the newer epoch says so, and is refused.

#ifndef CONTINUAL_TRANSFORMERS_SERVER_SHARD_OWNER_H_
#define CONTINUAL_TRANSFORMERS_SERVER_SHARD_OWNER_H_

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <set>

#include "cc/server/journal.h"
#include "cc/server/model_observer.h"
#include "cc/server/shard_table.h"

namespace continual_transformers::server {

// Any thread may call any method.
class ShardOwner : public ModelObserver {
 public:
  // Begins with no shards. The journal may be null, and has to be an observer before this one.
  explicit ShardOwner(Journal* journal);

  void Loaded(ServedModel* model) override;
  void Unloaded(ServedModel* model) override;

  std::shared_ptr<const ShardTable> table() const;
  // Whether this server takes steps of all shards that the table gives it. If not, a change is in
  // progress, or has failed: then the same table has to be given again.
  bool applied() const { return applied_; }

  struct Change {
    int64_t gained = 0, lost = 0;  // shards
    Journal::Rebuilt rebuilt;      // from the journal
  };
  // Goes on by another table. With a journal, the streams of shards that are lost end here. Without
  // one they stay, for the operator to move, and their steps are refused.
  //
  // Throws Refusal (kOutOfStep) if this server has a newer table, and Error (kIo) if the journal is
  // away: then the shards that were to be gained are not, and the same table can be given again.
  Change SetTable(ShardTable table);

 private:
  // Tells the models which shards they have.
  void Apply(const ShardSet& own, bool end_others);

  Journal* const journal_;
  std::mutex changing_;  // one change at a time
  std::set<ServedModel*> models_;
  ShardSet own_;  // of which steps are taken
  std::atomic<bool> applied_{true};
  mutable std::mutex mutex_;
  std::shared_ptr<const ShardTable> table_;
};

}  // namespace continual_transformers::server

#endif  // CONTINUAL_TRANSFORMERS_SERVER_SHARD_OWNER_H_
