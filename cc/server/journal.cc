#include "cc/server/journal.h"

#include <pthread.h>
#include <signal.h>

#include <algorithm>
#include <array>
#include <condition_variable>
#include <deque>
#include <exception>
#include <future>
#include <optional>
#include <random>
#include <set>
#include <thread>
#include <utility>

#include "cc/server/journal_entry.h"
#include "cc/server/log.h"
#include "cc/server/replay.h"
#include "cc/server/served_model.h"
#include "cc/server/shard_history.h"
#include "cc/server/shard_log.h"
#include "cc/server/shard_table.h"
#include "cc/server/shards.h"
#include "cc/server/stream_copy.h"
#include "cc/server/stream_keeper.h"
#include "cc/session/error.h"
#include "cc/session/fingerprint.h"

namespace continual_transformers::server {
namespace {

using std::chrono::milliseconds;

// How long answers wait for a Redis that is away.
constexpr milliseconds kPatience{1000};
constexpr milliseconds kReconnectEvery{100};
// The most bytes that are sent before the replies to them are read.
constexpr size_t kMostInFlight = 8 << 20;
// With more than this on its way, for example to a Redis that hangs, steps are refused.
constexpr size_t kMostWaiting = 128 << 20;
// A shard is trimmed when it has so many new entries; so many stay in any case, for the last
// answers of streams that have ended.
constexpr int64_t kTrimEvery = 256;
constexpr int64_t kSpareEntries = 64;
// A stream is copied to the end of its shard when this many bytes, and as many as copies of all
// streams of the shard have, came after the oldest entry that it needs. So at most half of what is
// written is copies.
constexpr int64_t kBehindBytes = 256 << 10;
// No batch is run while streams are copied.
constexpr int64_t kSliceBytes = 1 << 20;
constexpr int64_t kSliceStreams = 64;
// Entries that are read at once.
constexpr const char* kReadAtOnce = "256";

uint64_t RandomNumber() {
  std::random_device device;
  return static_cast<uint64_t>(device()) << 32 | device();
}

}  // namespace

// Writes the journal of one model, on a thread of its own, which alone talks to Redis.
class Journal::Keeper final : public StreamKeeper {
 public:
  using Epochs = std::array<std::atomic<int64_t>, kShards>;

  Keeper(ServedModel* model, const JournalOptions& options, RedisAddress address, Epochs* epochs,
         const std::atomic<uint64_t>* server)
      : model_(model),
        options_(options),
        address_(std::move(address)),
        epochs_(epochs),
        server_(server),
        writer_(RandomNumber()),
        receptive_field_(ReceptiveField(model->plan())) {
    for (const Port& port : model->plan().inputs) {
      const Value& value = model->plan().values[port.value];
      input_bytes_.push_back(value.size * SizeOf(value.dtype));
    }
    logs_.assign(kShards, ShardLog(receptive_field_));
    for (int shard = 0; shard < kShards; ++shard) {
      keys_.push_back("ct:" + model->name() + ":" + std::to_string(shard));
    }
    thread_ = std::thread([this] { Run(); });
    try {
      std::vector<int> all;
      for (int shard = 0; shard < kShards && options_.rebuild; ++shard) all.push_back(shard);
      Do(all, Job::Kind::kTakeOver);
      model_->AddKeeper(this);
      // A stream that a snapshot brought back, and the journal does not know.
      const std::vector<std::string> open = model_->OpenNames();
      if (open.size() > static_cast<size_t>(counts().rebuilt)) CopyAll();
    } catch (...) {
      Stop();
      throw;
    }
  }

  ~Keeper() override { Stop(); }

  // Something to do with shards on the journal's thread.
  struct Result {
    Rebuilt rebuilt;
    ErrorCode code = ErrorCode::kIo;
    std::string error;  // empty: none
  };
  struct Job {
    enum class Kind { kTakeOver, kGiveUp };
    std::vector<int> shards;
    Kind kind;
    std::promise<Result> promise;
  };

