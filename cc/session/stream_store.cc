#include "cc/session/stream_store.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <limits>
#include <mutex>
#include <new>
#include <string>
#include <utility>

#include "cc/session/error.h"
#include "cc/session/fork.h"

namespace continual_transformers {
namespace {

// Slots are kept in chunks that never move.
constexpr int64_t kChunkBits = 10;
constexpr int64_t kChunkSlots = int64_t{1} << kChunkBits;

// Approximate slab size. Making a slab costs little compared to opening its streams, and a slab for
// a single stream is affordable where address space is limited.
constexpr int64_t kSlabBytes = 4 << 20;

// Total size of the blocks that are touched when their streams are opened, so that the first step
// has no page faults. Counts only open streams that were never stepped.
constexpr int64_t kTouchedBeforehand = 16 << 20;

// Streams opened under one hold of the mutex. Steps of other threads may begin between batches.
constexpr int64_t kOpenBatch = 256;

constexpr int64_t kMostSlots = std::numeric_limits<uint32_t>::max();

constexpr int64_t kNoSlab = -1;

std::atomic<const StreamStore::WaitHooks*> wait_hooks{nullptr};

int64_t RoundUp(int64_t x, int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }

// The distance between blocks. A power of two would put the same row of all streams into the same
// few cache sets. So from 8 KiB on the distance is an odd number of cache lines.
int64_t Stride(int64_t block_bytes) {
  const int64_t stride = RoundUp(std::max<int64_t>(block_bytes, 1), 64);
  return stride >= 8192 && stride / 64 % 2 == 0 ? stride + 64 : stride;
}

// log2 of the number of blocks in a slab.
int64_t SlabBits(int64_t stride) {
  int64_t bits = 0;
  while (bits < kChunkBits && (stride << (bits + 1)) <= kSlabBytes) ++bits;
  return bits;
}

// The free slots, as a tree of words: each bit says whether the word below has a bit set. The
// lowest free slot takes one look per level.
class FreeSlots {
 public:
  // Makes room for slots below `count`. If it throws bad_alloc, nothing has visibly changed.
  void Grow(int64_t count) {
    int64_t words = count;
    for (auto& level : levels_) {
      words = (words + 63) / 64;
      if (static_cast<int64_t>(level.size()) < words) level.resize(words);
    }
  }

  void Add(int64_t slot) {
    for (auto& level : levels_) {
      uint64_t& word = level[slot >> 6];
      const bool had_any = word != 0;
      word |= uint64_t{1} << (slot & 63);
      if (had_any) return;
      slot >>= 6;
    }
  }

  bool empty() const { return levels_[kLevels - 1].empty() || levels_[kLevels - 1][0] == 0; }

  int64_t TakeLowest() {
    int64_t slot = 0;
    for (int level = kLevels - 1; level >= 0; --level) {
      slot = slot << 6 | __builtin_ctzll(levels_[level][slot]);
    }
    int64_t place = slot;
    for (auto& level : levels_) {
      uint64_t& word = level[place >> 6];
      word &= ~(uint64_t{1} << (place & 63));
      if (word != 0) break;
      place >>= 6;
    }
    return slot;
  }

  int64_t bytes() const {
    int64_t bytes = 0;
    for (const auto& level : levels_) bytes += level.capacity() * sizeof(uint64_t);
    return bytes;
  }

 private:
  static constexpr int kLevels = 6;  // 64^6 > 2^32
  std::vector<uint64_t> levels_[kLevels];
};

enum Flags : uint32_t {
  kOpen = 1,
  kHeld = 2,     // by a lease
  kFresh = 4,    // the block must be initialized before use
  kTouched = 8,  // the block has memory
  kIdle = 16,    // touched when the stream was opened, and not used yet
  kWanted = 32,  // by the lease whose turn is next
};

std::string Text(int64_t x) { return std::to_string(x); }

}  // namespace

struct StreamStore::Slot {
  int64_t position = 0;
  uint32_t generation = 1;  // 0: used up
  uint32_t flags = 0;
};

struct StreamStore::State final : ForkListener {
  struct Slab {
    char* base = nullptr;
    int64_t used = 0;  // slots that are open or being opened
  };

