// Times the attention kernel, one step of M streams on one thread, and its bound: a plain read of
// the same keys and values.
//
//   bazel run -c opt //benchmarks:single_output_benchmark

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <random>
#include <type_traits>
#include <vector>

#include "benchmark/benchmark.h"
#include "cc/attention/half.h"
#include "cc/attention/params.h"
#include "cc/attention/read_loop.h"
#include "cc/attention/single_output.h"
#include "cc/attention/targets.h"

namespace continual_transformers {
namespace {

// Sizes: window, heads, features of a head, streams.
void Sizes(benchmark::internal::Benchmark* b) {
  b->ArgNames({"N", "H", "D", "M"});
  using Sizes = std::vector<std::vector<int64_t>>;
  for (const auto& sizes : Sizes{{64, 4, 32, 1},
                                 {64, 4, 32, 256},
                                 {120, 16, 12, 1},
                                 {64, 8, 128, 1},
                                 {512, 8, 64, 1},
                                 {512, 8, 33, 1},
                                 {512, 8, 16, 1},
                                 {512, 8, 24, 1},
                                 {4096, 16, 64, 1}}) {
    b->Args(sizes);
  }
}

template <typename T, typename C>
struct Step {
  explicit Step(const benchmark::State& state)
      : window(state.range(0)),
        heads(state.range(1)),
        dim(state.range(2)),
        streams(state.range(3)),
        position(streams, 3 * window + window / 3),
        stream(streams),
        query(heads * dim),
        output(heads * dim),
        row(heads * dim),
        keys(streams * heads * window * dim),
        values(keys.size()),
        key_mask(streams * window, 1) {
    std::iota(stream.begin(), stream.end(), 0);
    std::mt19937 random(1);
    std::normal_distribution<float> normal;
    for (T& x : query) x = normal(random);
    const auto fill = [&](std::vector<C>* v) {
      for (C& x : *v) {
        const float value = normal(random);
        if constexpr (std::is_same_v<C, T>) {
          x = value;
        } else if constexpr (std::is_same_v<C, BFloat16>) {
          x.bits = BitsOfFloat(value) >> 16;
        } else {
          x.bits = 0x3800 | (random() & 0x83ff);  // +-[0.5, 1)
        }
      }
    };
    fill(&keys);
    fill(&values);
    fill(&row);
  }

  SingleOutputParams<T, C> Params() {
    SingleOutputParams<T, C> p = {};
    p.query = query.data();
    p.key = p.value = row.data();
    p.output = output.data();
    p.query_strides = p.key_strides = p.value_strides = p.output_strides = {0, 0, dim};
    p.key_cache = keys.data();
    p.value_cache = values.data();
    p.key_cache_strides = p.value_cache_strides = RowMajorRing(heads, window, dim);
    p.key_mask_cache = reinterpret_cast<bool*>(key_mask.data());
    p.position = position.data();
    p.streams = stream.data();
    p.num_streams = streams;
    p.num_steps = p.window_parts = 1;
    p.num_heads = heads;
    p.window = window;
    p.key_dim = p.value_dim = dim;
    p.scale = 0.125;
    p.update_state = true;
    return p;
  }

  int64_t window, heads, dim, streams;
  std::vector<int64_t> position;
  std::vector<int32_t> stream;
  std::vector<T> query, output;
  std::vector<C> row, keys, values;
  std::vector<char> key_mask;
};

template <typename T, typename C>
void Attention(benchmark::State& state) {
  Step<T, C> step(state);
  const SingleOutputParams<T, C> params = step.Params();
  for (auto _ : state) {
    SingleOutputAttention(params, 0, step.streams * step.heads);
    FinishSingleOutput(params);
    for (int64_t& position : step.position) ++position;
    benchmark::ClobberMemory();
  }
  state.SetBytesProcessed(state.iterations() * 2 * step.keys.size() * sizeof(C));
}

template <typename T, typename C>
void Read(benchmark::State& state) {
  const Step<T, C> step(state);
  const size_t bytes = step.keys.size() * sizeof(C);
  for (auto _ : state) {
    benchmark::DoNotOptimize(ReadLoop(step.keys.data(), bytes));
    benchmark::DoNotOptimize(ReadLoop(step.values.data(), bytes));
  }
  state.SetBytesProcessed(state.iterations() * 2 * bytes);
}

#define BOTH(T, C)                                                             \
  BENCHMARK_TEMPLATE(Read, T, C)->Apply(Sizes)->Unit(benchmark::kMicrosecond); \
  BENCHMARK_TEMPLATE(Attention, T, C)->Apply(Sizes)->Unit(benchmark::kMicrosecond)
BOTH(float, float);
BOTH(float, BFloat16);
BOTH(float, Float16);
BOTH(double, double);

}  // namespace
}  // namespace continual_transformers

int main(int argc, char** argv) {
  benchmark::AddCustomContext(
      "target", continual_transformers::NameOf(continual_transformers::TargetInUse()));
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 1;
  benchmark::RunSpecifiedBenchmarks();
  return 0;
}
