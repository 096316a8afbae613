#include "cc/session/thread_pool.h"

#include <unistd.h>

#include <cstdint>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

namespace continual_transformers {
namespace {

// How often a thread looks for work before it goes to sleep, and a caller for the end of it: some
// 20 us, which is the pause between two parts of a step. Waking one that sleeps costs as much.
constexpr int kLooks = 4000;

inline void Pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

}  // namespace

ThreadPool::~ThreadPool() {
  if (process_ != getpid()) {
    // These threads were left behind by fork; there is nothing to join.
    for (std::thread& worker : workers_) new (&worker) std::thread();
    return;
  }
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    stop_ = true;
  }
  wake_.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

void ThreadPool::Start() {
  for (std::thread& worker : workers_) new (&worker) std::thread();
  workers_.clear();
  process_ = getpid();
  round_.store(0, std::memory_order_relaxed);  // New threads have seen none.
  for (int64_t worker = 1; worker < threads_; ++worker) {
    workers_.emplace_back([this, worker] { Work(worker); });
  }
}

void ThreadPool::ShareTasks(int64_t tasks, const Function& f) {
  const std::unique_lock<std::mutex> in_use(in_use_, std::try_to_lock);
  if (threads_ <= 1 || tasks <= 1 || !in_use.owns_lock()) {
    for (int64_t task = 0; task < tasks; ++task) f.call(f.object, task, 0);
    return;
  }
  if (process_ != getpid()) Start();
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    f_ = f;
    tasks_ = tasks;
    next_.store(0, std::memory_order_relaxed);
    busy_.store(threads_ - 1, std::memory_order_relaxed);
    round_.fetch_add(1, std::memory_order_release);
  }
  wake_.notify_all();
  Take(0);
  for (int looks = 0; busy_.load(std::memory_order_acquire) > 0; ++looks) {
    if (looks < kLooks) {
      Pause();
    } else {
      std::this_thread::yield();
    }
  }
}

void ThreadPool::Take(int64_t worker) {
  for (;;) {
    const int64_t task = next_.fetch_add(1, std::memory_order_relaxed);
    if (task >= tasks_) return;
    f_.call(f_.object, task, worker);
  }
}

void ThreadPool::Work(int64_t worker) {
  int64_t seen = 0;
  for (;;) {
    for (int looks = 0; looks < kLooks && round_.load(std::memory_order_acquire) == seen; ++looks) {
      Pause();
    }
    if (round_.load(std::memory_order_acquire) == seen) {
      std::unique_lock<std::mutex> lock(mutex_);
      wake_.wait(lock, [&] { return stop_ || round_.load(std::memory_order_acquire) != seen; });
      if (stop_) return;
    }
    seen = round_.load(std::memory_order_acquire);
    Take(worker);
    busy_.fetch_sub(1, std::memory_order_release);
  }
}

}  // namespace continual_transformers
