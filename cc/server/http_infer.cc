#include "cc/server/http_infer.h"

#include <charconv>
#include <cmath>
#include <cstring>
#include <limits>
#include <nlohmann/json.hpp>
#include <type_traits>

namespace continual_transformers::server {
namespace {

using nlohmann::json;

// More axes than any tensor of a model can have.
constexpr size_t kMostAxes = 32;

[[noreturn]] void Refuse(const std::string& sentence) {
  throw Refusal(Reason::kInvalidArgument, sentence);
}

std::string Text(size_t x) { return std::to_string(x); }

std::string Shown(const json& value) {
  if (value.is_string()) return Quoted(value.get_ref<const std::string&>());
  if (value.is_structured()) return value.is_array() ? "a list" : "an object";
  return value.dump();
}

const json* Find(const json& object, const char* key) {
  const auto found = object.find(key);
  return found == object.end() ? nullptr : &*found;
}

// The member `key`, or null. Throws if it is of another kind.
const json* FindObject(const json& object, const char* key, const std::string& where) {
  const json* const value = Find(object, key);
  if (value != nullptr && !value->is_object()) {
    Refuse(where + ": \"" + key + "\" is " + Shown(*value) + ", expected an object");
  }
  return value;
}

const json* FindList(const json& object, const char* key, const std::string& where) {
  const json* const value = Find(object, key);
  if (value != nullptr && !value->is_array()) {
    Refuse(where + ": \"" + key + "\" is " + Shown(*value) + ", expected a list");
  }
  return value;
}

std::string TextOf(const json& object, const char* key, const std::string& where) {
  const json* const value = Find(object, key);
  if (value == nullptr) Refuse(where + " has no \"" + key + "\"");
  if (!value->is_string()) {
    Refuse(where + ": \"" + key + "\" is " + Shown(*value) + ", expected a string");
  }
  return value->get<std::string>();
}

int64_t WholeOf(const json& value, const std::string& where) {
  const bool fits = value.is_number_integer() &&
                    !(value.is_number_unsigned() &&
                      value.get<uint64_t>() > uint64_t{std::numeric_limits<int64_t>::max()});
  if (!fits) Refuse(where + " is " + Shown(value) + ", expected a whole number");
  return value.get<int64_t>();
}

bool BoolOf(const json& value, const std::string& where) {
  if (!value.is_boolean()) Refuse(where + " is " + Shown(value) + ", expected true or false");
  return value.get<bool>();
}

// Parameters of the whole request. Others than these are the business of other servers.
void ReadParameters(const json& parameters, HttpInferCall* http) {
  InferCall* const call = &http->call;
  if (const json* const value = Find(parameters, "sequence_id")) {
    if (value->is_string()) {
      call->sequence_id = value->get<std::string>();
    } else if (value->is_number_integer()) {
      call->sequence_id = value->dump();
    } else {
      Refuse("the parameter sequence_id is " + Shown(*value) +
             ", expected a whole number or a string");
    }
    // Triton's clients send 0 and "" for "no sequence".
    if (*call->sequence_id == "0" && value->is_number()) call->sequence_id.reset();
    if (call->sequence_id == "") call->sequence_id.reset();
  }
  // The short names are for many streams: tritonclient sends the others with a sequence_id only.
  for (const char* const name : {"sequence_start", "start"}) {
    if (const json* const value = Find(parameters, name)) {
      call->sequence_start = BoolOf(*value, "the parameter " + std::string(name));
    }
  }
  for (const char* const name : {"sequence_end", "end"}) {
    if (const json* const value = Find(parameters, name)) {
      call->sequence_end = BoolOf(*value, "the parameter " + std::string(name));
    }
  }
  if (const json* const value = Find(parameters, "step")) {
    call->step = WholeOf(*value, "the parameter step");
  }
  if (const json* const value = Find(parameters, "timeout")) {
    call->timeout_us = WholeOf(*value, "the parameter timeout");
  }
  if (const json* const value = Find(parameters, "shard_epoch")) {
    call->shard_epoch = WholeOf(*value, "the parameter shard_epoch");
  }
  if (const json* const value = Find(parameters, "binary_data_output")) {
    http->binary_by_default = BoolOf(*value, "the parameter binary_data_output");
  }
}

std::vector<int64_t> ShapeOf(const json& object, const std::string& where) {
  const json* const list = FindList(object, "shape", where);
  if (list == nullptr) Refuse(where + " has no \"shape\"");
  if (list->size() > kMostAxes) {
    Refuse(where + " has " + Text(list->size()) + " axes, expected at most " + Text(kMostAxes));
  }
  std::vector<int64_t> shape;
  for (const json& size : *list) shape.push_back(WholeOf(size, where + ": a size of \"shape\""));
  return shape;
}

void RefuseSharedMemory(const json& parameters, const std::string& where) {
  if (Find(parameters, "shared_memory_region") == nullptr) return;
  throw Refusal(Reason::kUnsupported,
                where + " is in shared memory, which this server does not have: send its bytes");
}

// Turns the elements of a tensor in JSON into bytes.
class ElementReader {
 public:
  ElementReader(TensorView* tensor, std::string where, std::deque<std::string>* made)
      : tensor_(tensor), where_(std::move(where)), made_(made) {}