  Rebuilt Do(const std::vector<int>& shards, Job::Kind kind) {
    Job job = {shards, kind, {}};
    std::future<Result> future = job.promise.get_future();
    {
      std::lock_guard<std::mutex> lock(mutex_);
      if (stopped_) throw Error(ErrorCode::kIo, "the journal has ended");
      jobs_.push_back(std::move(job));
      wake_.notify_all();
    }
    const Result result = future.get();
    if (!result.error.empty()) throw Error(result.code, result.error);
    return result.rebuilt;
  }

  Outcome Ready() override {
    std::lock_guard<std::mutex> lock(mutex_);
    if (waiting_bytes_ > kMostWaiting) {
      return {Reason::kQueueFull,
              "the journal at " + address_.text() + " is behind by " +
                  std::to_string(waiting_bytes_ >> 20) +
                  " MiB: no stream has moved, try again later",
              {}};
    }
    if (!down_ && !stopping_) return {};
    return {Reason::kUnavailable,
            "the journal at " + address_.text() + " cannot be reached (" + why_down_ +
                "), and steps that are not in it could be lost: no stream has moved, try again "
                "later",
            {}};
  }

  void Stepped(const std::vector<Row>& rows) override {
    if (rows.empty()) return;
    for (const Row& row : rows) {
      uint32_t flags = 0;
      if (row.began) flags |= JournalRow::kBegan;
      if (row.ended) flags |= JournalRow::kEnded;
      if (!row.request->first_steps.empty()) flags |= JournalRow::kNumbered;
      int64_t bytes = 0;
      for (const int64_t input : input_bytes_) bytes += row.steps * input;
      const std::string& name = *row.stream->name;
      const int64_t first = row.stream->next - row.steps;
      JournalEntryWriter* const writer = Add(name, flags, first, row.steps, bytes);
      for (size_t i = 0; i < input_bytes_.size() && row.steps > 0; ++i) {
        const int64_t input = row.steps * input_bytes_[i];
        writer->Append(static_cast<const char*>(row.request->inputs[i]) + row.index * input, input);
      }
    }
    Enqueue();
  }

  void Ended(const std::string& stream, End end) override {
    if (end == End::kMoved) {
      // Its new server goes on with the journal.
      return Forget(stream);
    }
    Add(stream, JournalRow::kEnded | JournalRow::kByServer, 0, 0, 0);
    Enqueue();
  }

  void PutIn(const StreamCopy& copy, int64_t next) override {
    AddCopy(copy, next);
    Enqueue();
  }

  void WeightsLoaded() override { CopyAll(); }

  void Hold(std::vector<Answer> answers) override {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      // While Redis is away, Ready has refused all of them, and nothing has to come before that.
      const bool refused =
          down_ && std::none_of(answers.begin(), answers.end(),
                                [](const Answer& answer) { return answer.outcome.ok(); });
      const bool waits = !refused && (copying_ || acknowledged_ < last_);
      if (!held_.empty() || passing_ || waits) {
        if (!stopped_) {
          held_.push_back({last_, std::move(answers)});
          wake_.notify_all();
          return;
        }
        Refuse(&answers);
      }
      // Redis may have replied already.
      if (fenced_.any()) RefuseFenced(&answers);
    }
    PassOn(std::move(answers));
  }

  void Flush() override {
    std::unique_lock<std::mutex> lock(mutex_);
    passed_.wait(lock, [this] {
      const bool safe = acknowledged_ >= last_ && !copying_;
      return held_.empty() && !passing_ && (safe || down_ || stopped_);
    });
  }

