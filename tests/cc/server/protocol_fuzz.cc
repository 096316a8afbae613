// Sends wrong messages over both protocols: nothing in a message may make the server read or write
// out of bounds, run into undefined behaviour, or answer with an internal error, and nothing may
// change a stream that it does not name.
//
// With libFuzzer (clang++ -fsanitize=fuzzer,address,undefined) it is a fuzz target. With
// -DCONTINUAL_TRANSFORMERS_FUZZ_MAIN it has a main, which changes a number of messages at random,
// the same way on every run:
//
//   protocol_fuzz [messages] [seed]
//   protocol_fuzz --corpus FOLDER    writes the initial messages, for libFuzzer
//
// The first byte of a message says what the others are: see kGrpc and those after it.

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <fstream>
#include <future>
#include <iostream>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "cc/server/grpc_infer.h"
#include "cc/server/http_server.h"
#include "cc/server/log.h"
#include "cc/server/model_repository.h"
#include "cc/server/shard_table.h"
#include "cc/server/stream_copy.h"
#include "cc/session/error.h"
#include "tests/cc/mutator.h"
#include "tests/cc/server/http_client.h"
#include "tests/cc/server/server_case.h"

namespace continual_transformers::server {
namespace {

// The kinds of messages.
constexpr char kGrpc = 0;  // a ModelInferRequest
constexpr char kHttp = 1;  // what comes over the wire
constexpr char kCopy = 2;  // of a stream
constexpr char kShardTable = 3;
constexpr int kKinds = 4;

[[noreturn]] void Fail(const std::string& message) {
  std::cerr << message << "\n";
  std::abort();
}

// A ModelInfer, without the network.
class GrpcCall : public GrpcStepRequest {
 public:
  Outcome Run(const ModelRepository& repository, const std::string& bytes) {
    inference::ModelInferRequest request;
    // gRPC refuses what is no message.
    if (!request.ParseFromString(bytes)) return {Reason::kInvalidArgument, "no message", {}};
    inference::ModelInferResponse response;
    Submit(repository, {}, request, &response);
    const Outcome outcome = done_.get_future().get();
    if (outcome.ok() && response.SerializeAsString().empty()) Fail("an answer without outputs");
    return outcome;
  }

  void Done(const Outcome& outcome) noexcept override {
    if (outcome.ok()) WriteResponse();
    done_.set_value(outcome);
  }

 private:
  std::promise<Outcome> done_;
};

// A server of a small model with every op, and a stream in it that no message names.
class Target {
 public:
  Target() {
    SetLogLevel(LogLevel::kOff);
    google::protobuf::SetLogHandler(nullptr);
    EveryOp().File()->Save(folder_ / "m");
    repository_.Add("m", folder_ / "m");
    repository_.Load("m");
    HttpOptions options;
    options.port = 0;
    options.max_body_bytes = 1 << 20;
    Security security;
    security.operator_token = "secret";
    http_ = std::make_unique<HttpServer>(options, security, ServerParts{&repository_});
  }

  // Messages that were taken, and all.
  int taken = 0, all = 0;

  void Take(const std::string& message) {
    if (message.empty()) return;
    const std::string bytes = message.substr(1);
    ++all;
    switch (static_cast<unsigned char>(message[0]) % kKinds) {
      case kGrpc: {
        GrpcCall call;
        const Outcome outcome = call.Run(repository_, bytes);
        if (outcome.reason == Reason::kInternal) Fail("an internal error: " + outcome.message);
        if (!outcome.ok() && outcome.message.empty()) Fail("a refusal without a sentence");
        taken += outcome.ok() ? 1 : 0;
        break;
      }
      case kHttp:
        TakeHttp(bytes);
        break;
      case kCopy:
        TakeCopy(bytes);
        break;
      case kShardTable:
        try {
          ShardTable::Parse(ShardTable::Parse(bytes).Json(true));
          ++taken;
        } catch (const Refusal& refusal) {
          if (refusal.outcome().message.empty()) Fail("a refusal without a sentence");
        }
        break;
    }
    constexpr int kLookEvery = 16;
    if (all % kLookEvery == 0) Witness();
  }

