#include "cc/server/served_model.h"

#include <algorithm>
#include <cstring>
#include <string_view>
#include <unordered_set>
#include <utility>

#include "cc/session/error.h"
#include "cc/session/fingerprint.h"
#include "cc/session/model_file.h"

namespace continual_transformers::server {
namespace {

// A refusal's sentence names streams up to so many bytes; its list has all of them. gRPC's clients
// accept 8 KiB of metadata for both, and a request may have thousands of streams.
constexpr size_t kMostNamedBytes = 1500;

std::string Text(int64_t x) { return std::to_string(x); }

double Seconds(Clock::duration duration) { return std::chrono::duration<double>(duration).count(); }

int64_t Nanoseconds(Clock::duration duration) {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(duration).count();
}

SessionOptions OptionsOf(const ModelOptions& options) {
  SessionOptions of_session;
  of_session.threads = options.threads;
  of_session.device = options.device;
  // The table counts streams. The session has room for more: a stream that begins anew has two
  // blocks until its first step is taken.
  return of_session;
}

bool IsAligned(const void* pointer, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % static_cast<uintptr_t>(bytes) == 0;
}

}  // namespace

// One stream of one request in a batch.
struct ServedModel::Row {
  enum class Kind {
    kStep,    // of an open stream
    kBegin,   // a stream begins, or begins anew; there may be no step
    kRepeat,  // only the last answer again
    kNoStep,  // a stream ends without a step; it may have ended before
  };

