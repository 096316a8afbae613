#include "cc/session/session.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <mutex>
#include <new>
#include <string>
#include <utility>

#include "cc/session/device.h"
#include "cc/session/error.h"
#include "cc/session/fork.h"
#include "cc/session/state_layout.h"

namespace continual_transformers {
namespace {

// The most warm-up steps of a profile. A model file may have a receptive field of any size.
constexpr int64_t kMostProfileWarmUp = 10000;

// The header of a copy of a stream. Little-endian, like the block: model_file.cc does not compile
// on big-endian machines.
struct StateHeader {
  char magic[8];
  uint32_t version;
  uint32_t header_bytes;
  uint64_t plan_fingerprint;
  uint64_t weights_fingerprint;
  int64_t position;
  int64_t block_bytes;
  char reserved[16];  // zeros; keeps the block aligned if the copy is
};
static_assert(sizeof(StateHeader) == 64);

constexpr char kMagic[8] = {'C', 'T', 'S', 'T', 'R', 'E', 'A', 'M'};
constexpr uint32_t kStateVersion = 1;
// Leaves room to add to positions without overflow. At one step a nanosecond it lasts a century.
constexpr int64_t kMostSteps = int64_t{1} << 62;

std::string Text(int64_t x) { return std::to_string(x); }

std::string Hex(uint64_t x) {
  char text[17];
  for (int i = 15; i >= 0; --i, x >>= 4) text[i] = "0123456789abcdef"[x & 15];
  text[16] = '\0';
  return text;
}

struct Free {
  void operator()(void* p) const { std::free(p); }
};
using Buffer = std::unique_ptr<char, Free>;

// Returns zeroed memory.
Buffer Allocate(int64_t bytes) {
  const int64_t size = (std::max<int64_t>(bytes, 1) + 63) / 64 * 64;
  Buffer buffer(static_cast<char*>(std::aligned_alloc(64, size)));
  if (buffer == nullptr) throw std::bad_alloc();
  std::memset(buffer.get(), 0, size);
  return buffer;
}

// The bytes of one arena. They are part of the sum over all arenas for as long as this object
// lives.
class CountedBytes {
 public:
  explicit CountedBytes(std::atomic<int64_t>* all) : all_(all) {}
  ~CountedBytes() { Set(0); }
  CountedBytes(const CountedBytes&) = delete;
  CountedBytes& operator=(const CountedBytes&) = delete;

  void Set(int64_t bytes) {
    if (bytes == bytes_) return;
    *all_ += bytes - bytes_;
    bytes_ = bytes;
  }

 private:
  std::atomic<int64_t>* const all_;
  int64_t bytes_ = 0;
};

// Blocks that belong to no stream. They begin as zeros.
class PrivateBlocks {
 public:
  PrivateBlocks(BlockMemory* memory, int64_t bytes)
      : memory_(memory),
        bytes_((bytes + memory->Granularity() - 1) / memory->Granularity() *
               memory->Granularity()) {
    std::string refusal;
    base_ = memory_->Map(bytes_, &refusal);
    if (base_ == nullptr) {
      throw Error(ErrorCode::kTooManyStreams,
                  "no memory for " + Text(bytes) + " bytes of private streams " + refusal);
    }
    try {
      memory_->Zero(base_, bytes_);
    } catch (...) {
      memory_->Unmap(base_, bytes_, 1);
      throw;
    }
  }
  ~PrivateBlocks() { memory_->Unmap(base_, bytes_, 1); }
  PrivateBlocks(const PrivateBlocks&) = delete;
  PrivateBlocks& operator=(const PrivateBlocks&) = delete;

  char* base() const { return base_; }

 private:
  BlockMemory* const memory_;
  const int64_t bytes_;
  char* base_;
};

// The streams, executor and memory of a call in progress. Kept afterwards for another call.
struct Call {
  explicit Call(std::atomic<int64_t>* bytes_of_all) : arena_bytes(bytes_of_all) {}

