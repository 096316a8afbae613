// What gRPC and HTTP say about the server and its models, as messages of the protocol.

#ifndef CONTINUAL_TRANSFORMERS_SERVER_MODEL_DESCRIPTION_H_
#define CONTINUAL_TRANSFORMERS_SERVER_MODEL_DESCRIPTION_H_

#include "cc/server/inference.pb.h"
#include "cc/server/served_model.h"

namespace continual_transformers::server {

// The platform and the backend of every model.
inline constexpr char kPlatform[] = "continual_transformers";

void DescribeServer(inference::ServerMetadataResponse* metadata);

// Shapes begin with -1: the streams or steps of a request.
void DescribeModel(const ServedModel& model, inference::ModelMetadataResponse* metadata);

// `dims` are the shape of one step of one stream. Triton's clients put an axis for the batch before
// them, because max_batch_size is not 0.
void DescribeConfig(const ServedModel& model, inference::ModelConfig* config);

void DescribeStatistics(ServedModel* model, inference::ModelStatistics* statistics);

}  // namespace continual_transformers::server

#endif  // CONTINUAL_TRANSFORMERS_SERVER_MODEL_DESCRIPTION_H_
