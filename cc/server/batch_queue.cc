#include "cc/server/batch_queue.h"

#include <exception>
#include <utility>

namespace continual_transformers::server {
namespace {

// How long a thread that came with a request leads at most.
constexpr auto kTurn = std::chrono::milliseconds(5);

}  // namespace

struct BatchQueue::Task {
  const std::function<void()>* run;
  std::exception_ptr thrown;
  bool done = false;
};

BatchQueue::BatchQueue(const Limits& limits, StreamTable* table, Run run, Refuse refuse)
    : limits_(limits), table_(table), run_(std::move(run)), refuse_(std::move(refuse)) {
  // Now, and not when it is needed first: to start a thread may fail, and then there is no leader.
  relief_ = std::thread([this] { RunRelief(); });
}

BatchQueue::~BatchQueue() {
  Close({Reason::kUnavailable, "the server is shutting down", {}});
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stop_relief_ = true;
    relief_changed_.notify_all();
  }
  relief_.join();
}

void BatchQueue::Submit(StepRequest* request) {
  request->submitted_ = Clock::now();
  std::unique_lock<std::mutex> lock(mutex_);
  if (closed_) {
    const Outcome outcome = closed_outcome_;
    lock.unlock();
    return refuse_(request, outcome);
  }
  if (count_ >= limits_.requests) {
    lock.unlock();
    return refuse_(request, {Reason::kQueueFull,
                             std::to_string(limits_.requests) +
                                 " requests wait already, which is the most that this server lets "
                                 "wait: try again later, or start it with a larger --max-queue",
                             {}});
  }
  ++count_;
  arrived_.push_back(request);
  if (leading_) {
    if (limits_.delay.count() > 0) changed_.notify_all();
    return;
  }
  leading_ = true;
  Lead(&lock, Clock::now() + kTurn);
}

void BatchQueue::Between(const std::function<void()>& run) {
  Task task = {&run, nullptr};
  std::unique_lock<std::mutex> lock(mutex_);
  tasks_.push_back(&task);
  if (leading_) {
    changed_.notify_all();
    // The leader may end its last batch just before the task arrives: it looks again under the
    // lock.
    changed_.wait(lock, [&task] { return task.done; });
  } else {
    leading_ = true;
    RunTasks(&lock);
    if (arrived_.empty() && waiting_.empty()) {
      leading_ = false;
      changed_.notify_all();
    } else {
      Relieve();
    }
  }
  if (task.thrown != nullptr) std::rethrow_exception(task.thrown);
}

void BatchQueue::Close(const Outcome& outcome) {
  std::unique_lock<std::mutex> lock(mutex_);
  if (!closed_) closed_outcome_ = outcome;
  closed_ = true;
  changed_.notify_all();
  changed_.wait(lock, [this] { return !leading_; });
}

int64_t BatchQueue::waiting() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return count_;
}

void BatchQueue::Relieve() {
  relieve_ = true;
  relief_changed_.notify_all();
}

void BatchQueue::RunRelief() {
  std::unique_lock<std::mutex> lock(mutex_);
  while (true) {
    relief_changed_.wait(lock, [this] { return relieve_ || stop_relief_; });
    if (!relieve_) return;
    relieve_ = false;
    Lead(&lock, Clock::time_point::max());
  }
}

void BatchQueue::RunTasks(std::unique_lock<std::mutex>* lock) {
  while (!tasks_.empty()) {
    std::vector<Task*> tasks;
    tasks.swap(tasks_);
    lock->unlock();
    for (Task* const task : tasks) {
      try {
        (*task->run)();
      } catch (...) {
        task->thrown = std::current_exception();
      }
    }
    lock->lock();
    for (Task* const task : tasks) task->done = true;
    changed_.notify_all();
  }
}

void BatchQueue::Lead(std::unique_lock<std::mutex>* lock, Clock::time_point until) {
  while (true) {
    RunTasks(lock);
    waiting_.insert(waiting_.end(), arrived_.begin(), arrived_.end());
    arrived_.clear();
    if (waiting_.empty()) break;
    if (limits_.delay.count() > 0 && !closed_) {
      WaitForMore(lock);
      if (!tasks_.empty()) continue;
    }
    lock->unlock();
    FormBatch();
    for (StepRequest* const request : dropped_) {
      Drop(request);
    }
    const int64_t gone = static_cast<int64_t>(batch_.size() + dropped_.size());
    lock->lock();
    count_ -= gone;
    if (batch_.empty()) continue;
    lock->unlock();
    // Requests may be gone after they are done.
    held_.clear();
    for (StepRequest* const request : batch_) {
      held_.insert(held_.end(), request->records_.begin(), request->records_.end());
    }
    run_(batch_);
    for (Stream* const stream : held_) table_->Release(stream);
    const bool tired = until != Clock::time_point::max() && Clock::now() >= until;
    lock->lock();
    if (tired && !(arrived_.empty() && waiting_.empty())) return Relieve();
  }
  leading_ = false;
  changed_.notify_all();
}

void BatchQueue::WaitForMore(std::unique_lock<std::mutex>* lock) {
  const Clock::time_point until = waiting_.front()->submitted_ + limits_.delay;
  int64_t rows = 0;
  size_t counted = 0;
  changed_.wait_until(*lock, until, [&] {
    waiting_.insert(waiting_.end(), arrived_.begin(), arrived_.end());
    arrived_.clear();
    for (; counted < waiting_.size(); ++counted) {
      rows += static_cast<int64_t>(waiting_[counted]->streams.size());
    }
    return rows >= limits_.rows || !tasks_.empty() || closed_;
  });
}

void BatchQueue::FormBatch() {
  ++pass_;
  batch_.clear();
  dropped_.clear();
  const Clock::time_point now = Clock::now();
  int64_t rows = 0;
  size_t kept = 0;
  size_t i = 0;
  for (; i < waiting_.size() && rows < limits_.rows; ++i) {
    StepRequest* const request = waiting_[i];
    if (request->deadline < now || request->Cancelled()) {
      dropped_.push_back(request);
      continue;
    }
    if (request->records_.empty()) {
      request->records_.reserve(request->streams.size());
      for (const std::string& name : request->streams) {
        request->records_.push_back(table_->Hold(name));
      }
    }
    const int64_t more = static_cast<int64_t>(request->streams.size());
    bool fits =
        batch_.empty() || (request->steps == batch_[0]->steps && rows + more <= limits_.rows);
    // A request that has to wait keeps back later ones with its streams: steps are taken in order.
    for (Stream* const stream : request->records_) {
      if (stream->pass == pass_) fits = false;
      stream->pass = pass_;
    }
    if (fits) {
      batch_.push_back(request);
      rows += more;
    } else {
      waiting_[kept++] = request;
    }
  }
  waiting_.erase(waiting_.begin() + static_cast<std::ptrdiff_t>(kept),
                 waiting_.begin() + static_cast<std::ptrdiff_t>(i));
}

void BatchQueue::Drop(StepRequest* request) {
  for (Stream* const stream : request->records_) table_->Release(stream);
  if (request->deadline < Clock::now()) {
    refuse_(request, {Reason::kDeadline,
                      "the deadline passed before the request's turn: no stream has moved",
                      {}});
  } else {
    refuse_(request, {Reason::kCancelled,
                      "the client cancelled the request before its turn: no stream has moved",
                      {}});
  }
}

}  // namespace continual_transformers::server