  StreamStore::Lease lease;
  uint64_t version = 0;  // The executor's.
  std::shared_ptr<const Executor> executor;
  std::unique_ptr<Arena> arena;
  CountedBytes arena_bytes;
};

// Calls that are not in progress. A thread first looks where it put its last one back: that arena
// is in its core's caches.
class CallPool {
 public:
  ~CallPool() { Clear(); }

  // Null: all are in progress.
  std::unique_ptr<Call> Get() {
    for (unsigned i = 0; i < kPlaces; ++i) {
      std::atomic<Call*>& place = places_[(Hint() + i) % kPlaces].call;
      if (place.load(std::memory_order_relaxed) == nullptr) continue;
      Call* const call = place.exchange(nullptr, std::memory_order_acquire);
      if (call != nullptr) return std::unique_ptr<Call>(call);
    }
    return nullptr;
  }

  // Destroys the call if every place is taken.
  void Put(std::unique_ptr<Call> call) {
    for (unsigned i = 0; i < kPlaces; ++i) {
      std::atomic<Call*>& place = places_[(Hint() + i) % kPlaces].call;
      Call* none = nullptr;
      if (place.load(std::memory_order_relaxed) == nullptr &&
          place.compare_exchange_strong(none, call.get(), std::memory_order_release,
                                        std::memory_order_relaxed)) {
        call.release();  // NOLINT(bugprone-unused-return-value): `place` owns it now.
        return;
      }
    }
  }

  void Clear() {
    for (Place& place : places_) delete place.call.exchange(nullptr, std::memory_order_acquire);
  }

 private:
  static constexpr unsigned kPlaces = 32;
  struct alignas(64) Place {
    std::atomic<Call*> call{nullptr};
  };

  static unsigned Hint() {
    static std::atomic<unsigned> next{0};
    static thread_local const unsigned hint = next++;
    return hint;
  }

  Place places_[kPlaces];
};

ExecutorOptions OptionsFor(const Plan& plan, const SessionOptions& options) {
  return {options.cache_dtype.value_or(plan.cache_dtype),
          options.weights_dtype.value_or(plan.weights_dtype), options.threads};
}

}  // namespace

class Session::Impl final : public ForkListener {
 public:
  Impl(std::shared_ptr<const ModelFile> file, const SessionOptions& options)
      : plan_(file->plan()),
        options_(OptionsFor(plan_, options)),
        plan_fingerprint_(plan_.FingerprintWith(options_.cache_dtype)),
        device_(OpenDevice(options.device)),
        memory_(device_->memory()),
        executor_(device_->NewExecutor(std::move(file), options_)),
        weights_fingerprint_(executor_->file().weights_fingerprint()),
        // The layout of a block depends only on the plan and the cache dtype, not on the weights.
        store_(
            executor_->block_bytes(), options.streams,
            [this](char* block) { executor()->InitBlock(block, memory_.get()); }, memory_) {
    for (const StateEntry& entry : executor_->state()) {
      const int64_t bytes = BytesOf(entry);
      segments_.push_back({entry.offset, bytes, entry.ring_rows != 0 ? bytes / entry.ring_rows : 0,
                           entry.ring_rows, entry.rows_a_step, entry.dtype == DType::kBool});
    }
    RegisterFork();
  }

  ~Impl() override { UnregisterFork(); }

  std::shared_ptr<const Executor> executor() const {
    std::lock_guard<std::mutex> lock(executor_mutex_);
    return executor_;
  }

  void LoadWeights(std::shared_ptr<const ModelFile> file) {
    const uint64_t fingerprint = file->plan().FingerprintWith(options_.cache_dtype);
    if (fingerprint != plan_fingerprint_) {
      throw Error(ErrorCode::kOtherModel,
                  "these are weights of another model: its layers or sizes (heads, features, "
                  "window, cache dtype) differ. Its plan has the fingerprint " +
                      Hex(fingerprint) + ", this session's plan has " + Hex(plan_fingerprint_) +
                      ": make another session for that model");
    }
    std::shared_ptr<const Executor> executor = device_->NewExecutor(std::move(file), options_);
    {
      std::lock_guard<std::mutex> lock(executor_mutex_);
      weights_fingerprint_ = executor->file().weights_fingerprint();
      executor_.swap(executor);
      version_.fetch_add(1, std::memory_order_release);
    }
    // Pooled calls hold the old executor.
    calls_.Clear();
  }

