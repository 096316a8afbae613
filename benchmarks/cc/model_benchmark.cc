// The C++ contestants of the whole-model race: a session's step, the kernels back to back, and the
// bound. The program takes the same requests as bench/worker.py, one line of JSON each.
//
//   model_benchmark session_cpp|kernels|bound THREADS

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <iostream>
#include <memory>
#include <numeric>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "benchmarks/cc/fma_loop.h"
#include "benchmarks/cc/measure.h"
#include "benchmarks/cc/raw_model.h"
#include "cc/attention/co_si_encoder_step.h"
#include "cc/attention/dense.h"
#include "cc/attention/elementwise.h"
#include "cc/attention/read_loop.h"
#include "cc/session/session.h"
#include "nlohmann/json.hpp"

namespace continual_transformers {
namespace {

using Json = nlohmann::json;

constexpr float kEpsilon = 1e-6f;
constexpr double kChunkMicroseconds = 200;  // Faster steps are sampled several at a time.

// A model that takes steps.
class Contestant {
 public:
  virtual ~Contestant() = default;
  // x [M, F] -> outputs [M, 10]
  virtual const float* Step(const float* x) = 0;
};

class SessionContestant : public Contestant {
 public:
  SessionContestant(const ModelSize& size, const std::string& directory, int64_t threads)
      : session_(ModelFile::Map(directory + "/model.safetensors"), Options(size, threads)),
        ids_(size.streams),
        outputs_(size.streams * kModelOutputs) {
    session_.Open(size.streams, ids_.data());
  }

  const float* Step(const float* x) override {
    const void* inputs[] = {x};
    void* outputs[] = {outputs_.data()};
    session_.Step(ids_.data(), static_cast<int64_t>(ids_.size()), 1, inputs, outputs);
    return outputs_.data();
  }

 private:
  static SessionOptions Options(const ModelSize& size, int64_t threads) {
    SessionOptions options;
    options.streams = size.streams;
    options.threads = threads;
    return options;
  }

  Session session_;
  std::vector<StreamId> ids_;
  std::vector<float> outputs_;
};

// The kernels of whole layers, back to back, as a C++ program took a step before sessions existed.
class KernelsContestant : public Contestant {
 public:
  KernelsContestant(const ModelSize& size, const std::string& directory)
      : size_(size),
        model_(size, directory + "/weights.bin"),
        x_(size.streams * size.embed_dim),
        y_(x_.size()),
        outputs_(size.streams * kModelOutputs),
        streams_(size.streams),
        position_(size.streams) {
    std::iota(streams_.begin(), streams_.end(), 0);
    for (const BlockWeights& block : model_.blocks) {
      const size_t ring = x_.size() * size.window;
      rings_.push_back({std::vector<float>(ring), std::vector<float>(ring),
                        std::vector<char>(size.streams * size.window)});
      steps_.push_back(Encoder(block, &rings_.back()));
    }
  }

  const float* Step(const float* x) override {
    const int64_t e = size_.embed_dim;
    Product(model_.embedding, x, size_.features, e, x_.data());
    const float* row = model_.positions + position_[0] % size_.position_rows() * e;
    for (int64_t m = 0; m < size_.streams; ++m) Add(x_.data() + m * e, row, e);
    float* from = x_.data();
    float* to = y_.data();
    for (auto& step : steps_) {
      step.attention.query.input = step.attention.key.input = step.attention.value.input = from;
      step.result = to;
      TakeCoSiEncoderStep(step, threads_);
      std::swap(from, to);
    }
    Product(model_.classifier, from, e, kModelOutputs, outputs_.data());
    for (int64_t& position : position_) ++position;
    return outputs_.data();
  }

 private:
  struct Rings {
    std::vector<float> key, value;
    std::vector<char> key_mask;
  };

  CoSiEncoderStep<float, float, float> Encoder(const BlockWeights& block, Rings* rings) {
    const int64_t e = size_.embed_dim;
    const auto projection = [&](const DenseWeights& layer) {
      return Projection<float, float>{nullptr, layer.kernel, layer.bias, e};
    };
    CoSiEncoderStep<float, float, float> step = {};
    step.attention.query = projection(block.query);
    step.attention.key = projection(block.key);
    step.attention.value = projection(block.value);
    step.attention.output = projection(block.output);
    step.attention.output_features = e;
    auto& attention = step.attention.attention;
    attention.num_streams = size_.streams;
    attention.num_steps = 1;
    attention.num_heads = size_.heads;
    attention.window = size_.window;
    attention.key_dim = attention.value_dim = size_.head();
    attention.scale = 1 / std::sqrt(static_cast<float>(size_.head()));
    attention.update_state = true;
    attention.key_cache = rings->key.data();
    attention.value_cache = rings->value.data();
    attention.key_cache_strides = attention.value_cache_strides =
        RowMajorRing(size_.heads, size_.window, size_.head());
    attention.key_mask_cache = reinterpret_cast<bool*>(rings->key_mask.data());
    attention.position = position_.data();
    attention.streams = streams_.data();
    step.attention_norm = {block.attention_norm.gamma, block.attention_norm.beta, kEpsilon};
    step.output_norm = {block.output_norm.gamma, block.output_norm.beta, kEpsilon};
    step.hidden = projection(block.feed_forward);
    step.output = projection(block.feed_forward_output);
    step.hidden_features = e;
    step.activation = {Activation::kGelu};
    return step;
  }

