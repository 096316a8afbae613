#include "cc/session/executor.h"

#include <cstdint>
#include <memory>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#include "cc/session/error.h"
#include "cc/session/state_layout.h"

namespace continual_transformers {
namespace {

// Returns whether a node's state must be zeros in a fresh stream. The others write their rows
// before they read them.
bool StartsAtZero(Op op) {
  return op == Op::kPositional || op == Op::kRetroactiveAttention || op == Op::kRecurrent;
}

}  // namespace

Executor::Executor(std::shared_ptr<const ModelFile> file, const ExecutorOptions& options)
    : file_(std::move(file)), options_(options) {
  if (options.threads < 1) {
    throw Error(ErrorCode::kInvalidArgument,
                "Expected at least 1 thread, but got " + std::to_string(options.threads));
  }
  StateLayout layout = LayOut(plan(), options_.cache_dtype);
  state_ = std::move(layout.entries);
  block_bytes_ = layout.block_bytes;
  for (size_t i = 0; i < plan().nodes.size(); ++i) {
    if (plan().nodes[i].op == Op::kEmbedding) {
      token_checks_.push_back(TokenCheckOf(static_cast<int>(i)));
    }
  }
}

void Executor::InitBlock(char* block, BlockMemory* memory) const {
  for (const StateEntry& entry : state_) {
    if (StartsAtZero(plan().nodes[entry.node].op)) {
      memory->Zero(block + entry.offset, BytesOf(entry));
    }
  }
}

void Executor::Check(const StepCall& call) const {
  for (const TokenCheck& check : token_checks_) {
    if (plan().values[plan().inputs[check.input].value].dtype == DType::kInt32) {
      CheckTokens<int32_t>(check, call);
    } else {
      CheckTokens<int64_t>(check, call);
    }
  }
}

template <typename Index>
void Executor::CheckTokens(const TokenCheck& check, const StepCall& call) const {
  const int64_t size = plan().values[plan().inputs[check.input].value].size;
  const Index* row = static_cast<const Index*>(call.inputs[check.input]);
  for (int64_t r = 0; r < call.streams * call.steps; ++r, row += size) {
    for (int64_t element : check.elements) {
      const int64_t token = row[element];
      if (token >= 0 && token < check.rows) continue;
      throw Error(ErrorCode::kInvalidArgument,
                  "Expected tokens from 0 to " + std::to_string(check.rows - 1) + " for " +
                      plan().nodes[check.node].name + ", but got " + std::to_string(token) +
                      " for stream number " + std::to_string(r / call.steps) +
                      " of the call; no stream has taken a step");
    }
  }
}

// Follows the indices of an embedding back to an input of the plan.
Executor::TokenCheck Executor::TokenCheckOf(int node) const {
  const Node& embedding = plan().nodes[node];
  const int64_t rows = file().tensor(embedding.weights.at("table")).shape[0];
  int value = embedding.inputs[0];
  std::vector<int64_t> elements(plan().values[value].size);
  std::iota(elements.begin(), elements.end(), 0);
  for (;;) {
    for (size_t input = 0; input < plan().inputs.size(); ++input) {
      if (plan().inputs[input].value == value) {
        return {node, static_cast<int>(input), std::move(elements), rows};
      }
    }
    const Node* producer = nullptr;
    for (const Node& other : plan().nodes) {
      if (other.outputs[0] == value) producer = &other;
    }
    if (producer == nullptr || (producer->op != Op::kStrided && producer->op != Op::kReshape)) {
      throw Error(ErrorCode::kBadModelFile,
                  embedding.name +
                      ": another node computes the indices of this embedding, expected an input "
                      "of the plan, or elements of one");
    }
    value = producer->inputs[0];
    if (producer->op == Op::kReshape) continue;
    const std::vector<int64_t>& shape = plan().values[producer->outputs[0]].shape;
    const std::vector<int64_t>& strides = producer->Ints("strides");
    for (int64_t& element : elements) {
      int64_t at = producer->Int("offset"), rest = element;
      for (size_t axis = shape.size(); axis-- > 0;) {
        at += rest % shape[axis] * strides[axis];
        rest /= shape[axis];
      }
      element = at;
    }
  }
}

}  // namespace continual_transformers
