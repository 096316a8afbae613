#include "cc/server/shard_history.h"

#include <cstddef>
#include <exception>
#include <utility>

#include "cc/server/log.h"
#include "cc/server/stream_copy.h"
#include "cc/session/error.h"

namespace continual_transformers::server {

ShardHistory::ShardHistory(std::string model, uint64_t plan_fingerprint, int64_t receptive_field)
    : model_(std::move(model)),
      plan_fingerprint_(plan_fingerprint),
      receptive_field_(receptive_field) {}

std::vector<JournalRow> ShardHistory::Add(std::string_view entry) {
  std::vector<JournalRow> rows;
  try {
    const JournalHeader header = ReadJournalEntry(entry, &rows);
    if (header.plan != plan_fingerprint_) {
      throw Error(ErrorCode::kOtherModel, "an entry of the journal is of another model");
    }
    if (header.number != 0) {
      uint64_t* const number = &numbers_[header.writer];
      if (header.number <= *number) return {};
      *number = header.number;
    }
    for (JournalRow& row : rows) {
      ReadRow(row, header.weights);
      row.data = {};
    }
    return rows;
  } catch (const std::exception& error) {
    if (damage_ != error.what()) {
      damage_ = error.what();
      Log(LogLevel::kError, "journal_damaged",
          {{"model", model_},
           {"reason", error.what()},
           {"consequence", "what came before it in its shard is not read"}});
    }
    streams_.clear();
    ended_.clear();
    return {};
  }
}

void ShardHistory::ReadRow(const JournalRow& row, uint64_t weights) {
  if ((row.flags & (JournalRow::kBegan | JournalRow::kCopy)) != 0) {
    Known known;
    known.history.name = row.name;
    if ((row.flags & JournalRow::kCopy) != 0) {
      known.copy = DecodeStreamCopy(row.data);
      known.history.state = known.copy->state;
      known.history.state_position = row.first;
    }
    streams_[row.name] = std::move(known);
    ended_.erase(row.name);
  }
  if (row.steps > 0) {
    // If it is new here, how it began is not needed any more.
    Known* const known = &streams_[row.name];
    known->history.name = row.name;
    // Steps that are missing are found out when the stream is rebuilt.
    std::vector<StreamHistory::Steps>* const steps = &known->history.steps;
    steps->push_back(
        {row.first, row.steps, std::string(row.data), (row.flags & JournalRow::kNumbered) != 0});
    known->weights.push_back(weights);
    // Not one by one, as each moves all others.
    constexpr size_t kDropAtOnce = 64;
    if (steps->size() % kDropAtOnce == 0) {
      const int64_t needed = FirstNeeded(receptive_field_, row.first);
      size_t drop = 0;
      while (drop + 1 < steps->size() && (*steps)[drop + 1].first <= needed) ++drop;
      const auto dropped = static_cast<std::ptrdiff_t>(drop);
      steps->erase(steps->begin(), steps->begin() + dropped);
      known->weights.erase(known->weights.begin(), known->weights.begin() + dropped);
    }
  }
  if ((row.flags & JournalRow::kEnded) != 0) {
    const auto found = streams_.find(row.name);
    if (found != streams_.end()) {
      found->second.ended = true;
      if ((row.flags & JournalRow::kByServer) != 0) streams_.erase(found);
    }
    ended_.insert(row.name);
  }
}

StreamCopy RebuildStream(Session* session, int64_t receptive_field, bool other_weights,
                         ShardHistory::Known* known) {
  StreamHistory* const history = &known->history;
  if (history->steps.empty()) {
    if (known->copy.has_value()) return std::move(*known->copy);
    return Rebuild(session, *history, other_weights);
  }
  const int64_t needed = FirstNeeded(receptive_field, history->steps.back().first);
  for (size_t i = 0; i < known->weights.size() && !other_weights; ++i) {
    if (known->weights[i] != session->weights_fingerprint() &&
        history->steps[i].first + history->steps[i].count > needed) {
      throw Error(ErrorCode::kOtherModel, "its steps were taken with other weights");
    }
  }
  if (history->state_position < needed && !HasOffsets(*session, history->state)) {
    history->state.clear();
    history->state_position = 0;
  }
  return Rebuild(session, *history, other_weights);
}

}  // namespace continual_transformers::server
