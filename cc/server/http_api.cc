#include "cc/server/http_api.h"

#include <arpa/inet.h>
#include <strings.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <functional>
#include <nlohmann/json.hpp>
#include <string_view>
#include <thread>
#include <utility>

#include "cc/server/http_infer.h"
#include "cc/server/http_target.h"
#include "cc/server/log.h"
#include "cc/server/logged_load.h"
#include "cc/server/message_json.h"
#include "cc/server/metrics.h"
#include "cc/server/model_description.h"
#include "cc/server/page.h"
#include "cc/server/shard_owner.h"
#include "cc/server/stream_copy.h"
#include "cc/server/stream_outputs.h"

namespace continual_transformers::server {
namespace {

using nlohmann::ordered_json;

constexpr char kBinary[] = "application/octet-stream";

// Scripts and styles only from this server, which is also the only one that they may call.
constexpr char kContentSecurityPolicy[] =
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

constexpr char kNeedsTokenOfServer[] =
    "this call is for the operator, and this server has no token to tell who that is: start it "
    "with --token-file or --operator-token-file";

std::string Dump(const ordered_json& json) {
  return json.dump(-1, ' ', false, ordered_json::error_handler_t::replace);
}

HttpResponse JsonResponse(const ordered_json& json) {
  HttpResponse response;
  response.body = Dump(json);
  return response;
}

struct PageFileType {
  const char* path;  // without the slash
  const char* name;
  const char* content_type;
};

constexpr PageFileType kPageFiles[] = {
    {"", "index.html", "text/html; charset=utf-8"},
    {"page.css", "page.css", "text/css; charset=utf-8"},
    {"page.js", "page.js", "text/javascript; charset=utf-8"},
    {"icon.svg", "icon.svg", "image/svg+xml"},
};

const PageFileType* FindPageFile(const std::vector<std::string>& path) {
  if (path.size() > 1) return nullptr;
  const std::string name = path.empty() ? "" : path[0];
  for (const PageFileType& file : kPageFiles) {
    if (name == file.path) return &file;
  }
  return nullptr;
}

// Paths that need no token.
bool IsOpen(const std::vector<std::string>& path) {
  if (FindPageFile(path) != nullptr) return true;
  if (path.size() == 1) return path[0] == "metrics";
  return path.size() == 3 && path[0] == "v2" && path[1] == "health";
}

bool IsShards(const std::vector<std::string>& path) {
  return path.size() == 2 && path[0] == "v2" && path[1] == "shards";
}

bool IsLoading(const std::vector<std::string>& path) {
  return path.size() == 5 && path[0] == "v2" && path[1] == "repository" && path[2] == "models" &&
         (path[4] == "load" || path[4] == "unload");
}

// Lists and copies of streams, and changes of the table of shards. The outputs of a stream are for
// everyone who may take its steps.
bool IsOperators(const HttpRequest& head, const std::vector<std::string>& path) {
  if (IsShards(path)) return head.method != "GET";
  if (path.size() < 4 || path[0] != "v2" || path[1] != "models") return false;
  const size_t at = path[3] == "versions" ? 5 : 3;
  return path.size() > at && path[at] == "streams" && path.size() <= at + 2;
}

// Whether the host of a URL, with or without a port, is localhost or an IP address.
bool IsAddress(const std::string& host) {
  unsigned char address[sizeof(in6_addr)];
  if (!host.empty() && host[0] == '[') {
    const size_t end = host.find(']');
    return end != std::string::npos && (end + 1 == host.size() || host[end + 1] == ':') &&
           inet_pton(AF_INET6, host.substr(1, end - 1).c_str(), address) == 1;
  }
  const std::string name = host.substr(0, host.find(':'));
  return strcasecmp(name.c_str(), "localhost") == 0 ||
         inet_pton(AF_INET, name.c_str(), address) == 1;
}

// A call over HTTP for steps of streams. It lives until its answer is made.
class HttpStepRequest : public StepRequest, public std::enable_shared_from_this<HttpStepRequest> {
 public:
  HttpStepRequest(HttpRequest request, std::shared_ptr<HttpExchange> exchange)
      : http_(std::move(request)), exchange_(std::move(exchange)) {}

