// A model that is served: its session, its streams by name, and its queue.

#ifndef CONTINUAL_TRANSFORMERS_SERVER_SERVED_MODEL_H_
#define CONTINUAL_TRANSFORMERS_SERVER_SERVED_MODEL_H_

#include <array>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "cc/server/batch_queue.h"
#include "cc/server/shard_table.h"
#include "cc/server/statistics.h"
#include "cc/server/step_request.h"
#include "cc/server/stream_keeper.h"
#include "cc/server/stream_table.h"
#include "cc/session/session.h"

namespace continual_transformers::server {

struct ModelOptions {
  int64_t threads = 1;                        // that compute a batch
  std::string device = "cpu";                 // or "cuda:0" and so on
  int64_t max_streams = 0;                    // the most open at once; 0: no limit
  bool strict_start = false;                  // a stream begins with sequence_start only
  std::chrono::milliseconds idle_timeout{0};  // 0: streams may be idle for ever
  int64_t remembered_ends = 100000;
  BatchQueue::Limits queue;
};

// One stream, for the operator's list.
struct StreamFacts {
  std::string name;
  int64_t next_step;
  double age_seconds, idle_seconds;
};

// A stream as a whole: what a copy or a snapshot holds.
struct StreamCopy {
  std::string name;
  std::string state;  // Session::GetState; empty: the stream has ended
  int64_t last_first = 0, last_steps = 0;
  uint64_t last_inputs = 0;
  std::string answer;
  bool may_lag = false;  // see Stream
};

// Sees the steps of one stream (ServedModel::Watch).
class StreamWatcher {
 public:
  virtual ~StreamWatcher() = default;
  // Called in a batch, so it must be quick. `outputs` has one pointer per plan output, to the last
  // step's; null if the request did not want it.
  virtual void Stepped(int64_t next_step, const std::vector<const char*>& outputs) noexcept = 0;
};

// Any thread may call any method.
class ServedModel {
 public:
  // Loads a model file. Throws Error, or Refusal if the model has an input whose name the server
  // needs for itself.
  ServedModel(std::string name, std::string path, const ModelOptions& options);
  ~ServedModel();
  ServedModel(const ServedModel&) = delete;
  ServedModel& operator=(const ServedModel&) = delete;

  const std::string& name() const { return name_; }
  const std::string& path() const { return path_; }
  const ModelOptions& options() const { return options_; }
  const Plan& plan() const { return session_.plan(); }
  const Session& session() const { return session_; }

  // Takes the steps of a request, now or when its turn comes, and calls its Done. May run batches
  // of other requests on this thread. A request without steps begins or ends its streams in its
  // turn; the end of a stream that is not open is no error, as a client may send it again.
  void Submit(StepRequest* request);
  // Counts a request that was refused before it could be submitted.
  void CountRefusal(Reason reason) { ++refused_[static_cast<int>(reason)]; }

  // Reads the model file anew. Streams go on with the new weights. Throws Error if the file cannot
  // be read, or has another architecture; then nothing has changed.
  void LoadWeights();
  // Ends the streams that were idle for too long.
  void EvictIdle();
  // Refuses later requests, and waits until those that wait have their answers.
  void Close(const Outcome& outcome);
  // Ends all open streams.
  void EndStreams(End end);

  Statistics statistics();
  int64_t waiting() const { return queue_.waiting(); }  // requests
  // Open streams in no order, with how many there are. `foreign`: only those of shards that are not
  // this server's.
  std::vector<StreamFacts> ListStreams(size_t most, bool foreign, size_t* all);
  // Ends a stream. Throws Refusal: kNotFound, or kUnavailable if it may not be safe with keepers.
  void CloseStream(const std::string& name, End end);
  // Copies a stream out or in. A copy put in replaces an open stream of that name. Throw Refusal
  // (as CloseStream) or Error (a copy of another model).
  StreamCopy CopyOut(const std::string& name);
  void CopyIn(const StreamCopy& copy, bool other_weights);
  // The same for a copy that comes from this keeper. The others are told.
  void CopyInFrom(const StreamKeeper* keeper, const StreamCopy& copy, bool other_weights);

  // From now on, takes steps of streams in these shards only. `table` is for refusals, to say who
  // has the others. With `end_others`, their streams end here; else they stay as they are.
  void SetShards(std::shared_ptr<const ShardTable> table, const ShardSet& own, bool end_others);
  // Another server has taken the shard over: its streams end.
  void LoseShard(int shard);

  // Adds one who is told of everything that happens to streams from now on, and who has answers
  // before their clients. It must stay until RemoveKeepers.
  void AddKeeper(StreamKeeper* keeper);
  // Call it after Close.
  void RemoveKeepers();