  void Stop() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      stopping_ = true;
      wake_.notify_all();
    }
    if (thread_.joinable()) thread_.join();
  }

  JournalCounts counts() const {
    std::lock_guard<std::mutex> lock(mutex_);
    JournalCounts counts = counts_;
    counts.connected = !down_;
    counts.held = static_cast<int64_t>(held_.size());
    return counts;
  }

 private:
  // An entry on its way. Rows are without data: what ShardLog wants.
  struct Entry {
    int shard;
    std::string id;  // for Redis to complete: "epoch-*"
    std::string bytes;
    std::vector<JournalRow> rows;
    std::string forgotten;  // if this is no entry, but a stream that is not kept here any more
  };
  // The entry of a shard that is being written.
  struct Building {
    std::optional<JournalEntryWriter> writer;
    std::vector<JournalRow> rows;
    uint64_t number = 0;
    int64_t epoch = 0;
  };
  struct Held {
    uint64_t until;  // the number of an entry
    std::vector<Answer> answers;
  };
  // --- Where the model's queue runs: entries are collected, and put in the queue together.

  JournalEntryWriter* Add(const std::string& name, uint32_t flags, int64_t first, int64_t steps,
                          size_t bytes) {
    const int shard = ShardOf(name);
    Building* const building = &building_[shard];
    if (!building->writer.has_value()) {
      building->epoch = (*epochs_)[shard];
      building->writer.emplace(Header(++building->number));
      touched_.push_back(shard);
    }
    building->rows.push_back({flags, name, first, steps, {}});
    building->writer->AddRow(flags, name, first, steps, bytes);
    return &*building->writer;
  }

  void AddCopy(const StreamCopy& copy, int64_t next) {
    const std::string bytes = EncodeStreamCopy(copy);
    uint32_t flags = JournalRow::kCopy;
    if (HasOffsets(model_->session(), copy.state)) flags |= JournalRow::kHasOffsets;
    Add(copy.name, flags, next, 0, bytes.size())->Append(bytes.data(), bytes.size());
  }

  // Keeps the stream's entries no longer. It may have some in the queue, so this goes there, too.
  void Forget(const std::string& stream) {
    std::lock_guard<std::mutex> lock(mutex_);
    ++last_;
    queue_.push_back({ShardOf(stream), "", "", {}, stream});
    wake_.notify_all();
  }

  void Enqueue() {
    std::vector<Entry> entries;
    entries.reserve(touched_.size());
    for (const int shard : touched_) {
      Building* const building = &building_[shard];
      if (!building->writer.has_value()) continue;
      entries.push_back({shard, IdOf(building->epoch), building->writer->Finish(),
                         std::move(building->rows), ""});
      building->writer.reset();
      building->rows.clear();
    }
    touched_.clear();
    std::lock_guard<std::mutex> lock(mutex_);
    last_ += entries.size();
    for (const Entry& entry : entries) waiting_bytes_ += entry.bytes.size();
    std::move(entries.begin(), entries.end(), std::back_inserter(queue_));
    wake_.notify_all();
  }

  // --- Any thread.

  static std::string IdOf(int64_t epoch) { return std::to_string(epoch) + "-*"; }

  JournalHeader Header(uint64_t number) const {
    const Session& session = model_->session();
    return {session.plan_fingerprint(), session.weights_fingerprint(), *server_, writer_, number};
  }

  // Refuses answers with steps of shards that another server has taken over.
  void RefuseFenced(std::vector<Answer>* answers) const {
    for (Answer& answer : *answers) {
      const std::vector<std::string>& streams = answer.request->streams;
      const bool fenced =
          std::any_of(streams.begin(), streams.end(),
                      [this](const std::string& name) { return fenced_[ShardOf(name)]; });
      if (!answer.outcome.ok() || !fenced) continue;
      answer.outcome = {Reason::kUnavailable,
                        "another server has taken over a shard of this request meanwhile: the "
                        "steps of this request may have been taken. Send it again; if it has step "
                        "numbers, its steps count once",
                        {}};
    }
  }

  void Refuse(std::vector<Answer>* answers) const {
    for (Answer& answer : *answers) {
      if (!answer.outcome.ok()) continue;
      answer.outcome = {Reason::kUnavailable,
                        "the journal at " + address_.text() + " cannot be reached (" + why_down_ +
                            "): the steps of this request were taken, but could be lost. Send it "
                            "again; if it has step numbers, its steps count once",
                        {}};
    }
  }

  // Answers wait until all open streams have a copy in the journal.
  void CopyAll() {
    std::lock_guard<std::mutex> lock(mutex_);
    copying_ = true;
    copy_again_ = true;
    wake_.notify_all();
  }

  // --- The journal's thread.

  void Run() {
    // A write to a Redis that has gone would end the process.
    sigset_t pipe;
    sigemptyset(&pipe);
    sigaddset(&pipe, SIGPIPE);
    pthread_sigmask(SIG_BLOCK, &pipe, nullptr);
    std::unique_lock<std::mutex> lock(mutex_);
    while (true) {
      if (down_) {
        wake_.wait_for(lock, kReconnectEvery, [this] { return stopping_ || !jobs_.empty(); });
      } else {
        wake_.wait(lock, [this] {
          return stopping_ || !queue_.empty() || !jobs_.empty() || copy_again_ || CanPass();
        });
      }
      if (stopping_ && (down_ || queue_.empty())) break;
      std::vector<Job> jobs;
      jobs.swap(jobs_);
      lock.unlock();
      const Clock::time_point started = Clock::now();
      try {
        Work(&jobs);
        lock.lock();
        PassHeld(&lock, false);
      } catch (const std::exception& error) {
        // Redis is away, or there is no memory.
        redis_.reset();
        for (Job& job : jobs) job.promise.set_value({{}, ErrorCode::kIo, error.what()});
        lock.lock();
        Down(&lock, started, error.what());
      }
    }
    stopped_ = true;
    for (Job& job : jobs_) job.promise.set_value({{}, ErrorCode::kIo, "the journal has ended"});
    jobs_.clear();
    PassHeld(&lock, true);
  }

  // Does all that there is to do. Throws if Redis is away. Jobs that are done leave the list.
  void Work(std::vector<Job>* jobs) {
    if (redis_ == nullptr) Connect();
    bool copies;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      copies = copy_again_;
      copy_again_ = false;
    }
    try {
      Send();
      if (copies) CopyStreams(model_->OpenNames());
      while (!jobs->empty()) {
        Result result;
        try {
          const Job& job = jobs->back();
          if (job.kind == Job::Kind::kTakeOver) {
            result.rebuilt = Read(job.shards);
          } else {
            for (const int shard : job.shards) logs_[shard] = ShardLog(receptive_field_);
          }
        } catch (const Error& error) {
          if (error.code() == ErrorCode::kIo) throw;
          result = {{}, error.code(), error.what()};
        } catch (const std::exception& error) {
          result = {{}, ErrorCode::kInternal, error.what()};
        }
        jobs->back().promise.set_value(std::move(result));
        jobs->pop_back();
      }
      loaded_ = true;
      Trim();
    } catch (...) {
      std::lock_guard<std::mutex> lock(mutex_);
      copy_again_ = copy_again_ || copies;
      throw;
    }
    std::lock_guard<std::mutex> lock(mutex_);
    copying_ = copy_again_;
    if (down_) {
      down_ = false;
      Log(LogLevel::kInfo, "journal_reached_again",
          {{"model", model_->name()}, {"journal", address_.text()}});
    }
  }

  void Connect() {
    redis_ = std::make_unique<RedisConnection>(address_);
    const std::string run_id = redis_->RunId();
    std::lock_guard<std::mutex> lock(mutex_);
    // Redis may have these already: readers know them by their numbers.
    queue_.insert(queue_.begin(), std::make_move_iterator(sent_.begin()),
                  std::make_move_iterator(sent_.end()));
    sent_.clear();
    if (!run_id_.empty() && run_id != run_id_) {
      // It may have lost what it had.
      logs_.assign(kShards, ShardLog(receptive_field_));
      copying_ = copy_again_ = true;
    }
    run_id_ = run_id;
  }

  void Down(std::unique_lock<std::mutex>* lock, Clock::time_point since, const std::string& why) {
    why_down_ = why;
    if (!down_) {
      down_ = true;
      down_since_ = since;
      ++counts_.failures;
      Log(LogLevel::kError, "journal_away",
          {{"model", model_->name()},
           {"reason", why},
           {"consequence", "steps are refused until it is back"}});
    }
    passed_.notify_all();
    if (Clock::now() - down_since_ >= kPatience) PassHeld(lock, true);
  }

  // Sends the queue until it is empty.
  void Send() {
    while (true) {
      {
        std::lock_guard<std::mutex> lock(mutex_);
        size_t bytes = 0;
        while (!queue_.empty() && bytes < kMostInFlight) {
          bytes += queue_.front().bytes.size();
          sent_.push_back(std::move(queue_.front()));
          queue_.pop_front();
        }
      }
      if (sent_.empty()) return;
      for (const Entry& entry : sent_) {
        if (!entry.forgotten.empty()) continue;
        redis_->Append({"XADD", keys_[entry.shard], entry.id, "e", entry.bytes});
      }
      std::set<int> lost;
      while (!sent_.empty()) {
        const Entry& entry = sent_.front();
        if (!entry.forgotten.empty()) {
          logs_[entry.shard].Forget(entry.forgotten);
          std::lock_guard<std::mutex> lock(mutex_);
          sent_.pop_front();
          ++acknowledged_;
          continue;
        }
        const RedisReply reply = redis_->ReadAny();
        const auto bytes = static_cast<int64_t>(entry.bytes.size());
        const bool fenced = IsFenced(*reply);
        if (fenced) {
          lost.insert(entry.shard);
        } else {
          redis_->Check(*reply);
          logs_[entry.shard].Append(ShardLog::Id::Of(reply->str), bytes, entry.rows);
        }
        std::lock_guard<std::mutex> lock(mutex_);
        if (fenced) fenced_.set(entry.shard);
        sent_.pop_front();
        ++acknowledged_;
        waiting_bytes_ -= static_cast<size_t>(bytes);
        if (fenced) continue;
        ++counts_.entries;
        ++counts_.kept;
        counts_.bytes += bytes;
      }
      for (const int shard : lost) Lose(shard);
      std::unique_lock<std::mutex> lock(mutex_);
      PassHeld(&lock, false);
    }
  }

  // Whether Redis has an entry of a newer epoch.
  static bool IsFenced(const redisReply& reply) {
    return reply.type == REDIS_REPLY_ERROR &&
           std::string_view(reply.str, reply.len).find("equal or smaller") !=
               std::string_view::npos;
  }

  // Another server has taken the shard over. It also trims it from now on.
  void Lose(int shard) {
    logs_[shard] = ShardLog(receptive_field_);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      ++counts_.fenced;
    }
    Log(LogLevel::kWarning, "shard_taken_over",
        {{"model", model_->name()},
         {"shard", shard},
         {"consequence", "its streams are another server's, and steps of them are refused"}});
    model_->LoseShard(shard);
  }

  void CopyStreams(const std::vector<std::string>& names) {
    const auto slice = static_cast<size_t>(
        std::clamp<int64_t>(kSliceBytes / model_->session().state_bytes(), 1, kSliceStreams));
    for (size_t begin = 0; begin < names.size(); begin += slice) {
      const auto end = std::min(names.size(), begin + slice);
      model_->CopyOpen(
          {names.begin() + begin, names.begin() + end},
          [this](const StreamCopy& copy, int64_t next) {
            AddCopy(copy, next);
            Enqueue();
          },
          // It has ended, or could not be put in when its shard was read.
          [this](const std::string& name) { Forget(name); });
      Send();
    }
    std::lock_guard<std::mutex> lock(mutex_);
    counts_.copies += static_cast<int64_t>(names.size());
  }

  void Trim() {
    std::vector<std::string> behind;
    int64_t trimmed = 0;
    int commands = 0;
    for (int shard = 0; shard < kShards; ++shard) {
      ShardLog* const log = &logs_[shard];
      if (log->appended() < kTrimEvery) continue;
      const int64_t copies = static_cast<int64_t>(log->streams()) * model_->session().state_bytes();
      for (std::string& stream : log->Behind(std::max(kBehindBytes, copies))) {
        behind.push_back(std::move(stream));
      }
      ShardLog::Id oldest;
      const int64_t entries = log->Trim(kSpareEntries, &oldest);
      if (entries == 0) continue;
      trimmed += entries;
      ++commands;
      redis_->Append({"XTRIM", keys_[shard], "MINID", oldest.text()});
    }
    for (; commands > 0; --commands) redis_->Read();
    {
      std::lock_guard<std::mutex> lock(mutex_);
      counts_.trimmed += trimmed;
      counts_.kept -= trimmed;
    }
    if (!behind.empty()) CopyStreams(behind);
  }

  bool CanPass() const {
    return !held_.empty() && !copying_ && held_.front().until <= acknowledged_;
  }

  void PassHeld(std::unique_lock<std::mutex>* lock, bool refuse) {
    passing_ = true;
    while (refuse ? !held_.empty() : CanPass()) {
      std::vector<Answer> answers = std::move(held_.front().answers);
      held_.pop_front();
      if (refuse) Refuse(&answers);
      if (fenced_.any()) RefuseFenced(&answers);
      lock->unlock();
      PassOn(std::move(answers));
      lock->lock();
    }
    passing_ = false;
    passed_.notify_all();
  }

  // --- Reading.

  Rebuilt Read(const std::vector<int>& shards) {
    Rebuilt rebuilt;
    brought_back_.clear();
    if (!loaded_) {
      size_t all = 0;
      for (StreamFacts& stream : model_->ListStreams(SIZE_MAX, false, &all)) {
        brought_back_[std::move(stream.name)] = stream.next_step;
      }
    }
    // Without a table of shards, each start is an epoch of its own. So what the last process has
    // sent, and Redis reads only now, is not taken for steps of this one.
    if (!loaded_ && options_.rebuild) {
      const int64_t next = std::max(epochs_->front().load(), NewestEpoch() + 1);
      for (std::atomic<int64_t>& epoch : *epochs_) epoch = next;
    }
    for (const int shard : shards) ReadShard(shard, &rebuilt);
    std::lock_guard<std::mutex> lock(mutex_);
    counts_.rebuilt += rebuilt.streams;
    counts_.lost += rebuilt.lost;
    counts_.kept = 0;
    for (const ShardLog& log : logs_) counts_.kept += log.entries();
    return rebuilt;
  }

  // Returns the highest epoch that an entry of any shard has; -1 if there are no entries.
  int64_t NewestEpoch() {
    for (const std::string& key : keys_) {
      redis_->Append({"XREVRANGE", key, "+", "-", "COUNT", "1"});
    }
    int64_t newest = -1;
    for (size_t i = 0; i < keys_.size(); ++i) {
      const RedisReply reply = redis_->Read();
      if (reply->elements == 0) continue;
      const ShardLog::Id id = ShardLog::Id::Of(reply->element[0]->element[0]->str);
      newest = std::max(newest, static_cast<int64_t>(id.epoch));
    }
    return newest;
  }

  // Appends an entry without rows. From then on, the shard's last server can append nothing. Throws
  // if it is another server's.
  void Fence(int shard) {
    const int64_t epoch = (*epochs_)[shard];
    JournalEntryWriter mark(Header(0));
    redis_->Append({"XADD", keys_[shard], IdOf(epoch), "e", mark.Finish()});
    const RedisReply reply = redis_->ReadAny();
    if (IsFenced(*reply)) {
      throw Error(ErrorCode::kInvalidArgument,
                  "shard " + std::to_string(shard) + " has been taken over in a newer epoch than " +
                      std::to_string(epoch) +
                      ", in which this server got it: it needs the newer table of shards");
    }
    redis_->Check(*reply);
    CheckFirst(shard, epoch, reply->str);
    std::lock_guard<std::mutex> lock(mutex_);
    if (!fenced_[shard]) return;
    // Answers may be held whose entries Redis has not taken.
    for (Held& held : held_) RefuseFenced(&held.answers);
    fenced_.reset(shard);
  }

  // Throws if the first entry of this epoch is another server's, and takes this server's mark out
  // again. So all entries of an epoch are of one server, whichever of them are trimmed.
  void CheckFirst(int shard, int64_t epoch, const std::string& mark) {
    const std::string of_epoch = std::to_string(epoch);
    const RedisReply reply =
        redis_->Call({"XRANGE", keys_[shard], of_epoch, of_epoch, "COUNT", "1"});
    if (reply->elements == 0) return;
    const redisReply* const value = reply->element[0]->element[1]->element[1];
    std::vector<JournalRow> rows;
    if (ReadJournalEntry({value->str, value->len}, &rows).server == *server_) return;
    redis_->Call({"XDEL", keys_[shard], mark});
    throw Error(ErrorCode::kInvalidArgument,
                "shard " + std::to_string(shard) +
                    " has been taken over by another server in the same epoch, " + of_epoch +
                    ": there are two tables of shards of that epoch, and a newer one is needed");
  }

  void ReadShard(int number, Rebuilt* rebuilt) {
    const std::string& key = keys_[number];
    Fence(number);
    ShardLog log(receptive_field_);
    ShardHistory history(model_->name(), model_->session().plan_fingerprint(), receptive_field_);
    std::string from = "-";
    while (true) {
      const RedisReply reply = redis_->Call({"XRANGE", key, from, "+", "COUNT", kReadAtOnce});
      for (size_t i = 0; i < reply->elements; ++i) {
        const redisReply* const entry = reply->element[i];
        if (entry->elements != 2 || entry->element[1]->elements < 2) continue;
        const redisReply* const value = entry->element[1]->element[1];
        const std::string_view bytes(value->str, value->len);
        log.Append(ShardLog::Id::Of(entry->element[0]->str), static_cast<int64_t>(bytes.size()),
                   history.Add(bytes));
        from = "(" + std::string(entry->element[0]->str, entry->element[0]->len);
      }
      if (std::to_string(reply->elements) != kReadAtOnce) break;
    }
    // A snapshot has brought these back.
    for (const std::string& name : history.ended()) {
      if (brought_back_.count(name) != 0) CloseIfOpen(name);
    }
    for (auto& [name, known] : history.streams()) PutBack(&known, rebuilt);
    logs_[number] = std::move(log);
  }

  // Only while the model is loaded: this keeper is not one of the model's yet, and CloseStream,
  // which waits for all keepers, would wait for this thread.
  void CloseIfOpen(const std::string& name) {
    try {
      model_->CloseStream(name, End::kClosed);
    } catch (const Refusal&) {
      // It was idle for too long, and has ended meanwhile.
    }
  }

  // Puts a stream in, or the last answer of one that has ended, as its client may not have got it.
  void PutBack(ShardHistory::Known* known, Rebuilt* rebuilt) {
    const StreamHistory& history = known->history;
    const int64_t next = history.steps.empty()
                             ? history.state_position
                             : history.steps.back().first + history.steps.back().count;
    try {
      StreamCopy copy =
          RebuildStream(model_->mutable_session(), receptive_field_, options_.other_weights, known);
      if (known->ended) {
        copy.state.clear();
        if (copy.last_steps != 0) model_->Restore(copy, options_.other_weights);
        return;
      }
      // A snapshot that knows later steps was written by a server without this journal, or it is of
      // an older stream of that name. Nobody can tell.
      const auto brought_back = brought_back_.find(history.name);
      copy.may_lag = brought_back != brought_back_.end() && next < brought_back->second;
      model_->CopyInFrom(this, copy, options_.other_weights);
      ++rebuilt->streams;
    } catch (const std::exception& error) {
      if (known->ended) return;
      Log(LogLevel::kWarning, "journal_stream_lost",
          {{"model", model_->name()}, {"stream", history.name}, {"reason", error.what()}});
      ++rebuilt->lost;
    }
  }

  ServedModel* const model_;
  const JournalOptions options_;
  const RedisAddress address_;
  // Shared by the keepers of all models.
  Epochs* const epochs_;
  const std::atomic<uint64_t>* const server_;
  const uint64_t writer_;
  const int64_t receptive_field_;
  std::vector<int64_t> input_bytes_;
  std::vector<std::string> keys_;  // in Redis, by shard

  // Where the model's queue runs.
  std::array<Building, kShards> building_;
  std::vector<int> touched_;

  // The thread's.
  std::unique_ptr<RedisConnection> redis_;
  std::string run_id_;
  bool loaded_ = false;  // the shards of the beginning are read
  // Streams that were open before they are read, and their next steps.
  std::map<std::string, int64_t> brought_back_;
  std::deque<Entry> sent_;  // and not acknowledged
  std::vector<ShardLog> logs_;
  Clock::time_point down_since_;

  mutable std::mutex mutex_;
  std::condition_variable wake_, passed_;
  JournalCounts counts_;
  std::deque<Entry> queue_;
  uint64_t last_ = 0, acknowledged_ = 0;  // entries
  size_t waiting_bytes_ = 0;              // of those that are not acknowledged
  std::deque<Held> held_;
  std::vector<Job> jobs_;
  ShardSet fenced_;  // shards that another server has taken over
  bool down_ = false, passing_ = false, stopping_ = false, stopped_ = false;
  // All streams are to be copied: no answer goes out before; and it has not begun.
  bool copying_ = false, copy_again_ = false;
  std::string why_down_ = "it was not tried yet";
  std::thread thread_;
};

