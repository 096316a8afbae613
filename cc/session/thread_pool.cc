#include "cc/session/thread_pool.h"

#include <unistd.h>

#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

namespace continual_transformers {
namespace {

// How often a thread polls for work before it sleeps, and how often a caller polls for the end of
// the work before it yields. This takes about 20 us, the pause between two parts of a step. Waking
// a sleeping thread costs as much.
constexpr int kLooks = 4000;

inline void Pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

}  // namespace

struct ThreadPool::Team {
  const pid_t process = getpid();
  std::mutex in_use;  // held by the caller that the threads work for
  bool started = false;
  std::mutex mutex;
  std::condition_variable wake;
  std::vector<std::thread> workers;
  bool stop = false;

  // The current work. Threads see a new `round` when there is some.
  Function f = {nullptr, nullptr};
  int64_t tasks = 0;
  std::atomic<int64_t> next{0};
  std::atomic<int64_t> round{0};
  std::atomic<int64_t> busy{0};

  void Start(int64_t threads) {
    started = true;
    for (int64_t worker = 1; worker < threads; ++worker) {
      try {
        workers.emplace_back([this, worker] { Work(worker); });
      } catch (const std::system_error&) {
        return;  // The system has no more threads: those that exist do the work.
      }
    }
  }

  void Take(int64_t worker) {
    for (;;) {
      const int64_t task = next.fetch_add(1, std::memory_order_relaxed);
      if (task >= tasks) return;
      f.call(f.object, task, worker);
    }
  }

  void Work(int64_t worker) {
    int64_t seen = 0;
    for (;;) {
      for (int looks = 0; looks < kLooks && round.load(std::memory_order_acquire) == seen;
           ++looks) {
        Pause();
      }
      if (round.load(std::memory_order_acquire) == seen) {
        std::unique_lock<std::mutex> lock(mutex);
        wake.wait(lock, [&] { return stop || round.load(std::memory_order_acquire) != seen; });
        if (stop) return;
      }
      seen = round.load(std::memory_order_acquire);
      Take(worker);
      busy.fetch_sub(1, std::memory_order_release);
    }
  }
};

ThreadPool::~ThreadPool() {
  Team* team = team_.load();
  // A team left over from before a fork is never touched: its locks may be held, and its threads
  // exist only in the parent.
  if (team == nullptr || team->process != getpid()) return;
  {
    const std::lock_guard<std::mutex> lock(team->mutex);
    team->stop = true;
  }
  team->wake.notify_all();
  for (std::thread& worker : team->workers) worker.join();
  delete team;
}

ThreadPool::Team* ThreadPool::TeamOfThisProcess() {
  Team* team = team_.load(std::memory_order_acquire);
  if (team != nullptr && team->process == getpid()) return team;
  auto fresh = std::make_unique<Team>();
  // Two threads may get here first at the same time.
  if (team_.compare_exchange_strong(team, fresh.get())) return fresh.release();
  return team;
}

void ThreadPool::ShareTasks(int64_t tasks, const Function& f) {
  Team* team = threads_ > 1 && tasks > 1 ? TeamOfThisProcess() : nullptr;
  std::unique_lock<std::mutex> in_use;
  if (team != nullptr) in_use = std::unique_lock<std::mutex>(team->in_use, std::try_to_lock);
  if (in_use.owns_lock() && !team->started) team->Start(threads_);
  if (!in_use.owns_lock() || team->workers.empty()) {
    for (int64_t task = 0; task < tasks; ++task) f.call(f.object, task, 0);
    return;
  }
  {
    const std::lock_guard<std::mutex> lock(team->mutex);
    team->f = f;
    team->tasks = tasks;
    team->next.store(0, std::memory_order_relaxed);
    team->busy.store(static_cast<int64_t>(team->workers.size()), std::memory_order_relaxed);
    team->round.fetch_add(1, std::memory_order_release);
  }
  team->wake.notify_all();
  team->Take(0);
  for (int looks = 0; team->busy.load(std::memory_order_acquire) > 0; ++looks) {
    if (looks < kLooks) {
      Pause();
    } else {
      std::this_thread::yield();
    }
  }
}

}  // namespace continual_transformers
