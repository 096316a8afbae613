// Times the retroactive attention kernel, one step of one head on one thread: updating all rows,
// and recomputing them.
//
//   bazel run -c opt //benchmarks:retroactive_benchmark

#include <cmath>
#include <cstdint>
#include <random>
#include <vector>

#include "benchmark/benchmark.h"
#include "cc/attention/params.h"
#include "cc/attention/retroactive.h"
#include "cc/attention/targets.h"

namespace continual_transformers {
namespace {

void Sizes(benchmark::internal::Benchmark* b) {
  b->ArgNames({"N", "D", "std"});
  for (int64_t window : {1, 2, 3, 4, 8, 16, 64, 120, 512, 1000}) {
    for (int64_t dim : {12, 64, 128}) b->Args({window, dim, 1});
  }
  // With larger logits, an update recomputes more rows exactly.
  for (int64_t std : {4, 16, 36}) {
    for (int64_t window : {16, 64, 512}) b->Args({window, 64, std});
  }
}

// Steps whose logits have a given standard deviation, each with its own query, key and value.
template <typename T>
class Steps {
 public:
  explicit Steps(const benchmark::State& state)
      : window_(state.range(0)),
        dim_(state.range(1)),
        std_(state.range(2)),
        inputs_(kInputs * 3 * dim_),
        rings_(3 * window_ * dim_),
        key_mask_(window_),
        softmax_(4 * window_),
        weighted_sum_(window_ * dim_),
        output_(window_ * dim_) {
    std::mt19937 random(1);
    std::normal_distribution<float> normal;
    for (T& x : inputs_) x = normal(random);
  }

  void Take(bool recompute) {
    const T* input = inputs_.data() + position_ % kInputs * 3 * dim_;
    RetroactiveParams<T> p = {};
    p.query = input;
    p.key = input + dim_;
    p.value = input + 2 * dim_;
    p.query_cache = rings_.data();
    p.key_cache = p.query_cache + window_ * dim_;
    p.value_cache = p.key_cache + window_ * dim_;
    p.query_cache_strides = p.key_cache_strides = p.value_cache_strides =
        RowMajorRing(1, window_, dim_);
    p.key_mask_cache = reinterpret_cast<bool*>(key_mask_.data());
    p.position = &position_;
    p.streams = &stream_;
    p.softmax = softmax_.data();
    p.weighted_sum = weighted_sum_.data();
    p.made_with = made_with_;
    p.output = output_.data();
    p.output_row_stride = dim_;
    p.num_streams = p.num_steps = p.num_heads = 1;
    p.window = window_;
    p.key_dim = p.value_dim = dim_;
    p.scale = std_ / std::sqrt(T(dim_));
    p.recompute = recompute;
    p.update_state = true;
    RetroactiveAttention(p, 0, 1);
    FinishRetroactive(p);
    ++position_;
  }

  int64_t window() const { return window_; }

 private:
  static constexpr int64_t kInputs = 1021;
  int64_t window_, dim_, std_, position_ = 0;
  int32_t stream_ = 0;
  std::vector<T> inputs_, rings_;
  std::vector<char> key_mask_;
  std::vector<double> softmax_, weighted_sum_;
  double made_with_[2] = {};
  std::vector<T> output_;
};

template <typename T, bool recompute>
void Step(benchmark::State& state) {
  Steps<T> steps(state);
  for (int64_t i = 0; i < 2 * steps.window(); ++i) steps.Take(/*recompute=*/false);
  for (auto _ : state) {
    steps.Take(recompute);
    benchmark::ClobberMemory();
  }
}

#define BOTH(T)                                                                                  \
  BENCHMARK_TEMPLATE(Step, T, /*recompute=*/false)->Apply(Sizes)->Unit(benchmark::kMicrosecond); \
  BENCHMARK_TEMPLATE(Step, T, /*recompute=*/true)->Apply(Sizes)->Unit(benchmark::kMicrosecond)
BOTH(float);
BOTH(double);

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