  // Takes a step of the stream that no message names, and compares the answer.
  void Witness() {
    // A message may have unloaded the model, which ends its streams.
    if (!repository_.ready() || repository_.Find("m").get() != model_.get()) {
      if (repository_.index()[0].reason == "unloaded") repository_.Load("m");
      model_ = repository_.Find("m");
      next_ = 0;
      ++life_;
    }
    const auto call = Step(model_.get(), "witness", next_, {true, next_ == 0, false, life_});
    if (!call->outcome.ok()) Fail("the witness was refused: " + call->outcome.message);
    ExpectClose(model_->plan(), call->answers, undisturbed_.Answer("witness", life_, next_));
    if (::testing::Test::HasFailure()) Fail("the witness has another answer");
    ++next_;
  }

  const ModelRepository& repository() const { return repository_; }

 private:
  void TakeHttp(const std::string& bytes) {
    HttpClient client(http_->port());
    if (!client.connected()) Fail("the HTTP port is gone");
    client.Send(bytes);
    client.EndSending();
    for (int status = 0; (status = client.Receive()) != 0;) {
      if (status >= 500 && status != 501 && status != 503) {
        Fail("HTTP status " + std::to_string(status) + ": " + client.head());
      }
      if (client.head().find("text/event-stream") != std::string::npos) break;
      taken += status == 200 ? 1 : 0;
    }
  }

  void TakeCopy(const std::string& bytes) {
    const std::shared_ptr<ServedModel> model = repository_.Find("m");
    try {
      StreamCopy copy = DecodeStreamCopy(bytes);
      copy.name = "copy";
      model->CopyIn(copy, false);
      ++taken;
    } catch (const Refusal&) {
    } catch (const Error& error) {
      if (error.code() == ErrorCode::kInternal) Fail("an internal error");
    }
  }

  Folder folder_;
  ModelRepository repository_{ModelOptions()};
  std::unique_ptr<HttpServer> http_;
  std::shared_ptr<ServedModel> model_;
  Undisturbed undisturbed_{EveryOp().File()};
  int64_t next_ = 0, life_ = 0;
};

Target* TheTarget() {
  static Target* const target = new Target;  // with threads of its own until the process ends
  return target;
}

}  // namespace
}  // namespace continual_transformers::server

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  continual_transformers::server::TheTarget()->Take(
      std::string(reinterpret_cast<const char*>(data), size));
  return 0;
}

#ifdef CONTINUAL_TRANSFORMERS_FUZZ_MAIN

