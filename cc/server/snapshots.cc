#include "cc/server/snapshots.h"

#include <fcntl.h>
#include <sys/file.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <condition_variable>
#include <cstring>
#include <ctime>
#include <deque>
#include <filesystem>
#include <string_view>
#include <system_error>
#include <thread>
#include <unordered_map>
#include <unordered_set>
#include <utility>
#include <vector>

#include "cc/server/log.h"
#include "cc/server/served_model.h"
#include "cc/server/snapshot_file.h"
#include "cc/server/stream_copy.h"
#include "cc/server/stream_keeper.h"
#include "cc/session/error.h"
#include "cc/session/fingerprint.h"

namespace continual_transformers::server {
namespace {

// No batch is run while streams are copied: 0.2 ms for a slice of 10 streams of 98 kB.
constexpr int64_t kSliceBytes = 1 << 20;
constexpr int64_t kSliceStreams = 64;
// A transaction has several slices.
constexpr size_t kTransactionBytes = 8 << 20;
constexpr std::chrono::seconds kRetryAfter{1};
// How long the last answer of a stream that ended is kept in the file.
constexpr int64_t kEndedSeconds = 600;
// Of the rows that are not read back, so many have a line of their own in the log.
constexpr int64_t kMostNamed = 100;

// A model's name may hold anything.
std::string FileNameOf(const std::string& model) {
  std::string name;
  for (const char c : model) {
    const bool plain = (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') ||
                       c == '-' || c == '_' || (c == '.' && !name.empty());
    if (plain) {
      name += c;
    } else {
      constexpr char kDigits[] = "0123456789abcdef";
      const auto byte = static_cast<unsigned char>(c);
      name += {'%', kDigits[byte >> 4], kDigits[byte & 15]};
    }
  }
  constexpr size_t kMost = 150;  // file systems take 255, and there are endings
  if (name.size() <= kMost) return name;
  return name.substr(0, kMost) + "%" + std::to_string(Xxh64(model.data(), model.size()));
}

}  // namespace

// Writes the streams of one model, on a thread of its own.
class Snapshots::Keeper final : public StreamKeeper {
 public:
  Keeper(ServedModel* model, const SnapshotOptions& options)
      : model_(model),
        options_(options),
        slice_(std::clamp<int64_t>(kSliceBytes / model->session().state_bytes(), 1, kSliceStreams)),
        file_(options.directory + "/" + FileNameOf(model->name()), options.power_loss) {
    ReadBack();
    model_->AddKeeper(this);
    next_snapshot_ = Clock::now() + options_.every;
    thread_ = std::thread([this] { Run(); });
  }

  ~Keeper() override { Stop(); }

  void Stepped(const std::vector<Row>& rows) override {
    for (const Row& row : rows) {
      if (!row.began && !row.ended) continue;
      std::string last;
      if (row.ended && row.stream->last_steps != 0) {
        last =
            EncodeStreamCopy({*row.stream->name, "", row.stream->last_first, row.stream->last_steps,
                              row.stream->last_inputs, row.stream->answer});
      }
      Drop(*row.stream->name, std::move(last));
    }
  }

  void Ended(const std::string& stream, End) override { Drop(stream, ""); }
  void PutIn(const StreamCopy& copy, int64_t) override { Drop(copy.name, ""); }

  void Hold(std::vector<Answer> answers) override {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      if (!dropping_.empty()) {
        // Not moved within the vector: to itself, an outcome would lose its list of steps.
        std::vector<Answer> ready;
        for (Answer& answer : answers) {
          const uint64_t until = WaitsFor(*answer.request);
          if (until == 0) {
            ready.push_back(std::move(answer));
          } else if (stopped_) {
            ready.push_back({answer.request, Refused(std::move(answer.outcome))});
          } else {
            held_.push_back({until, std::move(answer)});
          }
        }
        answers = std::move(ready);
      }
    }
    if (!answers.empty()) PassOn(std::move(answers));
  }

