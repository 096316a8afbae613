// Those who keep a model's streams outside of this process: snapshots, and a journal. A model tells
// them what happens to its streams, and they may hold its answers back until what they promise is
// safe.

#ifndef CONTINUAL_TRANSFORMERS_SERVER_STREAM_KEEPER_H_
#define CONTINUAL_TRANSFORMERS_SERVER_STREAM_KEEPER_H_

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "cc/server/outcome.h"
#include "cc/server/step_request.h"
#include "cc/server/stream_table.h"

namespace continual_transformers::server {

struct StreamCopy;

// A request that has been run, and how it ended. Its Done has not been called yet.
struct Answer {
  StepRequest* request;
  Outcome outcome;
};

// A model calls these where its queue runs: one at a time, in the order in which things happen.
// They must not wait for anything slow, and not call the model.
class StreamKeeper {
 public:
  // A stream of a request that was taken.
  struct Row {
    const StepRequest* request;
    int64_t index;         // of the stream in the request
    const Stream* stream;  // as it is after it
    int64_t steps;         // 0: the answer to the last ones was given again, or it took none
    bool began;            // with this request; an older stream of this name has gone
    bool ended;            // with this request
  };

  StreamKeeper() = default;
  virtual ~StreamKeeper() = default;
  StreamKeeper(const StreamKeeper&) = delete;
  StreamKeeper& operator=(const StreamKeeper&) = delete;

  // Asked before a batch is run. A refusal is the answer to all its requests, and nothing moves.
  virtual Outcome Ready() { return {}; }
  // Steps were taken. Their answers come to Hold later.
  virtual void Stepped(const std::vector<Row>& rows) = 0;
  // The server ended an open stream.
  virtual void Ended(const std::string& stream, End end) = 0;
  // A copy was put in, and replaced a stream of that name if there was one. Its next step is
  // `next`.
  virtual void PutIn(const StreamCopy& copy, int64_t next) = 0;
  // Open streams go on with other weights.
  virtual void WeightsLoaded() {}
  // Gets the answers of a batch, and hands each to PassOn: now, or later and on any thread, those
  // of one stream in order.
  virtual void Hold(std::vector<Answer> answers) = 0;
  // Returns when all answers that it held have been passed on, and all that it was told is safe, or
  // cannot be: then Ready says so. Any thread that does not run the queue may call it.
  virtual void Flush() {}

 protected:
  // Gives answers to the next keeper of the model, or else sends them. Any thread.
  void PassOn(std::vector<Answer> answers) {
    if (next_ != nullptr) return next_->Hold(std::move(answers));
    for (const Answer& answer : answers) answer.request->Done(answer.outcome);
  }

 private:
  friend class ServedModel;
  StreamKeeper* next_ = nullptr;
};

}  // namespace continual_transformers::server

#endif  // CONTINUAL_TRANSFORMERS_SERVER_STREAM_KEEPER_H_
