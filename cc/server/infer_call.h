// An inference request of the KServe V2 protocol, before it is known to fit its model. gRPC and
// HTTP fill in an InferCall, and ReadInferCall turns it into steps of streams.

#ifndef CONTINUAL_TRANSFORMERS_SERVER_INFER_CALL_H_
#define CONTINUAL_TRANSFORMERS_SERVER_INFER_CALL_H_

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "cc/server/served_model.h"
#include "cc/server/step_request.h"
#include "cc/session/plan.h"

namespace continual_transformers::server {

// A tensor in the protocol's memory.
struct TensorView {
  std::string name;
  std::string datatype;  // of the protocol: "FP32"
  std::vector<int64_t> shape;
  std::string_view data;                // little-endian elements, unless the datatype is BYTES
  std::vector<std::string_view> texts;  // the elements, if the datatype is BYTES
};

struct InferCall {
  // Request parameters. A sequence id that is a number is the same as its decimal digits.
  std::optional<std::string> sequence_id;
  bool sequence_start = false;
  bool sequence_end = false;
  std::optional<int64_t> step;
  std::optional<int64_t> timeout_us;  // 0 or absent: none
  int64_t shard_epoch = 0;            // of the table of shards that the client knows; 0: none

  // The model's inputs in any order; also `streams`, int64 or BYTES [M], and `step`, int64 [M].
  std::vector<TensorView> inputs;
  std::vector<std::string> outputs;  // the wanted ones; empty: all
};

// An output that the protocol has to make room for.
struct OutputTensor {
  size_t port;  // index in Plan::outputs
  std::string name;
  std::string datatype;
  std::vector<int64_t> shape;
  size_t bytes;
};

// The most that a request may have.
struct InferLimits {
  int64_t answer_bytes = 64 << 20;  // of its outputs
  int64_t steps = 100000;           // of all its streams. A batch with more would block the others.
};

// Fills in `request` and returns the wanted outputs, in the order of the call. The caller points
// request->outputs[port] to memory for each before it submits. Throws Refusal.
//
// All inputs of the model begin with the same axes, and the outputs do, too. With `streams`: [M,
// ...] for one step of each or [M, T, ...]. Without: [...] for one step of the stream that
// sequence_id names, [T, ...] or [1, T, ...] for several.
std::vector<OutputTensor> ReadInferCall(const ServedModel& model, const InferCall& call,
                                        const InferLimits& limits, StepRequest* request);

// Throws Refusal if a stream cannot have this name.
void CheckStreamName(const std::string& name);

// The protocol's name of a dtype: "FP32".
const char* DatatypeOf(DType dtype);

// Splits the raw form of a BYTES tensor: each element after its length, 4 bytes, little-endian.
// Throws Refusal.
std::vector<std::string_view> SplitBytes(const std::string& name, std::string_view data);

}  // namespace continual_transformers::server

#endif  // CONTINUAL_TRANSFORMERS_SERVER_INFER_CALL_H_