  // Throws Refusal.
  void Read(std::shared_ptr<ServedModel> model, const InferLimits& limits) {
    model_ = std::move(model);
    ReadHttpInfer(http_.body, http_.inference_header_content_length, &call_);
    wanted_ = ReadInferCall(*model_, call_.call, limits, this);
    CheckHttpOutputs(call_, wanted_);
    tensors_.resize(wanted_.size());
    for (size_t i = 0; i < wanted_.size(); ++i) {
      tensors_[i].resize(wanted_[i].bytes);
      outputs[wanted_[i].port] = tensors_[i].data();
    }
  }

  // The caller holds this request until Submit returns.
  void Submit() {
    self_ = shared_from_this();
    model_->Submit(this);
  }

  bool Cancelled() const override { return exchange_->gone(); }

  void Done(const Outcome& outcome) noexcept override {
    outcome_ = outcome;
    const std::shared_ptr<HttpStepRequest> self = std::move(self_);
    exchange_->Answer([self] { return self->Response(); });
  }

 private:
  HttpResponse Response() {
    if (!outcome_.ok()) return ErrorResponse(outcome_);
    HttpResponse response;
    response.body = WriteHttpInfer(model_->name(), call_, wanted_, tensors_, *this);
    bool binary = false;
    for (size_t i = 0; i < wanted_.size(); ++i) {
      if (!call_.IsBinary(i)) continue;
      binary = true;
      response.tensors.push_back(std::move(tensors_[i]));
    }
    if (binary) {
      response.content_type = kBinary;
      response.headers.emplace_back("Inference-Header-Content-Length",
                                    std::to_string(response.body.size()));
    }
    return response;
  }

  const HttpRequest http_;
  const std::shared_ptr<HttpExchange> exchange_;
  std::shared_ptr<ServedModel> model_;
  HttpInferCall call_;
  std::vector<OutputTensor> wanted_;
  std::vector<std::string> tensors_;
  Outcome outcome_;
  std::shared_ptr<HttpStepRequest> self_;  // from Submit to Done
};

}  // namespace

int HttpStatusOf(Reason reason) {
  switch (reason) {
    case Reason::kNone:
      return 200;
    case Reason::kInvalidArgument:
      return 400;
    case Reason::kUnauthenticated:
      return 401;
    case Reason::kNotFound:
      return 404;
    case Reason::kOutOfStep:
    case Reason::kEnded:
    case Reason::kNotStarted:
      return 409;
    case Reason::kTooManyStreams:
    case Reason::kQueueFull:
      return 429;
    case Reason::kDeadline:
      return 504;
    case Reason::kWrongServer:
      return 421;
    case Reason::kCancelled:
    case Reason::kUnavailable:
      return 503;
    case Reason::kUnsupported:
      return 501;
    case Reason::kInternal:
      return 500;
  }
  return 500;
}

HttpResponse ErrorResponse(const Outcome& outcome) {
  HttpResponse response;
  response.status = HttpStatusOf(outcome.reason);
  ordered_json body = {{"error", outcome.message}, {"reason", NameOf(outcome.reason)}};
  for (const ExpectedStep& expected : outcome.expected) {
    body["expected"].push_back({{"stream", expected.stream}, {"step", expected.step}});
  }
  response.body = Dump(body);
  if (response.status == 401) response.headers.emplace_back("WWW-Authenticate", "Bearer");
  return response;
}

HttpResponse ErrorResponse(int status, Reason reason, const std::string& message) {
  HttpResponse response = ErrorResponse({reason, message, {}});
  response.status = status;
  if (status != 401) response.headers.clear();
  return response;
}

class HttpApi::Routes {
 public:
  Routes(const Security& security, const ServerParts& parts, const InferLimits& limits)
      : limits_(limits),
        security_(security),
        repository_(parts.repository),
        shards_(parts.shards),
        metrics_(parts) {}

