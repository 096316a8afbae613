// Tests the queue of a model on its own: batches here only count.

#include "cc/server/batch_queue.h"

#include <atomic>
#include <chrono>
#include <cstdint>
#include <memory>
#include <thread>
#include <vector>

#include "gtest/gtest.h"

namespace continual_transformers::server {
namespace {

// A client that sends its next request as soon as it has an answer, until it is told to stop.
class EndlessRequest : public StepRequest {
 public:
  EndlessRequest(BatchQueue* queue, std::atomic<int>* running, const std::atomic<bool>* stop)
      : queue_(queue), running_(running), stop_(stop) {
    streams = {"endless"};
    ++*running_;
  }

  void Done(const Outcome& outcome) noexcept override {
    if (outcome.ok() && !*stop_) {
      queue_->Submit(new EndlessRequest(queue_, running_, stop_));
    }
    --*running_;
    delete this;
  }

 private:
  BatchQueue* const queue_;
  std::atomic<int>* const running_;
  const std::atomic<bool>* const stop_;
};

// A queue whose batches only answer.
class BatchQueueTest : public ::testing::Test {
 protected:
  StreamTable table{10};
  BatchQueue queue{{},
                   &table,
                   [](const std::vector<StepRequest*>& batch) {
                     for (StepRequest* const request : batch) request->Done({});
                   },
                   [](StepRequest* request, const Outcome& outcome) { request->Done(outcome); }};
};

// A thread that runs a task gets away, even if requests never cease: here every batch's answer
// brings the next request before the batch ends.
TEST_F(BatchQueueTest, TaskDoesNotLead) {
  std::atomic<int> running{0};
  std::atomic<bool> stop{false};
  // The first request arrives in the task, so the task's thread would be the one to lead.
  std::thread other;
  queue.Between([&] {
    other = std::thread([&] { queue.Submit(new EndlessRequest(&queue, &running, &stop)); });
    other.join();
  });
  EXPECT_GT(running, 0);
  // Other tasks have their turn between the batches.
  int tasks = 0;
  for (int i = 0; i < 100; ++i) queue.Between([&tasks] { ++tasks; });
  EXPECT_EQ(tasks, 100);
  stop = true;
  queue.Close({Reason::kUnavailable, "", {}});
  EXPECT_EQ(running, 0);
  EXPECT_EQ(queue.waiting(), 0);
}

// The same for a thread that comes with a request.
TEST_F(BatchQueueTest, TheLeaderIsRelieved) {
  std::atomic<int> running{0};
  std::atomic<bool> stop{false};
  queue.Submit(new EndlessRequest(&queue, &running, &stop));  // would not return
  EXPECT_GT(running, 0);
  stop = true;
  queue.Close({Reason::kUnavailable, "", {}});
  EXPECT_EQ(running, 0);
}

}  // namespace
}  // namespace continual_transformers::server
