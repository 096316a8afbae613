// The streams of a session: who they are, where their blocks lie, and who may touch them now.
//
// An id is a slot and the slot's generation, so that a closed one is refused for ever. Blocks lie
// in slabs that are made on demand, the lowest free slot first; memory of a block is touched for
// the first time by its stream's first step, but for that of the first few streams, which is
// touched when they are opened. Nothing is ever copied to make room. A slab whose streams are all
// closed is given back.
//
// Whoever steps, copies, cleans or closes streams holds them by a Lease. A lease takes all its
// streams at once, or waits for all of them: so no two leases wait for each other.

#ifndef CONTINUAL_TRANSFORMERS_SESSION_STREAM_STORE_H_
#define CONTINUAL_TRANSFORMERS_SESSION_STREAM_STORE_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

namespace continual_transformers {

// generation << 32 | slot; never negative. Generations begin with 1: so 0 is no stream's id, nor is
// an id of which 32 bits were lost on the way.
using StreamId = int64_t;

// A store goes on in a child process: there it has a copy of every stream. A stream that another
// thread held when the process forked is closed in the child, as its block may be half a step on.
class StreamStore {
 public:
  static constexpr uint32_t kLastGeneration = 0x7fffffff;

  // init(block) is called before a new or cleaned stream's block is first used: it writes what a
  // fresh stream must find there. `limit`: the most streams open at once; 0: no limit. A slot is
  // never used again after `last_generation`, which tests make small.
  StreamStore(int64_t block_bytes, int64_t limit, std::function<void(char* block)> init,
              uint32_t last_generation = kLastGeneration);
  ~StreamStore();
  StreamStore(const StreamStore&) = delete;
  StreamStore& operator=(const StreamStore&) = delete;

  // Opens `count` streams, or none. Does not wait for steps. Throws Error: kTooManyStreams.
  void Open(int64_t count, StreamId* ids);
  // Closes streams, or none; waits for steps in progress on them. Throws Error: kUnknownStream, or
  // kInvalidArgument where one is named twice.
  void Close(const StreamId* ids, int64_t count);
  // Forgets what streams have seen, or none of them; waits for steps in progress on them. Touches
  // no block. Throws as Close does.
  void Clean(const StreamId* ids, int64_t count);

  // The `count` first default streams: stream i is opened by the first call that needs it, and
  // again by the next one after it was closed. All are open, or none was opened: throws
  // kTooManyStreams.
  void Defaults(int64_t count, StreamId* ids);
  // How many default streams there are, closed ones among them.
  int64_t default_streams() const;
  // Those of the default streams that are open, in order. Opens none.
  std::vector<StreamId> OpenDefaults() const;

  // What a thread does before it waits for streams that others hold, and after: Python's lets other
  // Python threads run meanwhile. `end` gets what `begin` gave, and is not called for null; no lock
  // is held then. Set once, for all stores; both must be there for as long as the library is.
  struct WaitHooks {
    void* (*begin)();
    void (*end)(void* waited);
  };
  static void SetWaitHooks(const WaitHooks* hooks);

  bool IsOpen(StreamId id) const;
  // Steps that each has taken; waits for nothing: a step in progress is not counted. `ids` null: of
  // the first `count` default streams, of which one that is not open has taken none.
  void Positions(const StreamId* ids, int64_t count, int64_t* positions) const;
  // The ids of all streams that are open, the lowest slot first.
  std::vector<StreamId> OpenStreams() const;

  int64_t open_streams() const;
  int64_t block_bytes() const;
  int64_t limit() const;
  // Bytes of slabs that are mapped, touched or not; of blocks that have been touched and not been
  // given back; and of what is kept beside them.
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

// Exclusive hold of streams, in the order in which they were named. A lease is made to be reused:
// the vectors keep their memory from one Take to the next.
class StreamStore::Lease {
 public:
  Lease() = default;
  ~Lease() { Release(); }
  Lease(const Lease&) = delete;
  Lease& operator=(const Lease&) = delete;

  // Waits until no other lease holds any of these streams, and then holds them. Throws Error, and
  // holds none: kUnknownStream for an id that is not open, kInvalidArgument for one named twice.
  void Take(StreamStore* store, const StreamId* ids, int64_t count);
  // The same for the `count` first default streams. Throws Error: kTooManyStreams.
  void TakeDefaults(StreamStore* store, int64_t count);
  // Adds `steps` to the position of every stream held: to be called when a step has been taken.
  // Others see positions change when the lease is released, all at once.
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

  StreamStore::State* state_ = nullptr;  // Null: holds nothing.
  int64_t count_ = 0;
  std::vector<Slot*> slots_;
  std::vector<char*> blocks_;
  std::vector<int64_t> positions_;
  std::vector<char*> fresh_;  // Blocks that must be initialized.
  int64_t fresh_count_ = 0;
  std::vector<StreamId> defaults_;
  // Of all leases that hold streams of one store; and whose this one is.
  Lease* previous_ = nullptr;
  Lease* next_ = nullptr;
  uint64_t thread_ = 0;
};

}  // namespace continual_transformers

#endif  // CONTINUAL_TRANSFORMERS_SESSION_STREAM_STORE_H_
