// The journal: the inputs of every step, in Redis, before its answer goes out. Another server reads
// them and rebuilds the streams of one that is lost.
//
// What holds while Redis keeps what it acknowledged:
//
// - Every step that was answered can be rebuilt, with its answer, which a client with step numbers
//   may ask for again. So can the end of a stream, and a stream that was put in as a copy. A step
//   that was not answered is rebuilt or not; the client sends it again.
// - A rebuilt stream answers as the lost one would, within the bounds for steps in other batches
//   (replay.h).
//
// There is a Redis stream for each model and each of the 256 shards (shards.h), with the key
// ct:MODEL:SHARD, and one XADD for each batch and shard. The batches after it run while Redis
// works. An answer waits for the acknowledgement only.
//
// The id of an entry is EPOCH-NUMBER, with the epoch of the table that gave the shard to its
// server, and Redis takes no id that is lower than the last one. So the first entry of a server
// that got the shard later fences off every one that had it before: its XADD fails, its answers are
// refused, and it loses the shard. (A script that compares epochs would do the same, and cost
// more.) Should two servers want a shard in the same epoch, by two different tables, it is the
// one's whose entry came first.
//
// Redis keeps what open streams need: the inputs of the last receptive field of each. A shard is
// trimmed up to the oldest entry that one of its streams needs. For a stream that is idle while
// others are busy, a copy of the stream is added at the end instead, so that its old inputs do not
// keep back those of the others. The same is done for all streams when they get other weights, and
// when Redis was started again, as it may have lost everything; answers wait meanwhile.
//
// A stream that cannot be put in, because there is no room or the weights are others, is not
// forgotten at once: what it needs stays until 256 KiB came after it.
//
// While Redis is away, steps are refused (kUnavailable), as the journal promises that nothing is
// lost. Answers that wait are refused after a second; their steps have been taken, and count once
// if the client numbers them.
//
// Redis on the same two cores took 2.5 us for an XADD, and an answer in process 50 us more
// (medians; one request at a time).
//
// Redis must not evict keys (maxmemory-policy noeviction), and needs a persistence of its own
// (appendonly yes) if it may end together with the server.

#ifndef CONTINUAL_TRANSFORMERS_SERVER_JOURNAL_H_
#define CONTINUAL_TRANSFORMERS_SERVER_JOURNAL_H_

#include <array>
#include <atomic>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "cc/server/model_observer.h"
#include "cc/server/redis.h"
#include "cc/server/shards.h"

namespace continual_transformers::server {

struct JournalOptions {
  std::string url;             // redis://host:port/database
  bool other_weights = false;  // also rebuild streams whose steps were taken with other weights
  bool rebuild = true;         // when a model is loaded; else only what TakeOver names
};

// Of one model, since it was loaded.
struct JournalCounts {
  bool connected = false;
  int64_t entries = 0, bytes = 0;  // acknowledged
  int64_t copies = 0;              // of streams, instead of their inputs
  int64_t trimmed = 0;             // entries that nobody needs
  int64_t kept = 0;                // entries that Redis has now
  int64_t failures = 0;            // times that Redis was away
  int64_t rebuilt = 0, lost = 0;   // streams that were rebuilt, and that could not be
  int64_t held = 0;                // batches whose answers wait now
  int64_t fenced = 0;              // times that another server had taken over a shard
};

// Any thread may call any method. It is destroyed before the models.
class Journal : public ModelObserver {
 public:
  // Throws Error (kInvalidArgument) if the address is none.
  explicit Journal(const JournalOptions& options);
  ~Journal() override;

  // Rebuilds the model's streams. Throws Error (kIo) if there is no Redis.
  void Loaded(ServedModel* model) override;
  void Unloaded(ServedModel* model) override;

  // The epochs in which this server got its shards, and its name in the table of shards.
  void SetEpochs(const std::array<int64_t, kShards>& epochs, const std::string& server);
  struct Rebuilt {
    int64_t streams = 0;
    int64_t lost = 0;  // streams that could not be rebuilt, or put in
  };
  // Rebuilds the streams of shards that this server has got, for all models or for one. Their steps
  // must be refused until then. From then on, a server that got them in a lower epoch can append
  // nothing to them. Throws Error (kIo) if Redis is away; then it can be called again. Throws Error
  // (kInvalidArgument) if a server got one of them in a newer epoch, or another one in the same.
  Rebuilt TakeOver(const std::vector<int>& shards, const ServedModel* only = nullptr);
  // This server has lost these shards: it leaves what the journal has of them as it is.
  void GiveUp(const std::vector<int>& shards);

  // Waits until every answer has gone out. To be called when models answer no steps any more.
  void Finish();

  // By the model's name.
  std::map<std::string, JournalCounts> counts() const;

 private:
  class Keeper;

  // Returns the keepers of all models, or that of one. Callers hold no lock while they wait for a
  // keeper's work.
  std::vector<std::shared_ptr<Keeper>> KeepersOf(const ServedModel* only) const;

  const JournalOptions options_;
  const RedisAddress address_;
  std::array<std::atomic<int64_t>, kShards> epochs_{};
  std::atomic<uint64_t> server_;  // JournalHeader::server
  mutable std::mutex mutex_;
  std::map<ServedModel*, std::shared_ptr<Keeper>> keepers_;
};

}  // namespace continual_transformers::server

#endif  // CONTINUAL_TRANSFORMERS_SERVER_JOURNAL_H_
