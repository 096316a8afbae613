// The C++ contestants of the whole-model race: a session's step, the kernels back to back, and the
// bound. The program takes the same requests as bench/worker.py, one line of JSON each.
//
//   model_benchmark session_cpp|kernels|bound THREADS
//
// For benchmarks/examples/example_benchmark.py it also takes any model file, and the bound of any
// parts.

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

#include "benchmarks/cc/bound.h"
#include "benchmarks/cc/raw_model.h"
#include "benchmarks/cc/requests.h"
#include "cc/attention/co_si_encoder_step.h"
#include "cc/attention/dense.h"
#include "cc/attention/elementwise.h"
#include "cc/session/plan.h"
#include "cc/session/session.h"
#include "nlohmann/json.hpp"

namespace continual_transformers {
namespace {

using Json = nlohmann::json;

constexpr float kEpsilon = 1e-6f;

// A model that takes steps.
class Contestant {
 public:
  virtual ~Contestant() = default;
  // x [M, F] -> outputs [M, 10]
  virtual const float* Step(const float* x) = 0;
};

// Any model file with one input and outputs of float32. The outputs lie one after another.
class SessionContestant : public Contestant {
 public:
  SessionContestant(const std::string& path, int64_t streams, int64_t threads)
      : session_(ModelFile::Map(path), Options(streams, threads)), ids_(streams) {
    const Plan& plan = session_.plan();
    std::vector<int64_t> starts;
    int64_t size = 0;
    for (const Port& output : plan.outputs) {
      starts.push_back(size);
      size += streams * plan.values[output.value].size;
    }
    outputs_.resize(size);
    for (const int64_t start : starts) to_.push_back(outputs_.data() + start);
    session_.Open(streams, ids_.data());
  }

  const float* Step(const float* x) override {
    const void* inputs[] = {x};
    session_.Step(ids_.data(), static_cast<int64_t>(ids_.size()), 1, inputs, to_.data());
    return outputs_.data();
  }

  int64_t outputs() const { return static_cast<int64_t>(outputs_.size()); }

 private:
  static SessionOptions Options(int64_t streams, int64_t threads) {
    SessionOptions options;
    options.streams = streams;
    options.threads = threads;
    return options;
  }

  Session session_;
  std::vector<StreamId> ids_;
  std::vector<float> outputs_;
  std::vector<void*> to_;
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

std::vector<BoundPart> PartsOf(const ModelSize& size) {
  const int64_t m = size.streams, e = size.embed_dim;
  std::vector<BoundPart> parts = {DensePart(m, size.features, e)};
  for (int64_t i = 0; i < size.layers; ++i) {
    for (int product = 0; product < 3; ++product) parts.push_back(DensePart(m, e, e));
    parts.push_back(AttentionPart(m, size.window, e, sizeof(float)));
    for (int product = 0; product < 3; ++product) parts.push_back(DensePart(m, e, e));
  }
  parts.push_back(DensePart(m, e, kModelOutputs));
  return parts;
}

// One contestant at one size, driven by requests.
class Worker {
 public:
  Worker(std::string name, int64_t threads) : name_(std::move(name)), threads_(threads) {}

  Json Answer(const std::string& what, const Json& arguments) {
    if (what == "prepare") return Prepare(arguments);
    if (what == "prepare_file") return PrepareFile(arguments);
    if (what == "prepare_parts") return PrepareParts(arguments);
    if (what == "check") return Check();
    if (what == "steps") return TakeSteps(arguments["steps"]);
    if (what == "burst") return TimeBurst(arguments["seconds"], arguments["least"]);
    if (what == "versions") return Json::object();
    throw std::invalid_argument(
        "expected prepare, prepare_file, prepare_parts, check, steps, burst or versions, but got " +
        what);
  }

 private:
  Json Prepare(const Json& arguments) {
    const auto& size = arguments["size"];
    size_ = {size[0], size[1], size[2], size[3], size[4], size[5]};
    const std::string directory = arguments["directory"];
    Forget();
    inputs_ = ReadFloats(directory + "/inputs.bin");
    step_ = size_.streams * size_.features;
    if (name_ == "session_cpp") {
      contestant_ = std::make_unique<SessionContestant>(directory + "/model.safetensors",
                                                        size_.streams, threads_);
    } else if (name_ == "kernels") {
      contestant_ = std::make_unique<KernelsContestant>(size_, directory);
    } else if (name_ == "bound") {
      bound_ = std::make_unique<Bound>(PartsOf(size_), size_.streams);
    } else {
      throw std::invalid_argument("expected session_cpp, kernels or bound, but got " + name_);
    }
    return Json::object();
  }

  // One stream of the model file of a directory. A step has `step` inputs of 4 bytes each.
  Json PrepareFile(const Json& arguments) {
    const std::string directory = arguments["directory"];
    Forget();
    inputs_ = ReadFloats(directory + "/inputs.bin");
    step_ = arguments["step"];
    auto made = std::make_unique<SessionContestant>(directory + "/model.safetensors", 1, threads_);
    outputs_ = made->outputs();
    contestant_ = std::move(made);
    return Json::object();
  }

  // The bound of one stream's step: `parts` are lists of weight bytes, stream bytes, multiply-adds.
  Json PrepareParts(const Json& arguments) {
    Forget();
    std::vector<BoundPart> parts;
    for (const Json& part : arguments["parts"]) parts.push_back({part[0], part[1], part[2]});
    bound_ = std::make_unique<Bound>(parts, 1);
    return Json::object();
  }

  void Forget() {
    contestant_.reset();
    bound_.reset();
    at_ = 0;
  }

  const float* Take() {
    const int64_t steps = static_cast<int64_t>(inputs_.size()) / step_;
    return contestant_->Step(inputs_.data() + at_++ % steps * step_);
  }

  // Takes steps of a model file, and returns the outputs of the last one.
  Json TakeSteps(int64_t steps) {
    const float* outputs = nullptr;
    for (int64_t step = 0; step < steps; ++step) outputs = Take();
    return {{"outputs", std::vector<float>(outputs, outputs + outputs_)}};
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

  Json TimeBurst(double seconds, int least) {
    if (bound_ != nullptr) return BurstOfBound(bound_.get(), seconds, least);
    return Burst([&] { Take(); }, seconds, least);
  }

  std::string name_;
  int64_t threads_;
  ModelSize size_ = {};
  std::vector<float> inputs_;
  int64_t step_ = 0;     // how many inputs a step takes
  int64_t outputs_ = 0;  // how many outputs a step of a model file has
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
  AnswerRequests([&](const std::string& what, const Json& arguments) {
    return worker.Answer(what, arguments);
  });
  return 0;
}

}  // namespace
}  // namespace continual_transformers

int main(int argc, char** argv) { return continual_transformers::Main(argc, argv); }
