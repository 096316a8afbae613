// The floor of the server: a gRPC server of the same library and the same messages that answers
// every inference at once, with an empty tensor. It calls itself like a given model, so that the
// same load generator can be pointed at both.
//
//   empty_grpc_server PORT MODEL INPUT FEATURES OUTPUT

#include <grpcpp/grpcpp.h>

#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>

#include "cc/server/inference.grpc.pb.h"

namespace {

using grpc::CallbackServerContext;
using grpc::ServerUnaryReactor;

class EmptyService final : public inference::GRPCInferenceService::CallbackService {
 public:
  explicit EmptyService(char** names)
      : model_(names[0]), input_(names[1]), features_(std::atoll(names[2])), output_(names[3]) {}

  ServerUnaryReactor* ModelInfer(CallbackServerContext* context,
                                 const inference::ModelInferRequest* request,
                                 inference::ModelInferResponse* response) override {
    response->set_model_name(request->model_name());
    response->set_id(request->id());
    count_.fetch_add(1, std::memory_order_relaxed);
    auto* const tensor = response->add_outputs();
    tensor->set_name(output_);
    tensor->set_datatype("FP32");
    tensor->add_shape(0);
    response->add_raw_output_contents();
    return Finish(context);
  }

  ServerUnaryReactor* ServerLive(CallbackServerContext* context,
                                 const inference::ServerLiveRequest* /*request*/,
                                 inference::ServerLiveResponse* response) override {
    response->set_live(true);
    return Finish(context);
  }

  ServerUnaryReactor* ServerReady(CallbackServerContext* context,
                                  const inference::ServerReadyRequest* /*request*/,
                                  inference::ServerReadyResponse* response) override {
    response->set_ready(true);
    return Finish(context);
  }

  ServerUnaryReactor* ModelReady(CallbackServerContext* context,
                                 const inference::ModelReadyRequest* /*request*/,
                                 inference::ModelReadyResponse* response) override {
    response->set_ready(true);
    return Finish(context);
  }

  ServerUnaryReactor* ServerMetadata(CallbackServerContext* context,
                                     const inference::ServerMetadataRequest* /*request*/,
                                     inference::ServerMetadataResponse* response) override {
    response->set_name("empty");
    response->add_extensions("statistics");
    return Finish(context);
  }

  ServerUnaryReactor* ModelMetadata(CallbackServerContext* context,
                                    const inference::ModelMetadataRequest* /*request*/,
                                    inference::ModelMetadataResponse* response) override {
    response->set_name(model_);
    response->add_versions("1");
    auto* tensor = response->add_inputs();
    tensor->set_name(input_);
    tensor->set_datatype("FP32");
    tensor->add_shape(-1);
    tensor->add_shape(features_);
    tensor = response->add_outputs();
    tensor->set_name(output_);
    tensor->set_datatype("FP32");
    tensor->add_shape(-1);
    tensor->add_shape(0);
    return Finish(context);
  }

  ServerUnaryReactor* ModelConfig(CallbackServerContext* context,
                                  const inference::ModelConfigRequest* /*request*/,
                                  inference::ModelConfigResponse* response) override {
    inference::ModelConfig* const config = response->mutable_config();
    config->set_name(model_);
    config->set_max_batch_size(1024);
    config->mutable_sequence_batching()->mutable_oldest();
    auto* const input = config->add_input();
    input->set_name(input_);
    input->set_data_type(inference::TYPE_FP32);
    input->add_dims(features_);
    auto* const output = config->add_output();
    output->set_name(output_);
    output->set_data_type(inference::TYPE_FP32);
    output->add_dims(0);
    return Finish(context);
  }

  ServerUnaryReactor* ModelStatistics(CallbackServerContext* context,
                                      const inference::ModelStatisticsRequest* /*request*/,
                                      inference::ModelStatisticsResponse* response) override {
    auto* const model = response->add_model_stats();
    model->set_name(model_);
    model->set_version("1");
    // perf_analyzer looks for the version that has answered something.
    model->set_inference_count(count_);
    model->set_execution_count(count_);
    inference::InferStatistics* const all = model->mutable_inference_stats();
    for (auto* const each :
         {all->mutable_success(), all->mutable_queue(), all->mutable_compute_input(),
          all->mutable_compute_infer(), all->mutable_compute_output()}) {
      each->set_count(count_);
    }
    return Finish(context);
  }

 private:
  static ServerUnaryReactor* Finish(CallbackServerContext* context) {
    ServerUnaryReactor* const reactor = context->DefaultReactor();
    reactor->Finish(grpc::Status::OK);
    return reactor;
  }

  const std::string model_, input_;
  const int64_t features_;
  const std::string output_;
  std::atomic<int64_t> count_{0};
};

}  // namespace

int main(int argc, char** argv) {
  if (argc != 6) {
    std::fprintf(stderr, "usage: empty_grpc_server PORT MODEL INPUT FEATURES OUTPUT\n");
    return 2;
  }
  EmptyService service(argv + 2);
  grpc::ServerBuilder builder;
  int port = 0;
  builder.AddListeningPort(std::string("127.0.0.1:") + argv[1], grpc::InsecureServerCredentials(),
                           &port);
  builder.RegisterService(&service);
  const std::unique_ptr<grpc::Server> server = builder.BuildAndStart();
  if (server == nullptr) return 1;
  std::printf("%d\n", port);
  std::fflush(stdout);
  server->Wait();
}
