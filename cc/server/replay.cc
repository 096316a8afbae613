#include "cc/server/replay.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "cc/session/error.h"
#include "cc/session/executor.h"
#include "cc/session/fingerprint.h"

namespace continual_transformers::server {
namespace {

// Closes a stream of a session.
class OpenStream {
 public:
  explicit OpenStream(Session* session) : session_(session) { session_->Open(1, &id_); }
  ~OpenStream() { session_->Close(&id_, 1); }
  OpenStream(const OpenStream&) = delete;
  OpenStream& operator=(const OpenStream&) = delete;
  StreamId id() const { return id_; }

 private:
  Session* const session_;
  StreamId id_ = 0;
};

int64_t BytesOf(const Plan& plan, const Port& port) {
  const Value& value = plan.values[port.value];
  return value.size * SizeOf(value.dtype);
}

// Offsets are int64 entries of the block.
template <typename F>
void ForEachOffset(const Session& session, F f) {
  const int64_t header = session.state_bytes() - session.executor()->block_bytes();
  for (const StateEntry& entry : session.executor()->state()) {
    if (session.plan().nodes[entry.node].op == Op::kPositional) f(header + entry.offset);
  }
}

}  // namespace

int64_t ReceptiveField(const Plan& plan) {
  // How many earlier steps each value depends on.
  std::vector<int64_t> earlier(plan.values.size(), 0);
  for (const Node& node : plan.nodes) {
    int64_t most = 0;
    for (const int input : node.inputs) most = std::max(most, earlier[input]);
    for (const auto& [name, mask] : node.masks) most = std::max(most, earlier[mask]);
    switch (node.op) {
      case Op::kDelay:
        most += node.Int("steps");
        break;
      case Op::kAttention: {
        const int64_t rows = RowsAStep(plan, node);  // In each step. The window counts rows.
        most += (node.Int("window") - 1 + rows - 1) / rows;
        break;
      }
      case Op::kWindow:
      case Op::kRetroactiveAttention:
        most += node.Int("window") - 1;
        break;
      default:
        break;
    }
    for (const int output : node.outputs) earlier[output] = most;
  }
  int64_t most = 0;
  for (const Port& port : plan.outputs) most = std::max(most, earlier[port.value]);
  return most + 1;
}

bool HasOffsets(const Session& session, const std::string& state) {
  bool any = false;
  ForEachOffset(session, [&](int64_t at) {
    int64_t offset = 0;
    if (at + static_cast<int64_t>(sizeof(offset)) > static_cast<int64_t>(state.size())) return;
    std::memcpy(&offset, state.data() + at, sizeof(offset));
    any = any || offset != 0;
  });
  return any;
}

int64_t FirstNeeded(int64_t receptive_field, int64_t last_first) {
  return std::max<int64_t>(0, last_first - (receptive_field - 1));
}

StreamCopy Rebuild(Session* session, const StreamHistory& history, bool other_weights) {
  const Plan& plan = session->plan();
  StreamCopy copy;
  copy.name = history.name;
  const OpenStream stream(session);
  const StreamId id = stream.id();
  if (!history.state.empty()) {
    session->SetState(id, history.state.data(), static_cast<int64_t>(history.state.size()),
                      other_weights);
  }
  int64_t position = history.state_position;
  if (!history.steps.empty()) {
    const StreamHistory::Steps& last = history.steps.back();
    const int64_t needed = FirstNeeded(ReceptiveField(plan), last.first);
    const int64_t first = history.steps[0].first;
    // Steps from `begin` on are taken.
    const int64_t begin = std::max(position, needed);
    if (first > begin) {
      throw Error(ErrorCode::kInvalidArgument, "the inputs of step " + std::to_string(begin) +
                                                   " are missing: they begin with " +
                                                   std::to_string(first));
    }
    if (begin > position) {
      // A fresh block at another position. Offsets stay.
      std::string fresh(session->state_bytes(), '\0'), kept(session->state_bytes(), '\0');
      session->GetState(id, kept.data());
      session->Clean(&id, 1);
      session->GetState(id, fresh.data());
      ForEachOffset(*session, [&](int64_t at) {
        std::memcpy(fresh.data() + at, kept.data() + at, sizeof(int64_t));
      });
      const int64_t header = session->state_bytes() - session->executor()->block_bytes();
      std::string moved(session->state_bytes(), '\0');
      session->MakeState(fresh.data() + header, begin, moved.data());
      session->SetState(id, moved.data(), static_cast<int64_t>(moved.size()));
      position = begin;
    }
    // First all steps but those of the last request, whose outputs are its answer.
    std::vector<std::string> inputs(plan.inputs.size());
    const auto take = [&](int64_t steps, std::vector<std::string>* outputs) {
      std::vector<const void*> from;
      from.reserve(inputs.size());
      std::vector<void*> to(plan.outputs.size(), nullptr);
      for (const std::string& input : inputs) from.push_back(input.data());
      for (size_t i = 0; outputs != nullptr && i < to.size(); ++i) {
        outputs->emplace_back(steps * BytesOf(plan, plan.outputs[i]), '\0');
      }
      for (size_t i = 0; outputs != nullptr && i < to.size(); ++i) to[i] = (*outputs)[i].data();
      session->Step(&id, 1, steps, from.data(), to.data());
    };
    int64_t count = 0, next = history.steps[0].first;
    for (const StreamHistory::Steps& steps : history.steps) {
      if (steps.first != next) {
        throw Error(ErrorCode::kInvalidArgument,
                    "the inputs of step " + std::to_string(next) + " are missing");
      }
      next += steps.count;
      if (&steps == &last) {
        if (count > 0) take(count, nullptr);
        for (std::string& input : inputs) input.clear();
        count = 0;
      }
      const int64_t skip = std::max<int64_t>(0, position - steps.first);
      const int64_t taken = steps.count - skip;
      size_t at = 0;
      for (size_t i = 0; i < inputs.size(); ++i) {
        const int64_t bytes = BytesOf(plan, plan.inputs[i]);
        if (at + steps.count * bytes > steps.inputs.size()) {
          throw Error(ErrorCode::kInvalidArgument, "a step has too few bytes of input");
        }
        if (taken > 0) inputs[i].append(steps.inputs, at + skip * bytes, taken * bytes);
        at += steps.count * bytes;
      }
      if (taken <= 0) continue;
      count += taken;
      position += taken;
    }
    std::vector<std::string> answer;
    if (count > 0) take(count, &answer);
    if (last.numbered && count == last.count) {
      copy.last_first = last.first;
      copy.last_steps = last.count;
      for (const std::string& output : answer) copy.answer += output;
      if (last.first == 0) {
        copy.last_inputs = session->weights_fingerprint();
        for (const std::string& input : inputs) {
          copy.last_inputs = Xxh64(input.data(), input.size(), copy.last_inputs);
        }
      }
    }
  }
  copy.state.resize(session->state_bytes());
  session->GetState(id, copy.state.data());
  return copy;
}

}  // namespace continual_transformers::server