  struct Chunk {
    explicit Chunk(int64_t slabs) : slabs(slabs) {}
    Slot slots[kChunkSlots];
    std::vector<Slab> slabs;
  };

  State(int64_t block_bytes, int64_t limit, std::function<void(char*)> init,
        std::shared_ptr<BlockMemory> memory, uint32_t last_generation)
      : block_bytes(block_bytes),
        limit(limit),
        init(std::move(init)),
        memory(memory != nullptr ? std::move(memory) : std::make_shared<HostMemory>()),
        last_generation(last_generation),
        stride(Stride(block_bytes)),
        slab_bits(SlabBits(stride)),
        slab_bytes(RoundUp(stride << slab_bits, this->memory->Granularity())) {
    RegisterFork();
  }

  ~State() override {
    UnregisterFork();
    for (auto& chunk : chunks) {
      for (Slab& slab : chunk->slabs) {
        if (slab.base != nullptr) memory->Unmap(slab.base, slab_bytes, 1);
      }
    }
    for (char* base : loose) memory->Unmap(base, slab_bytes, 1);
    for (char* base : kept) memory->Unmap(base, slab_bytes, 1);
    wake->~condition_variable();
  }

  // The functions from here to AbandonSlot must be called with `mutex` held.

  Slot& SlotAt(int64_t slot) const {
    return chunks[slot >> kChunkBits]->slots[slot & (kChunkSlots - 1)];
  }
  // Slab k has the slots from k << slab_bits on.
  Slab& SlabAt(int64_t slab) const {
    const int64_t first = slab << slab_bits;
    return chunks[first >> kChunkBits]->slabs[(first & (kChunkSlots - 1)) >> slab_bits];
  }
  char* BlockAt(int64_t slot) const {
    return SlabAt(slot >> slab_bits).base + (slot & ((int64_t{1} << slab_bits) - 1)) * stride;
  }

  Slot* Find(StreamId id) const {
    const int64_t slot = static_cast<uint32_t>(id);
    if (slot >= slots) return nullptr;
    Slot* const found = &SlotAt(slot);
    return found->generation == static_cast<uint64_t>(id) >> 32 && (found->flags & kOpen) ? found
                                                                                          : nullptr;
  }

  Error Unknown(StreamId id) const {
    const int64_t slot = static_cast<uint32_t>(id);
    const int64_t generation = id >> 32;
    const std::string name = "stream " + Text(id);
    if (generation > 0 && slot < slots &&
        (SlotAt(slot).generation > generation || SlotAt(slot).generation == 0)) {
      return Error(ErrorCode::kUnknownStream,
                   name + " was closed: open another stream, and use its id");
    }
    return Error(ErrorCode::kUnknownStream,
                 name + " is not open in this session: use an id that opening a stream returned");
  }

  // Marks all streams as held by `lease`. Returns false, and marks none, if another lease holds one
  // or another lease has its turn.
  bool Mark(const StreamId* ids, int64_t count, Lease* lease) {
    int64_t fresh = 0;
    for (int64_t i = 0; i < count; ++i) {
      Slot* const slot = Find(ids[i]);
      if (slot == nullptr) {
        Unmark(lease, i);
        throw Unknown(ids[i]);
      }
      if (slot->flags & (kHeld | kWanted)) {
        if (slot->flags & kHeld) {
          // If this lease holds it, the stream was named before. This is rare, so other calls do
          // not pay for the search.
          Slot* const* const begin = lease->slots_.data();
          const int64_t first = std::find(begin, begin + i, slot) - begin;
          Unmark(lease, i);
          if (first == i) return false;
          throw Error(ErrorCode::kInvalidArgument,
                      "stream " + Text(ids[i]) + " is named twice, at places " + Text(first) +
                          " and " + Text(i) + ": a call may name each stream once");
        }
        if (next != lease) {
          Unmark(lease, i);
          return false;
        }
      }
      fresh += (slot->flags & kFresh) != 0;
      slot->flags |= kHeld;
      lease->slots_[i] = slot;
      lease->positions_[i] = slot->position;
      lease->blocks_[i] = BlockAt(static_cast<uint32_t>(ids[i]));
    }
    lease->count_ = count;
    lease->fresh_count_ = fresh;
    return true;
  }