  void Step(const StreamId* ids, int64_t count, int64_t steps, const void* const* inputs,
            void* const* outputs, const bool* key_mask, int64_t* positions) {
    if (count < 0 || steps < 0) {
      throw Error(ErrorCode::kInvalidArgument, "cannot take " + Text(steps) + " steps of " +
                                                   Text(count) +
                                                   " streams, expected 0 or more of each");
    }
    // A call without steps opens no default streams.
    if (count == 0 || (steps == 0 && ids == nullptr)) {
      if (positions != nullptr) store_.Positions(nullptr, count, positions);
      return;
    }
    CallInProgress call(this);
    StepCall step = {inputs, outputs, key_mask, count, steps, nullptr, nullptr};
    // A refused call opens no default streams.
    if (steps != 0 && ids == nullptr) call->executor->Check(step);
    StreamStore::Lease& lease = call->lease;
    if (ids != nullptr) {
      lease.Take(&store_, ids, count);
    } else {
      lease.TakeDefaults(&store_, count);
    }
    if (steps != 0) {
      // Check again: other threads may have changed the inputs while this one waited for the
      // streams.
      call->executor->Check(step);
      step.blocks = lease.blocks();
      step.positions = lease.positions();
      call->executor->Step(step, call->arena.get());
      lease.Advance(steps);
    }
    if (positions != nullptr) std::copy_n(lease.positions(), count, positions);
  }

  void Clean(const StreamId* ids, int64_t count) {
    if (ids != nullptr) return store_.Clean(ids, count);
    for (const StreamId id : store_.OpenStreams()) {
      try {
        store_.Clean(&id, 1);
      } catch (const Error& error) {
        // Another thread closed it meanwhile: there is nothing left to clean.
        if (error.code() != ErrorCode::kUnknownStream) throw;
      }
    }
  }

  void GetState(StreamId id, void* state) {
    CallInProgress call(this);
    call->lease.Take(&store_, &id, 1);
    const char* const block = call->lease.blocks()[0];
    WriteState(call->lease.positions()[0], state, [&](int64_t offset, int64_t bytes, char* to) {
      memory_->CopyOut(block + offset, bytes, to);
    });
  }

  void MakeState(const void* block, int64_t position, void* state) const {
    CheckPosition(position);
    WriteState(position, state, [&](int64_t offset, int64_t bytes, char* to) {
      std::memcpy(to, static_cast<const char*>(block) + offset, bytes);
    });
  }

  void SetStates(const StreamId* ids, int64_t count, const void* const* states,
                 const int64_t* bytes, bool other_weights) {
    for (int64_t i = 0; i < count; ++i) CheckState(states[i], bytes[i], other_weights);
    CallInProgress call(this);
    call->lease.Take(&store_, ids, count);
    for (int64_t i = 0; i < count; ++i) {
      const char* const state = static_cast<const char*>(states[i]);
      StateHeader header;
      std::memcpy(&header, state, sizeof(header));
      char* const block = call->lease.blocks()[i];
      for (const Segment& segment : segments_) {
        // Rows that were never written are never read.
        memory_->CopyIn(state + sizeof(header) + segment.offset, segment.Written(header.position),
                        block + segment.offset);
      }
      call->lease.SetPosition(i, header.position);
    }
  }

  Session::Memory memory() const {
    const std::shared_ptr<const Executor> now = executor();
    return {now->weights_bytes(), static_cast<int64_t>(now->file().size()), store_.used_bytes(),
            store_.overhead_bytes(), arenas_bytes_};
  }