  std::optional<HttpResponse> Refuse(const HttpRequest& head) const {
    bool needs_token = false;
    try {
      const HttpTarget target(head.target);
      if (IsOpen(target.path)) return std::nullopt;
      const bool operators = IsOperators(head, target.path);
      if (operators && !security_.knows_operator()) {
        return ErrorResponse(403, Reason::kUnauthenticated, kNeedsTokenOfServer);
      }
      const bool loading = IsLoading(target.path);
      needs_token = operators || (loading ? security_.knows_operator() : !security_.token.empty());
      const bool allowed = operators ? security_.AllowsOperator(head.authorization)
                           : loading ? security_.AllowsLoading(head.authorization)
                                     : security_.Allows(head.authorization);
      if (!allowed) {
        return ErrorResponse({Reason::kUnauthenticated, kNeedsToken, {}});
      }
    } catch (const std::exception& error) {
      return ErrorResponse(OutcomeOf(error));
    }
    // A browser says which page calls. Without this check, any page that a person visits could
    // change what runs on their machine.
    const size_t scheme = head.origin.find("://");
    if (!head.origin.empty() && head.method != "GET" &&
        (scheme == std::string::npos || head.origin.substr(scheme + 3) != head.host)) {
      return ErrorResponse(403, Reason::kUnauthenticated,
                           "the request comes from a page of another server, which may not call "
                           "this one");
    }
    // Whoever owns a name can let it lead to this machine after a browser has loaded a page of that
    // name. The browser then takes this server for the page's own. A token, localhost and addresses
    // cannot be had in that way.
    if (!head.origin.empty() && !needs_token && !IsAddress(head.host)) {
      return ErrorResponse(403, Reason::kUnauthenticated,
                           "the request comes from a page of a server with a name, and this call "
                           "needs no token: open the page at localhost or at the server's IP "
                           "address, or start the server with --token-file");
    }
    if (!head.content_encoding.empty() && head.content_encoding != "identity") {
      return ErrorResponse(415, Reason::kUnsupported,
                           "the body is compressed, which this server does not read: send it as "
                           "it is");
    }
    return std::nullopt;
  }

  void Handle(HttpRequest request, const std::shared_ptr<HttpExchange>& exchange) {
    HttpResponse response;
    try {
      const HttpTarget target(request.target);
      // Steps, and what takes long, answer later.
      if (HandleLater(target, &request, exchange)) return;
      response = Answer(target, request);
    } catch (const std::exception& error) {
      response = ErrorResponse(OutcomeOf(error));
    }
    // std::function copies what it holds.
    auto made = std::make_shared<HttpResponse>(std::move(response));
    exchange->Answer([made] { return std::move(*made); });
  }

  void Sample() {
    const int64_t sample = ++samples_;
    for (const auto& model : repository_->loaded()) {
      history_.Add(model->name(), sample, model->statistics());
    }
    history_.ForgetOthers(sample);
  }

 private:
  // A route that has another method. Thrown as a response.
  struct WrongMethod {
    HttpResponse response;
  };

  static void Need(const HttpRequest& request, const char* method) {
    if (request.method == method) return;
    HttpResponse response =
        ErrorResponse(405, Reason::kUnsupported,
                      "got the method " + request.method.substr(0, 20) + ", expected " + method);
    response.headers.emplace_back("Allow", method);
    throw WrongMethod{std::move(response)};
  }

  [[noreturn]] static void RefusePath() {
    throw Refusal(Reason::kNotFound,
                  "this server has no such path: see \"/\", \"/v2\", \"/metrics\" and the KServe "
                  "V2 protocol");
  }