  void Unmark(Lease* lease, int64_t count) {
    for (int64_t i = 0; i < count; ++i) lease->slots_[i]->flags &= ~kHeld;
  }

  // Marks all streams as held by `lease`. Waits while other leases hold any of them. Throws Error.
  void Hold(std::unique_lock<std::mutex>* lock, const StreamId* ids, int64_t count, Lease* lease) {
    if (Mark(ids, count, lease)) return;
    // A lease of many streams might never find all of them free while others take turns on them. So
    // one waiting lease at a time gets its turn: others do not take its streams.
    try {
      do {
        if (next == nullptr) {
          wanted.reserve(count);
          for (int64_t i = 0; i < count; ++i) {
            Slot* const slot = Find(ids[i]);
            if (slot == nullptr) continue;
            slot->flags |= kWanted;
            wanted.push_back(slot);
          }
          next = lease;
        }
        const WaitHooks* const hooks = wait_hooks.load(std::memory_order_acquire);
        void* const waited = hooks != nullptr ? hooks->begin() : nullptr;
        ++waiting;
        wake->wait(*lock);
        --waiting;
        if (waited != nullptr) {
          // A thread may hold what `end` waits for (Python's GIL) and want the mutex.
          lock->unlock();
          hooks->end(waited);
          lock->lock();
        }
      } while (!Mark(ids, count, lease));
    } catch (...) {
      EndTurn(lease);
      throw;
    }
    EndTurn(lease);
  }

  void EndTurn(const Lease* lease) {
    if (next != lease) return;
    for (Slot* slot : wanted) slot->flags &= ~kWanted;
    wanted.clear();
    next = nullptr;
    // Other waiting leases may get their turn now.
    if (waiting != 0) wake->notify_all();
  }

  void Link(Lease* lease) {
    lease->state_ = this;
    lease->thread_ = pthread_self();
    lease->previous_ = nullptr;
    lease->next_ = leases;
    if (leases != nullptr) leases->previous_ = lease;
    leases = lease;
  }

  void Unlink(Lease* lease) {
    (lease->previous_ != nullptr ? lease->previous_->next_ : leases) = lease->next_;
    if (lease->next_ != nullptr) lease->next_->previous_ = lease->previous_;
  }

  // Marks a block as used.
  void Use(Slot* slot) {
    if (!(slot->flags & kTouched)) ++touched;
    if (slot->flags & kIdle) idle_bytes -= stride;
    slot->flags = (slot->flags & ~(kFresh | kIdle)) | kTouched;
  }

  // Takes the lowest free slot. May throw bad_alloc, and then takes none.
  int64_t TakeSlot() {
    int64_t slot;
    if (!free.empty()) {
      slot = free.TakeLowest();
    } else {
      if (slots >= kMostSlots) {
        throw Error(ErrorCode::kTooManyStreams,
                    "all 2^32 - 1 slots for streams are used up: make a new session");
      }
      if (slots >> kChunkBits == static_cast<int64_t>(chunks.size())) {
        free.Grow((chunks.size() + 1) << kChunkBits);
        chunks.push_back(std::make_unique<Chunk>(kChunkSlots >> slab_bits));
      }
      slot = slots++;
    }
    Slab& slab = SlabAt(slot >> slab_bits);
    if (slab.used++ == 0 && spare == slot >> slab_bits) spare = kNoSlab;
    return slot;
  }

  // Frees a slot that TakeSlot took.
  void FreeSlot(int64_t slot) {
    if (SlotAt(slot).generation != 0) free.Add(slot);
    const int64_t number = slot >> slab_bits;
    Slab& slab = SlabAt(number);
    if (--slab.used != 0 || slab.base == nullptr) return;
    // Keep one empty slab, so that a stream that comes and goes does not make one each time. Keep
    // the lowest, as the lowest slots are taken first.
    if (spare == kNoSlab) {
      spare = number;
      return;
    }
    Detach(std::max(spare, number));
    spare = std::min(spare, number);
  }