  std::vector<Executor::ProfileEntry> Profile(int64_t streams, int64_t repeat) const {
    if (streams < 1 || repeat < 1) {
      throw Error(ErrorCode::kInvalidArgument,
                  "a profile needs at least 1 stream and 1 step, got " + Text(streams) + " and " +
                      Text(repeat));
    }
    const std::shared_ptr<const Executor> now = executor();
    const int64_t stride = (now->block_bytes() + 63) / 64 * 64;
    const PrivateBlocks blocks(memory_.get(), streams * stride);
    std::vector<char*> block(streams);
    for (int64_t i = 0; i < streams; ++i) {
      block[i] = blocks.base() + i * stride;
      now->InitBlock(block[i], memory_.get());
    }
    std::vector<Buffer> buffers;
    std::vector<const void*> inputs;
    std::vector<void*> outputs;
    const auto allocate = [&](const Port& port) {
      const Value& value = plan_.values[port.value];
      buffers.push_back(Allocate(streams * value.size * SizeOf(value.dtype)));
      return buffers.back().get();
    };
    inputs.reserve(plan_.inputs.size());
    outputs.reserve(plan_.outputs.size());
    for (const Port& port : plan_.inputs) inputs.push_back(allocate(port));
    for (const Port& port : plan_.outputs) outputs.push_back(allocate(port));
    std::vector<int64_t> positions(streams, 0);
    const StepCall step = {inputs.data(), outputs.data(),  nullptr, streams, 1,
                           block.data(),  positions.data()};
    now->Check(step);
    const std::unique_ptr<Arena> arena = now->NewArena();
    const auto take = [&](int64_t steps) {
      for (int64_t i = 0; i < steps; ++i) {
        now->Step(step, arena.get());
        for (int64_t& position : positions) ++position;
      }
    };
    // A stream's windows are full for most of its life.
    take(std::min(plan_.receptive_field, kMostProfileWarmUp));
    now->BeginProfile(arena.get());
    take(repeat);
    return now->EndProfile(arena.get());
  }

  const Plan& plan() const { return plan_; }
  StreamStore* store() { return &store_; }
  const StreamStore& store() const { return store_; }
  uint64_t plan_fingerprint() const { return plan_fingerprint_; }
  uint64_t weights_fingerprint() const { return weights_fingerprint_; }
  int64_t state_bytes() const { return sizeof(StateHeader) + store_.block_bytes(); }

 private:
  // The part of a block that holds one state entry.
  struct Segment {
    int64_t offset, bytes;
    int64_t row_bytes, ring_rows;  // 0: not a ring.
    int64_t rows_a_step;
    bool is_bool;

    // Bytes written by a stream at that position. The rows of a ring are written in order.
    int64_t Written(int64_t position) const {
      if (ring_rows == 0) return bytes;
      return std::min(std::min(position, ring_rows) * rows_a_step, ring_rows) * row_bytes;
    }
  };

  // Takes a Call from the pool and puts it back. It releases the streams first.
  class CallInProgress {
   public:
    explicit CallInProgress(Impl* session) : session_(session), call_(session->calls_.Get()) {
      if (call_ == nullptr) call_ = std::make_unique<Call>(&session->arenas_bytes_);
      if (call_->version != session->version_.load(std::memory_order_acquire)) Renew();
    }
    ~CallInProgress() {
      call_->lease.Release();
      // A call with replaced weights is not kept.
      if (call_->version != session_->version_.load(std::memory_order_acquire)) return;
      call_->arena_bytes.Set(call_->arena->bytes());
      session_->calls_.Put(std::move(call_));
    }
    CallInProgress(const CallInProgress&) = delete;
    CallInProgress& operator=(const CallInProgress&) = delete;

    Call* operator->() const { return call_.get(); }

   private:
    void Renew() {
      {
        std::lock_guard<std::mutex> lock(session_->executor_mutex_);
        call_->executor = session_->executor_;
        call_->version = session_->version_;
      }
      call_->arena = call_->executor->NewArena();
    }

    Impl* const session_;
    std::unique_ptr<Call> call_;
  };

