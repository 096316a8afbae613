// Runs a plan on the steps of streams. Everything is chosen when it is made: kernels for the
// processor, packed weights, places in the arena. A step allocates nothing and asks for no type.

#ifndef CONTINUAL_TRANSFORMERS_SESSION_EXECUTOR_H_
#define CONTINUAL_TRANSFORMERS_SESSION_EXECUTOR_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "cc/session/model_file.h"
#include "cc/session/plan.h"

namespace continual_transformers {

struct ExecutorOptions {
  DType cache_dtype;    // kFloat32, kBFloat16, kFloat16; kFloat64 under float64.
  DType weights_dtype;  // kFloat32, kBFloat16; kFloat64 under float64.
  int64_t threads;      // At least 1; 1: the caller's.
};

// One named part of a stream block; see docs/model_file.md.
struct StateEntry {
  int node;  // Place in Plan::nodes.
  std::string name;
  DType dtype;
  std::vector<int64_t> shape;  // The first axis of a ring is the step's.
  int64_t offset;              // Bytes from the block's start.
  // Of a ring, how many rows: row p mod `ring_rows` has step p. 0: not a ring.
  int64_t ring_rows;
};

struct StepCall {
  const void* const* inputs;  // Of each input of the plan [M, T, ...], contiguous.
  void* const* outputs;       // Of each output of the plan [M, T, ...]; a null one is not wanted.
  const bool* key_mask;       // [M, T]: which steps have a key; null: all.
  int64_t streams;            // M
  int64_t steps;              // T
  char* const* blocks;        // [M]
  const int64_t* positions;   // [M], steps taken before this call; the caller advances them.
};

// What is allocated beforehand for calls of up to so many rows; one for each call in progress.
class Arena {
 public:
  ~Arena();

 private:
  friend class Executor;
  struct Data;
  Arena();
  std::unique_ptr<Data> data_;
};

class Executor {
 public:
  // Throws Error where the plan holds something that cannot be run with these options.
  Executor(std::shared_ptr<const ModelFile> file, const ExecutorOptions& options);
  ~Executor();
  Executor(const Executor&) = delete;
  Executor& operator=(const Executor&) = delete;

  const ModelFile& file() const;
  const Plan& plan() const;
  const ExecutorOptions& options() const;
  int64_t block_bytes() const;
  const std::vector<StateEntry>& state() const;
  // Writes what the block of a fresh stream must hold: little, as rings are never read unwritten.
  void InitBlock(char* block) const;

  std::unique_ptr<Arena> NewArena() const;
  // Throws Error (kInvalidArgument) for a token out of range; nothing has changed then.
  void Check(const StepCall& call) const;
  // Cannot fail once Check has passed. Grows the arena where the call has more rows than any
  // before.
  void Step(const StepCall& call, Arena* arena) const;
  // Roughly how long a call takes, in nanoseconds.
  int64_t EstimatedNanoseconds(int64_t streams, int64_t steps) const;

  int64_t weights_bytes() const;  // Packed.
  static int64_t ArenaBytes(const Arena& arena);

  // What each part of a step took: seconds by node, the sum over the calls made with `arena` since
  // profiling began. A part that does several nodes at once has their names with " + " between.
  struct ProfileEntry {
    std::string name;
    std::string op;
    double seconds;
  };
  void BeginProfile(Arena* arena) const;
  std::vector<ProfileEntry> EndProfile(Arena* arena) const;

 private:
  class Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace continual_transformers

#endif  // CONTINUAL_TRANSFORMERS_SESSION_EXECUTOR_H_
