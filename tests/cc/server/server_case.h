// Helpers to test the server's core without a protocol: a model in a folder of its own, and calls
// that wait for their answer.
#ifndef CONTINUAL_TRANSFORMERS_TESTS_CC_SERVER_CASE_H_
#define CONTINUAL_TRANSFORMERS_TESTS_CC_SERVER_CASE_H_

#include <stdlib.h>

#include <condition_variable>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "cc/server/served_model.h"
#include "cc/session/fingerprint.h"
#include "cc/session/session.h"
#include "gtest/gtest.h"
#include "tests/cc/model_file_case.h"
#include "tests/cc/session_case.h"

namespace continual_transformers::server {

// A folder that is deleted afterwards.
class Folder {
 public:
  Folder() {
    std::string name = (std::filesystem::temp_directory_path() / "server_test_XXXXXX").string();
    path_ = mkdtemp(name.data());
  }
  ~Folder() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }
  Folder(const Folder&) = delete;
  Folder& operator=(const Folder&) = delete;

  std::string operator/(const std::string& name) const { return path_ + "/" + name; }
  const std::string& path() const { return path_; }

 private:
  std::string path_;
};

// One request, with memory of its own.
class TestCall : public StepRequest {
 public:
  // Inputs are [M, T, ...].
  TestCall(const Plan& plan, std::vector<std::string> names, int64_t count, Arrays data) {
    streams = std::move(names);
    steps = count;
    data_ = std::move(data);
    for (const std::string& input : data_) inputs.push_back(input.data());
    for (const Port& port : plan.outputs) {
      answers.emplace_back(streams.size() * count * RowBytes(plan, port), '\xee');
    }
    for (std::string& output : answers) outputs.push_back(output.data());
  }

  void Done(const Outcome& of_call) noexcept override {
    std::lock_guard<std::mutex> lock(mutex_);
    outcome = of_call;
    done_ = true;
    changed_.notify_all();
  }

  void Wait() {
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait(lock, [this] { return done_; });
  }

  bool done() {
    std::lock_guard<std::mutex> lock(mutex_);
    return done_;
  }

  Outcome outcome;
  Arrays answers;

 private:
  Arrays data_;
  std::mutex mutex_;
  std::condition_variable changed_;
  bool done_ = false;
};

// The inputs of step `step` of a stream. `life` counts the streams that had its name before.
inline Arrays InputsOf(const Plan& plan, const std::string& name, int64_t life, int64_t step) {
  Fingerprint hash;
  hash.Add(name);
  hash.Add(life);
  hash.Add(step);
  return RandomInputs(plan, 1, static_cast<uint32_t>(hash.Hash()));
}

// How a test steps one stream.
struct StepOptions {
  bool numbered = true, start = false, end = false;
  int64_t life = 0;
};

inline std::unique_ptr<TestCall> SubmitStep(ServedModel* model, const std::string& name,
                                            int64_t step, const StepOptions& options = {}) {
  auto call = std::make_unique<TestCall>(model->plan(), std::vector<std::string>{name}, 1,
                                         InputsOf(model->plan(), name, options.life, step));
  if (options.numbered) call->first_steps = {step};
  call->start = options.start;
  call->end = options.end;
  model->Submit(call.get());
  return call;
}

inline std::unique_ptr<TestCall> Step(ServedModel* model, const std::string& name, int64_t step,
                                      const StepOptions& options = {}) {
  auto call = SubmitStep(model, name, step, options);
  call->Wait();
  return call;
}

// Begins or ends streams without a step. `numbers`: that of each stream's next step; empty: none.
inline std::unique_ptr<TestCall> SubmitNoStep(ServedModel* model, std::vector<std::string> names,
                                              std::vector<int64_t> numbers, bool start, bool end) {
  auto call = std::make_unique<TestCall>(model->plan(), std::move(names), 0,
                                         Arrays(model->plan().inputs.size()));
  call->first_steps = std::move(numbers);
  call->start = start;
  call->end = end;
  model->Submit(call.get());
  return call;
}

inline std::unique_ptr<TestCall> BeginOnly(ServedModel* model, std::vector<std::string> names,
                                           std::vector<int64_t> numbers = {}) {
  auto call = SubmitNoStep(model, std::move(names), std::move(numbers), true, false);
  call->Wait();
  return call;
}

inline std::unique_ptr<TestCall> EndOnly(ServedModel* model, std::vector<std::string> names,
                                         std::vector<int64_t> numbers = {}) {
  auto call = SubmitNoStep(model, std::move(names), std::move(numbers), false, true);
  call->Wait();
  return call;
}

// What an undisturbed stream answers.
class Undisturbed {
 public:
  explicit Undisturbed(std::shared_ptr<const ModelFile> file) : session_(std::move(file), {}) {}

  const Arrays& Answer(const std::string& name, int64_t life, int64_t step) {
    Known& known = known_[{name, life}];
    if (known.answers.empty()) session_.Open(1, &known.id);
    while (static_cast<int64_t>(known.answers.size()) <= step) {
      const auto next = static_cast<int64_t>(known.answers.size());
      known.answers.push_back(
          TakeSteps(&session_, {known.id}, 1, InputsOf(session_.plan(), name, life, next)));
    }
    return known.answers[step];
  }

 private:
  struct Known {
    StreamId id = 0;
    std::vector<Arrays> answers;
  };

  Session session_;
  std::map<std::pair<std::string, int64_t>, Known> known_;
};

}  // namespace continual_transformers::server

#endif  // CONTINUAL_TRANSFORMERS_TESTS_CC_SERVER_CASE_H_
