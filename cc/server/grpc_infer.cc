#include "cc/server/grpc_infer.h"

#include <cstring>
#include <limits>
#include <nlohmann/json.hpp>
#include <utility>

namespace continual_transformers::server {
namespace {

[[noreturn]] void Refuse(const std::string& message) {
  throw Refusal(Reason::kInvalidArgument, message);
}

grpc::StatusCode CodeOf(Reason reason) {
  switch (reason) {
    case Reason::kNone:
      return grpc::StatusCode::OK;
    case Reason::kInvalidArgument:
      return grpc::StatusCode::INVALID_ARGUMENT;
    case Reason::kUnauthenticated:
      return grpc::StatusCode::UNAUTHENTICATED;
    case Reason::kNotFound:
      return grpc::StatusCode::NOT_FOUND;
    case Reason::kOutOfStep:
    case Reason::kEnded:
    case Reason::kNotStarted:
      return grpc::StatusCode::FAILED_PRECONDITION;
    case Reason::kTooManyStreams:
    case Reason::kQueueFull:
      return grpc::StatusCode::RESOURCE_EXHAUSTED;
    case Reason::kDeadline:
      return grpc::StatusCode::DEADLINE_EXCEEDED;
    case Reason::kCancelled:
      return grpc::StatusCode::CANCELLED;
    case Reason::kUnavailable:
    case Reason::kWrongServer:
      return grpc::StatusCode::UNAVAILABLE;
    case Reason::kUnsupported:
      return grpc::StatusCode::UNIMPLEMENTED;
    case Reason::kInternal:
      return grpc::StatusCode::INTERNAL;
  }
  return grpc::StatusCode::INTERNAL;
}

bool Bool(const std::string& name, const inference::InferParameter& parameter) {
  if (parameter.parameter_choice_case() == inference::InferParameter::kBoolParam) {
    return parameter.bool_param();
  }
  Refuse("the parameter " + name + " is not a bool");
}

int64_t Whole(const std::string& name, const inference::InferParameter& parameter) {
  if (parameter.parameter_choice_case() == inference::InferParameter::kInt64Param) {
    return parameter.int64_param();
  }
  if (parameter.parameter_choice_case() == inference::InferParameter::kUint64Param &&
      parameter.uint64_param() <= static_cast<uint64_t>(std::numeric_limits<int64_t>::max())) {
    return static_cast<int64_t>(parameter.uint64_param());
  }
  Refuse("the parameter " + name + " is not an int64");
}

std::optional<std::string> SequenceId(const inference::InferParameter& parameter) {
  switch (parameter.parameter_choice_case()) {
    case inference::InferParameter::kInt64Param:
      // Triton's clients send 0 for a request without a sequence.
      if (parameter.int64_param() == 0) return std::nullopt;
      return std::to_string(parameter.int64_param());
    case inference::InferParameter::kUint64Param:
      if (parameter.uint64_param() == 0) return std::nullopt;
      return std::to_string(parameter.uint64_param());
    case inference::InferParameter::kStringParam:
      if (parameter.string_param().empty()) return std::nullopt;
      return parameter.string_param();
    default:
      Refuse("the parameter sequence_id is neither an integer nor a string");
  }
}

template <typename Repeated>
std::string_view BytesOf(const Repeated& values) {
  return {reinterpret_cast<const char*>(values.data()), values.size() * sizeof(values.Get(0))};
}

// The typed contents of a tensor. Their values lie one after another, as in the raw form.
void ReadContents(const inference::InferTensorContents& contents, TensorView* tensor) {
  if (tensor->datatype == "FP32") {
    tensor->data = BytesOf(contents.fp32_contents());
  } else if (tensor->datatype == "FP64") {
    tensor->data = BytesOf(contents.fp64_contents());
  } else if (tensor->datatype == "INT32") {
    tensor->data = BytesOf(contents.int_contents());
  } else if (tensor->datatype == "INT64") {
    tensor->data = BytesOf(contents.int64_contents());
  } else if (tensor->datatype == "BOOL") {
    tensor->data = BytesOf(contents.bool_contents());
  } else if (tensor->datatype == "BYTES") {
    tensor->texts.assign(contents.bytes_contents().begin(), contents.bytes_contents().end());
  } else {
    Refuse("the datatype " + Quoted(tensor->datatype) +
           " has no typed contents: send raw_input_contents");
  }
}

bool HasContents(const std::string& datatype) { return datatype != "FP16" && datatype != "BF16"; }

template <typename T, typename Repeated>
void Append(const std::string& bytes, Repeated* values) {
  if (bytes.empty()) return;  // memcpy takes no null pointer, not even for no bytes.
  values->Resize(static_cast<int>(bytes.size() / sizeof(T)), T());
  std::memcpy(values->mutable_data(), bytes.data(), bytes.size());
}

void WriteContents(const std::string& datatype, const std::string& bytes,
                   inference::InferTensorContents* contents) {
  if (datatype == "FP32") Append<float>(bytes, contents->mutable_fp32_contents());
  if (datatype == "FP64") Append<double>(bytes, contents->mutable_fp64_contents());
  if (datatype == "INT32") Append<int32_t>(bytes, contents->mutable_int_contents());
  if (datatype == "INT64") Append<int64_t>(bytes, contents->mutable_int64_contents());
  if (datatype == "BOOL") Append<bool>(bytes, contents->mutable_bool_contents());
}

std::string TextOf(const nlohmann::ordered_json& value) {
  return value.dump(-1, ' ', false, nlohmann::ordered_json::error_handler_t::replace);
}

// A JSON object from streams to the steps that they expect.
std::string ExpectedSteps(const Outcome& outcome) {
  // Clients accept 8 KiB of metadata by default.
  constexpr size_t kMostBytes = 2500;
  nlohmann::ordered_json steps = nlohmann::ordered_json::object();
  size_t bytes = 0;
  for (const ExpectedStep& expected : outcome.expected) {
    bytes += TextOf(expected.stream).size() + 32;  // as JSON: a byte may become six
    if (bytes > kMostBytes) break;
    steps[expected.stream] = expected.step;
  }
  return TextOf(steps);
}

}  // namespace

grpc::Status StatusOf(const Outcome& outcome) {
  if (outcome.ok()) return grpc::Status::OK;
  return {CodeOf(outcome.reason), outcome.message};
}

void AddShards(const ShardTable& table, grpc::CallbackServerContext* context) {
  context->AddTrailingMetadata("shard-table-bin", table.Json(false));
}

void AddRefusal(const Outcome& outcome, grpc::CallbackServerContext* context) {
  if (outcome.ok()) return;
  context->AddTrailingMetadata("reason", NameOf(outcome.reason));
  if (outcome.shards != nullptr) AddShards(*outcome.shards, context);
  if (outcome.expected.empty()) return;
  context->AddTrailingMetadata("expected-steps-bin", ExpectedSteps(outcome));
}

void AddRefusal(const Outcome& outcome, inference::ModelInferResponse* response) {
  if (outcome.ok()) return;
  auto* const parameters = response->mutable_parameters();
  (*parameters)["reason"].set_string_param(NameOf(outcome.reason));
  if (outcome.expected.empty()) return;
  (*parameters)["expected_steps"].set_string_param(ExpectedSteps(outcome));
}

void GrpcStepRequest::Submit(const ModelRepository& repository, const InferLimits& limits,
                             const inference::ModelInferRequest& request,
                             inference::ModelInferResponse* response) {
  response_ = response;
  try {
    model_ = repository.Find(request.model_name(), request.model_version());
    Read(request);
    outputs_ = ReadInferCall(*model_, call_, limits, this);
    MakeRoom(request);
  } catch (const std::exception& error) {
    const Outcome outcome = OutcomeOf(error);
    if (model_ != nullptr) model_->CountRefusal(outcome.reason);
    return Done(outcome);
  }
  // Held until Submit returns: this request may destroy itself in Done, and the last owner of a
  // model waits for its queue, which must not be in a batch that this thread leads.
  const std::shared_ptr<ServedModel> model = model_;
  model->Submit(this);
}

void GrpcStepRequest::Read(const inference::ModelInferRequest& request) {
  for (const auto& [name, parameter] : request.parameters()) {
    if (name == "sequence_id") call_.sequence_id = SequenceId(parameter);
    // The short names are for many streams: tritonclient sends the others with a sequence_id only.
    if (name == "sequence_start" || name == "start") call_.sequence_start = Bool(name, parameter);
    if (name == "sequence_end" || name == "end") call_.sequence_end = Bool(name, parameter);
    if (name == "step") call_.step = Whole(name, parameter);
    if (name == "timeout") call_.timeout_us = Whole(name, parameter);
    if (name == "shard_epoch") call_.shard_epoch = Whole(name, parameter);
  }
  const bool raw = request.raw_input_contents_size() > 0;
  if (raw && request.raw_input_contents_size() != request.inputs_size()) {
    Refuse("the request has " + std::to_string(request.inputs_size()) + " inputs and " +
           std::to_string(request.raw_input_contents_size()) +
           " raw_input_contents, expected as many or none");
  }
  call_.inputs.resize(request.inputs_size());
  for (int i = 0; i < request.inputs_size(); ++i) {
    const auto& input = request.inputs(i);
    TensorView* const tensor = &call_.inputs[i];
    tensor->name = input.name();
    tensor->datatype = input.datatype();
    tensor->shape.assign(input.shape().begin(), input.shape().end());
    if (input.parameters().contains("shared_memory_region")) {
      throw Refusal(Reason::kUnsupported,
                    "this server does not read shared memory: send the data in the request");
    }
    if (!raw) {
      ReadContents(input.contents(), tensor);
    } else if (input.has_contents()) {
      Refuse("the input " + Quoted(tensor->name) +
             " has typed contents in a request with raw_input_contents, expected one of them");
    } else if (tensor->datatype == "BYTES") {
      tensor->texts = SplitBytes(tensor->name, request.raw_input_contents(i));
    } else {
      tensor->data = request.raw_input_contents(i);
    }
  }
  for (const auto& output : request.outputs()) {
    if (output.parameters().contains("shared_memory_region")) {
      throw Refusal(Reason::kUnsupported,
                    "this server does not write shared memory: its answers have the data");
    }
    if (output.parameters().contains("classification")) {
      throw Refusal(Reason::kUnsupported, "this server does not sort outputs into classes");
    }
    call_.outputs.push_back(output.name());
  }
}

void GrpcStepRequest::MakeRoom(const inference::ModelInferRequest& request) {
  response_->set_model_name(request.model_name());
  response_->set_model_version("1");
  response_->set_id(request.id());
  // Who sends typed contents gets them, where the datatypes have them.
  bool typed = request.raw_input_contents_size() == 0;
  for (const OutputTensor& output : outputs_) typed = typed && HasContents(output.datatype);
  if (typed) typed_.resize(outputs_.size());
  for (size_t i = 0; i < outputs_.size(); ++i) {
    const OutputTensor& output = outputs_[i];
    auto* const tensor = response_->add_outputs();
    tensor->set_name(output.name);
    tensor->set_datatype(output.datatype);
    tensor->mutable_shape()->Add(output.shape.begin(), output.shape.end());
    std::string* const room = typed ? &typed_[i] : response_->add_raw_output_contents();
    room->resize(output.bytes);
    outputs[output.port] = room->data();
  }
}

void GrpcStepRequest::WriteResponse() {
  for (size_t i = 0; i < typed_.size(); ++i) {
    WriteContents(outputs_[i].datatype, typed_[i],
                  response_->mutable_outputs(static_cast<int>(i))->mutable_contents());
  }
  if (call_.sequence_id.has_value() && !next_steps.empty()) {
    (*response_->mutable_parameters())["next_step"].set_int64_param(next_steps[0]);
  }
}

}  // namespace continual_transformers::server
