#include "cc/server/grpc_server.h"

#include <grpcpp/ext/proto_server_reflection_plugin.h>
#include <grpcpp/grpcpp.h>
#include <grpcpp/health_check_service_interface.h>

#include <chrono>
#include <deque>
#include <mutex>
#include <string_view>
#include <thread>
#include <utility>

#include "cc/server/grpc_infer.h"
#include "cc/server/inference.grpc.pb.h"
#include "cc/server/logged_load.h"
#include "cc/server/model_description.h"
#include "cc/server/model_repository.h"
#include "cc/server/shard_owner.h"
#include "cc/session/error.h"

namespace continual_transformers::server {
namespace {

using grpc::CallbackServerContext;
using grpc::ServerUnaryReactor;

// A client's deadline, which gRPC tells by the clock on the wall.
Clock::time_point DeadlineOf(const CallbackServerContext& context) {
  const auto deadline = context.deadline();
  if (deadline == std::chrono::system_clock::time_point::max()) return Clock::time_point::max();
  return Clock::now() +
         std::chrono::duration_cast<Clock::duration>(deadline - std::chrono::system_clock::now());
}

// The call's metadata `authorization`, or nothing.
std::string_view AuthorizationOf(const CallbackServerContext& context) {
  const auto found = context.client_metadata().find("authorization");
  if (found == context.client_metadata().end()) return {};
  return {found->second.data(), found->second.size()};
}

bool Passes(const Security& security, const CallbackServerContext& context) {
  return security.token.empty() || security.Allows(AuthorizationOf(context));
}

Outcome NeedsToken() { return {Reason::kUnauthenticated, kNeedsToken, {}}; }

// One ModelInfer. Done deletes it. It uses gRPC's default reactor, because gRPC calls OnDone of any
// other reactor on another thread. That cost a sixth of the requests a second at concurrency 8.
class UnaryInferCall : public GrpcStepRequest {
 public:
  explicit UnaryInferCall(CallbackServerContext* context)
      : context_(context), reactor_(context->DefaultReactor()) {
    deadline = DeadlineOf(*context);
  }

  ServerUnaryReactor* reactor() const { return reactor_; }
  bool Cancelled() const override { return context_->IsCancelled(); }
  void Done(const Outcome& outcome) noexcept override {
    if (outcome.ok()) {
      WriteResponse();
    } else {
      AddRefusal(outcome, context_);
    }
    reactor_->Finish(StatusOf(outcome));
    delete this;
  }

