// Runs a plan on the steps of streams. Kernels, packed weights and arena offsets are chosen when
// the executor is made. A step allocates nothing and checks no types.

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
  DType cache_dtype;    // kFloat32, kBFloat16, kFloat16, kInt8; kFloat64 under float64.
  DType weights_dtype;  // kFloat32, kBFloat16, kInt8; kFloat64 under float64.
  int64_t threads;      // at least 1; 1: only the caller's thread
};

// One named part of a stream block; see docs/model_file.md.
struct StateEntry {
  int node;  // index in Plan::nodes
  std::string name;
  DType dtype;
  std::vector<int64_t> shape;  // the first axis of a ring is the step
  int64_t offset;              // bytes from the start of the block
  // The number of rows of a ring: row n is in n mod `ring_rows`. 0: not a ring.
  int64_t ring_rows;
  int64_t rows_a_step;  // that each step adds to a ring
};

struct StepCall {
  const void* const* inputs;  // one per plan input, [M, T, ...], contiguous
  void* const* outputs;       // one per plan output, [M, T, ...]; null: not wanted
  const bool* key_mask;       // [M, T]: which steps have a key; null: all
  int64_t streams;            // M
  int64_t steps;              // T
  char* const* blocks;        // [M]
  const int64_t* positions;   // [M], steps taken before this call; the caller advances them
};

// The working memory of one call in progress. It is allocated before the steps run, and reused.
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
  // Throws Error if the plan cannot run with these options.
  Executor(std::shared_ptr<const ModelFile> file, const ExecutorOptions& options);
  ~Executor();
  Executor(const Executor&) = delete;
  Executor& operator=(const Executor&) = delete;

  const ModelFile& file() const;
  const Plan& plan() const;
  const ExecutorOptions& options() const;
  int64_t block_bytes() const;
  const std::vector<StateEntry>& state() const;
  // Initializes the block of a fresh stream. This is little, as ring rows are written before they
  // are read.
  void InitBlock(char* block) const;

  std::unique_ptr<Arena> NewArena() const;
  // Throws Error (kInvalidArgument) if a token is out of range. Changes nothing.
  void Check(const StepCall& call) const;
  // Cannot fail after Check has passed. Grows the arena if a call has more rows than any before.
  void Step(const StepCall& call, Arena* arena) const;
  // Estimates how long a call takes, in nanoseconds.
  int64_t EstimatedNanoseconds(int64_t streams, int64_t steps) const;

  int64_t weights_bytes() const;  // of the packed weights
  static int64_t ArenaBytes(const Arena& arena);

  // Seconds by node: the sum over the calls with `arena` since profiling began. An instruction that
  // runs several nodes has their names joined by " + ".
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