  void Product(const DenseWeights& layer, const float* x, int64_t inputs, int64_t outputs,
               float* y) const {
    const Dense<float> dense = {x, layer.kernel, layer.bias, y, size_.streams, inputs, outputs};
    TakeDenseTasks(dense, 0, DenseTasks(outputs));
  }

  ModelSize size_;
  RawModel model_;
  std::vector<float> x_, y_, outputs_;
  std::vector<int32_t> streams_;
  std::vector<int64_t> position_;
  std::vector<Rings> rings_;
  std::vector<CoSiEncoderStep<float, float, float>> steps_;
  const Threads threads_ = {1, [](int64_t tasks, int64_t,
                                  const std::function<void(int64_t, int64_t)>& f) { f(0, tasks); }};
};

// The sum over a step's parts, each dense product and each attention, of the larger of two times: a
// plain read of the part's bytes, from where they are when it runs, and its multiply-adds at the
// rate of a loop in registers.
class Bound {
 public:
  explicit Bound(const ModelSize& size) : size_(size) {
    const int64_t e = size.embed_dim;
    const auto dense = [&](int64_t inputs, int64_t outputs) {
      parts_.push_back({weights_bytes_, inputs * outputs * 4, -1, size.streams * inputs * outputs});
      weights_bytes_ += (inputs * outputs * 4 + 63) / 64 * 64;
    };
    ring_bytes_ = 2 * size.window * e * 4;
    dense(size.features, e);
    for (int64_t i = 0; i < size.layers; ++i) {
      for (int product = 0; product < 3; ++product) dense(e, e);
      parts_.push_back({i * ring_bytes_, ring_bytes_, i, 2 * size.streams * size.window * e});
      for (int product = 0; product < 3; ++product) dense(e, e);
    }
    dense(e, kModelOutputs);
    weights_.resize(weights_bytes_, 1);
    rings_.resize(size.streams * size.layers * ring_bytes_, 1);
    Classify();
  }

  // Reads everything once as a step would. Returns the microseconds of the parts that are bound by
  // reading.
  double ReadOnce() {
    double time = 0;
    size_t i = 0;
    while (i < parts_.size()) {
      if (parts_[i].computes) {
        Read(parts_[i++]);
        continue;
      }
      // Read the clock once for several parts in a row.
      const double start = Now();
      while (i < parts_.size() && !parts_[i].computes) Read(parts_[i++]);
      time += std::max(0.0, Now() - start - clock_);
    }
    return time;
  }

  // Returns the microseconds of a million multiply-adds.
  static double MultiplyAddOnce() {
    const double start = Now();
    const FmaLoopResult result = FmaLoop(2000);
    const double time = Now() - start;
    sink_ = sink_ + result.sum;
    return time * 1e6 / static_cast<double>(result.multiply_adds);
  }

  // Returns the millions of multiply-adds in the parts that are bound by them.
  double computed() const {
    double sum = 0;
    for (const Part& part : parts_) sum += part.computes ? part.multiply_adds / 1e6 : 0;
    return sum;
  }

 private:
  struct Part {
    int64_t offset, bytes;
    int64_t layer;  // of an attention; -1: a dense product
    int64_t multiply_adds;
    bool computes = false;
  };

  void Read(const Part& part) {
    unsigned char sum = 0;
    if (part.layer < 0) {
      sum = ReadLoop(weights_.data() + part.offset, part.bytes);
    } else {
      for (int64_t m = 0; m < size_.streams; ++m) {
        const char* ring = rings_.data() + m * size_.layers * ring_bytes_ + part.offset;
        sum ^= ReadLoop(ring, part.bytes / 2) ^ ReadLoop(ring + part.bytes / 2, part.bytes / 2);
      }
    }
    sink_ = sink_ + sum;
  }

  void Classify() {
    std::vector<std::vector<double>> times(parts_.size());
    std::vector<double> rates;
    const int passes = size_.streams > 16 ? 15 : 200;
    for (int pass = 0; pass < passes; ++pass) {
      for (size_t i = 0; i < parts_.size(); ++i) {
        const double start = Now();
        Read(parts_[i]);
        times[i].push_back(Now() - start - clock_);
      }
      rates.push_back(MultiplyAddOnce());
    }
    const double rate = Median(rates);
    for (size_t i = 0; i < parts_.size(); ++i) {
      parts_[i].computes = parts_[i].multiply_adds / 1e6 * rate > Median(times[i]);
    }
  }