  void Read(const json& data) {
    const std::string& datatype = tensor_->datatype;
    if (datatype == "FP32") return Read<float>(data);
    if (datatype == "FP64") return Read<double>(data);
    if (datatype == "INT32") return Read<int32_t>(data);
    if (datatype == "INT64") return Read<int64_t>(data);
    if (datatype == "BOOL") return Read<bool>(data);
    if (datatype == "BYTES") return Read<std::string>(data);
    if (datatype == "FP16" || datatype == "BF16") {
      Refuse(where_ + " has the datatype " + datatype +
             ", which has no form in JSON: send its bytes, with binary_data_size");
    }
    Refuse(where_ + " has the datatype " + Quoted(datatype) +
           ", expected FP32, FP64, FP16, BF16, INT32, INT64, BOOL or BYTES");
  }

 private:
  template <typename T>
  void Read(const json& data) {
    made_->emplace_back();
    bytes_ = &made_->back();
    const bool nested = !data.empty() && data[0].is_array();
    if (nested) {
      ReadNested<T>(data, 0);
    } else {
      for (const json& element : data) Append(element, static_cast<T*>(nullptr));
      CheckCount(data.size());
    }
    if constexpr (std::is_same_v<T, std::string>) {
      for (const std::string* const text : texts_) tensor_->texts.emplace_back(*text);
    } else {
      tensor_->data = *bytes_;
    }
  }

  template <typename T>
  void ReadNested(const json& list, size_t axis) {
    const std::vector<int64_t>& shape = tensor_->shape;
    if (axis >= shape.size() || !list.is_array() ||
        static_cast<int64_t>(list.size()) != shape[axis]) {
      RefuseNesting();
    }
    for (const json& element : list) {
      if (axis + 1 < shape.size()) {
        ReadNested<T>(element, axis + 1);
      } else {
        Append(element, static_cast<T*>(nullptr));
      }
    }
  }

  // Flat data. Sizes that are not possible are refused where the tensor is read.
  void CheckCount(size_t got) const {
    size_t expected = 1;
    for (const int64_t size : tensor_->shape) {
      if (size < 0 || (size > 0 && expected > (size_t{1} << 31) / static_cast<size_t>(size)))
        return;
      expected *= static_cast<size_t>(size);
    }
    if (got != expected) {
      Refuse(where_ + " has " + Text(got) + " elements of data, and its shape has " +
             Text(expected));
    }
  }

  [[noreturn]] void RefuseNesting() const {
    Refuse(where_ + ": the lists of \"data\" are not nested as its \"shape\" says");
  }

  [[noreturn]] void RefuseElement(const json& element) const {
    Refuse(where_ + " has the element " + Shown(element) + ", which is no " + tensor_->datatype);
  }

  template <typename T>
  void AppendBytes(T value) {
    bytes_->append(reinterpret_cast<const char*>(&value), sizeof(value));
  }

  template <typename T>
  std::enable_if_t<std::is_floating_point_v<T>> Append(const json& element, T*) {
    if (element.is_number()) {
      const auto value = element.get<double>();
      if (std::abs(value) > std::numeric_limits<T>::max()) RefuseElement(element);
      return AppendBytes(static_cast<T>(value));
    }
    if (element == "NaN") return AppendBytes(std::numeric_limits<T>::quiet_NaN());
    if (element == "Infinity") return AppendBytes(std::numeric_limits<T>::infinity());
    if (element == "-Infinity") return AppendBytes(-std::numeric_limits<T>::infinity());
    RefuseElement(element);
  }

  template <typename T>
  std::enable_if_t<std::is_integral_v<T> && !std::is_same_v<T, bool>> Append(const json& element,
                                                                             T*) {
    const bool fits =
        element.is_number_integer() &&
        (element.is_number_unsigned()
             ? element.get<uint64_t>() <= static_cast<uint64_t>(std::numeric_limits<T>::max())
             : element.get<int64_t>() >= std::numeric_limits<T>::min());
    if (!fits) RefuseElement(element);
    AppendBytes(element.get<T>());
  }

