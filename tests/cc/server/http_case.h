// Helpers for tests of the HTTP port: a served model, and requests to it without a socket.
#ifndef CONTINUAL_TRANSFORMERS_TESTS_CC_HTTP_CASE_H_
#define CONTINUAL_TRANSFORMERS_TESTS_CC_HTTP_CASE_H_

#include <atomic>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <future>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <utility>

#include "cc/server/http_api.h"
#include "cc/server/model_repository.h"
#include "gtest/gtest.h"
#include "tests/cc/model_file_case.h"

namespace continual_transformers::server {

// A model whose output is its input of one step before: an answer that is another stream's, or of
// another step, is wrong.
inline PlanBuilder DelayModel() {
  PlanBuilder builder;
  builder.plan["receptive_field"] = 2;
  const int x = builder.Input("x", {3});
  builder.Output("y", builder.Node("delay", {x}, {3}, {{"steps", 1}}));
  return builder;
}

// A repository with one loaded model, "m".
class OneModel {
 public:
  explicit OneModel(const PlanBuilder& builder = DelayModel(), const ModelOptions& options = {})
      : folder_(MakeFolder()), repository(options) {
    const std::string path = folder_ + "/m.safetensors";
    std::ofstream(path, std::ios::binary) << builder.Bytes();
    repository.Add("m", path);
    repository.Load("m");
  }
  ~OneModel() { std::filesystem::remove_all(folder_); }

 private:
  static std::string MakeFolder() {
    std::string pattern = ::testing::TempDir() + "/http_XXXXXX";
    if (mkdtemp(pattern.data()) == nullptr) throw std::runtime_error("no folder for the test");
    return pattern;
  }

  const std::string folder_;

 public:
  ModelRepository repository;
};

// Waits for the answer of one request, and checks that there is only one.
class WaitingExchange : public HttpExchange {
 public:
  void Answer(std::function<HttpResponse()> make) override {
    EXPECT_EQ(++answers_, 1);
    response_.set_value(make());
  }
  bool gone() const override { return gone_; }

  HttpResponse Wait() { return response_.get_future().get(); }
  void Leave() { gone_ = true; }

 private:
  std::atomic<int> answers_{0};
  std::atomic<bool> gone_{false};
  std::promise<HttpResponse> response_;
};

// Handles a request as a connection does.
inline HttpResponse Call(HttpApi* api, HttpRequest request) {
  if (const std::optional<HttpResponse> refusal = api->Refuse(request)) return *refusal;
  const auto exchange = std::make_shared<WaitingExchange>();
  api->Handle(std::move(request), exchange);
  return exchange->Wait();
}

inline HttpResponse Get(HttpApi* api, const std::string& target, const std::string& token = "") {
  HttpRequest request;
  request.method = "GET";
  request.target = target;
  if (!token.empty()) request.authorization = "Bearer " + token;
  return Call(api, std::move(request));
}

inline HttpResponse Post(HttpApi* api, const std::string& target, const std::string& body,
                         const std::string& json_length = "") {
  HttpRequest request;
  request.method = "POST";
  request.target = target;
  request.body = body;
  request.inference_header_content_length = json_length;
  return Call(api, std::move(request));
}

}  // namespace continual_transformers::server

#endif  // CONTINUAL_TRANSFORMERS_TESTS_CC_HTTP_CASE_H_
