// The instructions that an executor runs. Each does one or several nodes of the plan, and is chosen
// and sized when the executor is made.

#ifndef CONTINUAL_TRANSFORMERS_SESSION_INSTRUCTION_H_
#define CONTINUAL_TRANSFORMERS_SESSION_INSTRUCTION_H_

#include <cstdint>
#include <string>

#include "cc/session/thread_pool.h"

namespace continual_transformers {

// The rows that an instruction runs on: `steps` steps of `streams` streams. Row m * steps + t is
// step t of stream m.
struct Frame {
  int64_t streams;
  int64_t steps;
  char* const* blocks;       // [streams]
  const int64_t* positions;  // [streams], steps taken before this call
  int64_t first_step;        // index in the call of the frame's first step
  const bool* key_mask;      // [streams, steps]; null: all
  char* const* values;       // one per plan value: where its rows lie
  char* scratch;             // this thread's; as large as the instructions ask for
  ThreadPool* pool;          // threads that an instruction may use; null: only the caller's

  int64_t rows() const { return streams * steps; }
  int64_t Position(int64_t m, int64_t t) const { return positions[m] + first_step + t; }
  template <typename T>
  T* Rows(int value) const {
    return reinterpret_cast<T*>(values[value]);
  }
};

class Instruction {
 public:
  virtual ~Instruction() = default;
  virtual void Run(const Frame& frame) const = 0;
  // A rough estimate, in CPU cycles.
  virtual int64_t Cycles(int64_t rows) const = 0;
  virtual int64_t ScratchBytes() const { return 0; }
  virtual int64_t WeightsBytes() const { return 0; }
};

// Waking threads pays off from about this many cycles.
constexpr int64_t kCyclesWorthThreads = 20000;

}  // namespace continual_transformers

#endif  // CONTINUAL_TRANSFORMERS_SESSION_INSTRUCTION_H_
