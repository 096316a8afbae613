#include "cc/server/stream_table.h"

#include <utility>

namespace continual_transformers::server {

const char* NameOf(End end) {
  switch (end) {
    case End::kNone:
      return "none";
    case End::kClient:
      return "client";
    case End::kIdle:
      return "idle";
    case End::kClosed:
      return "closed";
    case End::kUnloaded:
      return "unloaded";
    case End::kMoved:
      return "moved";
  }
  return "none";
}

Stream* StreamTable::Find(const std::string& name) {
  const auto found = streams_.find(name);
  return found == streams_.end() ? nullptr : &found->second;
}

Stream* StreamTable::Hold(const std::string& name) {
  const auto [found, added] = streams_.try_emplace(name);
  Stream* const stream = &found->second;
  if (added) stream->name = &found->first;
  ++stream->holds;
  return stream;
}

void StreamTable::Release(Stream* stream) {
  --stream->holds;
  ForgetUnlessNeeded(stream);
}

void StreamTable::Open(Stream* stream, StreamId id, Clock::time_point now) {
  stream->id = id;
  stream->next = 0;
  stream->ended = End::kNone;
  stream->may_lag = false;
  stream->opened = stream->used = now;
  DropAnswer(stream);
  MoveTo(stream, Stream::List::kOpen);
  Changed(stream);
}

void StreamTable::Use(Stream* stream, int64_t next, Clock::time_point now) {
  stream->next = next;
  stream->used = now;
  open_.splice(open_.end(), open_, stream->at);
  Changed(stream);
}

void StreamTable::SetAnswer(Stream* stream, int64_t first, int64_t steps, uint64_t inputs,
                            std::string answer) {
  answer_bytes_ +=
      static_cast<int64_t>(answer.size()) - static_cast<int64_t>(stream->answer.size());
  stream->last_first = first;
  stream->last_steps = steps;
  stream->last_inputs = inputs;
  stream->answer = std::move(answer);
}

void StreamTable::Close(Stream* stream, End end) {
  stream->id = 0;
  stream->ended = end;
  if (end != End::kClient) DropAnswer(stream);
  MoveTo(stream, Stream::List::kEnded);
  Changed(stream);
  while (ended_.size() > remembered_) ForgetEnd(ended_.front());
}

void StreamTable::ForgetEnd(Stream* stream) {
  stream->ended = End::kNone;
  DropAnswer(stream);
  if (stream->list == Stream::List::kEnded) MoveTo(stream, Stream::List::kNone);
  ForgetUnlessNeeded(stream);
}

void StreamTable::ForgetEnds(const std::function<bool(const std::string& name)>& which) {
  for (auto at = ended_.begin(); at != ended_.end();) {
    Stream* const stream = *at++;
    if (which(*stream->name)) ForgetEnd(stream);
  }
}

std::vector<std::string> StreamTable::TakeChanges(size_t most) {
  std::vector<std::string> names;
  while (!changes_.empty() && names.size() < most) {
    names.push_back(std::move(changes_.front()));
    changes_.pop_front();
    if (Stream* const stream = Find(names.back())) stream->changed = false;
  }
  return names;
}

void StreamTable::Changed(Stream* stream) {
  if (!recording_ || stream->changed) return;
  stream->changed = true;
  changes_.push_back(*stream->name);
}

void StreamTable::MoveTo(Stream* stream, Stream::List list) {
  const auto list_of = [this](Stream::List which) {
    return which == Stream::List::kOpen ? &open_ : &ended_;
  };
  if (stream->list != Stream::List::kNone) list_of(stream->list)->erase(stream->at);
  stream->list = list;
  if (list == Stream::List::kNone) return;
  std::list<Stream*>* const to = list_of(list);
  stream->at = to->insert(to->end(), stream);
}

void StreamTable::ForgetUnlessNeeded(Stream* stream) {
  if (stream->holds > 0 || stream->list != Stream::List::kNone) return;
  streams_.erase(streams_.find(*stream->name));
}

void StreamTable::DropAnswer(Stream* stream) {
  SetAnswer(stream, 0, 0, 0, std::string());
  stream->answer.shrink_to_fit();
}

}  // namespace continual_transformers::server