  // For snapshots.
  // Puts a stream back that was open, or whose end is to be remembered (a copy without a state).
  // Throws as CopyIn does. Keepers are not told.
  void Restore(const StreamCopy& copy, bool other_weights);
  // From now on, remembers which streams change: see StreamTable. With `all`, those that are open
  // count as changed.
  void RecordChanges(bool all);
  size_t changes();
  // Copies of up to `most` streams that changed since they were taken last. A copy without a state
  // is of a stream that ended. No step is taken between the copies and the call of `taken`. Give
  // the same `copies` every time: into fresh memory, 32 streams of 98 kB took 6 ms instead of 0.6,
  // and batches wait meanwhile.
  void TakeChanges(size_t most, std::vector<StreamCopy>* copies,
                   const std::function<void()>& taken);
  // Copies those of these streams that are open, and says which step each expects; names the
  // others. No step is taken before the last of these calls.
  void CopyOpen(const std::vector<std::string>& names,
                const std::function<void(const StreamCopy& copy, int64_t next)>& copied,
                const std::function<void(const std::string& name)>& not_open);
  std::vector<std::string> OpenNames();
  // For streams that are not in the table, such as those that are rebuilt.
  Session* mutable_session() { return &session_; }
  // These copies could not be written: their streams count as changed.
  void ReturnChanges(const std::vector<std::string>& names);
  // Shows the steps of a stream, which need not be open, to a watcher for as long as that exists.
  // Without watchers this costs nothing.
  void Watch(const std::string& stream, const std::weak_ptr<StreamWatcher>& watcher);

 private:
  struct Row;

  void RunBatch(const std::vector<StepRequest*>& batch);
  // All or nothing: throws before anything has changed. Writes an outcome for each request.
  void TakeSteps(const std::vector<StepRequest*>& batch, Outcome* outcomes);
  // Adds the rows of a request, or says what stands in its way.
  Outcome Admit(StepRequest* request, int64_t* opening);
  // Says that a stream of the request is in a shard of another server.
  Outcome CheckShards(const StepRequest& request) const;
  // Ends the streams of shards of other servers, and forgets what was known of others there.
  void EndOthers();
  bool IsRepeat(const Stream& stream, const StepRequest& request, int64_t index) const;
  uint64_t HashOfInputs(const StepRequest& request, int64_t index) const;
  void StepRows(const std::vector<Row*>& rows);
  void Commit(Row* row, Clock::time_point now, std::vector<StreamId>* closed);
  void CommitSteps(Row* row, Clock::time_point now);
  void TellWatchers(const Row& row);
  void EndStream(Stream* stream, End end);
  // Shows the statistics as they are now to other threads.
  void Publish();
  // Runs an operator's change, which counts when the keepers have it. Throws Refusal if they cannot
  // take it, or did not.
  void Change(const std::function<void()>& change);
  void Count(const std::vector<StepRequest*>& batch, const std::vector<Outcome>& outcomes,
             Clock::time_point started);
  void SendAnswers(const std::vector<StepRequest*>& batch, std::vector<Outcome> outcomes);
  Stream* OpenStream(const std::string& name);
  void CheckAnswer(const StreamCopy& copy) const;
  int64_t PutIn(const StreamCopy& copy, bool other_weights);
  void CopyTo(const Stream& stream, StreamCopy* copy) const;

  const std::string name_;
  const std::string path_;
  const ModelOptions options_;
  std::vector<int64_t> input_bytes_, output_bytes_;  // of one step of one stream
  Session session_;
  std::array<std::atomic<int64_t>, kReasons> refused_ = {};

  // Used only where the queue runs a batch or a task.
  StreamTable table_;
  Statistics statistics_;
  std::vector<Row> rows_;
  std::vector<Stream*>
      told_;  // that the server has ended, and whose clients are told so in this batch
  std::vector<std::vector<char>> inputs_, outputs_;  // a batch of several requests
  std::vector<StreamKeeper*> keepers_;
  std::vector<StreamKeeper::Row> kept_rows_;  // of this batch, to tell keepers
  std::vector<std::pair<std::string, std::weak_ptr<StreamWatcher>>> watchers_;
  ShardSet own_shards_ = ShardSet().set();
  std::shared_ptr<const ShardTable> shards_;  // null: this server is not one of several

  // A copy, for those who must not wait for a batch that runs: some take seconds, and whoever looks
  // after the server must not take it for dead.
  std::mutex published_mutex_;
  Statistics published_;

  BatchQueue queue_;
};

}  // namespace continual_transformers::server

#endif  // CONTINUAL_TRANSFORMERS_SERVER_SERVED_MODEL_H_
