// The streams of one model by the name that clients give them.
//
// One thread at a time uses a table: the one that runs the model's batches (BatchQueue).

#ifndef CONTINUAL_TRANSFORMERS_SERVER_STREAM_TABLE_H_
#define CONTINUAL_TRANSFORMERS_SERVER_STREAM_TABLE_H_

#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <list>
#include <string>
#include <unordered_map>
#include <vector>

#include "cc/server/step_request.h"
#include "cc/session/stream_store.h"

namespace continual_transformers::server {

// Why a stream ended.
enum class End {
  kNone,      // it is open, or never existed
  kClient,    // sequence_end
  kIdle,      // longer idle than --idle-timeout
  kClosed,    // an operator closed it
  kUnloaded,  // its model was unloaded
  kMoved,     // its shard went to another server
};
constexpr int kEnds = static_cast<int>(End::kMoved) + 1;

const char* NameOf(End end);  // "idle": for metrics and logs

// What the server knows of a name. It is kept for a while after the stream's end, so that the
// client is told why, and so that a repeat of the last step is answered.
struct Stream {
  const std::string* name = nullptr;
  StreamId id = 0;         // the session's; 0: not open
  int64_t next = 0;        // the number of the next step
  End ended = End::kNone;  // why it is not open
  // The last answer that was given to a numbered request: `last_steps` steps from `last_first` on.
  // The bytes of every output, [T, ...], one after another. `last_steps` 0: none.
  int64_t last_first = 0;
  int64_t last_steps = 0;
  uint64_t last_inputs = 0;  // a hash of the inputs and the weights
  std::string answer;
  // It was read back after a crash, or from a journal older than its snapshot. So its client may
  // have answers to later steps.
  // Only a step number, or a new beginning, shows that both mean the same step.
  bool may_lag = false;
  Clock::time_point opened, used;

  bool open() const { return id != 0; }

  // The rest is StreamTable's.
  enum class List { kNone, kOpen, kEnded };
  int64_t holds = 0;     // requests that point to this record
  uint64_t pass = 0;     // the last pass over the queue that came to a request for it
  bool changed = false;  // since the last snapshot
  List list = List::kNone;
  std::list<Stream*>::iterator at;  // in that list
};

class StreamTable {
 public:
  // Remembers the ends of the last `remembered` streams that ended.
  explicit StreamTable(size_t remembered) : remembered_(remembered) {}
  StreamTable(const StreamTable&) = delete;
  StreamTable& operator=(const StreamTable&) = delete;

  // Null: nothing is known of this name.
  Stream* Find(const std::string& name);
  // Returns the record of a name, and makes one if there is none. It stays until Release.
  Stream* Hold(const std::string& name);
  // Ends a hold. A record that no one holds is forgotten if it neither is open nor has an end to
  // tell.
  void Release(Stream* stream);

  // Puts an id on a record: of a stream that was not open, or that begins anew.
  void Open(Stream* stream, StreamId id, Clock::time_point now);
  // The stream has taken steps, up to `next`.
  void Use(Stream* stream, int64_t next, Clock::time_point now);
  void SetAnswer(Stream* stream, int64_t first, int64_t steps, uint64_t inputs, std::string answer);
  // Ends an open stream. The caller closes its id in the session. The answer of a stream that its
  // client ended stays, for a repeat of the last step.
  void Close(Stream* stream, End end);
  // Forgets why the stream ended.
  void ForgetEnd(Stream* stream);
  // Forgets all ends for whose names this is true.
  void ForgetEnds(const std::function<bool(const std::string& name)>& which);

  // Open streams, the one that was idle longest first.
  const std::list<Stream*>& open() const { return open_; }
  int64_t answer_bytes() const { return answer_bytes_; }

  // The names of up to `most` streams that were opened, stepped or closed since they were last
  // taken. There are none before RecordChanges.
  void RecordChanges() { recording_ = true; }
  size_t changes() const { return changes_.size(); }
  std::vector<std::string> TakeChanges(size_t most);
  void Changed(Stream* stream);

 private:
  void MoveTo(Stream* stream, Stream::List list);
  void ForgetUnlessNeeded(Stream* stream);
  void DropAnswer(Stream* stream);

  const size_t remembered_;
  std::unordered_map<std::string, Stream> streams_;
  std::list<Stream*> open_;
  std::list<Stream*> ended_;  // the oldest first
  int64_t answer_bytes_ = 0;
  bool recording_ = false;
  std::deque<std::string> changes_;
};

}  // namespace continual_transformers::server

#endif  // CONTINUAL_TRANSFORMERS_SERVER_STREAM_TABLE_H_
