#include "cc/server/shard_log.h"

#include <algorithm>
#include <cstdlib>

#include "cc/server/journal_entry.h"
#include "cc/server/replay.h"

namespace continual_transformers::server {

ShardLog::Id ShardLog::Id::Of(const char* text) {
  char* end = nullptr;
  Id id;
  id.epoch = std::strtoull(text, &end, 10);
  if (*end == '-') id.number = std::strtoull(end + 1, nullptr, 10);
  return id;
}

std::string ShardLog::Id::text() const {
  return std::to_string(epoch) + "-" + std::to_string(number);
}

void ShardLog::Append(Id id, int64_t bytes, const std::vector<JournalRow>& rows) {
  const int64_t entry = next_++;
  end_ += bytes;
  entries_.push_back({id, end_});
  for (const JournalRow& row : rows) {
    if ((row.flags & (JournalRow::kBegan | JournalRow::kCopy)) != 0) {
      Stream* const stream = &streams_[row.name];
      stream->base = entry;
      stream->base_step = row.first;
      stream->keeps_base = (row.flags & JournalRow::kHasOffsets) != 0;
      stream->requests.clear();
    }
    if (row.steps > 0) {
      Stream* const stream = &streams_[row.name];
      std::deque<Request>* const requests = &stream->requests;
      requests->push_back({row.first, entry});
      const int64_t needed = FirstNeeded(receptive_field_, row.first);
      while (requests->size() > 1 && (*requests)[1].first <= needed) requests->pop_front();
    }
    if ((row.flags & JournalRow::kEnded) != 0) streams_.erase(row.name);
  }
}

int64_t ShardLog::NeededBy(const Stream& stream) const {
  if (stream.keeps_base || stream.requests.empty()) return stream.base;
  const int64_t needed = FirstNeeded(receptive_field_, stream.requests.back().first);
  return stream.base_step >= needed ? stream.base : stream.requests.front().entry;
}

int64_t ShardLog::Trim(int64_t spare, Id* oldest) {
  int64_t needed = next_ - spare;
  for (const auto& [name, stream] : streams_) needed = std::min(needed, NeededBy(stream));
  int64_t trimmed = 0;
  // The last one stays, so that there is an id to trim to.
  while (entries() > 1 && next_ - entries() < needed) {
    entries_.pop_front();
    ++trimmed;
  }
  trimmed_to_ = next_;
  if (!entries_.empty()) *oldest = entries_.front().id;
  return trimmed;
}

std::vector<std::string> ShardLog::Behind(int64_t bytes) const {
  std::vector<std::string> behind;
  for (const auto& [name, stream] : streams_) {
    const int64_t at = NeededBy(stream) - (next_ - entries());
    if (at >= 0 && at < entries() && end_ - entries_[at].end > bytes) behind.push_back(name);
  }
  return behind;
}

}  // namespace continual_transformers::server
