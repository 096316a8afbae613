// The streams of a session: their ids, their blocks, and which call may use them now.
//
// An id is a slot and the slot's generation, so the id of a closed stream is refused for ever.
// Blocks lie in slabs that are made on demand, and the lowest free slot is taken first. The system
// gives a block memory when it is first touched: in its stream's first step, or for the first few
// streams when they are opened. Nothing is ever copied to make room. A slab is freed once all its
// streams are closed.
//
// A call that steps, copies, cleans or closes streams holds them with a Lease. A lease takes all
// its streams at once or waits for all of them, so two leases never wait for each other.

#ifndef CONTINUAL_TRANSFORMERS_SESSION_STREAM_STORE_H_
#define CONTINUAL_TRANSFORMERS_SESSION_STREAM_STORE_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "cc/session/block_memory.h"

namespace continual_transformers {

// generation << 32 | slot; never negative. Generations begin with 1, so 0 is not an id, nor is an
// id that lost its upper 32 bits.
using StreamId = int64_t;

// A child process has its own copy of the store and of every stream. A stream that another thread
// held at the fork is closed in the child, as its block may be in the middle of a step.
class StreamStore {
 public:
  static constexpr uint32_t kLastGeneration = 0x7fffffff;

  // init(block) is called before the block of a new or cleaned stream is used: it writes the state
  // of a fresh stream. `limit` is the most streams open at once; 0: no limit. `memory` is where the
  // blocks lie; null: HostMemory. A slot is not used again after `last_generation`; tests make that
  // small.
  StreamStore(int64_t block_bytes, int64_t limit, std::function<void(char* block)> init,
              std::shared_ptr<BlockMemory> memory = nullptr,
              uint32_t last_generation = kLastGeneration);
  ~StreamStore();
  StreamStore(const StreamStore&) = delete;
  StreamStore& operator=(const StreamStore&) = delete;

  // Opens all `count` streams or none. Does not wait for steps. Throws Error: kTooManyStreams.
  void Open(int64_t count, StreamId* ids);
  // Closes all streams or none. Waits for steps in progress on them. Throws Error: kUnknownStream,
  // or kInvalidArgument if one is named twice.
  void Close(const StreamId* ids, int64_t count);
  // Resets all streams or none. Waits for steps in progress on them. Does not touch their blocks.
  // Throws as Close does.
  void Clean(const StreamId* ids, int64_t count);

  // Writes the ids of the first `count` default streams. Opens those that are not open yet, or were
  // closed: all of them, or none if it throws kTooManyStreams.
  void Defaults(int64_t count, StreamId* ids);
  // The number of default streams, including closed ones.
  int64_t default_streams() const;
  // The default streams that are open, in order. Opens none.
  std::vector<StreamId> OpenDefaults() const;

  // Called by a thread before and after it waits for streams that others hold. Python's hooks let
  // other Python threads run meanwhile. `end` gets what `begin` returned, and is not called for
  // null. No lock is held during `end`. They are set once for all stores, and must live as long as
  // the library.
  struct WaitHooks {
    void* (*begin)();
    void (*end)(void* waited);
  };
  static void SetWaitHooks(const WaitHooks* hooks);

  bool IsOpen(StreamId id) const;
  // Writes the steps that each stream has taken. Does not wait: a step in progress is not counted.
  // `ids` null: the first `count` default streams, with 0 for one that is not open.
  void Positions(const StreamId* ids, int64_t count, int64_t* positions) const;
  // The ids of all open streams, the lowest slot first.
  std::vector<StreamId> OpenStreams() const;

  int64_t open_streams() const;
  int64_t block_bytes() const;
  int64_t limit() const;
  // In bytes: mapped slabs, touched or not; blocks that were touched and not unmapped since; and
  // the bookkeeping.
  int64_t reserved_bytes() const;
  int64_t used_bytes() const;
  int64_t overhead_bytes() const;

  class Lease;

 private:
  struct Slot;
  struct State;
  class LeaseOfThread;
  std::unique_ptr<State> state_;
};

// Exclusive hold of streams, in the order in which they were named. A lease can be reused: its
// vectors keep their memory.
class StreamStore::Lease {
 public:
  Lease() = default;
  ~Lease() { Release(); }
  Lease(const Lease&) = delete;
  Lease& operator=(const Lease&) = delete;

  // Waits until no other lease holds any of these streams, then holds them. On an Error it holds
  // none: kUnknownStream for an id that is not open, kInvalidArgument for one named twice.
  void Take(StreamStore* store, const StreamId* ids, int64_t count);
  // The same for the first `count` default streams. Throws Error: kTooManyStreams.
  void TakeDefaults(StreamStore* store, int64_t count);
  // Adds `steps` to the position of every held stream. Call it when the steps have been taken.
  // Others see the new positions when the lease is released, all at once.
  void Advance(int64_t steps);
  void SetPosition(int64_t i, int64_t position);
  void Release();

  int64_t count() const { return count_; }
  char* const* blocks() const { return blocks_.data(); }
  const int64_t* positions() const { return positions_.data(); }

 private:
  friend class StreamStore;
  friend struct StreamStore::State;

  void Reserve(int64_t count);

  StreamStore::State* state_ = nullptr;  // null: holds nothing
  int64_t count_ = 0;
  std::vector<Slot*> slots_;
  std::vector<char*> blocks_;
  std::vector<int64_t> positions_;
  std::vector<char*> fresh_;  // blocks to initialize
  int64_t fresh_count_ = 0;
  std::vector<StreamId> defaults_;
  // The list of all leases that hold streams of the store, and the thread of this one.
  Lease* previous_ = nullptr;
  Lease* next_ = nullptr;
  uint64_t thread_ = 0;
};

}  // namespace continual_transformers

#endif  // CONTINUAL_TRANSFORMERS_SESSION_STREAM_STORE_H_
