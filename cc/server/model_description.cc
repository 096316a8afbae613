#include "cc/server/model_description.h"

#include <continual_transformers.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <limits>

#include "cc/server/infer_call.h"

namespace continual_transformers::server {
namespace {

inference::DataType DataTypeOf(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return inference::TYPE_FP32;
    case DType::kFloat64:
      return inference::TYPE_FP64;
    case DType::kBFloat16:
      return inference::TYPE_BF16;
    case DType::kFloat16:
      return inference::TYPE_FP16;
    case DType::kInt32:
      return inference::TYPE_INT32;
    case DType::kInt64:
      return inference::TYPE_INT64;
    case DType::kBool:
      return inference::TYPE_BOOL;
    case DType::kInt8:
      break;  // Only rings and kernels are.
  }
  return inference::TYPE_INVALID;
}

void DescribeTensor(const Plan& plan, const Port& port,
                    inference::ModelMetadataResponse::TensorMetadata* tensor) {
  const Value& value = plan.values[port.value];
  tensor->set_name(port.name);
  tensor->set_datatype(DatatypeOf(value.dtype));
  tensor->add_shape(-1);
  for (const int64_t size : value.shape) tensor->add_shape(size);
}

template <typename Tensor>
void DescribeTensorOfConfig(const Plan& plan, const Port& port, Tensor* tensor) {
  const Value& value = plan.values[port.value];
  tensor->set_name(port.name);
  tensor->set_data_type(DataTypeOf(value.dtype));
  for (const int64_t size : value.shape) tensor->add_dims(size);
}

int32_t AtMostInt32(int64_t x) {
  return static_cast<int32_t>(std::min<int64_t>(x, std::numeric_limits<int32_t>::max()));
}

void Set(inference::StatisticDuration* duration, int64_t count, int64_t ns) {
  duration->set_count(count);
  duration->set_ns(ns);
}

}  // namespace

void DescribeServer(inference::ServerMetadataResponse* metadata) {
  metadata->set_name("continual-transformers-server");
  metadata->set_version(ct_version());
  for (const char* const extension :
       {"sequence", "sequence(string_id)", "model_repository", "model_configuration",
        "binary_tensor_data", "parameters", "statistics"}) {
    metadata->add_extensions(extension);
  }
}

void DescribeModel(const ServedModel& model, inference::ModelMetadataResponse* metadata) {
  const Plan& plan = model.plan();
  metadata->set_name(model.name());
  metadata->add_versions("1");
  metadata->set_platform(kPlatform);
  for (const Port& port : plan.inputs) DescribeTensor(plan, port, metadata->add_inputs());
  for (const Port& port : plan.outputs) DescribeTensor(plan, port, metadata->add_outputs());
}

void DescribeConfig(const ServedModel& model, inference::ModelConfig* config) {
  const Plan& plan = model.plan();
  const ModelOptions& options = model.options();
  config->set_name(model.name());
  config->set_platform(kPlatform);
  config->set_backend(kPlatform);
  config->set_max_batch_size(AtMostInt32(options.queue.rows));
  for (const Port& port : plan.inputs) DescribeTensorOfConfig(plan, port, config->add_input());
  for (const Port& port : plan.outputs) DescribeTensorOfConfig(plan, port, config->add_output());
  inference::ModelSequenceBatching* const sequences = config->mutable_sequence_batching();
  sequences->set_max_sequence_idle_microseconds(
      std::chrono::microseconds(options.idle_timeout).count());
  inference::ModelSequenceBatching::StrategyOldest* const oldest = sequences->mutable_oldest();
  oldest->set_max_candidate_sequences(AtMostInt32(options.max_streams));
  oldest->set_max_queue_delay_microseconds(options.queue.delay.count());
  oldest->set_preserve_ordering(true);
  const auto add = [config](const char* name, int64_t value) {
    (*config->mutable_parameters())[name].set_string_value(std::to_string(value));
  };
  add("receptive_field", plan.receptive_field);
  add("delay", plan.delay);
}

void DescribeStatistics(ServedModel* model, inference::ModelStatistics* statistics) {
  const Statistics counts = model->statistics();
  statistics->set_name(model->name());
  statistics->set_version("1");
  statistics->set_last_inference(counts.last_request_ms);
  statistics->set_inference_count(counts.steps);
  statistics->set_execution_count(counts.batches);
  int64_t refused = 0;
  for (const int64_t count : counts.refused) refused += count;
  inference::InferStatistics* const requests = statistics->mutable_inference_stats();
  Set(requests->mutable_success(), counts.requests, counts.queue_ns + counts.compute_ns);
  Set(requests->mutable_fail(), refused, 0);
  Set(requests->mutable_queue(), counts.requests, counts.queue_ns);
  Set(requests->mutable_compute_infer(), counts.requests, counts.compute_ns);
  // A batch's copies count as its compute.
  Set(requests->mutable_compute_input(), counts.requests, counts.copy_ns);
  Set(requests->mutable_compute_output(), counts.requests, 0);
  inference::MemoryUsage* const memory = statistics->add_memory_usage();
  memory->set_type("CPU");
  memory->set_byte_size(counts.memory.weights + counts.memory.streams +
                        counts.memory.streams_overhead + counts.memory.arenas +
                        counts.answer_bytes);
}

}  // namespace continual_transformers::server
