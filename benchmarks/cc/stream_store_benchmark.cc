// Times opening, closing and holding streams, with few and with many streams open.
//
// A held stream is an open one. Blocks have the size of three layers of 64 features and a window of
// 64 steps: 96 KiB. Streams that are never stepped take no memory, so a million fit.

#include <benchmark/benchmark.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "cc/session/stream_store.h"

namespace continual_transformers {
namespace {

constexpr int64_t kBlockBytes = 3 * 2 * 64 * 64 * 4;

// A store and its open streams, in random order.
struct Held {
  explicit Held(int64_t count, int64_t block_bytes = kBlockBytes)
      : store(block_bytes, 0, [](char* block) { std::memset(block, 0, 64); }), ids(count) {
    store.Open(count, ids.data());
    std::shuffle(ids.begin(), ids.end(), std::mt19937(1));
  }
  StreamStore store;
  std::vector<StreamId> ids;
};

// Returns a store with `count` open streams. It is made once, as opening a million takes a while.
Held& HeldStreams(int64_t count) {
  static std::unique_ptr<Held> held;
  static int64_t held_count = 0;
  if (held_count != count) {
    held.reset();
    held = std::make_unique<Held>(count);
    held_count = count;
  }
  return *held;
}

// Opens one stream in the slot that was just freed, so its memory is ready.
void OpenAndClose(benchmark::State& state) {
  Held& held = HeldStreams(state.range(0));
  for (auto _ : state) {
    StreamId id;
    held.store.Open(1, &id);
    held.store.Close(&id, 1);
  }
}
BENCHMARK(OpenAndClose)->Arg(10)->Arg(1000)->Arg(1000000);

// Closes a random stream and opens one in its place.
void CloseAndOpenAnywhere(benchmark::State& state) {
  Held& held = HeldStreams(state.range(0));
  size_t i = 0;
  for (auto _ : state) {
    held.store.Close(&held.ids[i], 1);
    held.store.Open(1, &held.ids[i]);
    i = i + 1 == held.ids.size() ? 0 : i + 1;
  }
}
BENCHMARK(CloseAndOpenAnywhere)->Arg(10)->Arg(1000)->Arg(1000000);

// Opens and closes a thousand streams beyond those held, which makes and frees their slabs.
void OpenAndCloseWithSlabs(benchmark::State& state) {
  Held& held = HeldStreams(state.range(0));
  std::vector<StreamId> ids(1000);
  for (auto _ : state) {
    for (StreamId& id : ids) held.store.Open(1, &id);
    for (StreamId& id : ids) held.store.Close(&id, 1);
  }
  state.SetItemsProcessed(state.iterations() * ids.size());
}
BENCHMARK(OpenAndCloseWithSlabs)->Arg(10)->Arg(1000000);

// The cost of a step's streams. Arguments: streams held, streams in the step.
void TakeAndRelease(benchmark::State& state) {
  Held held(state.range(0), /*block_bytes=*/64);
  const int64_t count = state.range(1);
  StreamStore::Lease lease;
  for (auto _ : state) {
    lease.Take(&held.store, held.ids.data(), count);
    lease.Advance(1);
    lease.Release();
  }
  state.SetItemsProcessed(state.iterations() * count);
}
BENCHMARK(TakeAndRelease)
    ->Args({10, 1})
    ->Args({1000, 64})
    ->Args({1000, 256})
    ->Args({1000000, 1})
    ->Args({1000000, 256});

// The same by two threads, each with its own streams.
void TakeAndReleaseThreads(benchmark::State& state) {
  static Held held(64, 64);
  StreamStore::Lease lease;
  for (auto _ : state) {
    lease.Take(&held.store, &held.ids[state.thread_index()], 1);
    lease.Advance(1);
    lease.Release();
  }
}
BENCHMARK(TakeAndReleaseThreads)->Threads(1)->Threads(2)->UseRealTime();

// A stream's first step has page faults for the memory that it touches: here one row in each of six
// rings. Argument: 1 for streams that got memory when they were opened.
void FirstTouch(benchmark::State& state) {
  const bool beforehand = state.range(0);
  std::vector<StreamId> ids(100);
  StreamStore::Lease lease;
  for (auto _ : state) {
    state.PauseTiming();
    StreamStore store(kBlockBytes, 0, [](char*) {});
    if (!beforehand) {
      std::vector<StreamId> others(1000);
      store.Open(1000, others.data());
    }
    store.Open(ids.size(), ids.data());
    state.ResumeTiming();
    for (const StreamId id : ids) {
      lease.Take(&store, &id, 1);
      for (int ring = 0; ring < 6; ++ring) {
        std::memset(lease.blocks()[0] + ring * kBlockBytes / 6, 1, 256);
      }
      lease.Release();
    }
    state.PauseTiming();
    store.Close(ids.data(), ids.size());
    state.ResumeTiming();
  }
  state.SetItemsProcessed(state.iterations() * ids.size());
}
BENCHMARK(FirstTouch)->Arg(1)->Arg(0)->Iterations(50);

}  // namespace
}  // namespace continual_transformers

BENCHMARK_MAIN();
