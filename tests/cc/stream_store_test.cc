// Tests ids, blocks and leases of streams. Also run it under AddressSanitizer and ThreadSanitizer:
// the threads here write to blocks with no lock but the leases'.

#include "cc/session/stream_store.h"

#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <future>
#include <map>
#include <memory>
#include <random>
#include <set>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "cc/session/error.h"
#include "gtest/gtest.h"

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define CONTINUAL_TRANSFORMERS_SANITIZED 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer)
#define CONTINUAL_TRANSFORMERS_SANITIZED 1
#endif
#endif

namespace continual_transformers {
namespace {

using Ids = std::vector<StreamId>;

void NoInit(char*) {}

Ids Open(StreamStore* store, int64_t count) {
  Ids ids(count);
  store->Open(count, ids.data());
  return ids;
}

StreamId OpenOne(StreamStore* store) { return Open(store, 1)[0]; }

void Close(StreamStore* store, const Ids& ids) { store->Close(ids.data(), ids.size()); }

void Take(StreamStore::Lease* lease, StreamStore* store, const Ids& ids) {
  lease->Take(store, ids.data(), ids.size());
}

std::vector<int64_t> Positions(const StreamStore& store, const Ids& ids) {
  std::vector<int64_t> positions(ids.size());
  store.Positions(ids.data(), ids.size(), positions.data());
  return positions;
}

void Step(StreamStore* store, const Ids& ids, int64_t steps = 1) {
  StreamStore::Lease lease;
  Take(&lease, store, ids);
  lease.Advance(steps);
}

int64_t Slot(StreamId id) { return id & 0xffffffff; }
int64_t Generation(StreamId id) { return id >> 32; }

// Expects an Error with this code whose message contains `part`.
void ExpectError(ErrorCode code, const std::string& part, const std::function<void()>& call) {
  try {
    call();
    ADD_FAILURE() << "no error";
  } catch (const Error& error) {
    EXPECT_EQ(static_cast<int>(error.code()), static_cast<int>(code)) << error.what();
    EXPECT_NE(std::string(error.what()).find(part), std::string::npos) << error.what();
  }
}

TEST(StreamStore, IdsAreTheLowestFreeSlots) {
  StreamStore store(64, 0, NoInit);
  const Ids ids = Open(&store, 70);
  for (int64_t i = 0; i < 70; ++i) {
    EXPECT_EQ(Slot(ids[i]), i);
    EXPECT_GT(Generation(ids[i]), 0);
  }
  Close(&store, {ids[65], ids[3], ids[40]});
  const Ids again = Open(&store, 4);
  EXPECT_EQ(Slot(again[0]), 3);
  EXPECT_EQ(Slot(again[1]), 40);
  EXPECT_EQ(Slot(again[2]), 65);
  EXPECT_EQ(Slot(again[3]), 70);
  EXPECT_EQ(store.open_streams(), 71);
}

TEST(StreamStore, ClosedIdsAreRefusedForEver) {
  StreamStore store(64, 0, NoInit);
  std::set<StreamId> seen;
  for (int i = 0; i < 100; ++i) {
    const StreamId id = OpenOne(&store);
    EXPECT_EQ(Slot(id), 0);
    EXPECT_TRUE(seen.insert(id).second);
    for (const StreamId old : seen) EXPECT_EQ(store.IsOpen(old), old == id);
    Close(&store, {id});
    EXPECT_FALSE(store.IsOpen(id));
  }
  const StreamId id = *seen.begin();
  StreamStore::Lease lease;
  ExpectError(ErrorCode::kUnknownStream, "was closed", [&] { Take(&lease, &store, {id}); });
  ExpectError(ErrorCode::kUnknownStream, "was closed", [&] { Close(&store, {id}); });
  ExpectError(ErrorCode::kUnknownStream, "was closed", [&] { store.Clean(&id, 1); });
  ExpectError(ErrorCode::kUnknownStream, "was closed", [&] { Positions(store, {id}); });
}

TEST(StreamStore, IdsThatNoOneGot) {
  StreamStore store(64, 0, NoInit);
  const StreamId id = OpenOne(&store);
  for (const StreamId other :
       {StreamId{0}, StreamId{1}, StreamId{-1}, id + 1, id + (int64_t{1} << 32),
        id - (int64_t{1} << 32), std::numeric_limits<int64_t>::min(),
        std::numeric_limits<int64_t>::max(), id | std::numeric_limits<int64_t>::min()}) {
    EXPECT_FALSE(store.IsOpen(other)) << other;
    StreamStore::Lease lease;
    ExpectError(ErrorCode::kUnknownStream, "not open in this session",
                [&] { Take(&lease, &store, {other}); });
  }
}

TEST(StreamStore, ASlotIsRetiredAfterItsLastGeneration) {
  StreamStore store(64, 0, NoInit, /*memory=*/nullptr, /*last_generation=*/3);
  const StreamId first = OpenOne(&store);
  StreamId id = first;
  for (int i = 0; i < 3; ++i) {
    EXPECT_EQ(Slot(id), 0);
    EXPECT_EQ(Generation(id), i + 1);
    Close(&store, {id});
    EXPECT_FALSE(store.IsOpen(id));
    id = OpenOne(&store);
  }
  EXPECT_EQ(Slot(id), 1);
  EXPECT_EQ(Generation(id), 1);
  ExpectError(ErrorCode::kUnknownStream, "was closed", [&] { Positions(store, {first}); });
  EXPECT_FALSE(store.IsOpen(0));  // the slot now has generation 0
}

TEST(StreamStore, TheLimitIsOfStreamsOpenAtOnce) {
  StreamStore store(64, 5, NoInit);
  const Ids ids = Open(&store, 3);
  ExpectError(ErrorCode::kTooManyStreams, "3 of at most 5", [&] { Open(&store, 3); });
  EXPECT_EQ(store.open_streams(), 3);
  Open(&store, 2);
  ExpectError(ErrorCode::kTooManyStreams, "5 of at most 5", [&] { OpenOne(&store); });
  Ids defaults(1);
  ExpectError(ErrorCode::kTooManyStreams, "", [&] { store.Defaults(1, defaults.data()); });
  Close(&store, {ids[1]});
  EXPECT_EQ(Slot(OpenOne(&store)), 1);
  EXPECT_EQ(store.open_streams(), 5);
  Open(&store, 0);
  ExpectError(ErrorCode::kInvalidArgument, "-1", [&] { store.Open(-1, nullptr); });
  ExpectError(ErrorCode::kInvalidArgument, "limit", [&] { StreamStore(64, -1, NoInit); });
}

TEST(StreamStore, ManyAreOpenedOrNone) {
  StreamStore store(64, 1000, NoInit);
  const Ids ids = Open(&store, 700);
  for (int i = 0; i < 700; ++i) EXPECT_TRUE(store.IsOpen(ids[i]));
  ExpectError(ErrorCode::kTooManyStreams, "", [&] { Open(&store, 301); });
  EXPECT_EQ(Slot(OpenOne(&store)), 700);
}

// Blocks of all sizes are aligned, do not overlap, never move while their stream is open, and keep
// what the caller wrote.
TEST(StreamStore, BlocksDoNotOverlapOrMove) {
  for (const int64_t bytes : {1, 63, 64, 65, 4096, 8192, 10000, 65536, 3000000, 5000000}) {
    StreamStore store(bytes, 0, NoInit);
    EXPECT_EQ(store.block_bytes(), bytes);
    const int64_t count = bytes > 1000000 ? 5 : 300;
    const Ids ids = Open(&store, count);
    std::vector<std::pair<char*, int64_t>> blocks;
    StreamStore::Lease lease;
    Take(&lease, &store, ids);
    ASSERT_EQ(lease.count(), count);
    for (int64_t i = 0; i < count; ++i) {
      blocks.push_back({lease.blocks()[i], i});
      EXPECT_EQ(reinterpret_cast<uintptr_t>(lease.blocks()[i]) % 64, 0u);
      std::memset(lease.blocks()[i], static_cast<int>(i % 251), bytes);
    }
    lease.Release();
    EXPECT_EQ(lease.count(), 0);
    for (int64_t i = count; i-- > 0;) {
      lease.Take(&store, &ids[i], 1);
      EXPECT_EQ(lease.blocks()[0], blocks[i].first);
      for (int64_t k = 0; k < bytes; k += std::max<int64_t>(1, bytes / 100)) {
        ASSERT_EQ(lease.blocks()[0][k], static_cast<char>(i % 251));
      }
      EXPECT_EQ(lease.blocks()[0][bytes - 1], static_cast<char>(i % 251));
    }
    std::sort(blocks.begin(), blocks.end());
    for (int64_t i = 1; i < count; ++i) {
      EXPECT_GE(blocks[i].first - blocks[i - 1].first, bytes);
    }
  }
}

TEST(StreamStore, PositionsChangeWhenTheLeaseIsReleased) {
  StreamStore store(64, 0, NoInit);
  const Ids ids = Open(&store, 3);
  StreamStore::Lease lease;
  Take(&lease, &store, {ids[2], ids[0]});
  EXPECT_EQ(lease.positions()[0], 0);
  lease.Advance(5);
  lease.Advance(2);
  lease.SetPosition(1, 70);
  EXPECT_EQ(lease.positions()[0], 7);
  EXPECT_EQ(Positions(store, ids), std::vector<int64_t>({0, 0, 0}));
  lease.Release();
  EXPECT_EQ(Positions(store, ids), std::vector<int64_t>({70, 0, 7}));
  Take(&lease, &store, ids);
  EXPECT_EQ(std::vector<int64_t>(lease.positions(), lease.positions() + 3),
            std::vector<int64_t>({70, 0, 7}));
  lease.Release();
  store.Clean(&ids[0], 1);
  EXPECT_EQ(Positions(store, ids), std::vector<int64_t>({0, 0, 7}));
  // A new stream begins at 0, also in a used slot.
  Close(&store, {ids[2]});
  EXPECT_EQ(Positions(store, {OpenOne(&store)}), std::vector<int64_t>({0}));
}

TEST(StreamStore, BlocksAreInitializedBeforeTheyAreFirstUsed) {
  std::vector<char*> initialized;
  StreamStore store(64, 0, [&](char* block) {
    initialized.push_back(block);
    std::memset(block, 7, 64);
  });
  const Ids ids = Open(&store, 3);
  EXPECT_TRUE(initialized.empty());
  StreamStore::Lease lease;
  Take(&lease, &store, {ids[1]});
  ASSERT_EQ(initialized.size(), 1u);
  EXPECT_EQ(initialized[0], lease.blocks()[0]);
  EXPECT_EQ(lease.blocks()[0][63], 7);
  lease.blocks()[0][63] = 1;
  lease.Release();
  Take(&lease, &store, {ids[1]});
  EXPECT_EQ(initialized.size(), 1u);
  EXPECT_EQ(lease.blocks()[0][63], 1);
  lease.Release();
  // A cleaned and a new stream are initialized once, when they are used next.
  store.Clean(&ids[1], 1);
  store.Clean(&ids[1], 1);
  EXPECT_EQ(initialized.size(), 1u);
  Take(&lease, &store, {ids[1]});
  EXPECT_EQ(initialized.size(), 2u);
  EXPECT_EQ(lease.blocks()[0][63], 7);
  lease.blocks()[0][63] = 1;
  lease.Release();
  Close(&store, {ids[1]});
  Take(&lease, &store, {OpenOne(&store)});
  EXPECT_EQ(initialized.size(), 3u);
  EXPECT_EQ(lease.blocks()[0][63], 7);
}

TEST(StreamStore, ALeaseThatIsRefusedHoldsNothing) {
  StreamStore store(64, 0, NoInit);
  const Ids ids = Open(&store, 3);
  StreamStore::Lease lease, other;
  ExpectError(ErrorCode::kUnknownStream, "", [&] { Take(&lease, &store, {ids[0], ids[1], 99}); });
  ExpectError(ErrorCode::kInvalidArgument, "named twice, at places 0 and 2",
              [&] { Take(&lease, &store, {ids[0], ids[1], ids[0]}); });
  ExpectError(ErrorCode::kInvalidArgument, "named twice", [&] { Close(&store, {ids[1], ids[1]}); });
  ExpectError(ErrorCode::kUnknownStream, "", [&] { Close(&store, {ids[0], 99}); });
  ExpectError(ErrorCode::kInvalidArgument, "named twice", [&] {
    const Ids twice = {ids[2], ids[2]};
    store.Clean(twice.data(), 2);
  });
  EXPECT_EQ(lease.count(), 0);
  // If streams were still held, this would wait for ever.
  Take(&other, &store, ids);
  EXPECT_EQ(other.count(), 3);
  other.Release();
  EXPECT_EQ(store.open_streams(), 3);
  // A call of no streams is allowed.
  Take(&other, &store, {});
  EXPECT_EQ(other.count(), 0);
}

TEST(StreamStore, DefaultStreams) {
  StreamStore store(64, 6, NoInit);
  const StreamId first = OpenOne(&store);
  Ids ids(3);
  EXPECT_EQ(store.default_streams(), 0);
  store.Defaults(2, ids.data());
  EXPECT_EQ(store.default_streams(), 2);
  EXPECT_EQ(Slot(ids[0]), 1);
  EXPECT_EQ(Slot(ids[1]), 2);
  Step(&store, {ids[1]}, 4);
  Ids more(4);
  store.Defaults(4, more.data());
  EXPECT_EQ(more[0], ids[0]);
  EXPECT_EQ(more[1], ids[1]);
  EXPECT_EQ(store.open_streams(), 5);
  // More than the limit: none is opened.
  Ids many(6);
  ExpectError(ErrorCode::kTooManyStreams, "", [&] { store.Defaults(6, many.data()); });
  EXPECT_EQ(store.default_streams(), 4);
  EXPECT_EQ(store.open_streams(), 5);
  // The next call that needs a closed default stream opens it again.
  Close(&store, {more[1], first});
  std::vector<int64_t> positions(6, -1);
  store.Positions(nullptr, 6, positions.data());
  EXPECT_EQ(positions, std::vector<int64_t>({0, 0, 0, 0, 0, 0}));
  store.Defaults(1, ids.data());
  EXPECT_EQ(store.open_streams(), 3);
  StreamStore::Lease lease;
  lease.TakeDefaults(&store, 3);
  lease.Advance(2);
  lease.Release();
  store.Defaults(3, ids.data());
  EXPECT_EQ(ids[0], more[0]);
  EXPECT_NE(ids[1], more[1]);
  EXPECT_EQ(ids[2], more[2]);
  EXPECT_EQ(Positions(store, ids), std::vector<int64_t>({2, 2, 2}));
}

// Random calls on stores with several block sizes, compared with a map: which streams are open,
// their positions, the contents of their blocks, and that the lowest free slot is taken.
TEST(StreamStore, RandomCallsAgainstAMap) {
  struct Stream {
    int64_t position = 0;
    unsigned char content = 0;  // 0: fresh
  };
  for (const int64_t bytes : {40, 5000, 700000}) {
    std::mt19937 random(static_cast<uint32_t>(bytes));
    const int64_t most = bytes > 100000 ? 40 : 700;
    const auto below = [&](int64_t n) { return static_cast<int64_t>(random() % n); };
    StreamStore store(bytes, 0, [&](char* block) { std::memset(block, 0, bytes); });
    std::map<StreamId, Stream> model;
    Ids closed;
    std::set<int64_t> used;
    StreamStore::Lease lease;
    const auto some = [&](int64_t n) {
      Ids ids;
      for (const auto& [id, stream] : model) ids.push_back(id);
      std::shuffle(ids.begin(), ids.end(), random);
      ids.resize(std::min<size_t>(n, ids.size()));
      return ids;
    };
    for (int call = 0; call < 2000; ++call) {
      // Alternate between few and many streams, so that slabs become empty.
      const bool grow = call / 500 % 2 == 0;
      const int64_t what = below(10);
      if (what < 3) {
        const int64_t count = below(grow ? 20 : 3);
        if (static_cast<int64_t>(model.size()) + count > most) continue;
        int64_t slot = 0;
        for (const StreamId id : Open(&store, count)) {
          while (used.count(slot)) ++slot;
          ASSERT_EQ(Slot(id), slot);
          used.insert(slot);
          ASSERT_TRUE(model.emplace(id, Stream()).second);
        }
      } else if (what < 5) {
        const Ids ids = some(below(grow ? 3 : 20));
        Close(&store, ids);
        for (const StreamId id : ids) {
          model.erase(id);
          used.erase(Slot(id));
          closed.push_back(id);
        }
      } else if (what < 6) {
        const Ids ids = some(3);
        store.Clean(ids.data(), ids.size());
        for (const StreamId id : ids) model[id] = Stream();
      } else {
        const Ids ids = some(below(30));
        Take(&lease, &store, ids);
        const int64_t steps = below(3);
        for (size_t i = 0; i < ids.size(); ++i) {
          Stream& stream = model[ids[i]];
          char* const block = lease.blocks()[i];
          ASSERT_EQ(lease.positions()[i], stream.position);
          ASSERT_EQ(static_cast<unsigned char>(block[0]), stream.content);
          ASSERT_EQ(static_cast<unsigned char>(block[bytes / 2]), stream.content);
          ASSERT_EQ(static_cast<unsigned char>(block[bytes - 1]), stream.content);
          stream.content = static_cast<unsigned char>(1 + below(255));
          stream.position += steps;
          std::memset(block, stream.content, bytes);
        }
        lease.Advance(steps);
        lease.Release();
      }
      ASSERT_EQ(store.open_streams(), static_cast<int64_t>(model.size()));
      if (!closed.empty()) {
        ASSERT_FALSE(store.IsOpen(closed[below(closed.size())]));
      }
      if (call % 50 == 0) {
        Ids ids;
        std::vector<int64_t> positions;
        for (const auto& [id, stream] : model) ids.push_back(id);
        std::sort(ids.begin(), ids.end(), [](auto a, auto b) { return Slot(a) < Slot(b); });
        for (const StreamId id : ids) positions.push_back(model[id].position);
        ASSERT_EQ(store.OpenStreams(), ids);
        ASSERT_EQ(Positions(store, ids), positions);
      }
    }
    Close(&store, some(most));
    EXPECT_EQ(store.open_streams(), 0);
    EXPECT_LE(store.reserved_bytes(), 4 << 20);
  }
}

TEST(StreamStore, SlabsThatEmptyAreGivenBack) {
  const int64_t bytes = 100000;
  StreamStore store(bytes, 0, NoInit);
  const Ids ids = Open(&store, 1000);
  Step(&store, ids);
  EXPECT_GE(store.reserved_bytes(), 1000 * bytes);
  EXPECT_LE(store.reserved_bytes(), 1000 * bytes * 1.02 + (4 << 20));
  EXPECT_GE(store.used_bytes(), 1000 * bytes);
  EXPECT_LE(store.used_bytes(), 1000 * bytes * 1.02);
  // `rest` keeps the slabs of the first two hundred streams, and of every fiftieth.
  Ids some, rest;
  for (size_t i = 0; i < ids.size(); ++i) (i >= 200 && i % 50 != 0 ? some : rest).push_back(ids[i]);
  Close(&store, some);
  EXPECT_GE(store.reserved_bytes(), 200 * bytes);
  Close(&store, rest);
  EXPECT_LE(store.reserved_bytes(), 4 << 20);
  EXPECT_LE(store.used_bytes(), 4 << 20);
  // The slab that is kept is the lowest: opening one stream makes no new one.
  const int64_t reserved = store.reserved_bytes();
  OpenOne(&store);
  EXPECT_EQ(store.reserved_bytes(), reserved);
}

// Sanitizers keep shadows of all memory, and reserve address space.
#ifndef CONTINUAL_TRANSFORMERS_SANITIZED

int64_t ResidentBytes() {
  FILE* const file = std::fopen("/proc/self/statm", "r");
  long size = 0, resident = 0;
  if (file == nullptr || std::fscanf(file, "%ld %ld", &size, &resident) != 2) std::abort();
  std::fclose(file);
  return resident * sysconf(_SC_PAGESIZE);
}

TEST(StreamStore, MemoryOfStreamsThatAreNotStepped) {
  const int64_t before = ResidentBytes();
  StreamStore store(200000, 0, [](char* block) { std::memset(block, 1, 64); });
  const Ids ids = Open(&store, 100000);
  const int64_t opened = ResidentBytes() - before;
  EXPECT_LT(opened, 50 << 20);
  EXPECT_LT(store.overhead_bytes(), 8 << 20);
  // Neither cleaning nor closing touches their blocks.
  store.Clean(ids.data(), ids.size());
  Close(&store, ids);
  EXPECT_LT(ResidentBytes() - before, 50 << 20);
}

TEST(StreamStore, MemoryOfStreamsInUseIsTheirBlocks) {
  for (const int64_t bytes : {20000, 65536, 200000}) {
    const int64_t before = ResidentBytes();
    StreamStore store(bytes, 0, NoInit);
    const Ids ids = Open(&store, 1000);
    StreamStore::Lease lease;
    Take(&lease, &store, ids);
    for (int64_t i = 0; i < 1000; ++i) std::memset(lease.blocks()[i], 1, bytes);
    lease.Release();
    EXPECT_LT(ResidentBytes() - before, 1000 * bytes * 1.02 + (1 << 20));
    Close(&store, ids);
    EXPECT_LT(ResidentBytes() - before, 6 << 20);
  }
}

// Runs `child` in a new process, and returns its result.
int ExitStatus(const std::function<int()>& child) {
  const pid_t pid = fork();
  if (pid == 0) _exit(child());
  int status = 0;
  waitpid(pid, &status, 0);
  return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

// With `ulimit -v`, streams open until memory runs out, then opening is refused. It works again
// after others were closed.
TEST(StreamStore, LimitedAddressSpace) {
  EXPECT_EQ(ExitStatus([] {
              // 64 MiB more than the process uses now.
              long pages = 0;
              FILE* const file = std::fopen("/proc/self/statm", "r");
              if (file == nullptr || std::fscanf(file, "%ld", &pages) != 1) return 1;
              std::fclose(file);
              const rlim_t most = pages * sysconf(_SC_PAGESIZE) + (64 << 20);
              const rlimit limit = {most, most};
              if (setrlimit(RLIMIT_AS, &limit) != 0) return 2;
              StreamStore store(100000, 0, NoInit);
              Ids ids;
              try {
                for (;;) ids.push_back(OpenOne(&store));
              } catch (const Error& error) {
                if (error.code() != ErrorCode::kTooManyStreams) return 3;
                if (std::string(error.what()).find("ulimit") == std::string::npos) return 4;
              }
              if (ids.size() < 300) return 5;
              if (store.open_streams() != static_cast<int64_t>(ids.size())) return 6;
              Step(&store, ids);
              // Many at once: all or none.
              Close(&store, {ids.begin() + 200, ids.end()});
              ids.resize(200);
              try {
                Open(&store, 1000);
                return 7;
              } catch (const Error& error) {
                if (error.code() != ErrorCode::kTooManyStreams) return 8;
              }
              if (store.open_streams() != 200) return 9;
              if (Slot(Open(&store, 300)[299]) != 499) return 10;
              Step(&store, ids);
              return Positions(store, ids)[199] == 2 ? 0 : 11;
            }),
            0);
}

// A child has the parent's streams, except those that another thread held.
TEST(StreamStore, Fork) {
  StreamStore store(5000, 0, NoInit);
  const Ids ids = Open(&store, 4);
  Step(&store, ids, 3);
  StreamStore::Lease own;
  Take(&own, &store, {ids[3]});
  std::promise<void> held, done;
  std::thread other([&] {
    StreamStore::Lease lease;
    Take(&lease, &store, {ids[1]});
    held.set_value();
    done.get_future().wait();
  });
  held.get_future().wait();
  // Another thread waits for the held stream when the process forks.
  std::thread waits([&] { Step(&store, {ids[1], ids[0]}); });
  std::this_thread::sleep_for(std::chrono::milliseconds(20));
  EXPECT_EQ(ExitStatus([&] {
              alarm(20);  // instead of waiting for ever
              if (store.IsOpen(ids[1])) return 1;
              if (!store.IsOpen(ids[3])) return 2;
              own.Advance(1);
              own.Release();
              Step(&store, {ids[0], ids[2], ids[3]});
              if (Positions(store, {ids[0], ids[2], ids[3]}) != std::vector<int64_t>({4, 4, 5})) {
                return 3;
              }
              const StreamId id = OpenOne(&store);
              if (Slot(id) != 1 || id == ids[1]) return 4;
              // Threads of the child wait for one another.
              StreamStore::Lease lease;
              Take(&lease, &store, {id});
              std::thread thread([&] { Step(&store, {id}); });
              std::this_thread::sleep_for(std::chrono::milliseconds(20));
              lease.Advance(1);
              lease.Release();
              thread.join();
              if (Positions(store, {id})[0] != 2) return 5;
              StreamStore another(64, 0, NoInit);
              Step(&another, Open(&another, 3));
              return 0;
            }),
            0);
  done.set_value();
  other.join();
  waits.join();
  own.Release();
  EXPECT_EQ(Positions(store, ids), std::vector<int64_t>({4, 4, 3, 3}));
}

// Forks at any moment of other threads' calls.
TEST(StreamStore, ForkAmongBusyThreads) {
  StreamStore store(5000, 0, NoInit);
  const Ids ids = Open(&store, 8);
  std::atomic<bool> stop{false};
  std::vector<std::thread> threads;
  for (int t = 0; t < 3; ++t) {
    threads.emplace_back([&, t] {
      std::mt19937 random(t);
      while (!stop) {
        Step(&store, {ids[random() % 4], ids[4 + random() % 4]});
        Close(&store, Open(&store, 1 + random() % 300));
      }
    });
  }
  for (int i = 0; i < 50; ++i) {
    EXPECT_EQ(ExitStatus([&] {
                alarm(20);
                const Ids open = store.OpenStreams();
                Step(&store, open);
                Close(&store, open);
                Step(&store, Open(&store, 10));
                return store.open_streams() == 10 ? 0 : 1;
              }),
              0);
  }
  stop = true;
  for (std::thread& thread : threads) thread.join();
}

#endif  // CONTINUAL_TRANSFORMERS_SANITIZED

TEST(StreamStoreThreads, AnotherLeaseWaitsForItsStreamsOnly) {
  StreamStore store(64, 0, NoInit);
  const Ids ids = Open(&store, 4);
  StreamStore::Lease lease;
  Take(&lease, &store, {ids[0], ids[1]});
  // Streams that are not held: no waiting.
  Step(&store, {ids[2], ids[3]});
  Close(&store, {ids[3]});
  OpenOne(&store);
  EXPECT_EQ(Positions(store, {ids[0]})[0], 0);
  // Held streams: these end when the lease is released, and not before.
  std::atomic<int> finished{0};
  std::vector<std::thread> threads;
  threads.emplace_back([&] { Step(&store, {ids[2], ids[0]}), ++finished; });
  threads.emplace_back([&] { store.Clean(&ids[1], 1), ++finished; });
  threads.emplace_back([&] { Step(&store, {ids[1]}), ++finished; });
  std::this_thread::sleep_for(std::chrono::milliseconds(50));
  EXPECT_EQ(finished, 0);
  lease.Advance(10);
  lease.Release();
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(Positions(store, {ids[0], ids[2]}), std::vector<int64_t>({11, 2}));
  EXPECT_LE(Positions(store, {ids[1]})[0], 1);
}

TEST(StreamStoreThreads, WhoWaitsForAStreamThatIsClosedIsRefused) {
  StreamStore store(64, 0, NoInit);
  const Ids ids = Open(&store, 2);
  StreamStore::Lease lease;
  Take(&lease, &store, ids);
  std::thread closes([&] { Close(&store, {ids[0]}); });
  std::this_thread::sleep_for(std::chrono::milliseconds(20));
  EXPECT_TRUE(store.IsOpen(ids[0]));
  // Either closing comes first, or the step waits together with it and finds the stream closed.
  std::thread steps([&] {
    try {
      Step(&store, {ids[1], ids[0]});
    } catch (const Error& error) {
      EXPECT_EQ(static_cast<int>(error.code()), static_cast<int>(ErrorCode::kUnknownStream));
    }
  });
  std::this_thread::sleep_for(std::chrono::milliseconds(20));
  lease.Release();
  closes.join();
  steps.join();
  EXPECT_FALSE(store.IsOpen(ids[0]));
  // The refused call left nothing behind.
  Step(&store, {ids[1], OpenOne(&store)});
}

// A lease of all streams gets its turn among threads that step single ones without a pause.
TEST(StreamStoreThreads, ManyStreamsAreNotStarvedByFew) {
  StreamStore store(64, 0, NoInit);
  const Ids ids = Open(&store, 40);
  std::atomic<bool> stop{false};
  std::atomic<int> started{0};
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&, t] {
      StreamStore::Lease lease;
      for (int64_t i = 0; !stop; ++i) {
        lease.Take(&store, &ids[10 * t + i % 10], 1);
        started += i == 0;
        if (i % 16 == 0) std::this_thread::yield();  // sometimes the holder does not run
        lease.Advance(1);
        lease.Release();
      }
    });
  }
  while (started < 4) std::this_thread::yield();
  for (int i = 0; i < 200; ++i) Step(&store, ids);
  stop = true;
  for (std::thread& thread : threads) thread.join();
}

