// The threads of one executor.

#ifndef CONTINUAL_TRANSFORMERS_SESSION_THREAD_POOL_H_
#define CONTINUAL_TRANSFORMERS_SESSION_THREAD_POOL_H_

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

namespace continual_transformers {

// Shares tasks out between its threads and the caller's. Threads are started by the first call that
// needs them, so that a process may fork before; a child that was forked later starts its own.
class ThreadPool {
 public:
  // `threads`: the caller's among them.
  explicit ThreadPool(int64_t threads) : threads_(threads) {}
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int64_t threads() const { return threads_; }

  // Calls f(task, worker) for every task in [0, tasks), and returns when all are done. `worker`, in
  // [0, threads), is that of the thread: two calls with the same do not overlap. Where the threads
  // are at work for another caller, this one takes all tasks itself, as worker 0.
  template <class F>
  void Share(int64_t tasks, const F& f) {
    // Not a std::function, which would allocate.
    ShareTasks(tasks, {&f, [](const void* f, int64_t task, int64_t worker) {
                         (*static_cast<const F*>(f))(task, worker);
                       }});
  }

 private:
  struct Function {
    const void* object;
    void (*call)(const void* object, int64_t task, int64_t worker);
  };

  void ShareTasks(int64_t tasks, const Function& f);
  void Start();
  void Work(int64_t worker);
  void Take(int64_t worker);

  const int64_t threads_;
  std::mutex in_use_;  // Held by the caller that the threads work for.
  std::mutex mutex_;
  std::condition_variable wake_;
  std::vector<std::thread> workers_;
  int64_t process_ = 0;  // Whose threads these are.
  bool stop_ = false;

  // Of the work at hand. A thread sees by `round_` that there is some.
  Function f_ = {nullptr, nullptr};
  int64_t tasks_ = 0;
  std::atomic<int64_t> next_{0};
  std::atomic<int64_t> round_{0};
  std::atomic<int64_t> busy_{0};
};

}  // namespace continual_transformers

#endif  // CONTINUAL_TRANSFORMERS_SESSION_THREAD_POOL_H_
