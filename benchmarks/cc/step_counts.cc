// Takes steps of a session, for tools/step_counts.py, which counts their instructions by callgrind.
// Prints the heap allocations in the counted steps.
//
//   step_counts MODEL.safetensors STREAMS STEPS DTYPE
//
// DTYPE is that of weights and rings: float32, bfloat16 or int8. Two runs differ only in STEPS, so
// everything before the counted steps cancels out in the difference of their counts.

#include <atomic>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <random>
#include <string>
#include <vector>

#include "cc/session/plan.h"
#include "cc/session/session.h"

namespace {

std::atomic<int64_t> allocations{0};

}  // namespace

// glibc lets a program replace malloc, also for libraries. operator new calls it.
extern "C" {

void* __libc_malloc(size_t size);
void* __libc_calloc(size_t count, size_t size);
void* __libc_realloc(void* p, size_t size);
void* __libc_memalign(size_t alignment, size_t size);

void* malloc(size_t size) {
  ++allocations;
  return __libc_malloc(size);
}

void* calloc(size_t count, size_t size) {
  ++allocations;
  return __libc_calloc(count, size);
}

void* realloc(void* p, size_t size) {
  ++allocations;
  return __libc_realloc(p, size);
}

void* aligned_alloc(size_t alignment, size_t size) {
  ++allocations;
  return __libc_memalign(alignment, size);
}

int posix_memalign(void** p, size_t alignment, size_t size) {
  ++allocations;
  *p = __libc_memalign(alignment, size);
  return *p == nullptr ? ENOMEM : 0;
}

}  // extern "C"

namespace continual_transformers {
namespace {

void Run(const std::string& path, int64_t streams, int64_t steps, const std::string& dtype) {
  SessionOptions options;
  options.streams = streams;
  options.cache_dtype = options.weights_dtype = DTypeOf(dtype);
  Session session(ModelFile::Map(path), options);
  const Plan& plan = session.plan();
  const int64_t inputs = streams * plan.values[plan.inputs.at(0).value].size;
  constexpr int64_t kPrepared = 16;
  std::vector<float> x(kPrepared * inputs);
  std::vector<float> y(streams * plan.values[plan.outputs.at(0).value].size);
  std::mt19937 random(1);
  // No distribution of the standard library: its calls of the C library's functions differ from
  // processor to processor.
  for (float& value : x) value = static_cast<float>(random() % 2001) / 1000 - 1;
  std::vector<StreamId> ids(streams);
  session.Open(streams, ids.data());
  const auto step = [&](int64_t at) {
    const void* from[] = {x.data() + at % kPrepared * inputs};
    void* to[] = {y.data()};
    session.Step(ids.data(), streams, 1, from, to);
  };
  // Fill the windows, and let everything that is made once be made.
  const int64_t first = plan.receptive_field + kPrepared;
  for (int64_t at = 0; at < first; ++at) step(at);
  const int64_t before = allocations;
  for (int64_t at = first; at < first + steps; ++at) step(at);
  std::printf("%lld\n", static_cast<long long>(allocations - before));
}

}  // namespace
}  // namespace continual_transformers

int main(int argc, char** argv) {
  if (argc != 5) {
    std::fputs("usage: step_counts MODEL.safetensors STREAMS STEPS DTYPE\n", stderr);
    return 2;
  }
  try {
    continual_transformers::Run(argv[1], std::stoll(argv[2]), std::stoll(argv[3]), argv[4]);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
  return 0;
}