  void Detach(int64_t number) {
    Slab& slab = SlabAt(number);
    const int64_t first = number << slab_bits;
    for (int64_t slot = first; slot < first + (int64_t{1} << slab_bits); ++slot) {
      if (SlotAt(slot).flags & kTouched) --touched;
      SlotAt(slot).flags &= ~kTouched;
    }
    loose.push_back(slab.base);  // ReserveLoose has made room
    slab.base = nullptr;
  }

  // May throw bad_alloc, before anything changes.
  void ReserveLoose(int64_t more) {
    const size_t needed = mapped + more;
    for (auto* slabs : {&loose, &kept}) {
      if (slabs->capacity() < needed) slabs->reserve(std::max(2 * slabs->capacity(), needed));
    }
  }

  // Closes a stream that the caller holds.
  void CloseSlot(int64_t number) {
    Slot& slot = SlotAt(number);
    slot.generation = slot.generation >= last_generation ? 0 : slot.generation + 1;
    --open;
    AbandonSlot(number);
  }

  // Frees a slot whose id was never given out, or is no longer valid.
  void AbandonSlot(int64_t number) {
    Slot& slot = SlotAt(number);
    if (slot.flags & kIdle) idle_bytes -= stride;
    slot.flags &= kTouched;
    FreeSlot(number);
  }

  // The functions from here on are called without `mutex`.

  // Opens all streams or none. `opening` must be held.
  void OpenStreams(int64_t count, StreamId* ids);
  void OpenBatch(int64_t count, StreamId* ids, bool publish);

  // `refusal` says why, and what to do.
  Error NoMemory(int64_t bytes, const std::string& refusal) const {
    return Error(ErrorCode::kTooManyStreams, "no memory for another stream: the system refused " +
                                                 Text(bytes) + " bytes for streams of " +
                                                 Text(block_bytes) + " bytes " + refusal);
  }

  char* Map() {
    std::string refusal;
    char* const base = memory->Map(slab_bytes, &refusal);
    if (base == nullptr) throw NoMemory(slab_bytes, refusal);
    return base;
  }

  // Unmaps slabs that no longer belong to slots.
  void UnmapLoose() {
    char* bases[64];
    for (;;) {
      int64_t count = 0;
      {
        std::lock_guard<std::mutex> lock(mutex);
        while (count < 64 && !loose.empty()) {
          bases[count++] = loose.back();
          loose.pop_back();
        }
        mapped -= count;
      }
      if (count == 0) return;
      // Unmap neighbours with one call.
      std::sort(bases, bases + count);
      for (int64_t i = 0; i < count;) {
        int64_t n = 1;
        while (i + n < count && bases[i + n] == bases[i] + n * slab_bytes) ++n;
        if (!memory->Unmap(bases[i], slab_bytes, n)) {
          std::lock_guard<std::mutex> lock(mutex);
          mapped += n;
          for (int64_t k = 0; k < n; ++k) kept.push_back(bases[i] + k * slab_bytes);
        }
        i += n;
      }
    }
  }

  void BeforeFork() override {
    opening.lock();
    mutex.lock();
  }
  void AfterFork() override {
    mutex.unlock();
    opening.unlock();
  }
  void InChild() override {
    // The waiting threads do not exist in the child, and the condition variable must not wait for
    // them.
    wake = new (wake_storage) std::condition_variable;
    waiting = 0;
    for (Slot* slot : wanted) slot->flags &= ~kWanted;
    wanted.clear();
    next = nullptr;
    for (Lease* lease = leases; lease != nullptr;) {
      Lease* const following = lease->next_;
      if (lease->thread_ != static_cast<uint64_t>(pthread_self())) {
        for (int64_t i = 0; i < lease->count_; ++i) CloseSlot(NumberOf(lease->slots_[i]));
        Unlink(lease);
        lease->state_ = nullptr;
        lease->count_ = 0;
      }
      lease = following;
    }
    mutex.unlock();
    opening.unlock();
    UnmapLoose();
  }

  int64_t NumberOf(const Slot* slot) const {
    for (size_t i = 0; i < chunks.size(); ++i) {
      const Slot* const first = chunks[i]->slots;
      if (std::less_equal<const Slot*>()(first, slot) &&
          std::less<const Slot*>()(slot, first + kChunkSlots)) {
        return static_cast<int64_t>(i << kChunkBits) + (slot - first);
      }
    }
    return 0;  // not reached: every slot lies in a chunk
  }

