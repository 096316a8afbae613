// One request for steps of streams, as a protocol hands it to a model.

#ifndef CONTINUAL_TRANSFORMERS_SERVER_STEP_REQUEST_H_
#define CONTINUAL_TRANSFORMERS_SERVER_STEP_REQUEST_H_

#include <chrono>
#include <cstdint>
#include <string>
#include <vector>

#include "cc/server/outcome.h"

namespace continual_transformers::server {

using Clock = std::chrono::steady_clock;

struct Stream;

// T steps of M streams. The protocol fills it in, submits it (ServedModel::Submit), and keeps it
// and the memory that it points to until Done is called.
class StepRequest {
 public:
  StepRequest() = default;
  virtual ~StepRequest() = default;
  StepRequest(const StepRequest&) = delete;
  StepRequest& operator=(const StepRequest&) = delete;

  std::vector<std::string> streams;  // M names, all different
  // The number of the first step, by stream; empty: the client does not number its steps.
  // Without steps, that of its next step.
  std::vector<int64_t> first_steps;
  int64_t steps = 1;                // T; 0: the streams only begin or end
  std::vector<const void*> inputs;  // one per plan input, [M, T, ...], contiguous
  std::vector<void*> outputs;       // one per plan output, the same; null: not wanted
  bool start = false;               // the streams begin anew with this request
  bool end = false;                 // the streams end after it
  Clock::time_point deadline = Clock::time_point::max();
  int64_t shard_epoch = 0;  // of the table of shards that the client knows

  // Answers, valid in Done after a success. The number of the next step, by stream; empty if the
  // request asked nothing.
  std::vector<int64_t> next_steps;
  // Nanoseconds: from Submit to the start of the batch, and the batch's compute.
  int64_t queue_ns = 0;
  int64_t compute_ns = 0;

  // Whether the client has gone. Any thread may call it until Done.
  virtual bool Cancelled() const { return false; }
  // Called once, by any thread, and must not block: it may be the thread that runs all batches.
  // The request may destroy itself in it.
  virtual void Done(const Outcome& outcome) noexcept = 0;

 private:
  friend class BatchQueue;
  friend class ServedModel;
  friend class StreamTable;

  Clock::time_point submitted_;
  std::vector<Stream*> records_;  // found when the request is first considered
};

}  // namespace continual_transformers::server

#endif  // CONTINUAL_TRANSFORMERS_SERVER_STEP_REQUEST_H_