 private:
  CallbackServerContext* const context_;
  ServerUnaryReactor* const reactor_;
};

// One ModelStreamInfer: requests and responses in both directions. Requests of different streams
// may overtake each other; an answer has the id of its request.
class InferStreamReactor : public grpc::ServerBidiReactor<inference::ModelInferRequest,
                                                          inference::ModelStreamInferResponse> {
 public:
  InferStreamReactor(CallbackServerContext* context, const ModelRepository* repository,
                     const InferLimits& limits)
      : context_(context), repository_(repository), limits_(limits) {
    std::unique_lock<std::mutex> lock(mutex_);
    ReadNext();
  }

  void OnReadDone(bool ok) override {
    std::unique_lock<std::mutex> lock(mutex_);
    if (!ok) {
      reading_ = false;
      reads_ended_ = true;
      return FinishIfDone(std::move(lock));
    }
    Item* const item = next_.release();
    ++in_flight_;
    lock.unlock();
    item->Submit(*repository_, limits_, item->request, item->response.mutable_infer_response());
    lock.lock();
    // Only now: OnWriteDone, on another thread, would otherwise read the next request, and that
    // could be submitted before this one.
    reading_ = false;
    ReadNext();
  }

  void OnWriteDone(bool ok) override {
    std::unique_lock<std::mutex> lock(mutex_);
    written_.pop_front();
    --in_flight_;
    if (!ok) broken_ = true;
    WriteNext();
    ReadNext();
    FinishIfDone(std::move(lock));
  }

  void OnCancel() override {
    std::unique_lock<std::mutex> lock(mutex_);
    broken_ = true;
  }

  // No item is left by then: each was in flight.
  void OnDone() override { delete this; }

 private:
  // The most requests of a call that wait for their answers. Then the client waits.
  static constexpr int kMostInFlight = 256;

  struct Item : GrpcStepRequest {
    explicit Item(InferStreamReactor* reactor) : owner(reactor) {}

    bool Cancelled() const override { return owner->context_->IsCancelled(); }
    void Done(const Outcome& outcome) noexcept override {
      if (outcome.ok()) {
        WriteResponse();
      } else {
        response.mutable_infer_response()->Clear();
        response.mutable_infer_response()->set_id(request.id());
        response.mutable_infer_response()->set_model_name(request.model_name());
        AddRefusal(outcome, response.mutable_infer_response());
        response.set_error_message(outcome.message);
      }
      owner->Write(this);
    }

    InferStreamReactor* const owner;
    inference::ModelInferRequest request;
    inference::ModelStreamInferResponse response;
  };

  // With mutex_, like WriteNext. gRPC never calls OnReadDone from StartRead.
  void ReadNext() {
    if (reading_ || reads_ended_ || in_flight_ >= kMostInFlight) return;
    reading_ = true;
    next_ = std::make_unique<Item>(this);
    StartRead(&next_->request);
  }

  void Write(Item* item) {
    std::unique_lock<std::mutex> lock(mutex_);
    written_.emplace_back(item);
    if (written_.size() == 1) WriteNext();
    FinishIfDone(std::move(lock));
  }

  // The first of written_ is being written.
  void WriteNext() {
    // To a client that has gone nothing is written.
    while (broken_ && !written_.empty()) {
      written_.pop_front();
      --in_flight_;
    }
    if (!written_.empty()) StartWrite(&written_.front()->response);
  }

  void FinishIfDone(std::unique_lock<std::mutex> lock) {
    if (!reads_ended_ || in_flight_ > 0 || finished_) return;
    finished_ = true;
    lock.unlock();
    Finish(grpc::Status::OK);
  }

  CallbackServerContext* const context_;
  const ModelRepository* const repository_;
  const InferLimits limits_;

  std::mutex mutex_;
  std::unique_ptr<Item> next_;  // being read
  std::deque<std::unique_ptr<Item>> written_;
  int in_flight_ = 0;  // read, and not written yet
  bool reading_ = false, reads_ended_ = false, broken_ = false, finished_ = false;
};

class Service final : public inference::GRPCInferenceService::CallbackService {
 public:
  Service(const InferLimits& limits, const Security& security, const ServerParts& parts)
      : limits_(limits),
        security_(security),
        repository_(parts.repository),
        shards_(parts.shards) {}

  ServerUnaryReactor* ModelInfer(CallbackServerContext* context,
                                 const inference::ModelInferRequest* request,
                                 inference::ModelInferResponse* response) override {
    if (!Passes(security_, *context)) return Finished(context, NeedsToken());
    auto* const call = new UnaryInferCall(context);
    ServerUnaryReactor* const reactor = call->reactor();
    call->Submit(*repository_, limits_, *request, response);
    return reactor;
  }

  grpc::ServerBidiReactor<inference::ModelInferRequest, inference::ModelStreamInferResponse>*
  ModelStreamInfer(CallbackServerContext* context) override {
    if (Passes(security_, *context)) return new InferStreamReactor(context, repository_, limits_);
    struct Refused : grpc::ServerBidiReactor<inference::ModelInferRequest,
                                             inference::ModelStreamInferResponse> {
      void OnDone() override { delete this; }
    };
    auto* const refused = new Refused;
    AddRefusal(NeedsToken(), context);
    refused->Finish(StatusOf(NeedsToken()));
    return refused;
  }

  // Health is open to everyone, so that whoever watches the server needs no token.
  ServerUnaryReactor* ServerLive(CallbackServerContext* context,
                                 const inference::ServerLiveRequest* /*request*/,
                                 inference::ServerLiveResponse* response) override {
    response->set_live(true);
    return Finished(context, {});
  }

