// How a kernel's tasks are divided among threads. The threads belong to the caller.

#ifndef CONTINUAL_TRANSFORMERS_ATTENTION_THREADS_H_
#define CONTINUAL_TRANSFORMERS_ATTENTION_THREADS_H_

#include <cstdint>
#include <functional>

namespace continual_transformers {

struct Threads {
  int64_t count;
  // Calls f(begin, end) for ranges that together cover [0, tasks), on any threads. Returns when all
  // are done.
  std::function<void(int64_t tasks, int64_t cycles_per_task,
                     const std::function<void(int64_t, int64_t)>& f)>
      share;
};

}  // namespace continual_transformers

#endif  // CONTINUAL_TRANSFORMERS_ATTENTION_THREADS_H_
