// Runs a plan on the steps of streams. What depends on the device is in the classes that are
// derived from Executor: CpuExecutor here, and that of GPUs in cuda/session.

#ifndef CONTINUAL_TRANSFORMERS_SESSION_EXECUTOR_H_
#define CONTINUAL_TRANSFORMERS_SESSION_EXECUTOR_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "cc/session/block_memory.h"
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
  // Contiguous, and of the host. An executor for a GPU also takes arrays that are there, except
  // those that Check reads: inputs of whole numbers.
  const void* const* inputs;  // one per plan input, [M, T, ...]
  void* const* outputs;       // one per plan output, [M, T, ...]; null: not wanted
  const bool* key_mask;       // [M, T]: which steps have a key; null: all
  int64_t streams;            // M
  int64_t steps;              // T
  char* const* blocks;        // [M], of the device's memory
  const int64_t* positions;   // [M], steps taken before this call; the caller advances them
};

// The working memory of one call in progress. It is allocated before the steps run, and reused.
class Arena {
 public:
  virtual ~Arena() = default;
  virtual int64_t bytes() const = 0;
};

class Executor {
 public:
  virtual ~Executor() = default;
  Executor(const Executor&) = delete;
  Executor& operator=(const Executor&) = delete;

  const ModelFile& file() const { return *file_; }
  const Plan& plan() const { return file_->plan(); }
  const ExecutorOptions& options() const { return options_; }
  int64_t block_bytes() const { return block_bytes_; }
  const std::vector<StateEntry>& state() const { return state_; }
  // Initializes the block of a fresh stream. This is little, as ring rows are written before they
  // are read.
  void InitBlock(char* block, BlockMemory* memory) const;
  // Throws Error (kInvalidArgument) if a token is out of range. Changes nothing.
  void Check(const StepCall& call) const;

  virtual std::unique_ptr<Arena> NewArena() const = 0;
  // `arena` comes from this executor's NewArena. On the CPU it cannot fail after Check has passed,
  // except for lack of memory, and then no stream has changed. A GPU may fail at any time: see
  // docs/gpu.md. Grows the arena if a call has more rows than any before.
  virtual void Step(const StepCall& call, Arena* arena) const = 0;
  // Estimates how long a call takes, in nanoseconds.
  virtual int64_t EstimatedNanoseconds(int64_t streams, int64_t steps) const = 0;

  virtual int64_t weights_bytes() const = 0;  // as the device holds them

  // Seconds by node: the sum over the calls with `arena` since profiling began. An instruction that
  // runs several nodes has their names joined by " + ".
  struct ProfileEntry {
    std::string name;
    std::string op;
    double seconds;
  };
  virtual void BeginProfile(Arena* arena) const = 0;
  virtual std::vector<ProfileEntry> EndProfile(Arena* arena) const = 0;

 protected:
  // Throws Error if the plan cannot run on any device.
  Executor(std::shared_ptr<const ModelFile> file, const ExecutorOptions& options);

 private:
  // The input elements that index a table, and its number of rows.
  struct TokenCheck {
    int node;
    int input;  // index in Plan::inputs
    std::vector<int64_t> elements;
    int64_t rows;
  };
  TokenCheck TokenCheckOf(int node) const;
  template <typename Index>
  void CheckTokens(const TokenCheck& check, const StepCall& call) const;

  const std::shared_ptr<const ModelFile> file_;
  const ExecutorOptions options_;
  std::vector<StateEntry> state_;
  int64_t block_bytes_;
  std::vector<TokenCheck> token_checks_;
};

}  // namespace continual_transformers

#endif  // CONTINUAL_TRANSFORMERS_SESSION_EXECUTOR_H_
