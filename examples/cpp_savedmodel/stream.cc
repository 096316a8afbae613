// Takes steps of a model that ct.export wrote, through TensorFlow's C API. The process runs no
// Python.
//
//   stream OP_LIBRARY SAVED_MODEL < steps
//
// A line of the input is "step STREAM FEATURE...", one step of one stream, or "clean STREAM". For a
// step the program prints "ready" or "warming", and the model's output y. The README beside this
// file says how to build it.

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <iostream>
#include <map>
#include <memory>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "tensorflow/c/c_api.h"
#include "tensorflow/core/protobuf/meta_graph.pb.h"

namespace {

// Owning pointers to the objects of the C API.
using Status = std::unique_ptr<TF_Status, decltype(&TF_DeleteStatus)>;
using Graph = std::unique_ptr<TF_Graph, decltype(&TF_DeleteGraph)>;
using Tensor = std::unique_ptr<TF_Tensor, decltype(&TF_DeleteTensor)>;

// Runs `call` with a status. Throws the status's message if it is not OK.
template <typename Call>
auto Checked(const Call& call) {
  const Status status(TF_NewStatus(), TF_DeleteStatus);
  auto result = call(status.get());
  if (TF_GetCode(status.get()) != TF_OK) throw std::runtime_error(TF_Message(status.get()));
  return result;
}

template <typename T>
Tensor MakeTensor(TF_DataType dtype, const std::vector<int64_t>& shape,
                  const std::vector<T>& data) {
  const size_t bytes = data.size() * sizeof(T);
  Tensor tensor(TF_AllocateTensor(dtype, shape.data(), shape.size(), bytes), TF_DeleteTensor);
  std::memcpy(TF_TensorData(tensor.get()), data.data(), bytes);
  return tensor;
}

class Model {
 public:
  Model(const char* op_library, const char* saved_model) : graph_(TF_NewGraph(), TF_DeleteGraph) {
    // Load the ops first: TensorFlow refuses a graph with unknown ops.
    library_ = Checked([&](TF_Status* s) { return TF_LoadLibrary(op_library, s); });
    TF_SessionOptions* options = TF_NewSessionOptions();
    TF_Buffer* buffer = TF_NewBuffer();
    const char* tag = "serve";
    session_ = Checked([&](TF_Status* s) {
      return TF_LoadSessionFromSavedModel(options, nullptr, saved_model, &tag, 1, graph_.get(),
                                          buffer, s);
    });
    tensorflow::MetaGraphDef meta_graph;
    meta_graph.ParseFromArray(buffer->data, buffer->length);
    for (const auto& [name, signature] : meta_graph.signature_def()) {
      for (const auto& [input, info] : signature.inputs()) inputs_[name][input] = info.name();
      for (const auto& [output, info] : signature.outputs()) outputs_[name][output] = info.name();
    }
    TF_DeleteBuffer(buffer);
    TF_DeleteSessionOptions(options);
  }

  ~Model() {
    Checked([&](TF_Status* s) { return TF_CloseSession(session_, s), 0; });
    Checked([&](TF_Status* s) { return TF_DeleteSession(session_, s), 0; });
    TF_DeleteLibraryHandle(library_);
  }

  // Runs a signature. Inputs and outputs have the names that the signature gives them.
  std::map<std::string, Tensor> Run(const std::string& signature,
                                    const std::map<std::string, TF_Tensor*>& feeds) {
    std::vector<TF_Output> inputs, outputs;
    std::vector<TF_Tensor*> values;
    for (const auto& [name, tensor] : feeds) {
      inputs.push_back(Find(inputs_.at(signature).at(name)));
      values.push_back(tensor);
    }
    for (const auto& [name, place] : outputs_.at(signature)) outputs.push_back(Find(place));
    std::vector<TF_Tensor*> results(outputs.size());
    Checked([&](TF_Status* s) {
      TF_SessionRun(session_, nullptr, inputs.data(), values.data(), inputs.size(), outputs.data(),
                    results.data(), outputs.size(), nullptr, 0, nullptr, s);
      return 0;
    });
    std::map<std::string, Tensor> named;
    size_t i = 0;
    for (const auto& [name, place] : outputs_.at(signature)) {
      named.emplace(name, Tensor(results[i++], TF_DeleteTensor));
    }
    return named;
  }

 private:
  // Returns the output of the graph that a name such as "op:1" stands for.
  TF_Output Find(const std::string& place) const {
    const size_t colon = place.rfind(':');
    TF_Operation* op = TF_GraphOperationByName(graph_.get(), place.substr(0, colon).c_str());
    if (op == nullptr) throw std::runtime_error("the graph has no operation " + place);
    return {op, std::stoi(place.substr(colon + 1))};
  }

  Graph graph_;
  TF_Library* library_;
  TF_Session* session_;
  std::map<std::string, std::map<std::string, std::string>> inputs_, outputs_;
};

void Step(Model* model, int32_t stream, const std::vector<float>& x) {
  const Tensor streams = MakeTensor<int32_t>(TF_INT32, {1}, {stream});
  const Tensor features = MakeTensor<float>(TF_FLOAT, {1, static_cast<int64_t>(x.size())}, x);
  const auto outputs = model->Run("step", {{"streams", streams.get()}, {"x", features.get()}});
  const TF_Tensor* y = outputs.at("y").get();
  std::printf(*static_cast<bool*>(TF_TensorData(outputs.at("ready").get())) ? "ready" : "warming");
  const float* values = static_cast<const float*>(TF_TensorData(y));
  for (int64_t i = 0; i < TF_TensorElementCount(y); ++i) std::printf(" %.9g", values[i]);
  std::printf("\n");
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) {
    std::fprintf(stderr, "usage: %s OP_LIBRARY SAVED_MODEL < steps\n", argv[0]);
    return 2;
  }
  try {
    Model model(argv[1], argv[2]);
    std::string line, what;
    while (std::getline(std::cin, line)) {
      std::istringstream words(line);
      int32_t stream;
      if (!(words >> what >> stream) || (what != "step" && what != "clean")) {
        throw std::runtime_error("expected \"step STREAM FEATURE...\" or \"clean STREAM\", got \"" +
                                 line + "\"");
      }
      if (what == "clean") {
        model.Run("clean", {{"streams", MakeTensor<int32_t>(TF_INT32, {1}, {stream}).get()}});
        continue;
      }
      std::vector<float> x;
      for (float feature; words >> feature;) x.push_back(feature);
      Step(&model, stream, x);
    }
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