Journal::Journal(const JournalOptions& options)
    : options_(options), address_(RedisAddress::Parse(options.url)), server_(RandomNumber()) {}

Journal::~Journal() {
  for (const auto& [model, keeper] : keepers_) model->RemoveKeepers();
}

void Journal::Loaded(ServedModel* model) {
  if (model->plan().GoesOn()) {
    throw Error(ErrorCode::kInvalidArgument,
                "the model " + model->name() +
                    " has a recurrent layer, whose state depends on all steps of a stream, so the "
                    "journal could not rebuild a stream from its newest steps: serve it without "
                    "--journal, with snapshots, or convert it with recurrence=\"window\"");
  }
  auto keeper = std::make_shared<Keeper>(model, options_, address_, &epochs_, &server_);
  Log(LogLevel::kInfo, "journal_read",
      {{"model", model->name()},
       {"streams", keeper->counts().rebuilt},
       {"lost", keeper->counts().lost}});
  std::lock_guard<std::mutex> lock(mutex_);
  keepers_[model] = std::move(keeper);
}

void Journal::Unloaded(ServedModel* model) {
  std::shared_ptr<Keeper> keeper;
  std::lock_guard<std::mutex> lock(mutex_);
  const auto found = keepers_.find(model);
  if (found == keepers_.end()) return;
  keeper = std::move(found->second);
  keepers_.erase(found);
}

