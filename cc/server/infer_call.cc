#include "cc/server/infer_call.h"

#include <algorithm>
#include <cstring>
#include <limits>

namespace continual_transformers::server {
namespace {

[[noreturn]] void Refuse(const std::string& message) {
  throw Refusal(Reason::kInvalidArgument, message);
}

std::string Text(int64_t x) { return std::to_string(x); }

std::string Shown(const std::vector<int64_t>& shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); ++i) text += (i > 0 ? ", " : "") + Text(shape[i]);
  return text + "]";
}

// The number of elements, or -1: a negative size, or more than memory can have.
int64_t Elements(const std::vector<int64_t>& shape) {
  int64_t elements = 1;
  for (const int64_t size : shape) {
    if (size < 0) return -1;
    if (size > 0 && elements > std::numeric_limits<int32_t>::max() / size) return -1;
    elements *= size;
  }
  return elements;
}

void CheckData(const TensorView& tensor, int64_t element_bytes) {
  const int64_t elements = Elements(tensor.shape);
  if (elements < 0)
    Refuse("the input " + Quoted(tensor.name) + " cannot have the shape " + Shown(tensor.shape));
  const int64_t bytes = elements * element_bytes;
  if (static_cast<int64_t>(tensor.data.size()) != bytes) {
    Refuse("the input " + Quoted(tensor.name) + " has " +
           Text(static_cast<int64_t>(tensor.data.size())) + " bytes of data, and " +
           tensor.datatype + " of the shape " + Shown(tensor.shape) + " has " + Text(bytes));
  }
}

std::vector<int64_t> Integers(const TensorView& tensor) {
  CheckData(tensor, sizeof(int64_t));
  std::vector<int64_t> values(tensor.data.size() / sizeof(int64_t));
  if (values.empty()) return values;  // memcpy takes no null pointer, not even for no bytes.
  std::memcpy(values.data(), tensor.data.data(), tensor.data.size());
  return values;
}

void CheckList(const TensorView& tensor) {
  if (tensor.shape.size() == 1 && tensor.shape[0] >= 0) return;
  Refuse("the input " + Quoted(tensor.name) + " has the shape " + Shown(tensor.shape) +
         ", expected [M], one element for each stream");
}

std::vector<std::string> StreamNames(const TensorView& tensor) {
  CheckList(tensor);
  std::vector<std::string> names;
  if (tensor.datatype == "INT64") {
    for (const int64_t id : Integers(tensor)) names.push_back(Text(id));
  } else if (tensor.datatype == "BYTES") {
    names.assign(tensor.texts.begin(), tensor.texts.end());
    if (static_cast<int64_t>(names.size()) != tensor.shape[0]) {
      Refuse("the input \"streams\" has " + Text(static_cast<int64_t>(names.size())) +
             " elements, and its shape is " + Shown(tensor.shape));
    }
  } else {
    Refuse("the input \"streams\" has the datatype " + Quoted(tensor.datatype) +
           ", expected INT64 or BYTES");
  }
  return names;
}

// The axes of a tensor before those of one step of one stream.
std::vector<int64_t> LeadingAxes(const TensorView& tensor, const Port& port, const Value& value) {
  const auto refuse = [&] {
    Refuse("the input " + Quoted(port.name) + " has the shape " + Shown(tensor.shape) +
           ", expected " + Shown(value.shape) +
           " for one step of one stream, with at most two axes before it: streams, and steps");
  };
  if (tensor.shape.size() < value.shape.size()) refuse();
  const auto split = tensor.shape.end() - static_cast<std::ptrdiff_t>(value.shape.size());
  if (!std::equal(split, tensor.shape.end(), value.shape.begin())) refuse();
  std::vector<int64_t> leading(tensor.shape.begin(), split);
  if (leading.size() > 2) refuse();
  return leading;
}

}  // namespace

const char* DatatypeOf(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return "FP32";
    case DType::kFloat64:
      return "FP64";
    case DType::kBFloat16:
      return "BF16";
    case DType::kFloat16:
      return "FP16";
    case DType::kInt32:
      return "INT32";
    case DType::kInt64:
      return "INT64";
    case DType::kBool:
      return "BOOL";
    case DType::kInt8:
      return "INT8";
  }
  return "";
}