  // copy(offset, bytes, to) copies a part of the block.
  template <typename Copy>
  void WriteState(int64_t position, void* state, const Copy& copy) const {
    StateHeader header = {};
    std::memcpy(header.magic, kMagic, sizeof(kMagic));
    header.version = kStateVersion;
    header.header_bytes = sizeof(header);
    header.plan_fingerprint = plan_fingerprint_;
    header.weights_fingerprint = weights_fingerprint_;
    header.position = position;
    header.block_bytes = store_.block_bytes();
    std::memcpy(state, &header, sizeof(header));
    char* const to = static_cast<char*>(state) + sizeof(header);
    int64_t done = 0;
    for (const Segment& segment : segments_) {
      // Unwritten rows hold data of the block's earlier stream, and the gaps between entries hold
      // nothing: write zeros.
      std::memset(to + done, 0, segment.offset - done);
      const int64_t written = segment.Written(position);
      copy(segment.offset, written, to + segment.offset);
      done = segment.offset + written;
    }
    std::memset(to + done, 0, store_.block_bytes() - done);
  }

  static void CheckPosition(int64_t position) {
    if (position < 0 || position > kMostSteps) {
      throw Error(ErrorCode::kInvalidArgument,
                  "got the position " + Text(position) +
                      ", expected a stream's number of steps, 0 to 2^62");
    }
  }

  // Refuses a copy whose plan has another fingerprint, which also covers the cache dtype.
  [[noreturn]] void RefusePlan(uint64_t fingerprint) const {
    for (const DType cache : {DType::kFloat32, DType::kBFloat16, DType::kFloat16, DType::kInt8}) {
      if (fingerprint != plan_.FingerprintWith(cache)) continue;
      throw Error(
          ErrorCode::kOtherModel,
          std::string("this is a copy of a stream of the same model with the cache_dtype ") +
              NameOf(cache) + ", and this session has the cache_dtype " +
              NameOf(options_.cache_dtype) + ": put it into a session with the cache_dtype " +
              NameOf(cache));
    }
    throw Error(ErrorCode::kOtherModel,
                "this is a copy of another model's stream: the fingerprint of its plan is " +
                    Hex(fingerprint) + ", this session's plan has " + Hex(plan_fingerprint_) +
                    ": put it back into a session of the model that it came from");
  }

  void CheckState(const void* state, int64_t bytes, bool other_weights) const {
    const char* const from = static_cast<const char*>(state);
    StateHeader header;
    const int64_t begins = std::min<int64_t>(std::max<int64_t>(bytes, 0), sizeof(kMagic));
    if (begins == 0 || std::memcmp(from, kMagic, begins) != 0) {
      throw Error(ErrorCode::kInvalidArgument,
                  "these " + Text(bytes) +
                      " bytes are not a copy of a stream: a copy, as get_state writes it, begins "
                      "with CTSTREAM");
    }
    if (bytes < static_cast<int64_t>(sizeof(header))) {
      throw Error(ErrorCode::kInvalidArgument,
                  "this copy of a stream is cut off: it has " + Text(bytes) +
                      " bytes, and its header alone has " + Text(sizeof(header)));
    }
    std::memcpy(&header, from, sizeof(header));
    if (header.version != kStateVersion || header.header_bytes != sizeof(header)) {
      throw Error(ErrorCode::kInvalidArgument,
                  "this copy of a stream has the format " + Text(header.version) +
                      ", and this version of continual-transformers-tf reads format " +
                      Text(kStateVersion) + ": use the version that wrote it, or a newer one");
    }
    if (header.plan_fingerprint != plan_fingerprint_) RefusePlan(header.plan_fingerprint);
    if (header.block_bytes != store_.block_bytes() || bytes != state_bytes()) {
      throw Error(ErrorCode::kInvalidArgument,
                  "this copy of a stream is cut off or has extra bytes at its end: it has " +
                      Text(bytes) + " bytes, and a copy of this model's streams has " +
                      Text(state_bytes()));
    }
    if (header.weights_fingerprint != weights_fingerprint_ && !other_weights) {
      throw Error(
          ErrorCode::kOtherModel,
          std::string("this is a copy of a stream of the same model with other weights: of "
                      "another training, in another weights_dtype (this session's model file "
                      "has ") +
              NameOf(plan_.weights_dtype) +
              "), or with another start row of a positional encoding, which regular calls "
              "move. Their fingerprint is " +
              Hex(header.weights_fingerprint) + ", this session's weights have " +
              Hex(weights_fingerprint_) +
              ": load those weights, or both sessions from one model file, or allow "
              "other weights (other_weights)");
    }
    CheckPosition(header.position);
    for (const Segment& segment : segments_) {
      if (!segment.is_bool) continue;
      const char* const begin = from + sizeof(header) + segment.offset;
      const char* const end = begin + segment.Written(header.position);
      if (std::any_of(begin, end, [](char x) { return x != 0 && x != 1; })) {
        throw Error(ErrorCode::kInvalidArgument,
                    "this copy of a stream is damaged: a bool in it is neither 0 nor 1");
      }
    }
  }

