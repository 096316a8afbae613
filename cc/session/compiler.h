// Compiles a plan for an executor. Decides which nodes become one instruction, in which order they
// run, and where their values are in the arena.

#ifndef CONTINUAL_TRANSFORMERS_SESSION_COMPILER_H_
#define CONTINUAL_TRANSFORMERS_SESSION_COMPILER_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "cc/session/executor.h"
#include "cc/session/instruction.h"
#include "cc/session/model_file.h"

namespace continual_transformers {

struct CompiledPlan {
  struct Entry {
    std::unique_ptr<Instruction> instruction;
    std::string name, op;  // of its nodes, joined by " + "
  };
  std::vector<Entry> instructions;  // in execution order

  // One per plan value: the value whose rows it shares (itself, except after a reshape), and the
  // arena offset of its rows, in bytes per row. The offset is -1 for an input, which is not in the
  // arena.
  std::vector<int> storage;
  std::vector<int64_t> arena_offset;
  int64_t arena_bytes_a_row = 0;
  int64_t scratch_bytes = 0;

  // One per plan output: whether an instruction writes straight to the caller's memory. Other
  // outputs are copied there.
  std::vector<bool> written_in_place;

  std::vector<std::shared_ptr<void>> kept;  // owns memory that instructions point to
  int64_t weights_bytes = 0;
};

// Throws Error.
CompiledPlan Compile(const ModelFile& file, const ExecutorOptions& options);

}  // namespace continual_transformers

#endif  // CONTINUAL_TRANSFORMERS_SESSION_COMPILER_H_