  ServerUnaryReactor* ServerReady(CallbackServerContext* context,
                                  const inference::ServerReadyRequest* /*request*/,
                                  inference::ServerReadyResponse* response) override {
    response->set_ready(repository_->ready());
    return Finished(context, {});
  }

  ServerUnaryReactor* ModelReady(CallbackServerContext* context,
                                 const inference::ModelReadyRequest* request,
                                 inference::ModelReadyResponse* response) override {
    return Answer(context, [&] {
      try {
        repository_->Find(request->name(), request->version());
        response->set_ready(repository_->ready());
      } catch (const Refusal& refusal) {
        if (refusal.reason() != Reason::kUnavailable) throw;
        response->set_ready(false);
      }
    });
  }

  ServerUnaryReactor* ServerMetadata(CallbackServerContext* context,
                                     const inference::ServerMetadataRequest* /*request*/,
                                     inference::ServerMetadataResponse* response) override {
    return Answer(context, [&] {
      DescribeServer(response);
      if (shards_ != nullptr) AddShards(*shards_->table(), context);
    });
  }

  ServerUnaryReactor* ModelMetadata(CallbackServerContext* context,
                                    const inference::ModelMetadataRequest* request,
                                    inference::ModelMetadataResponse* response) override {
    return Answer(context, [&] {
      DescribeModel(*repository_->Find(request->name(), request->version()), response);
    });
  }

  ServerUnaryReactor* ModelConfig(CallbackServerContext* context,
                                  const inference::ModelConfigRequest* request,
                                  inference::ModelConfigResponse* response) override {
    return Answer(context, [&] {
      DescribeConfig(*repository_->Find(request->name(), request->version()),
                     response->mutable_config());
    });
  }

  ServerUnaryReactor* ModelStatistics(CallbackServerContext* context,
                                      const inference::ModelStatisticsRequest* request,
                                      inference::ModelStatisticsResponse* response) override {
    return Answer(context, [&] {
      if (!request->name().empty()) {
        const auto model = repository_->Find(request->name(), request->version());
        return DescribeStatistics(model.get(), response->add_model_stats());
      }
      for (const auto& model : repository_->loaded()) {
        DescribeStatistics(model.get(), response->add_model_stats());
      }
    });
  }

  ServerUnaryReactor* RepositoryIndex(CallbackServerContext* context,
                                      const inference::RepositoryIndexRequest* request,
                                      inference::RepositoryIndexResponse* response) override {
    return Answer(context, [&] {
      for (const ModelRepository::Entry& entry : repository_->index()) {
        if (request->ready() && !entry.ready) continue;
        auto* const model = response->add_models();
        model->set_name(entry.name);
        model->set_version("1");
        model->set_state(entry.ready ? "READY" : "UNAVAILABLE");
        model->set_reason(entry.reason);
      }
    });
  }

  ServerUnaryReactor* RepositoryModelLoad(
      CallbackServerContext* context, const inference::RepositoryModelLoadRequest* request,
      inference::RepositoryModelLoadResponse* /*response*/) override {
    return AnswerLater(context, [=] {
      if (!request->parameters().empty()) {
        throw Refusal(Reason::kUnsupported, kLoadsItsFile);
      }
      LoadAndLog(repository_, request->model_name());
    });
  }

  ServerUnaryReactor* RepositoryModelUnload(
      CallbackServerContext* context, const inference::RepositoryModelUnloadRequest* request,
      inference::RepositoryModelUnloadResponse* /*response*/) override {
    return AnswerLater(context, [=] { UnloadAndLog(repository_, request->model_name()); });
  }

 private:
  static ServerUnaryReactor* Finished(CallbackServerContext* context, const Outcome& outcome) {
    AddRefusal(outcome, context);
    ServerUnaryReactor* const reactor = context->DefaultReactor();
    reactor->Finish(StatusOf(outcome));
    return reactor;
  }

  template <typename Call>
  static Outcome OutcomeOfCall(const Call& call) {
    try {
      call();
      return {};
    } catch (const std::exception& error) {
      return OutcomeOf(error);
    }
  }

  template <typename Call>
  ServerUnaryReactor* Answer(CallbackServerContext* context, const Call& call) {
    return Finished(context, Passes(security_, *context) ? OutcomeOfCall(call) : NeedsToken());
  }