  // Takes "versions/1" out of a path below /v2/models/M, and returns what follows.
  static std::vector<std::string> AfterModel(const std::vector<std::string>& path,
                                             std::string* version) {
    if (path.size() > 4 && path[3] == "versions") {
      *version = path[4];
      return {path.begin() + 5, path.end()};
    }
    return {path.begin() + 3, path.end()};
  }

  bool HandleLater(const HttpTarget& target, HttpRequest* request,
                   const std::shared_ptr<HttpExchange>& exchange) {
    const std::vector<std::string>& path = target.path;
    if (IsShards(path) && request->method == "PUT") {
      AnswerOnAThread(exchange, [shards = Shards(), table = ShardTable::Parse(request->body)] {
        const ShardOwner::Change change = shards->SetTable(table);
        return JsonResponse({{"gained", change.gained},
                             {"lost", change.lost},
                             {"streams_rebuilt", change.rebuilt.streams},
                             {"streams_lost", change.rebuilt.lost}});
      });
      return true;
    }
    if (path.size() < 4 || path[0] != "v2" || request->method != "POST") return false;
    if (IsLoading(path)) {
      LoadOrUnload(path[3], path[4] == "load", *request, exchange);
      return true;
    }
    std::string version;
    if (path[1] == "models" && path.back() == "infer" && AfterModel(path, &version).size() == 1) {
      Infer(repository_->Find(path[2], version), request, exchange);
      return true;
    }
    return false;
  }

  void Infer(const std::shared_ptr<ServedModel>& model, HttpRequest* request,
             const std::shared_ptr<HttpExchange>& exchange) const {
    // Held until Submit returns: the last owner of a model waits for its queue, which must not be
    // in a batch that this thread leads.
    const auto step = std::make_shared<HttpStepRequest>(std::move(*request), exchange);
    try {
      step->Read(model, limits_);
    } catch (const std::exception& error) {
      model->CountRefusal(OutcomeOf(error).reason);
      throw;
    }
    step->Submit();
  }

  // For what takes long: it must not keep one of the port's few threads.
  static void AnswerOnAThread(const std::shared_ptr<HttpExchange>& exchange,
                              std::function<HttpResponse()> answer) {
    std::thread([exchange, answer = std::move(answer)] {
      HttpResponse response;
      try {
        response = answer();
      } catch (const std::exception& error) {
        response = ErrorResponse(OutcomeOf(error));
      }
      exchange->Answer([response] { return response; });
    }).detach();
  }

  ShardOwner* Shards() const {
    if (shards_ == nullptr) {
      throw Refusal(Reason::kNotFound, "this server is not one of several: --sharded makes it one");
    }
    return shards_;
  }

  void LoadOrUnload(const std::string& name, bool load, const HttpRequest& request,
                    const std::shared_ptr<HttpExchange>& exchange) {
    if (load && !request.body.empty()) {
      const auto body = ParseObject(request.body);
      if (body.contains("parameters") && !body["parameters"].empty()) {
        throw Refusal(Reason::kUnsupported, kLoadsItsFile);
      }
    }
    AnswerOnAThread(exchange, [this, name, load] {
      if (load) {
        LoadAndLog(repository_, name);
      } else {
        UnloadAndLog(repository_, name);
      }
      return JsonResponse(ordered_json::object());
    });
  }

  HttpResponse Answer(const HttpTarget& target, const HttpRequest& request) {
    try {
      return AnswerNow(target, request);
    } catch (const WrongMethod& wrong) {
      return wrong.response;
    }
  }