  void WeightsLoaded() override {
    std::lock_guard<std::mutex> lock(mutex_);
    other_weights_ = true;
  }

  void Flush() override {
    bool writes = false;
    {
      std::unique_lock<std::mutex> lock(mutex_);
      passed_.wait(lock, [this] { return held_.empty() && !passing_; });
      std::swap(writes, other_weights_);
    }
    // The rows in the file are states with the old weights, which the next server would not take.
    if (writes) Write();
  }

  // Writes everything. Returns whether it could.
  bool Write() {
    std::unique_lock<std::mutex> lock(mutex_);
    if (stopped_) return false;
    const uint64_t mine = ++wanted_;
    wake_.notify_all();
    passed_.wait(lock, [&] { return done_ >= mine || stopped_; });
    return done_ >= mine && last_ok_;
  }

  void Finish() {
    // Their rows do not say yet that they may lag.
    model_->ReturnChanges(lagging_);
    const bool written = Write();
    Stop();
    try {
      if (written) file_.Finish();
    } catch (const std::exception& error) {
      LogFailure(error.what());
    }
    if (!written) {
      Log(LogLevel::kError, "snapshot_not_finished",
          {{"model", model_->name()},
           {"streams", model_->changes()},
           {"consequence", "the next server goes on with an older state of these streams"}});
    }
  }

  // All streams have ended, and no answer waits.
  void Forget() {
    const bool written = Write();
    Stop();
    // Their rows could not be deleted, and must not be read when the model is loaded again.
    if (!written) file_.MoveAside();
  }

  SnapshotCounts counts() const {
    std::lock_guard<std::mutex> lock(mutex_);
    SnapshotCounts counts = counts_;
    counts.stored = static_cast<int64_t>(stored_.size());
    counts.held = static_cast<int64_t>(held_.size());
    counts.age_seconds = std::chrono::duration<double>(Clock::now() - last_snapshot_).count();
    return counts;
  }

 private:
  struct Held {
    uint64_t until;  // the number of a drop
    Answer answer;
  };

  void ReadBack() {
    const SnapshotFile::Contents contents =
        file_.Open([&](const std::string& name, std::string_view bytes, bool clean) {
          std::string reason;
          try {
            StreamCopy copy = DecodeStreamCopy(bytes);
            if (copy.name != name) {
              reason = "the row has another name than the copy in it";
            } else {
              copy.may_lag = copy.may_lag || !clean;
              model_->Restore(copy, options_.other_weights);
              stored_.insert(name);
              if (!copy.state.empty()) ++counts_.restored;
              if (copy.may_lag && !copy.state.empty()) lagging_.push_back(name);
            }
          } catch (const std::exception& error) {
            reason = error.what();
          }
          if (!reason.empty() && ++counts_.set_aside <= kMostNamed) {
            Log(LogLevel::kWarning, "snapshot_of_stream_set_aside",
                {{"model", model_->name()}, {"stream", name}, {"reason", reason}});
          }
          return reason;
        });
    if (!contents.damage.empty()) {
      Log(LogLevel::kError, "snapshot_damaged",
          {{"model", model_->name()},
           {"reason", contents.damage},
           {"moved_to", contents.aside},
           {"streams_read", counts_.restored}});
      stored_.clear();
    }
    if (counts_.restored > 0 || counts_.set_aside > 0) {
      Log(LogLevel::kInfo, "snapshot_read",
          {{"model", model_->name()},
           {"streams", counts_.restored},
           {"may_lag", lagging_.size()},
           {"set_aside", counts_.set_aside}});
    }
    // Rows of a damaged file are not in the new one, and rows of other weights are read only once
    // if they are not written again.
    model_->RecordChanges(!contents.damage.empty() || options_.other_weights);
  }