  void Append(const json& element, bool*) {
    if (!element.is_boolean()) RefuseElement(element);
    bytes_->push_back(element.get<bool>() ? 1 : 0);
  }

  void Append(const json& element, std::string*) {
    if (!element.is_string()) RefuseElement(element);
    made_->push_back(element.get<std::string>());
    texts_.push_back(&made_->back());
  }

  TensorView* const tensor_;
  const std::string where_;
  std::deque<std::string>* const made_;
  std::string* bytes_ = nullptr;
  std::vector<const std::string*> texts_;
};

void ReadInput(const json& input, std::string_view* binary, HttpInferCall* http) {
  if (!input.is_object()) Refuse("an input is " + Shown(input) + ", expected an object");
  TensorView tensor;
  tensor.name = TextOf(input, "name", "an input");
  const std::string where = "the input " + Quoted(tensor.name);
  tensor.datatype = TextOf(input, "datatype", where);
  tensor.shape = ShapeOf(input, where);
  const json* const data = FindList(input, "data", where);
  const json* size = nullptr;
  if (const json* const parameters = FindObject(input, "parameters", where)) {
    RefuseSharedMemory(*parameters, where);
    size = Find(*parameters, "binary_data_size");
  }
  if ((data != nullptr) == (size != nullptr)) {
    Refuse(where + (data != nullptr ? " has both" : " has neither") +
           " \"data\" and the parameter binary_data_size, expected one of them");
  }
  if (data != nullptr) {
    ElementReader(&tensor, where, &http->made).Read(*data);
  } else {
    const int64_t bytes = WholeOf(*size, where + ": binary_data_size");
    if (bytes < 0 || static_cast<uint64_t>(bytes) > binary->size()) {
      Refuse(where + " has a binary_data_size of " + std::to_string(bytes) + ", and " +
             Text(binary->size()) +
             " bytes are left behind the JSON (the header Inference-Header-Content-Length says "
             "where it ends)");
    }
    tensor.data = binary->substr(0, bytes);
    binary->remove_prefix(bytes);
    if (tensor.datatype == "BYTES") tensor.texts = SplitBytes(tensor.name, tensor.data);
  }
  http->call.inputs.push_back(std::move(tensor));
}

void ReadOutput(const json& output, HttpInferCall* http) {
  if (!output.is_object()) Refuse("an output is " + Shown(output) + ", expected an object");
  const std::string name = TextOf(output, "name", "an output");
  const std::string where = "the output " + Quoted(name);
  std::optional<bool> binary;
  if (const json* const parameters = FindObject(output, "parameters", where)) {
    RefuseSharedMemory(*parameters, where);
    if (const json* const value = Find(*parameters, "binary_data")) {
      binary = BoolOf(*value, where + ": binary_data");
    }
    const json* const classes = Find(*parameters, "classification");
    if (classes != nullptr && *classes != 0) {
      throw Refusal(Reason::kUnsupported,
                    where +
                        " is wanted as classes, which this server does not have: leave out "
                        "the parameter classification");
    }
  }
  http->call.outputs.push_back(name);
  http->binary.push_back(binary);
}

template <typename T>
void AppendNumber(T number, std::string* json) {
  char text[40];
  const auto end = std::to_chars(text, text + sizeof(text), number).ptr;
  json->append(text, end - text);
}

template <typename T>
void AppendFloat(T number, std::string* json) {
  if (std::isnan(number)) {
    *json += "\"NaN\"";
  } else if (std::isinf(number)) {
    *json += number > 0 ? "\"Infinity\"" : "\"-Infinity\"";
  } else {
    AppendNumber(number, json);
  }
}

template <typename T>
void AppendElements(std::string_view bytes, std::string* json) {
  for (size_t at = 0; at < bytes.size(); at += sizeof(T)) {
    T value;
    std::memcpy(&value, bytes.data() + at, sizeof(T));
    if (at > 0) *json += ',';
    if constexpr (std::is_floating_point_v<T>) {
      AppendFloat(value, json);
    } else {
      AppendNumber(value, json);
    }
  }
}

void AppendData(const std::string& datatype, std::string_view bytes, std::string* json) {
  if (datatype == "FP32") {
    AppendElements<float>(bytes, json);
  } else if (datatype == "FP64") {
    AppendElements<double>(bytes, json);
  } else if (datatype == "INT32") {
    AppendElements<int32_t>(bytes, json);
  } else if (datatype == "INT64") {
    AppendElements<int64_t>(bytes, json);
  } else {  // BOOL: CheckHttpOutputs has refused the others.
    for (size_t i = 0; i < bytes.size(); ++i) {
      if (i > 0) *json += ',';
      *json += bytes[i] != 0 ? "true" : "false";
    }
  }
}

}  // namespace

json ParseObject(std::string_view text) {
  if (text.size() > kMostJsonBytes) {
    Refuse("the request has " + Text(text.size()) + " bytes of JSON, expected at most " +
           Text(kMostJsonBytes) + ": send large tensors as bytes, with binary_data_size");
  }
  json value;
  try {
    value = json::parse(text.begin(), text.end());
  } catch (const json::parse_error& error) {
    Refuse("the request is not JSON at byte " + Text(error.byte) +
           " (JSON has no NaN and no Infinity: write them as strings)");
  } catch (const json::exception&) {
    Refuse("the request has a number that is too large");
  }
  if (!value.is_object()) Refuse("the request is " + Shown(value) + ", expected a JSON object");
  return value;
}

void ReadHttpInfer(std::string_view body, std::string_view json_length, HttpInferCall* call) {
  size_t json_bytes = body.size();
  if (!json_length.empty()) {
    const char* const end = json_length.data() + json_length.size();
    const auto [at, error] = std::from_chars(json_length.data(), end, json_bytes);
    if (error != std::errc() || at != end || json_bytes > body.size()) {
      Refuse("the header Inference-Header-Content-Length is " + Quoted(std::string(json_length)) +
             ", expected the bytes of JSON in the body, which has " + Text(body.size()));
    }
  }
  const json request = ParseObject(body.substr(0, json_bytes));
  std::string_view binary = body.substr(json_bytes);

  if (Find(request, "id") != nullptr) call->id = TextOf(request, "id", "the request");
  if (const json* const parameters = FindObject(request, "parameters", "the request")) {
    ReadParameters(*parameters, call);
  }
  const json* const inputs = FindList(request, "inputs", "the request");
  if (inputs == nullptr) Refuse("the request has no \"inputs\"");
  for (const json& input : *inputs) ReadInput(input, &binary, call);
  if (!binary.empty()) {
    Refuse(Text(binary.size()) +
           " bytes are left behind the JSON: no input with binary_data_size has them");
  }
  if (const json* const outputs = FindList(request, "outputs", "the request")) {
    for (const json& output : *outputs) ReadOutput(output, call);
  }
}

void CheckHttpOutputs(const HttpInferCall& call, const std::vector<OutputTensor>& outputs) {
  for (size_t i = 0; i < outputs.size(); ++i) {
    const std::string& datatype = outputs[i].datatype;
    if (!call.IsBinary(i) && (datatype == "FP16" || datatype == "BF16")) {
      Refuse("the output " + Quoted(outputs[i].name) + " has the datatype " + datatype +
             ", which has no form in JSON: give it the parameter binary_data");
    }
  }
}

std::string WriteHttpInfer(const std::string& model, const HttpInferCall& call,
                           const std::vector<OutputTensor>& outputs,
                           const std::vector<std::string>& tensors, const StepRequest& request) {
  std::string json = "{\"model_name\":";
  AppendJson(model, &json);
  json += ",\"model_version\":\"1\"";
  if (call.id.has_value()) {
    json += ",\"id\":";
    AppendJson(*call.id, &json);
  }
  if (request.next_steps.size() == 1) {
    json += ",\"parameters\":{\"next_step\":";
    AppendNumber(request.next_steps[0], &json);
    json += '}';
  }
  json += ",\"outputs\":[";
  for (size_t i = 0; i < outputs.size(); ++i) {
    const OutputTensor& output = outputs[i];
    if (i > 0) json += ',';
    json += "{\"name\":";
    AppendJson(output.name, &json);
    json += ",\"datatype\":\"" + output.datatype + "\",\"shape\":[";
    for (size_t axis = 0; axis < output.shape.size(); ++axis) {
      if (axis > 0) json += ',';
      AppendNumber(output.shape[axis], &json);
    }
    if (call.IsBinary(i)) {
      json += "],\"parameters\":{\"binary_data_size\":";
      AppendNumber(output.bytes, &json);
      json += "}}";
    } else {
      json += "],\"data\":[";
      AppendData(output.datatype, tensors[i], &json);
      json += "]}";
    }
  }
  return json + "]}";
}

void AppendJson(std::string_view text, std::string* json) {
  *json += nlohmann::json(text).dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
}

void AppendJson(double number, std::string* json) { AppendFloat(number, json); }

void AppendJson(float number, std::string* json) { AppendFloat(number, json); }

}  // namespace continual_transformers::server