  HttpResponse AnswerNow(const HttpTarget& target, const HttpRequest& request) {
    const std::vector<std::string>& path = target.path;
    if (const PageFileType* const file = FindPageFile(path)) {
      Need(request, "GET");
      HttpResponse response;
      response.content_type = file->content_type;
      response.body = PageFile(file->name);
      response.headers.emplace_back("Content-Security-Policy", kContentSecurityPolicy);
      response.headers.emplace_back("Referrer-Policy", "no-referrer");
      return response;
    }
    if (path == std::vector<std::string>{"metrics"}) {
      Need(request, "GET");
      HttpResponse response;
      response.content_type = "text/plain; version=0.0.4; charset=utf-8";
      response.body = metrics_.Text();
      return response;
    }
    if (path == std::vector<std::string>{"status"}) {
      Need(request, "GET");
      return JsonResponse(Status(target.Whole("since", -1, -1, int64_t{1} << 53)));
    }
    if (IsShards(path)) {
      Need(request, "GET");
      HttpResponse response;
      auto table = ordered_json::parse(Shards()->table()->Json(true));
      table["applied"] = Shards()->applied();
      response.body = Dump(table);
      return response;
    }
    if (path.empty() || path[0] != "v2") RefusePath();
    if (path.size() == 1) {
      Need(request, "GET");
      inference::ServerMetadataResponse metadata;
      DescribeServer(&metadata);
      return JsonResponse(JsonOf(metadata));
    }
    if (path[1] == "health" && path.size() == 3) return Health(path[2], request);
    if (path[1] == "models" && path.size() == 3 && path[2] == "stats") {
      Need(request, "GET");
      return StatisticsOf(repository_->loaded());
    }
    if (path[1] == "models" && path.size() >= 3) return OfModel(target, request);
    if (path[1] == "repository") return OfRepository(target, request);
    if (path[1] == "systemsharedmemory" || path[1] == "cudasharedmemory" || path[1] == "trace" ||
        path[1] == "logging") {
      throw Refusal(Reason::kUnsupported,
                    "this server has no shared memory and no settings for "
                    "traces and logs");
    }
    RefusePath();
  }

  HttpResponse Health(const std::string& of, const HttpRequest& request) const {
    if (of != "live" && of != "ready") RefusePath();
    Need(request, "GET");
    // The protocol has 4xx for "not ready".
    if (of == "ready" && !repository_->ready()) {
      return ErrorResponse(400, Reason::kUnavailable, "the server is loading or shutting down");
    }
    HttpResponse response;
    response.content_type = "text/plain";
    return response;
  }

  static HttpResponse StatisticsOf(const std::vector<std::shared_ptr<ServedModel>>& models) {
    inference::ModelStatisticsResponse statistics;
    for (const auto& model : models) DescribeStatistics(model.get(), statistics.add_model_stats());
    return JsonResponse(JsonOf(statistics));
  }

  HttpResponse OfModel(const HttpTarget& target, const HttpRequest& request) {
    std::string version;
    const std::vector<std::string> rest = AfterModel(target.path, &version);
    const std::string& name = target.path[2];
    if (rest.size() == 1 && rest[0] == "ready") {
      Need(request, "GET");
      try {
        repository_->Find(name, version);
      } catch (const Refusal& refusal) {
        if (refusal.reason() != Reason::kUnavailable) throw;
        return ErrorResponse(400, Reason::kUnavailable, refusal.what());
      }
      return Health("ready", request);
    }
    if (!rest.empty() && rest[0] == "infer" && rest.size() == 1) Need(request, "POST");
    const bool describes =
        rest.empty() || (rest.size() == 1 && (rest[0] == "config" || rest[0] == "stats"));
    const bool streams = !rest.empty() && rest[0] == "streams" && rest.size() <= 3;
    if (!describes && !streams) RefusePath();
    const std::shared_ptr<ServedModel> model = repository_->Find(name, version);
    if (streams && rest.size() == 3) {
      if (rest[2] != "outputs") RefusePath();
      Need(request, "GET");
      return Outputs(model, rest[1]);
    }
    if (streams && rest.size() == 2) return OfStream(model.get(), rest[1], target, request);
    Need(request, "GET");
    if (streams) return Streams(model.get(), target);
    if (rest.empty()) {
      inference::ModelMetadataResponse metadata;
      DescribeModel(*model, &metadata);
      return JsonResponse(JsonOf(metadata));
    }
    if (rest[0] == "stats") return StatisticsOf({model});
    inference::ModelConfig config;
    DescribeConfig(*model, &config);
    return JsonResponse(JsonOf(config));
  }