  // For loading and unloading. That takes long, and must not keep one of gRPC's few threads.
  template <typename Call>
  ServerUnaryReactor* AnswerLater(CallbackServerContext* context, const Call& call) {
    if (!security_.AllowsLoading(AuthorizationOf(*context))) return Finished(context, NeedsToken());
    ServerUnaryReactor* const reactor = context->DefaultReactor();
    std::thread([=] {
      const Outcome outcome = OutcomeOfCall(call);
      AddRefusal(outcome, context);
      reactor->Finish(StatusOf(outcome));
    }).detach();
    return reactor;
  }

  const InferLimits limits_;
  const Security security_;
  ModelRepository* const repository_;
  const ShardOwner* const shards_;  // null: this server is not one of several
};

std::shared_ptr<grpc::ServerCredentials> CredentialsOf(const Security& security) {
  if (!security.tls()) return grpc::InsecureServerCredentials();
  grpc::SslServerCredentialsOptions options(
      security.client_ca.empty() ? GRPC_SSL_DONT_REQUEST_CLIENT_CERTIFICATE
                                 : GRPC_SSL_REQUEST_AND_REQUIRE_CLIENT_CERTIFICATE_AND_VERIFY);
  options.pem_key_cert_pairs.push_back({security.key, security.certificate});
  options.pem_root_certs = security.client_ca;
  return grpc::SslServerCredentials(options);
}

constexpr char kServiceName[] = "inference.GRPCInferenceService";

}  // namespace

class GrpcServer::Impl {
 public:
  Impl(const GrpcOptions& options, const Security& security, const ServerParts& parts)
      : service_(options.limits, security, parts) {
    grpc::EnableDefaultHealthCheckService(true);
    grpc::reflection::InitProtoReflectionServerBuilderPlugin();
    grpc::ServerBuilder builder;
    const bool ipv6 = options.host.find(':') != std::string::npos;
    const std::string host = ipv6 ? "[" + options.host + "]" : options.host;
    const std::string address = host + ":" + std::to_string(options.port);
    builder.AddListeningPort(address, CredentialsOf(security), &port_);
    // A second server on the same port is refused instead of getting every other connection.
    builder.AddChannelArgument(GRPC_ARG_ALLOW_REUSEPORT, 0);
    builder.AddChannelArgument(GRPC_ARG_MAX_METADATA_SIZE,
                               static_cast<int>(options.max_header_bytes));
    builder.AddChannelArgument(GRPC_ARG_MAX_CONCURRENT_STREAMS,
                               static_cast<int>(options.max_calls_per_connection));
    builder.SetMaxReceiveMessageSize(static_cast<int>(options.max_message_bytes));
    builder.RegisterService(&service_);
    server_ = builder.BuildAndStart();
    if (server_ == nullptr || port_ == 0) {
      throw Error(ErrorCode::kIo, "cannot listen on " + address +
                                      ": another program may use the port, or the certificate may "
                                      "not fit its key; choose another one with --grpc-port");
    }
    SetServing(false);
  }

  int port() const { return port_; }

  void SetServing(bool serving) {
    grpc::HealthCheckServiceInterface* const health = server_->GetHealthCheckService();
    health->SetServingStatus(serving);
    health->SetServingStatus(kServiceName, serving);
  }

  void Stop(int64_t milliseconds) {
    server_->Shutdown(std::chrono::system_clock::now() + std::chrono::milliseconds(milliseconds));
    server_->Wait();
  }

 private:
  Service service_;
  int port_ = 0;
  std::unique_ptr<grpc::Server> server_;
};

GrpcServer::GrpcServer(const GrpcOptions& options, const Security& security,
                       const ServerParts& parts)
    : impl_(std::make_unique<Impl>(options, security, parts)) {}

GrpcServer::~GrpcServer() { Stop(0); }

int GrpcServer::port() const { return impl_->port(); }

void GrpcServer::SetServing(bool serving) { impl_->SetServing(serving); }

void GrpcServer::Stop(int64_t milliseconds) { impl_->Stop(milliseconds); }

}  // namespace continual_transformers::server