  // The row of a stream is not its state any more. `last` replaces it; empty: nothing does.
  void Drop(const std::string& name, std::string last) {
    std::lock_guard<std::mutex> lock(mutex_);
    const auto found = stored_.find(name);
    if (found == stored_.end()) return;
    if (last.empty()) stored_.erase(found);
    dropping_[name] = ++last_drop_;
    pending_.push_back({name, std::move(last), true});
    wake_.notify_all();
  }

  // The drop that an answer has to wait for; 0: none. Needs the lock.
  uint64_t WaitsFor(const StepRequest& request) {
    uint64_t until = 0;
    for (const std::string& name : request.streams) {
      const auto found = dropping_.find(name);
      if (found != dropping_.end()) until = std::max(until, found->second);
    }
    // Later answers about any of its streams must not overtake it.
    if (until != 0) {
      for (const std::string& name : request.streams) dropping_[name] = until;
    }
    return until;
  }

  static Outcome Refused(Outcome outcome) {
    if (!outcome.ok()) return outcome;
    return {Reason::kUnavailable,
            "a stream of this request has ended or begun anew, and that cannot be written to the "
            "directory of --state-dir now (is the disk full?): send the request again; if it has "
            "step numbers, its steps count once",
            {}};
  }

  void Run() {
    std::unique_lock<std::mutex> lock(mutex_);
    while (true) {
      const auto has_work = [this] {
        return stopping_ || wanted_ > done_ || (!pending_.empty() && Clock::now() >= retry_at_);
      };
      while (!has_work() && Clock::now() < next_snapshot_) {
        wake_.wait_until(lock,
                         pending_.empty() ? next_snapshot_ : std::min(next_snapshot_, retry_at_));
      }
      if (stopping_) break;
      const uint64_t wanted = wanted_;
      const bool all = wanted > done_ || Clock::now() >= next_snapshot_;
      lock.unlock();
      const Clock::time_point started = Clock::now();
      const bool ok = WriteChanges(all);
      lock.lock();
      last_ok_ = ok;
      if (all) {
        if (ok) last_snapshot_ = started;
        next_snapshot_ = Clock::now() + options_.every;
        done_ = wanted;
      }
      passed_.notify_all();
    }
    std::deque<Held> held;
    held.swap(held_);
    stopped_ = true;
    lock.unlock();
    for (Held& one : held) {
      PassOn({{one.answer.request, Refused(std::move(one.answer.outcome))}});
    }
    lock.lock();
    passed_.notify_all();
  }