  const ModelSize size_;
  const double clock_ = ClockMicroseconds();
  int64_t weights_bytes_ = 0, ring_bytes_ = 0;
  std::vector<Part> parts_;
  std::vector<char> weights_, rings_;
  static volatile float sink_;
};

volatile float Bound::sink_ = 0;

// One contestant at one size, driven by requests.
class Worker {
 public:
  Worker(std::string name, int64_t threads) : name_(std::move(name)), threads_(threads) {}

  Json Answer(const std::string& what, const Json& arguments) {
    if (what == "prepare") return Prepare(arguments);
    if (what == "check") return Check();
    if (what == "burst") return Burst(arguments["seconds"], arguments["least"]);
    if (what == "versions") return Json::object();
    throw std::invalid_argument("expected prepare, check, burst or versions, but got " + what);
  }

 private:
  Json Prepare(const Json& arguments) {
    const auto& size = arguments["size"];
    size_ = {size[0], size[1], size[2], size[3], size[4], size[5]};
    const std::string directory = arguments["directory"];
    contestant_.reset();  // Free the previous size's first.
    bound_.reset();
    inputs_ = ReadFloats(directory + "/inputs.bin");
    at_ = 0;
    if (name_ == "session_cpp") {
      contestant_ = std::make_unique<SessionContestant>(size_, directory, threads_);
    } else if (name_ == "kernels") {
      contestant_ = std::make_unique<KernelsContestant>(size_, directory);
    } else if (name_ == "bound") {
      bound_ = std::make_unique<Bound>(size_);
    } else {
      throw std::invalid_argument("expected session_cpp, kernels or bound, but got " + name_);
    }
    return Json::object();
  }

  const float* Take() {
    const int64_t step = size_.streams * size_.features;
    const int64_t steps = static_cast<int64_t>(inputs_.size()) / step;
    return contestant_->Step(inputs_.data() + at_++ % steps * step);
  }

  // Returns the outputs of the first and the last stream, once the receptive field is full.
  Json Check() {
    if (bound_ != nullptr) return Json::object();
    const int64_t steps = size_.receptive_field() + 3;
    const float* outputs = nullptr;
    for (int64_t step = 0; step < steps; ++step) outputs = Take();
    Json rows = Json::array();
    for (int64_t row = 0; row < size_.streams; row += std::max<int64_t>(1, size_.streams - 1)) {
      const float* y = outputs + row * kModelOutputs;
      rows.push_back(std::vector<float>(y, y + kModelOutputs));
    }
    return {{"steps", steps}, {"outputs", rows}, {"positions", true}};
  }

  Json Burst(double seconds, int least) {
    if (bound_ != nullptr) return BurstOfBound(seconds, least);
    const double one = Microseconds([&] { Take(); }, 1);
    const int chunk = static_cast<int>(std::clamp(kChunkMicroseconds / one, 1.0, 64.0));
    std::vector<double> times;
    const double end = Now() + 1e6 * seconds;
    while (static_cast<int>(times.size()) < least || Now() < end) {
      times.push_back(Microseconds([&] { Take(); }, chunk));
    }
    return {{"median", Median(times)}, {"steps", times.size() * chunk}};
  }

  Json BurstOfBound(double seconds, int least) {
    std::vector<double> reads, rates;
    const double end = Now() + 1e6 * seconds;
    while (static_cast<int>(reads.size()) < least || Now() < end) {
      reads.push_back(bound_->ReadOnce());
      if (reads.size() % 16 == 1) rates.push_back(Bound::MultiplyAddOnce());
    }
    const double computing = Median(rates) * bound_->computed();
    return {{"median", Median(reads) + computing},
            {"steps", reads.size()},
            {"reading", Median(reads)},
            {"computing", computing},
            {"gigaflops", 2e3 / Median(rates)}};
  }

  std::string name_;
  int64_t threads_;
  ModelSize size_ = {};
  std::vector<float> inputs_;
  int64_t at_ = 0;
  std::unique_ptr<Contestant> contestant_;
  std::unique_ptr<Bound> bound_;
};

int Main(int argc, char** argv) {
  if (argc != 3) {
    std::cerr << "usage: model_benchmark session_cpp|kernels|bound THREADS\n";
    return 2;
  }
  Worker worker(argv[1], std::stoll(argv[2]));
  std::string line;
  while (std::getline(std::cin, line)) {
    Json answer;
    try {
      const Json request = Json::parse(line);
      answer = worker.Answer(request.at(0), request.at(1));
    } catch (const std::exception& error) {
      answer = {{"error", error.what()}};
    }
    std::cout << answer.dump() << std::endl;
  }
  return 0;
}

}  // namespace
}  // namespace continual_transformers

int main(int argc, char** argv) { return continual_transformers::Main(argc, argv); }
