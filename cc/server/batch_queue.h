// The queue of one model: forms one batch after another of the requests that wait, and has them run
// one at a time.
//
// A thread that submits to an idle queue runs batches until nothing waits ("flat combining",
// Hendler et al., SPAA 2010); the others only leave their request. So a single request is answered
// without a change of threads, and under load the thread that leads goes on while others read
// requests. What runs between or in batches needs no lock.
//
// Under a load that never ends the leader would never return, and its own work, such as the other
// connections of a port, would wait for ever. So it leads for some milliseconds only, and then
// leaves the requests that wait to a thread of the queue's own, which otherwise sleeps. A thread
// that only came to run a task does not lead at all.

#ifndef CONTINUAL_TRANSFORMERS_SERVER_BATCH_QUEUE_H_
#define CONTINUAL_TRANSFORMERS_SERVER_BATCH_QUEUE_H_

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

#include "cc/server/step_request.h"
#include "cc/server/stream_table.h"

namespace continual_transformers::server {

class BatchQueue {
 public:
  struct Limits {
    int64_t requests = 1000;  // the most that wait
    int64_t rows = 1024;      // the most rows of a batch, unless a single request has more
    std::chrono::microseconds delay{0};  // how long a batch waits for more requests
  };
  // Runs a batch, and calls Done of each of its requests. The requests have the same number of
  // steps and no stream in common. Their `records_` are held until it returns.
  using Run = std::function<void(const std::vector<StepRequest*>& batch)>;

  // Refuses a request that is not run: the queue is full or closed, its deadline has passed, or its
  // client has gone. It calls Done. Any thread calls this.
  using Refuse = std::function<void(StepRequest* request, const Outcome& outcome)>;

  BatchQueue(const Limits& limits, StreamTable* table, Run run, Refuse refuse);
  ~BatchQueue();  // waits until nothing runs
  BatchQueue(const BatchQueue&) = delete;
  BatchQueue& operator=(const BatchQueue&) = delete;

  // Puts a request at the end of the queue; calls Done at once if it is full (kQueueFull) or
  // closed. May run batches on this thread.
  void Submit(StepRequest* request);
  // Runs `task` between two batches, on this thread or on the one that leads, and returns when it
  // has run. Runs no batches. Requests that were submitted before may still wait. Throws what the
  // task throws. Not to be called from a batch or another task.
  void Between(const std::function<void()>& task);
  // Refuses every later request with this outcome, and waits until the queue is empty.
  void Close(const Outcome& outcome);

  int64_t waiting() const;

 private:
  struct Task;

  // Runs batches until nothing waits, or until then.
  void Lead(std::unique_lock<std::mutex>* lock, Clock::time_point until);
  void RunTasks(std::unique_lock<std::mutex>* lock);
  // Has the queue's own thread lead instead of this one. With the lock.
  void Relieve();
  void RunRelief();
  void WaitForMore(std::unique_lock<std::mutex>* lock);
  void FormBatch();
  void Drop(StepRequest* request);

  const Limits limits_;
  StreamTable* const table_;
  const Run run_;
  const Refuse refuse_;

  mutable std::mutex mutex_;
  std::condition_variable changed_;  // a request or task arrived, or the leader has ended
  bool leading_ = false;
  bool closed_ = false;
  Outcome closed_outcome_;
  int64_t count_ = 0;  // requests that arrived and are not in a batch yet
  std::vector<StepRequest*> arrived_;
  std::vector<Task*> tasks_;
  std::thread relief_;
  bool relieve_ = false, stop_relief_ = false;
  std::condition_variable relief_changed_;

  // The leader's.
  uint64_t pass_ = 0;
  std::vector<StepRequest*> waiting_, batch_, dropped_;
  std::vector<Stream*> held_;
};

}  // namespace continual_transformers::server

#endif  // CONTINUAL_TRANSFORMERS_SERVER_BATCH_QUEUE_H_