  static HttpResponse Streams(ServedModel* model, const HttpTarget& target) {
    constexpr int64_t kMost = 100000;
    const int64_t limit = target.Whole("limit", 100, 0, kMost);
    size_t open = 0;
    ordered_json list = ordered_json::array();
    const bool foreign = target.Flag("foreign");
    for (const StreamFacts& stream :
         model->ListStreams(static_cast<size_t>(limit), foreign, &open)) {
      list.push_back({{"name", stream.name},
                      // For names that are not UTF-8, too.
                      {"path", "/v2/models/" + EncodePathPart(model->name()) + "/streams/" +
                                   EncodePathPart(stream.name)},
                      {"next_step", stream.next_step},
                      {"age_seconds", stream.age_seconds},
                      {"idle_seconds", stream.idle_seconds}});
    }
    return JsonResponse({{"open", open}, {"streams", std::move(list)}});
  }

  static HttpResponse OfStream(ServedModel* model, const std::string& stream,
                               const HttpTarget& target, const HttpRequest& request) {
    if (request.method == "DELETE") {
      const std::string* const reason = target.Find("reason");
      const End end =
          reason != nullptr && *reason == NameOf(End::kMoved) ? End::kMoved : End::kClosed;
      model->CloseStream(stream, end);
      Log(LogLevel::kInfo, "stream_closed",
          {{"model", model->name()}, {"stream", stream}, {"reason", NameOf(end)}});
      return JsonResponse(ordered_json::object());
    }
    if (request.method == "PUT") {
      StreamCopy copy = DecodeStreamCopy(request.body);
      if (copy.state.empty()) {
        throw Refusal(Reason::kInvalidArgument, "this copy is of a stream that had ended");
      }
      CheckStreamName(stream);
      copy.name = stream;
      model->CopyIn(copy, target.Flag("other_weights"));
      Log(LogLevel::kInfo, "stream_copied_in", {{"model", model->name()}, {"stream", stream}});
      return JsonResponse(ordered_json::object());
    }
    Need(request, "GET");
    HttpResponse response;
    response.content_type = kBinary;
    response.body = EncodeStreamCopy(model->CopyOut(stream));
    return response;
  }

  HttpResponse Outputs(const std::shared_ptr<ServedModel>& model, const std::string& stream) {
    constexpr int kMostWatching = 32;
    if (watching_ >= kMostWatching) {
      return ErrorResponse(429, Reason::kQueueFull,
                           std::to_string(kMostWatching) +
                               " others watch streams, which is the most that this server lets "
                               "watch");
    }
    HttpResponse response;
    response.content_type = "text/event-stream";
    response.events = std::make_shared<StreamOutputs>(model, stream, repository_, &watching_);
    return response;
  }

  HttpResponse OfRepository(const HttpTarget& target, const HttpRequest& request) const {
    const std::vector<std::string>& path = target.path;
    if (IsLoading(path)) Need(request, "POST");
    if (path.size() != 3 || path[2] != "index") RefusePath();
    Need(request, "POST");
    bool only_ready = false;
    if (!request.body.empty()) {
      const auto body = ParseObject(request.body);
      only_ready = body.contains("ready") && body["ready"] == true;
    }
    ordered_json list = ordered_json::array();
    for (const ModelRepository::Entry& entry : repository_->index()) {
      if (only_ready && !entry.ready) continue;
      list.push_back({{"name", entry.name},
                      {"version", "1"},
                      {"state", entry.ready ? "READY" : "UNAVAILABLE"},
                      {"reason", entry.reason}});
    }
    return JsonResponse(list);
  }

