// From a plan to what an executor runs: which nodes become one instruction, in which order, and
// where their values lie.

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
    std::string name, op;  // Of its nodes, with " + " between.
  };
  std::vector<Entry> instructions;  // In the order in which they are run.

  // Of each value of the plan: the value whose rows it shares (itself, but after a reshape), and
  // where in an arena these lie, in bytes for each row; -1: nowhere, as they are an input's.
  std::vector<int> storage;
  std::vector<int64_t> arena_offset;
  int64_t arena_bytes_a_row = 0;
  int64_t scratch_bytes = 0;

  // Of each output of the plan, whether an instruction writes straight to the caller's memory; the
  // others are copied there.
  std::vector<bool> written_in_place;

  std::vector<StateEntry> state;
  int64_t block_bytes = 0;
  // What must be zeros in a fresh stream's block.
  struct Bytes {
    int64_t offset, size;
  };
  std::vector<Bytes> zeroed;

  // Which elements of inputs are rows of tables, and of how many.
  struct TokenCheck {
    int node;
    int input;  // Of the plan.
    std::vector<int64_t> elements;
    int64_t rows;
  };
  std::vector<TokenCheck> token_checks;

  std::vector<std::shared_ptr<void>> kept;  // What instructions point to.
  int64_t weights_bytes = 0;
};

// Throws Error.
CompiledPlan Compile(const ModelFile& file, const ExecutorOptions& options);

}  // namespace continual_transformers

#endif  // CONTINUAL_TRANSFORMERS_SESSION_COMPILER_H_