  const int64_t block_bytes, limit;
  const std::function<void(char*)> init;
  const std::shared_ptr<BlockMemory> memory;
  const uint32_t last_generation;
  const int64_t stride, slab_bits, slab_bytes;

  // Held while streams are opened, and taken before `mutex`. Slabs are made under it without
  // `mutex`, so steps go on.
  std::mutex opening;
  // Guards everything below. Held only briefly: never during a step, or while the system gives or
  // takes memory.
  mutable std::mutex mutex;
  alignas(std::condition_variable) char wake_storage[sizeof(std::condition_variable)];
  std::condition_variable* wake = new (wake_storage) std::condition_variable;
  int64_t waiting = 0;
  Lease* next = nullptr;      // gets its turn as soon as its streams are free
  std::vector<Slot*> wanted;  // the streams of `next`
  Lease* leases = nullptr;    // all leases that hold streams

  std::vector<std::unique_ptr<Chunk>> chunks;
  int64_t slots = 0;  // slots made so far
  FreeSlots free;     // those of them that are free
  int64_t open = 0;
  int64_t touched = 0;     // blocks
  int64_t idle_bytes = 0;  // bytes of kIdle blocks
  int64_t mapped = 0;      // slabs
  int64_t spare = kNoSlab;
  std::vector<char*> loose;  // slabs that no longer belong to slots
  std::vector<char*> kept;   // the same, but the system refused to unmap them
  std::vector<StreamId> defaults;
};

void StreamStore::State::OpenStreams(int64_t count, StreamId* ids) {
  {
    std::lock_guard<std::mutex> lock(mutex);
    if (limit != 0 && count > limit - open) {
      throw Error(ErrorCode::kTooManyStreams,
                  "no room for " + Text(count) + (count == 1 ? " stream: " : " streams: ") +
                      Text(open) + " of at most " + Text(limit) +
                      " are open: close some, or make the session with a larger limit (streams=)");
    }
    open += count;
  }
  int64_t done = 0;
  try {
    while (done < count) {
      const int64_t batch = std::min(count - done, kOpenBatch);
      OpenBatch(batch, ids + done, batch == count);
      done += batch;
    }
  } catch (...) {
    {
      std::lock_guard<std::mutex> lock(mutex);
      open -= count;
      for (int64_t i = 0; i < done; ++i) AbandonSlot(static_cast<uint32_t>(ids[i]));
    }
    UnmapLoose();
    throw;
  }
  if (count <= kOpenBatch) return;
  for (int64_t begin = 0; begin < count; begin += kOpenBatch) {
    std::lock_guard<std::mutex> lock(mutex);
    for (int64_t i = begin; i < std::min(begin + kOpenBatch, count); ++i) {
      SlotAt(static_cast<uint32_t>(ids[i])).flags |= kOpen;
    }
  }
}

// Takes slots and gives them memory. `open` already counts these streams. Without `publish` no one
// can use the ids yet.
void StreamStore::State::OpenBatch(int64_t count, StreamId* ids, bool publish) {
  int64_t numbers[kOpenBatch];  // slots
  int64_t missing[kOpenBatch];  // slabs to make
  char* bases[kOpenBatch];
  int64_t touch[kOpenBatch];  // slots whose blocks are to be touched
  int64_t taken = 0, slabs = 0, touches = 0;

  const auto finish = [&] {
    for (int64_t i = 0; i < count; ++i) {
      Slot& slot = SlotAt(numbers[i]);
      slot.flags |= publish ? kOpen | kFresh : kFresh;
      slot.position = 0;
      ids[i] = static_cast<int64_t>(slot.generation) << 32 | numbers[i];
    }
  };
  const auto undo = [&] {
    for (int64_t i = 0; i < touches; ++i) {
      SlotAt(touch[i]).flags &= ~(kTouched | kIdle);
      idle_bytes -= stride;
      --touched;
    }
    for (int64_t i = 0; i < taken; ++i) FreeSlot(numbers[i]);
  };

  std::unique_lock<std::mutex> lock(mutex);
  try {
    for (; taken < count; ++taken) {
      const int64_t number = TakeSlot();
      numbers[taken] = number;
      const int64_t slab = number >> slab_bits;
      // Slots are taken in ascending order.
      if (SlabAt(slab).base == nullptr && (slabs == 0 || missing[slabs - 1] != slab)) {
        missing[slabs++] = slab;
      }
      Slot& slot = SlotAt(number);
      if (!(slot.flags & kTouched) && idle_bytes + stride <= kTouchedBeforehand) {
        slot.flags |= kTouched | kIdle;
        idle_bytes += stride;
        ++touched;
        touch[touches++] = number;
      }
    }
    if (slabs == 0 && touches == 0) return finish();
    ReserveLoose(slabs);
  } catch (const std::bad_alloc&) {
    undo();
    throw NoMemory(sizeof(Chunk), "(out of memory): close streams");
  } catch (...) {
    undo();
    throw;
  }

  int64_t made = 0;
  for (; made < slabs && !kept.empty(); ++made) {
    bases[made] = kept.back();
    kept.pop_back();
  }
  const int64_t reused = made;
  lock.unlock();
  try {
    for (; made < slabs; ++made) bases[made] = Map();
  } catch (...) {
    for (int64_t i = reused; i < made; ++i) memory->Unmap(bases[i], slab_bytes, 1);
    lock.lock();
    for (int64_t i = 0; i < reused; ++i) kept.push_back(bases[i]);
    undo();
    lock.unlock();
    UnmapLoose();
    throw;
  }
  lock.lock();
  for (int64_t i = 0; i < slabs; ++i) SlabAt(missing[i]).base = bases[i];
  mapped += slabs - reused;
  char* blocks[kOpenBatch];
  for (int64_t i = 0; i < touches; ++i) blocks[i] = BlockAt(touch[i]);
  lock.unlock();
  for (int64_t i = 0; i < touches;) {
    int64_t n = 1;
    while (i + n < touches && blocks[i + n] == blocks[i] + n * stride) ++n;
    memory->Touch(blocks[i], blocks[i] + n * stride);
    i += n;
  }
  lock.lock();
  finish();
}

StreamStore::StreamStore(int64_t block_bytes, int64_t limit, std::function<void(char*)> init,
                         std::shared_ptr<BlockMemory> memory, uint32_t last_generation) {
  if (limit < 0) {
    throw Error(ErrorCode::kInvalidArgument,
                "the limit of open streams must be at least 1, or 0 for none, got " + Text(limit));
  }
  state_ = std::make_unique<State>(block_bytes, limit, std::move(init), std::move(memory),
                                   last_generation);
}

StreamStore::~StreamStore() = default;

void StreamStore::SetWaitHooks(const WaitHooks* hooks) {
  wait_hooks.store(hooks, std::memory_order_release);
}

void StreamStore::Open(int64_t count, StreamId* ids) {
  if (count < 0) {
    throw Error(ErrorCode::kInvalidArgument,
                "cannot open " + Text(count) + " streams, expected 0 or more");
  }
  std::lock_guard<std::mutex> opening(state_->opening);
  state_->OpenStreams(count, ids);
}

// A lease for one call. Small leases are reused by their thread: allocating would take longer than
// the call.
class StreamStore::LeaseOfThread {
 public:
  explicit LeaseOfThread(int64_t count) : lease_(count <= 4096 ? &Kept() : &own_) {
    lease_->Reserve(count);
  }
  Lease& lease() { return *lease_; }

