// Tests that threads share tasks: each task runs once, also with simultaneous callers and after a
// fork.

#include "cc/session/thread_pool.h"

#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <memory>
#include <thread>
#include <vector>

#include "gtest/gtest.h"

namespace continual_transformers {
namespace {

// Returns whether every task of a call ran once, on a worker of the pool.
bool EachTaskOnce(ThreadPool* pool, int64_t tasks) {
  std::vector<std::atomic<int>> taken(tasks);
  std::atomic<bool> known_workers{true};
  pool->Share(tasks, [&](int64_t task, int64_t worker) {
    taken[task].fetch_add(1);
    if (worker < 0 || worker >= pool->threads()) known_workers = false;
  });
  for (const std::atomic<int>& times : taken) {
    if (times != 1) return false;
  }
  return known_workers;
}

TEST(ThreadPoolTest, EveryTaskIsTakenOnce) {
  for (int64_t threads : {1, 2, 5}) {
    ThreadPool pool(threads);
    for (int64_t tasks : {0, 1, 2, 3, 100}) {
      for (int round = 0; round < 50; ++round) EXPECT_TRUE(EachTaskOnce(&pool, tasks));
    }
  }
}

TEST(ThreadPoolTest, SleepingThreadsAreWoken) {
  ThreadPool pool(3);
  for (int round = 0; round < 5; ++round) {
    EXPECT_TRUE(EachTaskOnce(&pool, 20));
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
  }
}

TEST(ThreadPoolTest, SeveralCallersAtOnce) {
  ThreadPool pool(2);
  std::atomic<int> wrong{0};
  std::vector<std::thread> callers;
  for (int caller = 0; caller < 4; ++caller) {
    callers.emplace_back([&] {
      for (int round = 0; round < 200; ++round) wrong += !EachTaskOnce(&pool, 7);
    });
  }
  for (std::thread& caller : callers) caller.join();
  EXPECT_EQ(wrong, 0);
}

#if !defined(__SANITIZE_THREAD__)  // ThreadSanitizer ends a child that starts threads
// The parent's threads wait for work at the fork. The child has none of them.
TEST(ThreadPoolTest, AChildStartsThreadsOfItsOwn) {
  auto pool = std::make_unique<ThreadPool>(3);
  ASSERT_TRUE(EachTaskOnce(pool.get(), 20));
  std::this_thread::sleep_for(std::chrono::milliseconds(100));
  const pid_t child = fork();
  ASSERT_GE(child, 0);
  if (child == 0) {
    alarm(20);  // ends a child that waits for threads that do not exist
    bool right = true;
    for (int round = 0; round < 4; ++round) {
      right = right && EachTaskOnce(pool.get(), 20);
      std::this_thread::sleep_for(std::chrono::milliseconds(50));
    }
    pool.reset();
    _exit(right ? 0 : 1);
  }
  int status = 0;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0) << status;
  EXPECT_TRUE(EachTaskOnce(pool.get(), 20));
}
#endif

}  // namespace
}  // namespace continual_transformers