  void Stop() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      stopping_ = true;
      wake_.notify_all();
    }
    if (thread_.joinable()) thread_.join();
  }

  // Drops, and with `all` also streams that have changed. Returns whether everything was written.
  bool WriteChanges(bool all) {
    // Those that change meanwhile have their turn next time, or this would never end.
    size_t left = all ? model_->changes() : 0;
    bool ok = true;
    do {
      std::vector<SnapshotFile::Change> changes;
      std::vector<std::string> copied, added;
      size_t bytes = 0;
      uint64_t drops = 0;
      bool taking = false;
      // Errors of the file, and no memory for the copies: the thread must outlive both, as answers
      // wait for it.
      try {
        drops = TakeDrops(&changes);
        while (left > 0 && bytes < kTransactionBytes && (bytes == 0 || !HasDrops())) {
          // Drops and copies are in the order in which they happened, because no stream ends
          // between the copies and the list of drops.
          taking = true;
          model_->TakeChanges(slice_, &copies_, [&] {
            drops = TakeDrops(&changes);
            std::lock_guard<std::mutex> lock(mutex_);
            for (const StreamCopy& copy : copies_) {
              if (copy.state.empty()) continue;  // its end is a drop, or it has no row
              copied.push_back(copy.name);
              if (stored_.insert(copy.name).second) added.push_back(copy.name);
            }
          });
          taking = false;
          left = copies_.empty() ? 0 : left - std::min(left, copies_.size());
          for (const StreamCopy& copy : copies_) {
            if (copy.state.empty()) continue;
            changes.push_back({copy.name, EncodeStreamCopy(copy), false});
            bytes += changes.back().copy.size();
          }
        }
        if (changes.empty()) continue;
        file_.Commit(changes);
        Committed(changes, drops, bytes);
      } catch (const std::exception& error) {
        ok = false;
        if (taking) model_->RecordChanges(true);  // some may be neither marked nor copied
        Failed(std::move(changes), drops, copied, added, error.what());
      }
    } while (ok && (left > 0 || HasDrops()));
    if (ok && all) DeleteEnded();
    return ok;
  }

  void DeleteEnded() {
    try {
      file_.DeleteEnded(std::time(nullptr) - kEndedSeconds, [this](const std::string& name) {
        std::lock_guard<std::mutex> lock(mutex_);
        stored_.erase(name);
      });
    } catch (const std::exception& error) {
      LogFailure(error.what());
    }
  }

  bool HasDrops() const {
    std::lock_guard<std::mutex> lock(mutex_);
    return !pending_.empty();
  }

  // Returns the number of the last drop.
  uint64_t TakeDrops(std::vector<SnapshotFile::Change>* changes) {
    std::lock_guard<std::mutex> lock(mutex_);
    std::move(pending_.begin(), pending_.end(), std::back_inserter(*changes));
    pending_.clear();
    return last_drop_;
  }

  void Committed(const std::vector<SnapshotFile::Change>& changes, uint64_t drops, size_t bytes) {
    std::unique_lock<std::mutex> lock(mutex_);
    if (failing_) {
      failing_ = false;
      Log(LogLevel::kInfo, "snapshots_written_again", {{"model", model_->name()}});
    }
    for (const SnapshotFile::Change& change : changes) {
      ++(change.drops ? counts_.deleted : counts_.written);
    }
    counts_.written_bytes += static_cast<int64_t>(bytes);
    retry_at_ = {};
    PassHeld(&lock, drops, true);
    // Only now: else a later answer could go out before those.
    for (auto at = dropping_.begin(); at != dropping_.end();) {
      at = at->second <= drops ? dropping_.erase(at) : std::next(at);
    }
  }

  void Failed(std::vector<SnapshotFile::Change> changes, uint64_t drops,
              const std::vector<std::string>& copied, const std::vector<std::string>& added,
              const std::string& reason) {
    LogFailure(reason);
    model_->ReturnChanges(copied);
    std::unique_lock<std::mutex> lock(mutex_);
    for (const std::string& name : added) stored_.erase(name);
    changes.erase(std::remove_if(changes.begin(), changes.end(),
                                 [](const auto& change) { return !change.drops; }),
                  changes.end());
    std::move(pending_.begin(), pending_.end(), std::back_inserter(changes));
    pending_ = std::move(changes);
    retry_at_ = Clock::now() + kRetryAfter;
    PassHeld(&lock, drops, false);
  }

  // Passes on the answers that wait for drops up to this one, in order.
  void PassHeld(std::unique_lock<std::mutex>* lock, uint64_t drops, bool written) {
    passing_ = true;
    while (true) {
      std::vector<Answer> answers;
      std::deque<Held> others;
      for (Held& one : held_) {
        if (one.until > drops) {
          others.push_back(std::move(one));
        } else {
          answers.push_back(std::move(one.answer));
          if (!written) answers.back().outcome = Refused(std::move(answers.back().outcome));
        }
      }
      held_ = std::move(others);
      if (answers.empty()) break;
      lock->unlock();
      PassOn(std::move(answers));
      lock->lock();
    }
    passing_ = false;
    passed_.notify_all();
  }

  // One line, and not one for every attempt.
  void LogFailure(const std::string& reason) {
    std::lock_guard<std::mutex> lock(mutex_);
    ++counts_.failures;
    if (failing_) return;
    failing_ = true;
    Log(LogLevel::kError, "snapshot_failed",
        {{"model", model_->name()},
         {"reason", reason},
         {"consequence",
          "steps go on; streams stay marked as changed and are written when that is possible"}});
  }

  ServedModel* const model_;
  const SnapshotOptions options_;
  const int64_t slice_;
  // The thread's.
  SnapshotFile file_;
  std::vector<StreamCopy> copies_;

  std::vector<std::string> lagging_;  // that may have been when they were read back

  mutable std::mutex mutex_;
  std::condition_variable wake_, passed_;
  SnapshotCounts counts_;
  std::unordered_set<std::string> stored_;              // names with a row
  std::vector<SnapshotFile::Change> pending_;           // drops
  std::unordered_map<std::string, uint64_t> dropping_;  // names with a drop that is not committed
  uint64_t last_drop_ = 0;
  std::deque<Held> held_;
  bool passing_ = false, failing_ = false, last_ok_ = true;
  bool stopping_ = false, stopped_ = false;
  bool other_weights_ = false;      // were loaded, and no Flush has written all streams since
  uint64_t wanted_ = 0, done_ = 0;  // calls of Write
  Clock::time_point next_snapshot_, retry_at_ = {}, last_snapshot_ = Clock::now();
  std::thread thread_;
};