  const Plan plan_;
  const ExecutorOptions options_;
  const uint64_t plan_fingerprint_;
  const std::shared_ptr<const Device> device_;
  const std::shared_ptr<BlockMemory> memory_;
  std::vector<Segment> segments_;

  mutable std::mutex executor_mutex_;
  std::shared_ptr<const Executor> executor_;
  // Incremented with every change of the executor. A new call has 0, so it is out of date.
  std::atomic<uint64_t> version_{1};
  std::atomic<uint64_t> weights_fingerprint_;

  StreamStore store_;
  std::atomic<int64_t> arenas_bytes_{0};
  CallPool calls_;

  void BeforeFork() override { executor_mutex_.lock(); }
  void AfterFork() override { executor_mutex_.unlock(); }
  void InChild() override { executor_mutex_.unlock(); }
};

Session::Session(std::shared_ptr<const ModelFile> file, const SessionOptions& options)
    : impl_(std::make_unique<Impl>(std::move(file), options)) {}

Session::~Session() = default;

void Session::Open(int64_t count, StreamId* ids) { impl_->store()->Open(count, ids); }

void Session::Close(const StreamId* ids, int64_t count) { impl_->store()->Close(ids, count); }

void Session::Step(const StreamId* ids, int64_t count, int64_t steps, const void* const* inputs,
                   void* const* outputs, const bool* key_mask) {
  impl_->Step(ids, count, steps, inputs, outputs, key_mask, nullptr);
}

void Session::Step(const StreamId* ids, int64_t count, int64_t steps, const void* const* inputs,
                   void* const* outputs, const bool* key_mask, int64_t* positions) {
  impl_->Step(ids, count, steps, inputs, outputs, key_mask, positions);
}

void Session::Clean(const StreamId* ids, int64_t count) { impl_->Clean(ids, count); }

void Session::Positions(const StreamId* ids, int64_t count, int64_t* positions) const {
  impl_->store()->Positions(ids, count, positions);
}

int64_t Session::state_bytes() const { return impl_->state_bytes(); }

void Session::GetState(StreamId id, void* state) const { impl_->GetState(id, state); }

void Session::SetState(StreamId id, const void* state, int64_t bytes, bool other_weights) {
  impl_->SetStates(&id, 1, &state, &bytes, other_weights);
}

void Session::SetStates(const StreamId* ids, int64_t count, const void* const* states,
                        const int64_t* bytes, bool other_weights) {
  impl_->SetStates(ids, count, states, bytes, other_weights);
}

void Session::MakeState(const void* block, int64_t position, void* state) const {
  impl_->MakeState(block, position, state);
}

void Session::LoadWeights(std::shared_ptr<const ModelFile> file) {
  impl_->LoadWeights(std::move(file));
}

std::shared_ptr<const Executor> Session::executor() const { return impl_->executor(); }

const Plan& Session::plan() const { return impl_->plan(); }

StreamStore* Session::store() const { return impl_->store(); }

uint64_t Session::plan_fingerprint() const { return impl_->plan_fingerprint(); }

uint64_t Session::weights_fingerprint() const { return impl_->weights_fingerprint(); }

Session::Memory Session::memory() const { return impl_->memory(); }

std::vector<Executor::ProfileEntry> Session::Profile(int64_t streams, int64_t repeat) const {
  return impl_->Profile(streams, repeat);
}

}  // namespace continual_transformers
