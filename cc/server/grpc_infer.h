// Inference over gRPC: from protobuf messages to StepRequest and back.

#ifndef CONTINUAL_TRANSFORMERS_SERVER_GRPC_INFER_H_
#define CONTINUAL_TRANSFORMERS_SERVER_GRPC_INFER_H_

#include <grpcpp/grpcpp.h>

#include <memory>
#include <string>
#include <vector>

#include "cc/server/infer_call.h"
#include "cc/server/inference.pb.h"
#include "cc/server/model_repository.h"
#include "cc/server/shard_table.h"

namespace continual_transformers::server {

grpc::Status StatusOf(const Outcome& outcome);
// Adds what a program needs to know of a refusal: the metadata `reason`, and `expected-steps-bin`,
// a JSON object from streams to the steps that they expect. If another server has a stream, also
// the table of shards.
void AddRefusal(const Outcome& outcome, grpc::CallbackServerContext* context);
// The same for one answer of several on a call: the parameters `reason` and `expected_steps`, the
// same JSON.
void AddRefusal(const Outcome& outcome, inference::ModelInferResponse* response);

// Adds the metadata `shard-table-bin`, the table as JSON.
void AddShards(const ShardTable& table, grpc::CallbackServerContext* context);

// A request for steps with its messages. The messages belong to the caller.
class GrpcStepRequest : public StepRequest {
 public:
  // Reads the request, and submits it to its model. Calls Done at once if it is refused. Done may
  // destroy this request.
  void Submit(const ModelRepository& repository, const InferLimits& limits,
              const inference::ModelInferRequest& request, inference::ModelInferResponse* response);

 protected:
  // Completes the response of a request that was not refused.
  void WriteResponse();

 private:
  void Read(const inference::ModelInferRequest& request);
  void MakeRoom(const inference::ModelInferRequest& request);

  std::shared_ptr<ServedModel> model_;  // until the request is destroyed
  inference::ModelInferResponse* response_ = nullptr;
  InferCall call_;
  std::vector<OutputTensor> outputs_;
  std::vector<std::string> typed_;  // outputs that are copied to typed contents; empty: raw
};

}  // namespace continual_transformers::server

#endif  // CONTINUAL_TRANSFORMERS_SERVER_GRPC_INFER_H_
