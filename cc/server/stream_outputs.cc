#include "cc/server/stream_outputs.h"

#include <algorithm>
#include <cstring>
#include <mutex>
#include <vector>

#include "cc/attention/half.h"
#include "cc/server/http_infer.h"

namespace continual_transformers::server {
namespace {

// Numbers that a person can look at.
constexpr int64_t kMostNumbers = 64;

double NumberAt(const char* data, DType dtype) {
  const auto read = [data](auto value) {
    std::memcpy(&value, data, sizeof(value));
    return value;
  };
  switch (dtype) {
    case DType::kFloat32:
      return read(float{});
    case DType::kFloat64:
      return read(double{});
    case DType::kInt32:
      return read(int32_t{});
    case DType::kInt64:
      return static_cast<double>(read(int64_t{}));
    case DType::kBool:
      return read(uint8_t{});
    case DType::kInt8:
      return read(int8_t{});
    case DType::kBFloat16:
      return Widen(BFloat16{read(uint16_t{})});
    case DType::kFloat16:
      return Widen(Float16{read(uint16_t{})});
  }
  return 0;
}

}  // namespace

class StreamOutputs::Watcher : public StreamWatcher {
 public:
  explicit Watcher(const Plan& plan) : plan_(plan), numbers_(plan.outputs.size()) {}

  void Stepped(int64_t next_step, const std::vector<const char*>& outputs) noexcept override {
    std::lock_guard<std::mutex> lock(mutex_);
    next_step_ = next_step;
    changed_ = true;
    for (size_t i = 0; i < outputs.size(); ++i) {
      const Value& value = plan_.values[plan_.outputs[i].value];
      const int64_t bytes = std::min(value.size, kMostNumbers) * SizeOf(value.dtype);
      numbers_[i].clear();
      if (outputs[i] != nullptr) numbers_[i].assign(outputs[i], bytes);
    }
  }

  // Empty: no step since the last time.
  std::string TakeJson() {
    std::lock_guard<std::mutex> lock(mutex_);
    if (!changed_) return "";
    changed_ = false;
    std::string json = "{\"next_step\":" + std::to_string(next_step_) + ",\"outputs\":[";
    for (size_t i = 0; i < numbers_.size(); ++i) {
      const Value& value = plan_.values[plan_.outputs[i].value];
      if (i > 0) json += ',';
      json += "{\"name\":";
      AppendJson(plan_.outputs[i].name, &json);
      json += ",\"elements\":" + std::to_string(value.size) + ",\"numbers\":[";
      const auto step = static_cast<size_t>(SizeOf(value.dtype));
      for (size_t at = 0; at < numbers_[i].size(); at += step) {
        if (at > 0) json += ',';
        // No one sees more digits than a float has.
        AppendJson(static_cast<float>(NumberAt(numbers_[i].data() + at, value.dtype)), &json);
      }
      json += "]}";
    }
    return json + "]}";
  }

 private:
  const Plan& plan_;
  std::mutex mutex_;
  int64_t next_step_ = 0;
  bool changed_ = false;
  std::vector<std::string> numbers_;  // the first elements of each output
};

StreamOutputs::StreamOutputs(const std::shared_ptr<ServedModel>& model, const std::string& stream,
                             const ModelRepository* repository, std::atomic<int>* watching)
    : model_(model),
      repository_(repository),
      watching_(watching),
      watcher_(std::make_shared<Watcher>(model->plan())) {
  ++*watching_;
  model->Watch(stream, watcher_);
}

StreamOutputs::~StreamOutputs() { --*watching_; }

std::string StreamOutputs::Next() {
  if (ended()) return "event: end\ndata: the model was unloaded\n\n";
  const std::string json = watcher_->TakeJson();
  if (!json.empty()) return "data: " + json + "\n\n";
  // A client that has gone without a word is noticed by what it does not receive.
  constexpr int kQuiet = 50;
  if (++quiet_ % kQuiet == 0) return ": still here\n\n";
  return "";
}

bool StreamOutputs::ended() const {
  for (const auto& model : repository_->loaded()) {
    if (model == model_) return false;
  }
  return true;
}

}  // namespace continual_transformers::server