// Each block holds a count that only the stream's holder may change: no step is lost or torn while
// other threads open and close streams.
TEST(StreamStoreThreads, StepsOpensClosesAndCleansAtOnce) {
  constexpr int kThreads = 4;
  constexpr int64_t kShared = 12, kWords = 200;
  constexpr int kCalls = 1500;
  StreamStore store(kWords * 8, 0, [](char* block) { std::memset(block, 0, kWords * 8); });
  const Ids shared = Open(&store, kShared);
  std::vector<std::atomic<int64_t>> steps(kShared);
  // One step: every word of the block counts up, and matches the position.
  const auto step = [&](const StreamStore::Lease& lease) {
    for (int64_t i = 0; i < lease.count(); ++i) {
      int64_t* const words = reinterpret_cast<int64_t*>(lease.blocks()[i]);
      for (int64_t k = 0; k < kWords; ++k) {
        if (words[k]++ != lease.positions()[i]) return false;
      }
    }
    return true;
  };
  std::atomic<int> wrong{0};
  std::vector<std::thread> threads;
  for (int t = 0; t < kThreads; ++t) {
    threads.emplace_back([&, t] {
      std::mt19937 random(t);
      StreamStore::Lease lease;
      std::map<StreamId, int64_t> own;  // only this thread knows these
      for (int call = 0; call < kCalls; ++call) {
        const int what = random() % 8;
        if (what == 0) {
          for (const StreamId id : Open(&store, random() % 4)) own[id] = 0;
        } else if (what == 1 && !own.empty()) {
          Close(&store, {own.begin()->first});
          own.erase(own.begin());
        } else if (what == 2 && !own.empty()) {
          store.Clean(&own.rbegin()->first, 1);
          own.rbegin()->second = 0;
        } else {
          Ids ids;
          std::vector<int64_t> places;
          for (int64_t i = random() % 3; i < kShared; i += 1 + random() % 6) places.push_back(i);
          std::shuffle(places.begin(), places.end(), random);
          for (const int64_t i : places) ids.push_back(shared[i]);
          for (auto& [id, position] : own) {
            ids.push_back(id);
            ++position;
          }
          Take(&lease, &store, ids);
          wrong += !step(lease);
          lease.Advance(1);
          lease.Release();
          for (const int64_t i : places) ++steps[i];
        }
        for (const auto& [id, position] : own) wrong += Positions(store, {id})[0] != position;
      }
      Ids ids;
      for (const auto& [id, position] : own) ids.push_back(id);
      Close(&store, ids);
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(wrong, 0);
  std::vector<int64_t> expected(steps.begin(), steps.end());
  EXPECT_EQ(Positions(store, shared), expected);
  EXPECT_EQ(store.open_streams(), kShared);
}

TEST(StreamStoreThreads, DefaultStreamsAreOpenedOnce) {
  for (int round = 0; round < 20; ++round) {
    StreamStore store(64, 0, NoInit);
    std::vector<std::thread> threads;
    for (int t = 0; t < 4; ++t) {
      threads.emplace_back([&] {
        StreamStore::Lease lease;
        for (int i = 1; i <= 50; ++i) {
          lease.TakeDefaults(&store, i);
          lease.Advance(1);
          lease.Release();
        }
      });
    }
    for (std::thread& thread : threads) thread.join();
    EXPECT_EQ(store.open_streams(), 50);
    std::vector<int64_t> positions(50), expected;
    store.Positions(nullptr, 50, positions.data());
    for (int64_t i = 0; i < 50; ++i) expected.push_back(4 * (50 - i));
    EXPECT_EQ(positions, expected);
  }
}

}  // namespace
}  // namespace continual_transformers
