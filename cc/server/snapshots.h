// Snapshots: the streams of all models in a directory, from which a server that is started again
// goes on.
//
// There is one SQLite database for each model, with a row for each open stream. Every now and then,
// the streams that have changed since are written, many in one transaction. No step waits for that,
// except for the moment in which a few streams are copied.
//
// What holds if the process is killed at any moment, and is started again:
//
// - A stream that was open and had been written goes on from the step at which it was written last.
//   It may have answered later steps, which are forgotten. Its client learns where to go on from
//   the refusal of a later step number. A client that does not number its steps cannot know, so its
//   next step is refused until it says the number that is expected, or begins anew.
// - A client may be told that a stream has ended, or has begun anew. If the stream has a row, the
//   answer goes out only when that row is deleted. So the old stream never comes back. Other
//   answers, and those about streams without a row, never wait. Several such ends are one
//   transaction. If it fails, for example because the disk is full, the answer is a refusal
//   (kUnavailable), to be sent again.
// - The answer to a numbered request that ended a stream with a row is kept for ten minutes. A
//   client that lost it gets it again.
//
// After Finish, nothing is forgotten, and clients without step numbers go on as well.
//
// All this also holds if the machine loses its power, as each transaction is on the disk before an
// answer waits for it no longer (`power_loss`). Without that, a machine without power may lose the
// transactions of the last seconds; then the file is not used, if its note says so
// (snapshot_file.h). A killed process loses nothing either way. With it, the answer to the end of a
// stream took 4 ms instead of 0.4 on a virtual disk (medians); the MB/s of a snapshot were the
// same.

#ifndef CONTINUAL_TRANSFORMERS_SERVER_SNAPSHOTS_H_
#define CONTINUAL_TRANSFORMERS_SERVER_SNAPSHOTS_H_

#include <chrono>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <string>

#include "cc/server/model_observer.h"

namespace continual_transformers::server {

struct SnapshotOptions {
  std::string directory;  // made if it is missing
  std::chrono::milliseconds every{10000};
  bool other_weights = false;  // read streams of other weights too; else they are set aside
  bool power_loss = true;
};

// Of one model, since it was loaded.
struct SnapshotCounts {
  int64_t restored = 0;   // streams that were read back
  int64_t set_aside = 0;  // rows that were not: damaged, or of another model or other weights
  int64_t stored = 0;     // rows that are in the file now
  int64_t written = 0;    // rows
  int64_t written_bytes = 0;
  int64_t deleted = 0;     // rows of streams that ended
  int64_t failures = 0;    // transactions that failed: the disk is full, or broken
  int64_t held = 0;        // answers that wait now
  double age_seconds = 0;  // of the last complete snapshot
};

// Any thread may call any method. It is destroyed before the models.
class Snapshots : public ModelObserver {
 public:
  // Throws Error (kIo) if the directory cannot be made, or another server uses it.
  explicit Snapshots(const SnapshotOptions& options);
  ~Snapshots() override;  // writes nothing more

  // Reads back the model's streams. Logs what cannot be read, and throws nothing for it.
  void Loaded(ServedModel* model) override;
  // The streams' rows are gone.
  void Unloaded(ServedModel* model) override;
  // The streams' rows stay, and the file is as Finish leaves it.
  void LoadingFailed(ServedModel* model) override;

  // Writes everything that has changed, now. Returns whether it could.
  bool Write();
  // Writes everything that has changed, and closes the files. To be called when models answer no
  // steps any more (ModelRepository::Drain).
  void Finish();

  // By the model's name.
  std::map<std::string, SnapshotCounts> counts() const;

 private:
  class Keeper;

  std::unique_ptr<Keeper> Take(ServedModel* model);  // null: there is none

  const SnapshotOptions options_;
  int lock_ = -1;  // a file, locked while this object lives
  mutable std::mutex mutex_;
  std::map<ServedModel*, std::unique_ptr<Keeper>> keepers_;
};

}  // namespace continual_transformers::server

#endif  // CONTINUAL_TRANSFORMERS_SERVER_SNAPSHOTS_H_