namespace continual_transformers::server {
namespace {

using inference::ModelInferRequest;

// A request for steps of some streams, with raw contents.
ModelInferRequest GrpcRequest(const Plan& plan, int64_t streams, int64_t steps, bool numbered) {
  ModelInferRequest request;
  request.set_model_name("m");
  request.set_id("7");
  const auto add = [&request](const std::string& name, const std::string& datatype,
                              const std::vector<int64_t>& shape, const std::string& bytes) {
    auto* const tensor = request.add_inputs();
    tensor->set_name(name);
    tensor->set_datatype(datatype);
    for (const int64_t size : shape) tensor->add_shape(size);
    request.add_raw_input_contents(bytes);
  };
  const Arrays inputs = RandomInputs(plan, streams * steps, 5);
  for (size_t i = 0; i < plan.inputs.size(); ++i) {
    const Value& value = plan.values[plan.inputs[i].value];
    std::vector<int64_t> shape = {streams, steps};
    shape.insert(shape.end(), value.shape.begin(), value.shape.end());
    add(plan.inputs[i].name, DatatypeOf(value.dtype), shape, inputs[i]);
  }
  auto& parameters = *request.mutable_parameters();
  if (streams == 1) {
    parameters["sequence_id"].set_int64_param(5);
    parameters["sequence_start"].set_bool_param(true);
    if (numbered) parameters["step"].set_int64_param(0);
  } else {
    std::string names, numbers;
    for (int64_t i = 0; i < streams; ++i) {
      names += std::string({2, 0, 0, 0, 's', static_cast<char>('0' + i)});
      numbers += std::string(8, '\0');
    }
    add("streams", "BYTES", {streams}, names);
    if (numbered) add("step", "INT64", {streams}, numbers);
    parameters["start"].set_bool_param(true);
  }
  parameters["timeout"].set_int64_param(int64_t{3600} * 1000 * 1000);
  return request;
}

// The same request as JSON. Bytes of tensors are JSON's numbers.
Json JsonRequest(const Plan& plan, int64_t steps) {
  Json request = {{"id", "7"},
                  {"parameters", {{"sequence_id", "h"}, {"sequence_start", true}, {"step", 0}}},
                  {"inputs", Json::array()},
                  {"outputs", Json::array()}};
  for (const Port& port : plan.inputs) {
    const Value& value = plan.values[port.value];
    std::vector<int64_t> shape = {steps};
    shape.insert(shape.end(), value.shape.begin(), value.shape.end());
    Json data = Json::array();
    for (int64_t i = 0; i < steps * value.size; ++i) {
      if (value.dtype == DType::kBool) {
        data.push_back(i % 2 == 0);
      } else {
        data.push_back(i % 2);
      }
    }
    request["inputs"].push_back({{"name", port.name},
                                 {"datatype", DatatypeOf(value.dtype)},
                                 {"shape", shape},
                                 {"data", data}});
  }
  request["outputs"].push_back({{"name", plan.outputs[0].name}});
  return request;
}

std::string TextOf(const Json& json) {
  return json.dump(-1, ' ', false, Json::error_handler_t::replace);
}

constexpr char kInferLine[] = "POST /v2/models/m/infer";

struct Corpus {
  std::vector<ModelInferRequest> grpc;
  std::vector<Json> json;           // bodies of kInferLine
  std::vector<std::string> http;    // whole messages
  std::vector<std::string> others;  // with their kind

