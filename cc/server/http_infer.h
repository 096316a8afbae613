// Inference requests of KServe V2 over HTTP: a JSON text, and behind it the tensors that are sent
// as bytes (the binary extension of Triton).
//
// JSON has no NaN and no infinity. Here they are the strings "NaN", "Infinity" and "-Infinity", in
// requests and in responses.

#ifndef CONTINUAL_TRANSFORMERS_SERVER_HTTP_INFER_H_
#define CONTINUAL_TRANSFORMERS_SERVER_HTTP_INFER_H_

#include <cstddef>
#include <cstdint>
#include <deque>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "cc/server/infer_call.h"
#include "cc/server/step_request.h"

namespace continual_transformers::server {

// The longest JSON of a request. A parsed text needs many times its size.
constexpr size_t kMostJsonBytes = size_t{8} << 20;

struct HttpInferCall {
  InferCall call;  // points into the body, and to `made`
  std::optional<std::string> id;
  bool binary_by_default = false;           // for outputs that do not say
  std::vector<std::optional<bool>> binary;  // by output of the call
  std::deque<std::string> made;             // tensors and strings that were JSON

  bool IsBinary(size_t output) const {
    return output < binary.size() ? binary[output].value_or(binary_by_default) : binary_by_default;
  }
};

// Reads the JSON of a request, of at most kMostJsonBytes. Throws Refusal if it is no object.
nlohmann::json ParseObject(std::string_view text);

// Reads a body. `json_length` is the header Inference-Header-Content-Length: the bytes of JSON;
// empty if the body is JSON only. The body must outlive the call. Throws Refusal.
void ReadHttpInfer(std::string_view body, std::string_view json_length, HttpInferCall* call);

// Throws Refusal if an output that is wanted as JSON has a datatype that JSON cannot have.
void CheckHttpOutputs(const HttpInferCall& call, const std::vector<OutputTensor>& outputs);

// Writes the JSON of a response. `tensors` has the bytes of each output. The caller sends those
// that are binary behind the JSON.
std::string WriteHttpInfer(const std::string& model, const HttpInferCall& call,
                           const std::vector<OutputTensor>& outputs,
                           const std::vector<std::string>& tensors, const StepRequest& request);

// Appends a text as a JSON string. Bytes that are not UTF-8 become U+FFFD.
void AppendJson(std::string_view text, std::string* json);
// Appends a number. Those that JSON lacks become strings.
void AppendJson(double number, std::string* json);
void AppendJson(float number, std::string* json);

}  // namespace continual_transformers::server

#endif  // CONTINUAL_TRANSFORMERS_SERVER_HTTP_INFER_H_