  StepRequest* request;
  int64_t index;  // of the stream in the request
  Stream* stream;
  Kind kind;
  StreamId id;         // that is stepped
  int64_t next = 0;    // after the steps; of kNoStep, also if the stream is not open
  std::string answer;  // to remember
};

ServedModel::ServedModel(std::string name, std::string path, const ModelOptions& options)
    : name_(std::move(name)),
      path_(std::move(path)),
      options_(options),
      session_(ModelFile::Map(path_), OptionsOf(options)),
      table_(static_cast<size_t>(options.remembered_ends)),
      queue_(
          options.queue, &table_,
          [this](const std::vector<StepRequest*>& batch) { RunBatch(batch); },
          [this](StepRequest* request, const Outcome& outcome) {
            CountRefusal(outcome.reason);
            request->Done(outcome);
          }) {
  for (const Port& port : plan().inputs) {
    if (port.name == "streams" || port.name == "step") {
      throw Refusal(Reason::kInvalidArgument,
                    "the model " + Quoted(name_) + " has an input named " + port.name +
                        ", and requests use that name to say which streams and steps they are "
                        "about: give the input another name and save the model again");
    }
    const Value& value = plan().values[port.value];
    input_bytes_.push_back(value.size * SizeOf(value.dtype));
  }
  for (const Port& port : plan().outputs) {
    const Value& value = plan().values[port.value];
    output_bytes_.push_back(value.size * SizeOf(value.dtype));
  }
  inputs_.resize(input_bytes_.size());
  outputs_.resize(output_bytes_.size());
}

ServedModel::~ServedModel() { Close({Reason::kUnavailable, "the model is being unloaded", {}}); }

void ServedModel::Submit(StepRequest* request) {
  const auto refuse = [&](const std::string& message) {
    CountRefusal(Reason::kInvalidArgument);
    request->Done({Reason::kInvalidArgument, message, {}});
  };
  const auto count = static_cast<int64_t>(request->streams.size());
  if (request->steps < 0) return refuse("cannot take " + Text(request->steps) + " steps");
  if (count > 1) {
    std::unordered_set<std::string_view> seen;
    seen.reserve(request->streams.size());
    for (const std::string& name : request->streams) {
      if (!seen.insert(name).second) {
        return refuse("the stream " + Quoted(name) +
                      " is twice in one request: a request takes steps of each stream once");
      }
    }
  }
  for (const int64_t first : request->first_steps) {
    if (first < 0) return refuse("got step " + Text(first) + ", expected 0 or more");
  }
  // Nothing to take, to begin or to end: the answer says nothing about streams.
  if (count == 0 || (request->steps == 0 && !request->start && !request->end)) {
    return request->Done({});
  }
  request->next_steps.assign(request->streams.size(), 0);
  queue_.Submit(request);
}

void ServedModel::RunBatch(const std::vector<StepRequest*>& batch) {
  const Clock::time_point started = Clock::now();
  std::vector<Outcome> outcomes(batch.size());
  for (StreamKeeper* const keeper : keepers_) {
    const Outcome ready = keeper->Ready();
    if (ready.ok()) continue;
    std::fill(outcomes.begin(), outcomes.end(), ready);
    Count(batch, outcomes, started);
    return SendAnswers(batch, std::move(outcomes));
  }
  try {
    TakeSteps(batch, outcomes.data());
  } catch (const std::exception& error) {
    // One request spoils a batch, for example with a token out of range. The others go on without
    // it.
    for (size_t i = 0; i < batch.size(); ++i) {
      try {
        if (batch.size() == 1) throw;
        outcomes[i] = {};
        TakeSteps({batch[i]}, &outcomes[i]);
      } catch (const std::exception& of_request) {
        outcomes[i] = OutcomeOf(of_request);
      }
    }
  }
  Count(batch, outcomes, started);
  SendAnswers(batch, std::move(outcomes));
}

void ServedModel::SendAnswers(const std::vector<StepRequest*>& batch,
                              std::vector<Outcome> outcomes) {
  if (keepers_.empty()) {
    for (size_t i = 0; i < batch.size(); ++i) batch[i]->Done(outcomes[i]);
    return;
  }
  for (StreamKeeper* const keeper : keepers_) keeper->Stepped(kept_rows_);
  kept_rows_.clear();
  std::vector<Answer> answers;
  answers.reserve(batch.size());
  for (size_t i = 0; i < batch.size(); ++i) answers.push_back({batch[i], std::move(outcomes[i])});
  keepers_[0]->Hold(std::move(answers));
}

void ServedModel::TakeSteps(const std::vector<StepRequest*>& batch, Outcome* outcomes) {
  const Clock::time_point now = Clock::now();
  rows_.clear();
  told_.clear();
  int64_t opening = 0;
  for (size_t i = 0; i < batch.size(); ++i) {
    const size_t before = rows_.size();
    outcomes[i] = Admit(batch[i], &opening);
    if (!outcomes[i].ok()) rows_.resize(before);
  }
  std::vector<Row*> stepped;
  std::vector<Row*> begun;
  for (Row& row : rows_) {
    const bool begins = row.kind == Row::Kind::kBegin;
    if (begins) begun.push_back(&row);
    // All requests of a batch have the same number of steps.
    if ((begins || row.kind == Row::Kind::kStep) && row.request->steps > 0) stepped.push_back(&row);
  }
  std::vector<StreamId> fresh(begun.size());
  if (!fresh.empty()) session_.Open(static_cast<int64_t>(fresh.size()), fresh.data());
  try {
    for (size_t i = 0; i < begun.size(); ++i) begun[i]->id = fresh[i];
    if (!stepped.empty()) StepRows(stepped);
  } catch (...) {
    if (!fresh.empty()) session_.Close(fresh.data(), static_cast<int64_t>(fresh.size()));
    throw;
  }
  // Nothing is refused from here on.
  std::vector<StreamId> closed;
  for (Row& row : rows_) Commit(&row, now, &closed);
  // The clients of these are told now; they may begin anew next time.
  for (Stream* const stream : told_) table_.ForgetEnd(stream);
  if (!closed.empty()) session_.Close(closed.data(), static_cast<int64_t>(closed.size()));
}

Outcome ServedModel::CheckShards(const StepRequest& request) const {
  if (shards_ != nullptr && request.shard_epoch > shards_->epoch) {
    return {Reason::kWrongServer,
            "the request knows the table of shards of epoch " + Text(request.shard_epoch) +
                ", and this server the one of epoch " + Text(shards_->epoch) +
                ": it may have lost the stream's shard, so it takes no step",
            {},
            shards_};
  }
  for (const std::string& name : request.streams) {
    const int shard = ShardOf(name);
    if (own_shards_[shard]) continue;
    const std::string owner = shards_ == nullptr ? "" : shards_->shards[shard];
    const bool known = !owner.empty() && owner != shards_->self;
    return {Reason::kWrongServer,
            "stream " + Quoted(name) + " is in shard " + Text(shard) + ", which " +
                (known ? "is the server " + Quoted(owner) + "'s (" +
                             shards_->servers.at(owner).grpc + ")"
                       : "this server does not have now") +
                (shards_ == nullptr ? "" : " in epoch " + Text(shards_->epoch)) +
                ". No stream of this request has moved",
            {},
            shards_};
  }
  return {};
}

Outcome ServedModel::Admit(StepRequest* request, int64_t* opening) {
  Outcome outcome;
  if (shards_ != nullptr || !own_shards_.all()) outcome = CheckShards(*request);
  if (!outcome.ok()) return outcome;
  size_t in_the_way = 0, named = 0;
  const auto stop = [&](const Stream& stream, Reason reason, int64_t expected,
                        const std::string& sentence) {
    if (outcome.ok()) outcome.reason = reason;
    ++in_the_way;
    outcome.expected.push_back({*stream.name, expected});
    if (outcome.message.size() > kMostNamedBytes) return;
    ++named;
    outcome.message += (in_the_way > 1 ? "; stream " : "stream ") + Quoted(*stream.name) + sentence;
  };
  int64_t more = 0;
  for (size_t i = 0; i < request->streams.size(); ++i) {
    Stream* const stream = request->records_[i];
    const bool numbered = !request->first_steps.empty();
    const int64_t first = numbered ? request->first_steps[i] : 0;
    Row row = {request, static_cast<int64_t>(i), stream, Row::Kind::kStep, stream->id, 0, {}};
    if (numbered && IsRepeat(*stream, *request, row.index)) {
      row.kind = Row::Kind::kRepeat;
    } else if (request->steps == 0 && !request->start) {
      row.kind = Row::Kind::kNoStep;
      row.next = numbered ? first : stream->next;
      // An end may come twice, so it is no error if the stream has ended, at this step or unknown
      // to the client. Its state is not used any more, so it does not matter whether it may lag.
      if (numbered && first != stream->next && (stream->open() || first != 0)) {
        stop(*stream, Reason::kOutOfStep, stream->open() ? stream->next : 0,
             (stream->open() ? " expects step " + Text(stream->next)
                             : std::string(" is not open and so expects step 0")) +
                 ", got step " + Text(first));
      }
    } else if (request->start || !stream->open()) {
      row.kind = Row::Kind::kBegin;
      const bool server_ended = stream->ended != End::kNone && stream->ended != End::kClient;
      if (numbered && first != 0 && !(server_ended && !request->start)) {
        stop(*stream, Reason::kOutOfStep, 0,
             (request->start ? " begins anew and so expects step 0, got step "
                             : " is not open and so expects step 0, got step ") +
                 Text(first));
      } else if (server_ended && !request->start && !(numbered && first == 0)) {
        told_.push_back(stream);
        stop(*stream, Reason::kEnded, 0,
             std::string(" was ended by the server (") + NameOf(stream->ended) +
                 ") and its state is gone: begin anew, with sequence_start or step 0");
      } else if (options_.strict_start && !request->start) {
        stop(*stream, Reason::kNotStarted, 0,
             " is not open, and this server was started with --strict-start: begin it with "
             "sequence_start");
      } else if (!stream->open()) {
        ++more;
      }
    } else if (!numbered && stream->may_lag) {
      stop(*stream, Reason::kOutOfStep, stream->next,
           " was read back after a crash, or from a journal that is older than its snapshot, and "
           "may have answered later steps before: send step " +
               Text(stream->next) +
               " with its number (later steps need none), or begin anew with sequence_start");
    } else if (numbered && first != stream->next) {
      stop(*stream, Reason::kOutOfStep, stream->next,
           " expects step " + Text(stream->next) + ", got step " + Text(first));
    }
    rows_.push_back(std::move(row));
  }
  if (!outcome.ok()) {
    if (in_the_way > named) {
      outcome.message += "; and " + Text(static_cast<int64_t>(in_the_way - named)) + " more";
    }
    outcome.message += ". No stream of this request has moved";
    return outcome;
  }
  const auto open = static_cast<int64_t>(table_.open().size());
  if (options_.max_streams > 0 && more > 0 && open + *opening + more > options_.max_streams) {
    return {Reason::kTooManyStreams,
            Text(open) + " streams are open and this request would open " + Text(more) +
                " more, and this server was started with --max-streams " +
                Text(options_.max_streams) + ": end streams that are done, with sequence_end",
            {}};
  }
  *opening += more;
  return outcome;
}

bool ServedModel::IsRepeat(const Stream& stream, const StepRequest& request, int64_t index) const {
  if (stream.last_steps == 0 || stream.last_steps != request.steps ||
      stream.last_first != request.first_steps[index]) {
    return false;
  }
  // The stream's end was its last step, or a new stream has the old one's name.
  if (!stream.open() && !request.end) return false;
  // Another stream of this name may begin with step 0. With the same input and weights, both are
  // the same.
  return stream.last_first != 0 || stream.last_inputs == HashOfInputs(request, index);
}

uint64_t ServedModel::HashOfInputs(const StepRequest& request, int64_t index) const {
  uint64_t hash = session_.weights_fingerprint();
  for (size_t i = 0; i < input_bytes_.size(); ++i) {
    const int64_t bytes = request.steps * input_bytes_[i];
    const std::string_view row(static_cast<const char*>(request.inputs[i]) + index * bytes, bytes);
    hash = Xxh64(row.data(), row.size(), hash);
  }
  return hash;
}

void ServedModel::StepRows(const std::vector<Row*>& rows) {
  const StepRequest& first = *rows[0]->request;
  const auto count = static_cast<int64_t>(rows.size());
  const int64_t steps = first.steps;
  // A single request is stepped where its tensors are.
  bool gathers = rows.size() != first.streams.size() || rows.back()->request != &first;
  for (size_t i = 0; i < input_bytes_.size() && !gathers; ++i) {
    gathers = !IsAligned(first.inputs[i], SizeOf(plan().values[plan().inputs[i].value].dtype));
  }
  std::vector<const void*> inputs = first.inputs;
  for (size_t i = 0; i < input_bytes_.size() && gathers; ++i) {
    const int64_t bytes = steps * input_bytes_[i];
    inputs_[i].resize(count * bytes);
    for (int64_t k = 0; k < count; ++k) {
      const auto* from = static_cast<const char*>(rows[k]->request->inputs[i]);
      std::memcpy(inputs_[i].data() + k * bytes, from + rows[k]->index * bytes, bytes);
    }
    inputs[i] = inputs_[i].data();
  }
  std::vector<void*> outputs = first.outputs;
  for (size_t i = 0; i < output_bytes_.size(); ++i) {
    // An answer to be remembered has all outputs.
    if (!gathers && (outputs[i] != nullptr || first.first_steps.empty())) continue;
    outputs_[i].resize(count * steps * output_bytes_[i]);
    outputs[i] = outputs_[i].data();
  }
  std::vector<StreamId> ids(rows.size());
  std::vector<int64_t> next(rows.size());
  for (int64_t k = 0; k < count; ++k) ids[k] = rows[k]->id;
  // Here, because nothing may throw when the steps are taken: they would be taken again.
  int64_t answer_bytes = 0;
  for (const int64_t bytes : output_bytes_) answer_bytes += steps * bytes;
  for (Row* const row : rows) {
    if (!row->request->first_steps.empty()) row->answer.reserve(answer_bytes);
  }
  session_.Step(ids.data(), count, steps, inputs.data(), outputs.data(), nullptr, next.data());

  for (int64_t k = 0; k < count; ++k) {
    Row* const row = rows[k];
    row->next = next[k];
    const bool numbered = !row->request->first_steps.empty();
    for (size_t i = 0; i < output_bytes_.size(); ++i) {
      const int64_t bytes = steps * output_bytes_[i];
      if (outputs[i] == nullptr) continue;
      const char* const from = static_cast<const char*>(outputs[i]) + k * bytes;
      if (numbered) row->answer.append(from, bytes);
      if (gathers && row->request->outputs[i] != nullptr) {
        std::memcpy(static_cast<char*>(row->request->outputs[i]) + row->index * bytes, from, bytes);
      }
    }
  }
}

void ServedModel::Commit(Row* row, Clock::time_point now, std::vector<StreamId>* closed) {
  StepRequest* const request = row->request;
  Stream* const stream = row->stream;
  StreamKeeper::Row kept = {request, row->index, stream, 0, row->kind == Row::Kind::kBegin, false};
  if (row->kind == Row::Kind::kRepeat) {
    ++statistics_.repeats;
    const char* from = stream->answer.data();
    for (size_t i = 0; i < output_bytes_.size(); ++i) {
      const int64_t bytes = request->steps * output_bytes_[i];
      if (request->outputs[i] != nullptr) {
        std::memcpy(static_cast<char*>(request->outputs[i]) + row->index * bytes, from, bytes);
      }
      from += bytes;
    }
  } else if (row->kind == Row::Kind::kNoStep) {
    // If the server had ended the stream, its client needs not be told any more.
    if (stream->ended != End::kNone) stream->ended = End::kClient;
  } else {
    if (row->kind == Row::Kind::kBegin) {
      if (stream->open()) {
        closed->push_back(stream->id);
        ++statistics_.ended[static_cast<int>(End::kClient)];
      }
      table_.Open(stream, row->id, now);
      ++statistics_.opened;
    }
    if (request->steps > 0) CommitSteps(row, now);
    kept.steps = request->steps;
  }
  request->next_steps[row->index] = row->kind == Row::Kind::kNoStep ? row->next : stream->next;
  if (request->end && stream->open()) {
    closed->push_back(stream->id);
    ++statistics_.ended[static_cast<int>(End::kClient)];
    table_.Close(stream, End::kClient);
    kept.ended = true;
  }
  if (keepers_.empty()) return;
  if (kept.steps > 0 || kept.began || kept.ended) kept_rows_.push_back(kept);
}

void ServedModel::CommitSteps(Row* row, Clock::time_point now) {
  const StepRequest& request = *row->request;
  Stream* const stream = row->stream;
  statistics_.steps += request.steps;
  if (!watchers_.empty()) TellWatchers(*row);
  table_.Use(stream, row->next, now);
  if (!request.first_steps.empty()) {
    stream->may_lag = false;
    const int64_t first = request.first_steps[row->index];
    table_.SetAnswer(stream, first, request.steps,
                     first == 0 ? HashOfInputs(request, row->index) : 0, std::move(row->answer));
  } else if (stream->last_steps != 0) {
    table_.SetAnswer(stream, 0, 0, 0, std::string());
  }
}

void ServedModel::TellWatchers(const Row& row) {
  const StepRequest& request = *row.request;
  for (const auto& [name, weak] : watchers_) {
    if (name != *row.stream->name) continue;
    const std::shared_ptr<StreamWatcher> watcher = weak.lock();
    if (watcher == nullptr) continue;
    std::vector<const char*> outputs;
    const char* remembered = row.answer.empty() ? nullptr : row.answer.data();
    for (size_t i = 0; i < output_bytes_.size(); ++i) {
      const int64_t bytes = request.steps * output_bytes_[i];
      const char* at = remembered;
      if (request.outputs[i] != nullptr) {
        at = static_cast<const char*>(request.outputs[i]) + row.index * bytes;
      }
      outputs.push_back(at == nullptr ? nullptr : at + bytes - output_bytes_[i]);
      if (remembered != nullptr) remembered += bytes;
    }
    watcher->Stepped(row.next, outputs);
  }
}

void ServedModel::EndStream(Stream* stream, End end) {
  session_.Close(&stream->id, 1);
  ++statistics_.ended[static_cast<int>(end)];
  for (StreamKeeper* const keeper : keepers_) keeper->Ended(*stream->name, end);
  table_.Close(stream, end);
  Publish();
}

void ServedModel::Count(const std::vector<StepRequest*>& batch,
                        const std::vector<Outcome>& outcomes, Clock::time_point started) {
  const Clock::time_point now = Clock::now();
  const int64_t compute = Nanoseconds(now - started);
  int64_t rows = 0;
  for (size_t i = 0; i < batch.size(); ++i) {
    StepRequest* const request = batch[i];
    request->queue_ns = Nanoseconds(started - request->submitted_);
    request->compute_ns = compute;
    if (!outcomes[i].ok()) {
      CountRefusal(outcomes[i].reason);
      continue;
    }
    rows += static_cast<int64_t>(request->streams.size());
    ++statistics_.requests;
    statistics_.queue_ns += request->queue_ns;
    statistics_.compute_ns += compute;
    statistics_.latency.Add(Seconds(now - request->submitted_));
  }
  if (rows > 0) {
    ++statistics_.batches;
    statistics_.batch_rows.Add(static_cast<double>(rows));
    statistics_.compute.Add(Seconds(now - started));
    statistics_.last_request_ms = std::chrono::duration_cast<std::chrono::milliseconds>(
                                      std::chrono::system_clock::now().time_since_epoch())
                                      .count();
  }
  Publish();
}

void ServedModel::LoadWeights() {
  const std::shared_ptr<const ModelFile> file = ModelFile::Map(path_);
  std::vector<StreamKeeper*> keepers;
  queue_.Between([&] {
    keepers = keepers_;
    session_.LoadWeights(file);
    for (Stream* const stream : table_.open()) table_.Changed(stream);
    for (StreamKeeper* const keeper : keepers) keeper->WeightsLoaded();
  });
  // A server that is killed from now on goes on with the new weights, and finds states of theirs.
  for (StreamKeeper* const keeper : keepers) keeper->Flush();
}

void ServedModel::EvictIdle() {
  if (options_.idle_timeout.count() == 0) return;
  queue_.Between([this] {
    const Clock::time_point oldest = Clock::now() - options_.idle_timeout;
    std::vector<Stream*> idle;
    for (Stream* const stream : table_.open()) {
      if (stream->used > oldest) break;
      if (stream->holds == 0) idle.push_back(stream);
    }
    for (Stream* const stream : idle) EndStream(stream, End::kIdle);
  });
}

void ServedModel::Close(const Outcome& outcome) {
  queue_.Close(outcome);
  std::vector<StreamKeeper*> keepers;
  queue_.Between([&] { keepers = keepers_; });
  for (StreamKeeper* const keeper : keepers) keeper->Flush();
}

void ServedModel::EndStreams(End end) {
  queue_.Between([&] {
    while (!table_.open().empty()) EndStream(table_.open().front(), end);
  });
}

void ServedModel::AddKeeper(StreamKeeper* keeper) {
  queue_.Between([&] {
    if (!keepers_.empty()) keepers_.back()->next_ = keeper;
    keepers_.push_back(keeper);
  });
}

void ServedModel::RemoveKeepers() {
  queue_.Between([this] {
    for (StreamKeeper* const keeper : keepers_) keeper->next_ = nullptr;
    keepers_.clear();
  });
}

void ServedModel::Publish() {
  std::lock_guard<std::mutex> lock(published_mutex_);
  published_ = statistics_;
  published_.open_streams = static_cast<int64_t>(table_.open().size());
  published_.answer_bytes = table_.answer_bytes();
}

Statistics ServedModel::statistics() {
  Statistics copy;
  {
    std::lock_guard<std::mutex> lock(published_mutex_);
    copy = published_;
  }
  for (int i = 0; i < kReasons; ++i) copy.refused[i] = refused_[i];
  copy.waiting = queue_.waiting();
  copy.memory = session_.memory();
  return copy;
}

void ServedModel::EndOthers() {
  std::vector<Stream*> others;
  for (Stream* const stream : table_.open()) {
    if (!own_shards_[ShardOf(*stream->name)]) others.push_back(stream);
  }
  for (Stream* const stream : others) {
    // Keepers are not told, so that a journal goes on to keep what these streams need, until it is
    // told to give their shards up.
    session_.Close(&stream->id, 1);
    ++statistics_.ended[static_cast<int>(End::kMoved)];
    table_.Close(stream, End::kMoved);
  }
  // Their new server tells how streams end.
  table_.ForgetEnds([this](const std::string& name) { return !own_shards_[ShardOf(name)]; });
  Publish();
}

void ServedModel::SetShards(std::shared_ptr<const ShardTable> table, const ShardSet& own,
                            bool end_others) {
  queue_.Between([&] {
    shards_ = std::move(table);
    own_shards_ = own;
    if (end_others) EndOthers();
  });
}

void ServedModel::LoseShard(int shard) {
  queue_.Between([&] {
    own_shards_.reset(shard);
    EndOthers();
  });
}

std::vector<StreamFacts> ServedModel::ListStreams(size_t most, bool foreign, size_t* all) {
  std::vector<StreamFacts> list;
  queue_.Between([&] {
    const Clock::time_point now = Clock::now();
    *all = 0;
    for (const Stream* const stream : table_.open()) {
      if (foreign && own_shards_[ShardOf(*stream->name)]) continue;
      if ((*all)++ >= most) continue;
      list.push_back({*stream->name, stream->next, Seconds(now - stream->opened),
                      Seconds(now - stream->used)});
    }
  });
  return list;
}

void ServedModel::Change(const std::function<void()>& change) {
  std::vector<StreamKeeper*> keepers;
  const auto check = [&keepers] {
    for (StreamKeeper* const keeper : keepers) {
      const Outcome ready = keeper->Ready();
      if (!ready.ok()) throw Refusal(ready.reason, ready.message);
    }
  };
  queue_.Between([&] {
    keepers = keepers_;
    check();
    change();
  });
  for (StreamKeeper* const keeper : keepers) keeper->Flush();
  check();
}

void ServedModel::CloseStream(const std::string& name, End end) {
  Change([&] { EndStream(OpenStream(name), end); });
}

StreamCopy ServedModel::CopyOut(const std::string& name) {
  StreamCopy copy;
  queue_.Between([&] { CopyTo(*OpenStream(name), &copy); });
  return copy;
}

void ServedModel::CopyIn(const StreamCopy& copy, bool other_weights) {
  Change([&] {
    const int64_t next = PutIn(copy, other_weights);
    for (StreamKeeper* const keeper : keepers_) keeper->PutIn(copy, next);
  });
}

void ServedModel::CopyInFrom(const StreamKeeper* from, const StreamCopy& copy, bool other_weights) {
  queue_.Between([&] {
    const int64_t next = PutIn(copy, other_weights);
    for (StreamKeeper* const keeper : keepers_) {
      if (keeper != from) keeper->PutIn(copy, next);
    }
  });
}

void ServedModel::Watch(const std::string& stream, const std::weak_ptr<StreamWatcher>& watcher) {
  queue_.Between([&] {
    watchers_.erase(std::remove_if(watchers_.begin(), watchers_.end(),
                                   [](const auto& entry) { return entry.second.expired(); }),
                    watchers_.end());
    if (!watcher.expired()) watchers_.emplace_back(stream, watcher);
  });
}

void ServedModel::CheckAnswer(const StreamCopy& copy) const {
  int64_t expected = 0;
  for (const int64_t bytes : output_bytes_) expected += copy.last_steps * bytes;
  if (copy.last_steps < 0 || static_cast<int64_t>(copy.answer.size()) != expected) {
    throw Refusal(Reason::kInvalidArgument,
                  "this copy of a stream is damaged: the answer to its last " +
                      Text(copy.last_steps) + " steps has " +
                      Text(static_cast<int64_t>(copy.answer.size())) + " bytes, expected " +
                      Text(expected));
  }
}

int64_t ServedModel::PutIn(const StreamCopy& copy, bool other_weights) {
  CheckAnswer(copy);
  Stream* const stream = table_.Hold(copy.name);
  StreamId id = 0;
  try {
    const auto open = static_cast<int64_t>(table_.open().size());
    if (options_.max_streams > 0 && !stream->open() && open >= options_.max_streams) {
      throw Refusal(Reason::kTooManyStreams,
                    Text(open) +
                        " streams are open, which is the most that this server lets be open "
                        "(--max-streams)");
    }
    session_.Open(1, &id);
    session_.SetState(id, copy.state.data(), static_cast<int64_t>(copy.state.size()),
                      other_weights);
  } catch (...) {
    if (id != 0) session_.Close(&id, 1);
    table_.Release(stream);
    throw;
  }
  const StreamId old = stream->id;
  int64_t next = 0;
  session_.Positions(&id, 1, &next);
  const Clock::time_point now = Clock::now();
  table_.Open(stream, id, now);
  table_.Use(stream, next, now);
  table_.SetAnswer(stream, copy.last_first, copy.last_steps, copy.last_inputs, copy.answer);
  stream->may_lag = copy.may_lag;
  table_.Release(stream);
  if (old != 0) session_.Close(&old, 1);
  ++statistics_.opened;
  Publish();
  return next;
}

void ServedModel::Restore(const StreamCopy& copy, bool other_weights) {
  queue_.Between([&] {
    if (!copy.state.empty()) {
      PutIn(copy, other_weights);
      return;
    }
    CheckAnswer(copy);
    Stream* const stream = table_.Hold(copy.name);
    if (!stream->open()) {
      table_.Close(stream, End::kClient);
      stream->next = copy.last_first + copy.last_steps;
      table_.SetAnswer(stream, copy.last_first, copy.last_steps, copy.last_inputs, copy.answer);
    }
    table_.Release(stream);
  });
}

void ServedModel::RecordChanges(bool all) {
  queue_.Between([&] {
    table_.RecordChanges();
    if (!all) return;
    for (Stream* const stream : table_.open()) table_.Changed(stream);
  });
}

size_t ServedModel::changes() {
  size_t changes = 0;
  queue_.Between([&] { changes = table_.changes(); });
  return changes;
}

void ServedModel::TakeChanges(size_t most, std::vector<StreamCopy>* copies,
                              const std::function<void()>& taken) {
  queue_.Between([&] {
    const std::vector<std::string> names = table_.TakeChanges(most);
    copies->resize(names.size());
    for (size_t i = 0; i < names.size(); ++i) {
      StreamCopy* const copy = &(*copies)[i];
      const Stream* const stream = table_.Find(names[i]);
      if (stream != nullptr && stream->open()) {
        CopyTo(*stream, copy);
      } else {
        *copy = {};
        copy->name = names[i];
      }
    }
    taken();
  });
}

void ServedModel::CopyOpen(const std::vector<std::string>& names,
                           const std::function<void(const StreamCopy&, int64_t)>& copied,
                           const std::function<void(const std::string&)>& not_open) {
  queue_.Between([&] {
    StreamCopy copy;
    for (const std::string& name : names) {
      const Stream* const stream = table_.Find(name);
      if (stream == nullptr || !stream->open()) {
        not_open(name);
        continue;
      }
      CopyTo(*stream, &copy);
      copied(copy, stream->next);
    }
  });
}

std::vector<std::string> ServedModel::OpenNames() {
  std::vector<std::string> names;
  queue_.Between([&] {
    names.reserve(table_.open().size());
    for (const Stream* const stream : table_.open()) names.push_back(*stream->name);
  });
  return names;
}

void ServedModel::ReturnChanges(const std::vector<std::string>& names) {
  queue_.Between([&] {
    for (const std::string& name : names) {
      Stream* const stream = table_.Find(name);
      if (stream != nullptr && stream->open()) table_.Changed(stream);
    }
  });
}

Stream* ServedModel::OpenStream(const std::string& name) {
  Stream* const stream = table_.Find(name);
  if (stream == nullptr || !stream->open()) {
    throw Refusal(Reason::kNotFound,
                  "the model " + Quoted(name_) + " has no open stream " + Quoted(name));
  }
  return stream;
}

void ServedModel::CopyTo(const Stream& stream, StreamCopy* copy) const {
  copy->name = *stream.name;
  copy->state.resize(session_.state_bytes());
  copy->last_first = stream.last_first;
  copy->last_steps = stream.last_steps;
  copy->last_inputs = stream.last_inputs;
  copy->answer = stream.answer;
  copy->may_lag = stream.may_lag;
  session_.GetState(stream.id, copy->state.data());
}

}  // namespace continual_transformers::server