  std::vector<std::string> All() const {
    std::vector<std::string> all = others;
    for (const ModelInferRequest& request : grpc)
      all.push_back(kGrpc + request.SerializeAsString());
    for (const Json& body : json) all.push_back(kHttp + Message(kInferLine, TextOf(body)));
    for (const std::string& message : http) all.push_back(kHttp + message);
    return all;
  }
};

Corpus MakeCorpus(const std::shared_ptr<ServedModel>& model) {
  const Plan& plan = model->plan();
  Corpus corpus;
  for (const bool numbered : {false, true}) {
    corpus.grpc.push_back(GrpcRequest(plan, 1, 1, numbered));
    corpus.grpc.push_back(GrpcRequest(plan, 1, 3, numbered));
    corpus.grpc.push_back(GrpcRequest(plan, 3, 1, numbered));
    corpus.grpc.push_back(GrpcRequest(plan, 2, 2, numbered));
    // Without a step: they only begin or end.
    corpus.grpc.push_back(GrpcRequest(plan, 1, 0, numbered));
    corpus.grpc.push_back(GrpcRequest(plan, 2, 0, numbered));
    (*corpus.grpc.back().mutable_parameters())["end"].set_bool_param(true);
  }
  corpus.json = {JsonRequest(plan, 1), JsonRequest(plan, 2), JsonRequest(plan, 0)};
  corpus.json.back()["parameters"] = {{"sequence_id", "e"}, {"sequence_end", true}};
  corpus.http = {
      Message("GET /v2/health/ready"),
      Message("GET /v2/models/m"),
      Message("GET /metrics"),
      Message("GET /status?since=3"),
      Message("POST /v2/repository/index", R"({"ready":true})"),
      Message("GET /v2/models/m/streams?limit=7", "", "Authorization: Bearer secret\r\n"),
      Message("GET /v2/models/m/streams/h", "", "Authorization: Bearer secret\r\n"),
      Message("DELETE /v2/models/m/streams/h", "", "Authorization: Bearer secret\r\n"),
      Message("PUT /v2/shards", "{}", "Authorization: Bearer secret\r\n"),
      "POST /v2/models/m/infer HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
      "5\r\n{\"a\":\r\n2\r\n1}\r\n0\r\n\r\n",
  };
  {
    // The binary extension: JSON, and tensors after it.
    Json head = JsonRequest(plan, 1);
    std::string tensors;
    const Arrays inputs = RandomInputs(plan, 1, 5);
    for (size_t i = 0; i < plan.inputs.size(); ++i) {
      head["inputs"][i].erase("data");
      head["inputs"][i]["parameters"] = {{"binary_data_size", inputs[i].size()}};
      tensors += inputs[i];
    }
    head["outputs"][0]["parameters"] = {{"binary_data", true}};
    const std::string text = TextOf(head);
    corpus.http.push_back(
        Message(kInferLine, text + tensors,
                "Inference-Header-Content-Length: " + std::to_string(text.size()) + "\r\n"));
  }
  Step(model.get(), "copied", 0, {true, true, false, 0});
  corpus.others.push_back(kCopy + EncodeStreamCopy(model->CopyOut("copied")));
  ShardTable table;
  table.epoch = 3;
  table.servers = {{"n1", {"host:8001", "host:8000"}}};
  table.shards.fill("n1");
  table.self = "n1";
  corpus.others.push_back(kShardTable + table.Json(true));
  return corpus;
}

// Makes messages with one to four errors.
class MessageMutator {
 public:
  MessageMutator(Corpus corpus, uint32_t seed)
      : corpus_(std::move(corpus)), all_(corpus_.All()), mutator_(seed) {}

  std::string Next() {
    const size_t changes = mutator_.Below(3) == 0 ? 1 + mutator_.Below(4) : 1;
    switch (mutator_.Below(4)) {
      case 0: {
        ModelInferRequest request = corpus_.grpc[mutator_.Below(corpus_.grpc.size())];
        for (size_t i = 0; i < changes; ++i) Change(&request);
        return kGrpc + request.SerializeAsString();
      }
      case 1: {
        Json body = corpus_.json[mutator_.Below(corpus_.json.size())];
        for (size_t i = 0; i < changes; ++i) mutator_.Change(&body);
        return kHttp + Message(kInferLine, TextOf(body));
      }
      default: {
        std::string message = all_[mutator_.Below(all_.size())];
        std::string bytes = message.substr(1);
        for (size_t i = 0; i < changes; ++i) mutator_.ChangeBytes(&bytes);
        return message[0] + bytes;
      }
    }
  }