 private:
  static Lease& Kept();

  Lease own_;
  Lease* lease_;
};

// Defined outside the class: a static variable of an inline function would be a symbol that the
// library exports.
StreamStore::Lease& StreamStore::LeaseOfThread::Kept() {
  static thread_local Lease lease;
  return lease;
}

void StreamStore::Close(const StreamId* ids, int64_t count) {
  LeaseOfThread reused(count);
  Lease& lease = reused.lease();
  bool unmap;
  {
    std::unique_lock<std::mutex> lock(state_->mutex);
    state_->Hold(&lock, ids, count, &lease);
    for (int64_t i = 0; i < count; ++i) state_->CloseSlot(static_cast<uint32_t>(ids[i]));
    lease.count_ = 0;
    unmap = !state_->loose.empty();
    if (state_->waiting != 0) state_->wake->notify_all();  // they may wait for these streams
  }
  if (unmap) state_->UnmapLoose();
}

void StreamStore::Clean(const StreamId* ids, int64_t count) {
  LeaseOfThread reused(count);
  Lease& lease = reused.lease();
  std::unique_lock<std::mutex> lock(state_->mutex);
  state_->Hold(&lock, ids, count, &lease);
  for (int64_t i = 0; i < count; ++i) {
    lease.slots_[i]->position = 0;
    lease.slots_[i]->flags = (lease.slots_[i]->flags & ~kHeld) | kFresh;
  }
  lease.count_ = 0;
}

void StreamStore::Defaults(int64_t count, StreamId* ids) {
  if (count < 0) {
    throw Error(ErrorCode::kInvalidArgument,
                "got a count of " + Text(count) + " streams, expected 0 or more");
  }
  State& state = *state_;
  const auto find = [&] {
    if (static_cast<int64_t>(state.defaults.size()) < count) return false;
    for (int64_t i = 0; i < count; ++i) {
      if (state.Find(state.defaults[i]) == nullptr) return false;
      ids[i] = state.defaults[i];
    }
    return true;
  };
  {
    std::lock_guard<std::mutex> lock(state.mutex);
    if (find()) return;
  }
  std::lock_guard<std::mutex> opening(state.opening);
  std::vector<int64_t> closed;
  {
    std::lock_guard<std::mutex> lock(state.mutex);
    for (int64_t i = 0; i < count; ++i) {
      if (i < static_cast<int64_t>(state.defaults.size())) {
        ids[i] = state.defaults[i];
        if (state.Find(ids[i]) != nullptr) continue;
      }
      closed.push_back(i);
    }
    state.defaults.reserve(count);
  }
  std::vector<StreamId> opened(closed.size());
  state.OpenStreams(opened.size(), opened.data());
  std::lock_guard<std::mutex> lock(state.mutex);
  if (static_cast<int64_t>(state.defaults.size()) < count) state.defaults.resize(count);
  for (size_t i = 0; i < closed.size(); ++i) {
    state.defaults[closed[i]] = ids[closed[i]] = opened[i];
  }
}

int64_t StreamStore::default_streams() const {
  std::lock_guard<std::mutex> lock(state_->mutex);
  return state_->defaults.size();
}

std::vector<StreamId> StreamStore::OpenDefaults() const {
  std::lock_guard<std::mutex> lock(state_->mutex);
  std::vector<StreamId> open;
  for (const StreamId id : state_->defaults) {
    if (state_->Find(id) != nullptr) open.push_back(id);
  }
  return open;
}

bool StreamStore::IsOpen(StreamId id) const {
  std::lock_guard<std::mutex> lock(state_->mutex);
  return state_->Find(id) != nullptr;
}

void StreamStore::Positions(const StreamId* ids, int64_t count, int64_t* positions) const {
  std::lock_guard<std::mutex> lock(state_->mutex);
  if (ids == nullptr) {
    const int64_t known = state_->defaults.size();
    for (int64_t i = 0; i < count; ++i) {
      const Slot* const slot = i < known ? state_->Find(state_->defaults[i]) : nullptr;
      positions[i] = slot != nullptr ? slot->position : 0;
    }
    return;
  }
  for (int64_t i = 0; i < count; ++i) {
    const Slot* const slot = state_->Find(ids[i]);
    if (slot == nullptr) throw state_->Unknown(ids[i]);
    positions[i] = slot->position;
  }
}

std::vector<StreamId> StreamStore::OpenStreams() const {
  std::vector<StreamId> ids;
  std::unique_lock<std::mutex> lock(state_->mutex);
  const int64_t slots = state_->slots;
  for (int64_t number = 0; number < slots; ++number) {
    // Let steps begin in between.
    if (number % kChunkSlots == 0) {
      lock.unlock();
      lock.lock();
    }
    const Slot& slot = state_->SlotAt(number);
    if (slot.flags & kOpen) ids.push_back(static_cast<int64_t>(slot.generation) << 32 | number);
  }
  return ids;
}

int64_t StreamStore::open_streams() const {
  std::lock_guard<std::mutex> lock(state_->mutex);
  return state_->open;
}

int64_t StreamStore::block_bytes() const { return state_->block_bytes; }

int64_t StreamStore::limit() const { return state_->limit; }

int64_t StreamStore::reserved_bytes() const {
  std::lock_guard<std::mutex> lock(state_->mutex);
  return state_->mapped * state_->slab_bytes;
}

int64_t StreamStore::used_bytes() const {
  std::lock_guard<std::mutex> lock(state_->mutex);
  return state_->touched * state_->stride;
}

int64_t StreamStore::overhead_bytes() const {
  const State& state = *state_;
  std::lock_guard<std::mutex> lock(state.mutex);
  const int64_t slabs = kChunkSlots >> state.slab_bits;
  const int64_t chunk = sizeof(State::Chunk) + slabs * sizeof(State::Slab);
  return sizeof(State) + state.chunks.size() * chunk + state.chunks.capacity() * sizeof(void*) +
         state.free.bytes() + (state.loose.capacity() + state.kept.capacity()) * sizeof(char*) +
         state.defaults.capacity() * sizeof(StreamId);
}

void StreamStore::Lease::Reserve(int64_t count) {
  if (count < 0) {
    throw Error(ErrorCode::kInvalidArgument,
                "got a count of " + Text(count) + " streams, expected 0 or more");
  }
  if (static_cast<int64_t>(slots_.size()) >= count) return;
  slots_.resize(count);
  blocks_.resize(count);
  positions_.resize(count);
  fresh_.resize(count);
}

void StreamStore::Lease::Take(StreamStore* store, const StreamId* ids, int64_t count) {
  Release();
  Reserve(count);
  State& state = *store->state_;
  int64_t fresh = 0;
  {
    std::unique_lock<std::mutex> lock(state.mutex);
    state.Hold(&lock, ids, count, this);
    if (fresh_count_ != 0) {
      for (int64_t i = 0; i < count; ++i) {
        if (slots_[i]->flags & kFresh) {
          state.Use(slots_[i]);
          fresh_[fresh++] = blocks_[i];
        }
      }
    }
    state.Link(this);
  }
  try {
    for (int64_t i = 0; i < fresh; ++i) state.init(fresh_[i]);
  } catch (...) {
    // A GPU may have failed. The next call initializes the blocks again.
    std::lock_guard<std::mutex> lock(state.mutex);
    const auto end = fresh_.begin() + fresh;
    for (int64_t i = 0; i < count; ++i) {
      if (std::find(fresh_.begin(), end, blocks_[i]) != end) slots_[i]->flags |= kFresh;
    }
    throw;
  }
}

void StreamStore::Lease::TakeDefaults(StreamStore* store, int64_t count) {
  if (static_cast<int64_t>(defaults_.size()) < count) defaults_.resize(count);
  for (;;) {
    store->Defaults(count, defaults_.data());
    try {
      return Take(store, defaults_.data(), count);
    } catch (const Error& error) {
      // Another thread closed one meanwhile: open it again.
      if (error.code() != ErrorCode::kUnknownStream) throw;
    }
  }
}

void StreamStore::Lease::Advance(int64_t steps) {
  for (int64_t i = 0; i < count_; ++i) positions_[i] += steps;
}

void StreamStore::Lease::SetPosition(int64_t i, int64_t position) { positions_[i] = position; }

void StreamStore::Lease::Release() {
  if (state_ == nullptr) return;
  State& state = *state_;
  bool wake;
  {
    std::lock_guard<std::mutex> lock(state.mutex);
    for (int64_t i = 0; i < count_; ++i) {
      slots_[i]->position = positions_[i];
      slots_[i]->flags &= ~kHeld;
    }
    state.Unlink(this);
    wake = state.waiting != 0;
  }
  state_ = nullptr;
  count_ = 0;
  if (wake) state.wake->notify_all();
}

}  // namespace continual_transformers
