// Tests threads that step streams of one cache at once. Run it under ThreadSanitizer,
// `--config=tsan`.

#include "cc/attention/threads.h"

#include <cstdint>
#include <functional>
#include <mutex>
#include <random>
#include <thread>
#include <vector>

#include "cc/attention/co_si_mha_step.h"
#include "cc/attention/params.h"
#include "cc/attention/single_output.h"
#include "gtest/gtest.h"

namespace continual_transformers {
namespace {

constexpr int64_t kHeads = 3, kDim = 5, kFeatures = kHeads * kDim;

// Divides tasks as TensorFlow does, but always: one thread per task.
Threads ThreadPerTask(int64_t count) {
  return {count, [](int64_t tasks, int64_t, const std::function<void(int64_t, int64_t)>& f) {
            std::vector<std::thread> threads;
            for (int64_t i = 0; i < tasks; ++i) threads.emplace_back(f, i, i + 1);
            for (std::thread& thread : threads) thread.join();
          }};
}

const Threads kOneThread = {
    1, [](int64_t tasks, int64_t, const std::function<void(int64_t, int64_t)>& f) { f(0, tasks); }};

// A layer's weights, and the cache of its streams.
class Layer {
 public:
  Layer(int64_t streams, int64_t window)
      : window_(window),
        key_cache_(streams * kFeatures * window),
        value_cache_(key_cache_.size()),
        key_mask_cache_(streams * window),
        position_(streams),
        locks_(streams) {
    std::mt19937 random(5);
    std::normal_distribution<float> normal(0, 0.3f);
    for (auto& kernel : kernels_) {
      kernel.resize(kFeatures * kFeatures);
      for (float& w : kernel) w = normal(random);
    }
  }

  // Takes one step of one stream with the input `x` for every feature. Calls on one stream take
  // turns, as the op's calls do with the locks of its variables.
  std::vector<float> Step(int32_t stream, float x, const Threads& threads) {
    std::lock_guard<std::mutex> lock(locks_[stream]);
    const std::vector<float> input(kFeatures, x);
    std::vector<float> output(kFeatures);
    const auto projection = [&](int i, const float* from) {
      return Projection<float, float>{from, kernels_[i].data(), nullptr, kFeatures};
    };
    CoSiMhaStep<float, float, float> step = {};
    step.query = projection(0, input.data());
    step.key = projection(1, input.data());
    step.value = projection(2, input.data());
    step.output = projection(3, nullptr);
    step.result = output.data();
    step.output_features = kFeatures;
    auto& p = step.attention;
    p.key_cache = key_cache_.data();
    p.value_cache = value_cache_.data();
    p.key_cache_strides = p.value_cache_strides = HeadMajorRing(kHeads, window_, kDim);
    p.key_mask_cache = reinterpret_cast<bool*>(key_mask_cache_.data());
    p.position = position_.data();
    p.streams = &stream;
    p.num_streams = p.num_steps = 1;
    p.num_heads = kHeads;
    p.window = window_;
    p.key_dim = p.value_dim = kDim;
    p.scale = 0.4f;
    p.update_state = true;
    TakeCoSiMhaStep(step, threads);
    ++position_[stream];
    return output;
  }

 private:
  int64_t window_;
  std::vector<float> kernels_[4];
  std::vector<float> key_cache_, value_cache_;
  std::vector<char> key_mask_cache_;
  std::vector<int64_t> position_;
  std::vector<std::mutex> locks_;
};

TEST(ThreadsTest, StreamsOfOneCacheStepAtOnce) {
  constexpr int kStreams = 4, kSteps = 25;
  Layer layer(kStreams, 7), alone(kStreams, 7);
  std::vector<std::vector<float>> last(kStreams);
  std::vector<std::thread> threads;
  for (int32_t s = 0; s < kStreams; ++s) {
    threads.emplace_back([&, s] {
      for (int i = 0; i < kSteps; ++i) last[s] = layer.Step(s, s + 0.1f * i, kOneThread);
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (int32_t s = 0; s < kStreams; ++s) {
    std::vector<float> expected;
    for (int i = 0; i < kSteps; ++i) expected = alone.Step(s, s + 0.1f * i, kOneThread);
    EXPECT_EQ(last[s], expected);
  }
}

TEST(ThreadsTest, ThreadsStepTheSameStream) {
  constexpr int kThreads = 4, kSteps = 25;
  Layer layer(1, 7), alone(1, 7);
  std::vector<std::thread> threads;
  for (int i = 0; i < kThreads; ++i) {
    threads.emplace_back([&] {
      for (int j = 0; j < kSteps; ++j) layer.Step(0, 0.5f, kOneThread);
    });
  }
  for (std::thread& thread : threads) thread.join();
  // All steps are the same, so the order does not matter.
  for (int i = 0; i < kThreads * kSteps; ++i) alone.Step(0, 0.5f, kOneThread);
  EXPECT_EQ(layer.Step(0, 1, kOneThread), alone.Step(0, 1, kOneThread));
}

TEST(ThreadsTest, TasksOfOneStepOnManyThreads) {
  Layer shared(1, 5000), alone(1, 5000);
  for (int i = 0; i < 12; ++i) {
    EXPECT_EQ(shared.Step(0, 0.1f * i, ThreadPerTask(2)), alone.Step(0, 0.1f * i, kOneThread));
  }
  // There are more threads than heads, so windows are divided, and merging the parts rounds
  // differently.
  const auto got = shared.Step(0, 2, ThreadPerTask(8)), expected = alone.Step(0, 2, kOneThread);
  for (int64_t i = 0; i < kFeatures; ++i) EXPECT_NEAR(got[i], expected[i], 1e-5);
}

}  // namespace
}  // namespace continual_transformers