std::vector<std::shared_ptr<Journal::Keeper>> Journal::KeepersOf(const ServedModel* only) const {
  std::lock_guard<std::mutex> lock(mutex_);
  std::vector<std::shared_ptr<Keeper>> keepers;
  for (const auto& [model, keeper] : keepers_) {
    if (only == nullptr || only == model) keepers.push_back(keeper);
  }
  return keepers;
}

void Journal::SetEpochs(const std::array<int64_t, kShards>& epochs, const std::string& server) {
  server_ = Xxh64(server.data(), server.size());
  for (int shard = 0; shard < kShards; ++shard) epochs_[shard] = epochs[shard];
}

Journal::Rebuilt Journal::TakeOver(const std::vector<int>& shards, const ServedModel* only) {
  Rebuilt rebuilt;
  for (const auto& keeper : KeepersOf(only)) {
    const Rebuilt of_model = keeper->Do(shards, Keeper::Job::Kind::kTakeOver);
    rebuilt.streams += of_model.streams;
    rebuilt.lost += of_model.lost;
  }
  return rebuilt;
}

void Journal::GiveUp(const std::vector<int>& shards) {
  for (const auto& keeper : KeepersOf(nullptr)) keeper->Do(shards, Keeper::Job::Kind::kGiveUp);
}

void Journal::Finish() {
  std::lock_guard<std::mutex> lock(mutex_);
  for (const auto& [model, keeper] : keepers_) {
    keeper->Flush();
    keeper->Stop();
  }
}

std::map<std::string, JournalCounts> Journal::counts() const {
  std::lock_guard<std::mutex> lock(mutex_);
  std::map<std::string, JournalCounts> counts;
  for (const auto& [model, keeper] : keepers_) counts[model->name()] = keeper->counts();
  return counts;
}

}  // namespace continual_transformers::server
