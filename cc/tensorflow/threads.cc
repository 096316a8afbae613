#include "cc/tensorflow/threads.h"

#include <algorithm>
#include <cstdint>
#include <optional>

#include "tensorflow/core/lib/core/threadpool.h"

namespace continual_transformers {
namespace {

// A call with fewer cycles stays on its caller's thread. Medians on a 2-core AMD Zen 3: "hot" are
// steps in a tight loop, "cold" are steps every 4 ms, whose second thread has gone to sleep:
//
//   shared from, cycles            never   500,000   250,000   150,000
//   N=4096 H=4 D=32, hot           105 us      104        66
//                    cold          400         400       480       600
//   N=64 E=128, 32 streams, hot    152         150       146       100
//                           cold   430         435       430       610
//   N=64 E=1024, hot               560         297       280       260
constexpr int64_t kCyclesWorthSharing = 250'000;

}  // namespace

Threads ThreadsOf(tensorflow::DeviceBase* device) {
  auto* workers = device->tensorflow_cpu_worker_threads();
  const int64_t threads = workers->num_threads;
  const auto share = [pool = workers->workers, threads](int64_t tasks, int64_t cycles_per_task,
                                                        const auto& f) {
    if (threads == 1 || tasks * cycles_per_task < kCyclesWorthSharing) {
      f(0, tasks);
    } else {
      // One range of tasks for each thread. TensorFlow's adaptive blocks were single tasks, strips
      // of 64 columns of a kernel. Two threads then took as long as one, 718 us for N=64 E=1024.
      using tensorflow::thread::ThreadPool;
      // A range has at least half of what is worth sharing, however many threads there are.
      const int64_t least = kCyclesWorthSharing / 2 / std::max<int64_t>(1, cycles_per_task);
      const int64_t block = std::max((tasks + threads - 1) / threads, std::min(least, tasks));
      // TensorFlow 2.19 has no SchedulingParams::Fixed, and 2.20 deprecates this constructor.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wdeprecated-declarations"
      const ThreadPool::SchedulingParams fixed(ThreadPool::SchedulingStrategy::kFixedBlockSize,
                                               std::nullopt, block);
#pragma GCC diagnostic pop
      pool->ParallelFor(tasks, fixed, f);
    }
  };
  return {threads, share};
}

}  // namespace continual_transformers
