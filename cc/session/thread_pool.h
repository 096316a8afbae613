// The threads of one executor.

#ifndef CONTINUAL_TRANSFORMERS_SESSION_THREAD_POOL_H_
#define CONTINUAL_TRANSFORMERS_SESSION_THREAD_POOL_H_

#include <atomic>
#include <cstdint>

namespace continual_transformers {

// Shares tasks between its threads and the caller's. The first call that needs threads starts them.
// A child process does not inherit threads, so it starts its own.
class ThreadPool {
 public:
  // `threads` includes the caller's.
  explicit ThreadPool(int64_t threads) : threads_(threads) {}
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int64_t threads() const { return threads_; }

  // Calls f(task, worker) for every task in [0, tasks), and returns when all are done. `worker`, in
  // [0, threads), identifies the thread: two calls with the same worker never overlap. If the
  // threads are busy for another caller, or could not be started, the caller runs all tasks itself
  // as worker 0.
  template <class F>
  void Share(int64_t tasks, const F& f) {
    // A std::function would allocate.
    ShareTasks(tasks, {&f, [](const void* f, int64_t task, int64_t worker) {
                         (*static_cast<const F*>(f))(task, worker);
                       }});
  }

 private:
  struct Function {
    const void* object;
    void (*call)(const void* object, int64_t task, int64_t worker);
  };
  // The threads of one process, and everything that they wait on.
  struct Team;

  void ShareTasks(int64_t tasks, const Function& f);
  Team* TeamOfThisProcess();

  const int64_t threads_;
  std::atomic<Team*> team_{nullptr};
};

}  // namespace continual_transformers

#endif  // CONTINUAL_TRANSFORMERS_SESSION_THREAD_POOL_H_