  // For the page.
  ordered_json Status(int64_t since) {
    inference::ServerMetadataResponse metadata;
    DescribeServer(&metadata);
    ordered_json status = {
        {"name", metadata.name()},
        {"version", metadata.version()},
        {"ready", repository_->ready()},
        {"operator", security_.knows_operator()},
        {"up_seconds", std::chrono::duration<double>(Clock::now() - started_).count()},
        {"sample", samples_.load()},
        {"sample_seconds", History::kSeconds}};
    status["models"] = ordered_json::array();
    for (const ModelRepository::Entry& entry : repository_->index()) {
      status["models"].push_back(
          {{"name", entry.name}, {"ready", entry.ready}, {"reason", entry.reason}});
    }
    for (const auto& model : repository_->loaded()) {
      for (ordered_json& entry : status["models"]) {
        if (entry["name"] == model->name()) entry.update(StatusOf(model.get(), since));
      }
    }
    return status;
  }

  ordered_json StatusOf(ServedModel* model, int64_t since) const {
    const Statistics counts = model->statistics();
    const Plan& plan = model->plan();
    const auto ports = [&plan](const std::vector<Port>& list) {
      ordered_json tensors = ordered_json::array();
      for (const Port& port : list) {
        const Value& value = plan.values[port.value];
        tensors.push_back(
            {{"name", port.name}, {"datatype", DatatypeOf(value.dtype)}, {"shape", value.shape}});
      }
      return tensors;
    };
    ordered_json refused = ordered_json::object();
    for (int i = 1; i < kReasons; ++i) {
      if (counts.refused[i] > 0) refused[NameOf(static_cast<Reason>(i))] = counts.refused[i];
    }
    ordered_json ended = ordered_json::object();
    for (int i = 1; i < kEnds; ++i) {
      if (counts.ended[i] > 0) ended[NameOf(static_cast<End>(i))] = counts.ended[i];
    }
    return {{"inputs", ports(plan.inputs)},
            {"outputs", ports(plan.outputs)},
            {"receptive_field", plan.receptive_field},
            {"stream_bytes", model->session().state_bytes()},
            {"max_streams", model->options().max_streams},
            {"open_streams", counts.open_streams},
            {"waiting", counts.waiting},
            {"requests", counts.requests},
            {"steps", counts.steps},
            {"repeats", counts.repeats},
            {"batches", counts.batches},
            {"opened", counts.opened},
            {"ended", ended},
            {"refused", refused},
            {"batch_rows",
             {{"bounds", counts.batch_rows.bounds()}, {"counts", counts.batch_rows.counts()}}},
            {"memory",
             {{"weights", counts.memory.weights},
              {"streams", counts.memory.streams + counts.memory.streams_overhead},
              {"arenas", counts.memory.arenas},
              {"answers", counts.answer_bytes}}},
            {"history", history_.Since(model->name(), since)}};
  }

  const InferLimits limits_;
  const Security security_;
  ModelRepository* const repository_;
  ShardOwner* const shards_;  // null: this server is not one of several
  const Metrics metrics_;
  const Clock::time_point started_ = Clock::now();
  History history_;
  std::atomic<int64_t> samples_{0};
  std::atomic<int> watching_{0};
};

HttpApi::HttpApi(const Security& security, const ServerParts& parts, const InferLimits& limits)
    : routes_(std::make_unique<Routes>(security, parts, limits)) {}

HttpApi::~HttpApi() = default;

std::optional<HttpResponse> HttpApi::Refuse(const HttpRequest& head) const {
  return routes_->Refuse(head);
}

void HttpApi::Handle(HttpRequest request, const std::shared_ptr<HttpExchange>& exchange) {
  routes_->Handle(std::move(request), exchange);
}

void HttpApi::Sample() { routes_->Sample(); }

}  // namespace continual_transformers::server