std::vector<std::string_view> SplitBytes(const std::string& name, std::string_view data) {
  std::vector<std::string_view> texts;
  while (!data.empty()) {
    uint32_t bytes = 0;
    if (data.size() < sizeof(bytes)) break;
    std::memcpy(&bytes, data.data(), sizeof(bytes));
    if (data.size() - sizeof(bytes) < bytes) break;
    texts.push_back(data.substr(sizeof(bytes), bytes));
    data.remove_prefix(sizeof(bytes) + bytes);
  }
  if (!data.empty()) {
    Refuse("the input " + Quoted(name) +
           " is cut off: each element of BYTES is its length in 4 bytes, and then as many bytes");
  }
  return texts;
}

void CheckStreamName(const std::string& name) {
  // Names are kept for every stream, and shown in logs and lists.
  constexpr size_t kMost = 256;
  if (name.empty() || name.size() > kMost) {
    Refuse("a stream's name has " + Text(static_cast<int64_t>(name.size())) +
           " bytes, expected 1 to " + Text(kMost));
  }
}

std::vector<OutputTensor> ReadInferCall(const ServedModel& model, const InferCall& call,
                                        const InferLimits& limits, StepRequest* request) {
  const Plan& plan = model.plan();
  request->start = call.sequence_start;
  request->end = call.sequence_end;
  request->shard_epoch = call.shard_epoch;
  if (call.timeout_us.value_or(0) > 0) {
    // A day is as good as for ever, and cannot overflow.
    constexpr int64_t kDay = int64_t{24} * 3600 * 1000 * 1000;
    request->deadline =
        std::min(request->deadline,
                 Clock::now() + std::chrono::microseconds(std::min(*call.timeout_us, kDay)));
  }

  // Which tensor is which.
  std::vector<const TensorView*> tensors(plan.inputs.size(), nullptr);
  const TensorView* streams = nullptr;
  const TensorView* step = nullptr;
  for (const TensorView& tensor : call.inputs) {
    const TensorView** at = nullptr;
    if (tensor.name == "streams") at = &streams;
    if (tensor.name == "step") at = &step;
    for (size_t i = 0; i < plan.inputs.size() && at == nullptr; ++i) {
      if (tensor.name == plan.inputs[i].name) at = &tensors[i];
    }
    if (at == nullptr) {
      std::string names;
      for (const Port& port : plan.inputs) names += Quoted(port.name) + ", ";
      Refuse("the model " + Quoted(model.name()) + " has no input " + Quoted(tensor.name) +
             ": its inputs are " + names + "and \"streams\" and \"step\" for many streams");
    }
    if (*at != nullptr) Refuse("the input " + Quoted(tensor.name) + " is there twice");
    *at = &tensor;
  }

  // Which streams, and which steps of them.
  if (streams != nullptr) {
    if (call.sequence_id.has_value()) {
      Refuse("the request has a sequence_id and an input \"streams\", expected one of them");
    }
    request->streams = StreamNames(*streams);
  } else if (call.sequence_id.has_value()) {
    request->streams = {*call.sequence_id};
  } else {
    Refuse(
        "the request does not say which stream it is about: give it the parameter sequence_id "
        "(a number other than 0, or a string), or an input \"streams\"");
  }
  for (const std::string& name : request->streams) CheckStreamName(name);
  const auto count = static_cast<int64_t>(request->streams.size());
  if (step != nullptr) {
    if (call.step.has_value()) {
      Refuse("the request has a parameter step and an input \"step\", expected one of them");
    }
    if (step->datatype != "INT64") {
      Refuse("the input \"step\" has the datatype " + Quoted(step->datatype) + ", expected INT64");
    }
    CheckList(*step);
    request->first_steps = Integers(*step);
    if (step->shape[0] != count) {
      Refuse("the input \"step\" has " + Text(step->shape[0]) + " elements for " + Text(count) +
             " streams, expected one for each");
    }
  } else if (call.step.has_value()) {
    if (streams != nullptr) {
      Refuse(
          "the parameter step is for a single stream: number the steps of many streams with an "
          "input \"step\", INT64 [M]");
    }
    request->first_steps = {*call.step};
  }

  // The model's inputs.
  std::vector<int64_t> leading;
  request->inputs.clear();
  for (size_t i = 0; i < plan.inputs.size(); ++i) {
    const Port& port = plan.inputs[i];
    const Value& value = plan.values[port.value];
    const TensorView* const tensor = tensors[i];
    if (tensor == nullptr) Refuse("the input " + Quoted(port.name) + " is missing");
    if (tensor->datatype != DatatypeOf(value.dtype)) {
      Refuse("the input " + Quoted(port.name) + " has the datatype " + Quoted(tensor->datatype) +
             ", expected " + DatatypeOf(value.dtype));
    }
    CheckData(*tensor, SizeOf(value.dtype));
    const std::vector<int64_t> axes = LeadingAxes(*tensor, port, value);
    if (i > 0 && axes != leading) {
      Refuse("the inputs " + Quoted(plan.inputs[0].name) + " and " + Quoted(port.name) +
             " begin with different axes, " + Shown(leading) + " and " + Shown(axes) +
             ": all inputs have the same streams and steps");
    }
    leading = axes;
    if (value.dtype == DType::kBool) {
      for (const char c : tensor->data) {
        if (c != 0 && c != 1) {
          Refuse("the input " + Quoted(port.name) + " has a BOOL that is neither 0 nor 1");
        }
      }
    }
    request->inputs.push_back(tensor->data.data());
  }
  if (streams != nullptr) {
    if (leading.empty() || leading[0] != count) {
      Refuse("the inputs begin with the axes " + Shown(leading) + " and \"streams\" names " +
             Text(count) + " streams, expected [" + Text(count) + "] or [" + Text(count) + ", T]");
    }
    request->steps = leading.size() == 2 ? leading[1] : 1;
  } else {
    if (leading.size() == 2 && leading[0] != 1) {
      Refuse("the inputs begin with the axes " + Shown(leading) +
             " and the request is about one stream, expected none, [T] or [1, T]");
    }
    request->steps = leading.empty() ? 1 : leading.back();
  }

  // How many steps. Without streams there may be any number.
  if (count > 0 && request->steps > limits.steps / count) {
    Refuse("the request has " + Text(request->steps) + " steps of " + Text(count) +
           " streams, and a request may have at most " + Text(limits.steps) +
           " steps of all its streams together: send several requests of fewer steps or streams, "
           "or start the server with a larger --max-steps");
  }
  const int64_t rows = count > 0 ? count * request->steps : 0;

  // Its outputs.
  std::vector<OutputTensor> outputs;
  int64_t bytes_left = limits.answer_bytes;
  const auto want = [&](size_t i) {
    const Value& value = plan.values[plan.outputs[i].value];
    std::vector<int64_t> shape = leading;
    shape.insert(shape.end(), value.shape.begin(), value.shape.end());
    const int64_t row_bytes = value.size * SizeOf(value.dtype);
    if (rows > 0 && row_bytes > bytes_left / rows) {
      Refuse("the answer to " + Text(request->steps) + " steps of " + Text(count) +
             " streams would have more than " + Text(limits.answer_bytes) +
             " bytes of outputs: send several requests of fewer steps or streams, ask for fewer "
             "outputs, or start the server with a larger --max-message-mb");
    }
    const int64_t bytes = rows * row_bytes;
    bytes_left -= bytes;
    outputs.push_back({i, plan.outputs[i].name, DatatypeOf(value.dtype), std::move(shape),
                       static_cast<size_t>(bytes)});
  };
  if (call.outputs.empty()) {
    for (size_t i = 0; i < plan.outputs.size(); ++i) want(i);
  }
  for (const std::string& name : call.outputs) {
    const auto found = std::find_if(plan.outputs.begin(), plan.outputs.end(),
                                    [&](const Port& port) { return port.name == name; });
    if (found == plan.outputs.end()) {
      Refuse("the model " + Quoted(model.name()) + " has no output " + Quoted(name));
    }
    const auto i = static_cast<size_t>(found - plan.outputs.begin());
    for (const OutputTensor& other : outputs) {
      if (other.port == i) Refuse("the output " + Quoted(name) + " is wanted twice");
    }
    want(i);
  }
  request->outputs.assign(plan.outputs.size(), nullptr);
  return outputs;
}

}  // namespace continual_transformers::server