 private:
  void Change(ModelInferRequest* request) {
    const int inputs = request->inputs_size();
    const auto some = [&] {
      return request->mutable_inputs(static_cast<int>(mutator_.Below(inputs)));
    };
    if (inputs == 0) return;
    switch (mutator_.Below(9)) {
      case 0: {
        constexpr const char* kDatatypes[] = {"FP32", "FP64",  "INT64", "INT32", "BOOL",
                                              "FP16", "BYTES", "",      "FP"};
        some()->set_datatype(kDatatypes[mutator_.Below(9)]);
        break;
      }
      case 1: {
        constexpr int64_t kSizes[] = {-1,        0,        1, 2, 3, 1 << 20, int64_t{1} << 40,
                                      INT64_MAX, INT64_MIN};
        auto* const shape = some()->mutable_shape();
        if (shape->empty() || mutator_.Below(3) == 0) {
          shape->Add(kSizes[mutator_.Below(9)]);
        } else if (mutator_.Below(3) == 0) {
          shape->RemoveLast();
        } else {
          shape->Set(static_cast<int>(mutator_.Below(shape->size())), kSizes[mutator_.Below(9)]);
        }
        break;
      }
      case 2: {
        if (request->raw_input_contents_size() == 0) break;
        auto* const raw = request->mutable_raw_input_contents(
            static_cast<int>(mutator_.Below(request->raw_input_contents_size())));
        mutator_.ChangeBytes(raw);
        break;
      }
      case 3:
        *request->add_inputs() = *some();
        if (mutator_.Below(2) == 0) request->add_raw_input_contents("abcd");
        break;
      case 4:
        request->mutable_inputs()->RemoveLast();
        if (mutator_.Below(2) == 0 && request->raw_input_contents_size() > 0) {
          request->mutable_raw_input_contents()->RemoveLast();
        }
        break;
      case 5:
        mutator_.ChangeBytes(some()->mutable_name());
        break;
      case 6: {
        constexpr const char* kNames[] = {"sequence_id",  "sequence_start", "step",
                                          "sequence_end", "timeout",        "shard_epoch"};
        auto& parameter = (*request->mutable_parameters())[kNames[mutator_.Below(6)]];
        constexpr int64_t kNumbers[] = {0, 1, -1, INT64_MAX, INT64_MIN};
        switch (mutator_.Below(4)) {
          case 0:
            parameter.set_int64_param(kNumbers[mutator_.Below(5)]);
            break;
          case 1:
            parameter.set_string_param(std::string(mutator_.Below(400), 'x'));
            break;
          case 2:
            parameter.set_bool_param(mutator_.Below(2) == 0);
            break;
          default:
            parameter.set_double_param(0.5);
        }
        break;
      }
      case 7:
        request->add_outputs()->set_name(mutator_.Below(2) == 0 ? "y" : "nothing");
        break;
      case 8: {
        // Typed contents instead of raw ones.
        auto* const input = some();
        for (int64_t i = 0; i < static_cast<int64_t>(mutator_.Below(20)); ++i) {
          input->mutable_contents()->add_fp32_contents(1);
        }
        if (mutator_.Below(2) == 0) request->clear_raw_input_contents();
        break;
      }
    }
  }

  const Corpus corpus_;
  const std::vector<std::string> all_;
  Mutator mutator_;
};

int Main(int arguments, char** values) {
  Target* const target = TheTarget();
  const Corpus corpus = MakeCorpus(target->repository().Find("m"));
  const std::vector<std::string> all = corpus.All();
  if (arguments == 3 && values[1] == std::string("--corpus")) {
    for (size_t i = 0; i < all.size(); ++i) {
      std::ofstream(std::string(values[2]) + "/" + std::to_string(i), std::ios::binary) << all[i];
    }
    return 0;
  }
  const int messages = arguments > 1 ? std::atoi(values[1]) : 10000;
  const uint32_t seed = arguments > 2 ? static_cast<uint32_t>(std::atoi(values[2])) : 1;
  for (const std::string& message : all) target->Take(message);
  // All but the tables for a server that has no shards, and the chunks that are no request.
  if (target->taken != target->all - 2) {
    std::cerr << "of " << target->all << " messages, " << target->taken << " were taken\n";
    return 1;
  }
  target->taken = target->all = 0;
  MessageMutator mutator(corpus, seed);
  for (int i = 0; i < messages; ++i) {
    const std::string message = mutator.Next();
    // For whoever looks for what ended the process.
    std::ofstream("protocol_fuzz_last", std::ios::binary) << message;
    target->Take(message);
  }
  std::remove("protocol_fuzz_last");
  std::cout << messages << " messages: " << target->taken << " taken\n";
  // The test is useless if all messages are accepted, or all are refused.
  const bool sound = target->taken > messages / 50 && target->taken < messages * 9 / 10;
  return messages < 1000 || sound ? 0 : 1;
}

}  // namespace
}  // namespace continual_transformers::server

int main(int arguments, char** values) {
  return continual_transformers::server::Main(arguments, values);
}

#endif  // CONTINUAL_TRANSFORMERS_FUZZ_MAIN