Snapshots::Snapshots(const SnapshotOptions& options) : options_(options) {
  std::error_code error;
  std::filesystem::create_directories(options_.directory, error);
  if (error) {
    throw Error(ErrorCode::kIo, "cannot make the directory " + options_.directory +
                                    " of --state-dir: " + error.message());
  }
  const std::string path = options_.directory + "/lock";
  lock_ = open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600);
  if (lock_ < 0) {
    throw Error(ErrorCode::kIo, "cannot open " + path + ": " + std::strerror(errno) +
                                    ". The server needs a directory that it may write to, or no "
                                    "--state-dir");
  }
  if (flock(lock_, LOCK_EX | LOCK_NB) != 0) {
    const int reason = errno;
    close(lock_);
    if (reason != EWOULDBLOCK) {
      throw Error(ErrorCode::kIo, "cannot lock " + path + ": " + std::strerror(reason));
    }
    throw Error(ErrorCode::kIo, "another server uses the directory " + options_.directory +
                                    ": end it, or give this one another --state-dir");
  }
}

Snapshots::~Snapshots() {
  for (const auto& [model, keeper] : keepers_) model->RemoveKeepers();
  keepers_.clear();
  close(lock_);
}

void Snapshots::Loaded(ServedModel* model) {
  auto keeper = std::make_unique<Keeper>(model, options_);
  std::lock_guard<std::mutex> lock(mutex_);
  keepers_[model] = std::move(keeper);
}

std::unique_ptr<Snapshots::Keeper> Snapshots::Take(ServedModel* model) {
  std::lock_guard<std::mutex> lock(mutex_);
  const auto found = keepers_.find(model);
  if (found == keepers_.end()) return nullptr;
  std::unique_ptr<Keeper> keeper = std::move(found->second);
  keepers_.erase(found);
  return keeper;
}

void Snapshots::Unloaded(ServedModel* model) {
  const std::unique_ptr<Keeper> keeper = Take(model);
  if (keeper != nullptr) keeper->Forget();
}

void Snapshots::LoadingFailed(ServedModel* model) {
  const std::unique_ptr<Keeper> keeper = Take(model);
  if (keeper != nullptr) keeper->Finish();
}

bool Snapshots::Write() {
  std::lock_guard<std::mutex> lock(mutex_);
  bool ok = true;
  for (const auto& [model, keeper] : keepers_) ok = keeper->Write() && ok;
  return ok;
}

void Snapshots::Finish() {
  std::lock_guard<std::mutex> lock(mutex_);
  for (const auto& [model, keeper] : keepers_) keeper->Finish();
}

std::map<std::string, SnapshotCounts> Snapshots::counts() const {
  std::lock_guard<std::mutex> lock(mutex_);
  std::map<std::string, SnapshotCounts> counts;
  for (const auto& [model, keeper] : keepers_) counts[model->name()] = keeper->counts();
  return counts;
}

}  // namespace continual_transformers::server
