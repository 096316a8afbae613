// The streams of a session: who they are, where their blocks lie, and who may touch them now.
//
// An id is a slot and the slot's generation, so that a closed one is refused for ever. Blocks lie in
// slabs that are made on demand, the lowest free slot first; memory of a block is touched for the
// first time by its stream's first step. Nothing is ever copied to make room. A slab whose streams
// are all closed is given back.
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

// generation << 32 | slot; never negative.
using StreamId = int64_t;

class StreamStore {
 public:
  // init(block) is called before a new or cleaned stream's block is first used: it writes what a
  // fresh stream must find there. `limit`: the most streams open at once; 0: no limit.
  StreamStore(int64_t block_bytes, int64_t limit, std::function<void(char* block)> init);
  ~StreamStore();
  StreamStore(const StreamStore&) = delete;
  StreamStore& operator=(const StreamStore&) = delete;

  // Opens `count` streams, or none. Does not wait for steps. Throws Error: kTooManyStreams.
  void Open(int64_t count, StreamId* ids);
  // Closes streams, or none; waits for steps in progress on them. Throws Error: kUnknownStream, or
  // kInvalidArgument where one is named twice.
  void Close(const StreamId* ids, int64_t count);

  // The `count` first default streams: stream i is opened by the first call that needs it.
  void Defaults(int64_t count, StreamId* ids);

  bool IsOpen(StreamId id) const;
  // Steps that each has taken; waits for nothing: a step in progress is not counted.
  void Positions(const StreamId* ids, int64_t count, int64_t* positions) const;

  int64_t open_streams() const;
  int64_t block_bytes() const;
  int64_t limit() const;
  // Bytes of slabs that are mapped, touched or not, and of what is kept beside them.
  int64_t reserved_bytes() const;
  int64_t overhead_bytes() const;

  class Lease;

 private:
  struct State;
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
  // Adds `steps` to the position of every stream held: to be called when a step has been taken.
  void Advance(int64_t steps);
  // Forgets what stream i has seen.
  void Clean(int64_t i);
  void SetPosition(int64_t i, int64_t position);
  void Release();

  int64_t count() const { return static_cast<int64_t>(blocks_.size()); }
  char* const* blocks() const { return blocks_.data(); }
  const int64_t* positions() const { return positions_.data(); }

 private:
  StreamStore* store_ = nullptr;
  std::vector<uint32_t> slots_;
  std::vector<char*> blocks_;
  std::vector<int64_t> positions_;
};

}  // namespace continual_transformers

#endif  // CONTINUAL_TRANSFORMERS_SESSION_STREAM_STORE_H_
