#include "benchmarks/cc/raw_model.h"

#include <cstdint>
#include <fstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace continual_transformers {

std::vector<float> ReadFloats(const std::string& path) {
  std::ifstream file(path, std::ios::binary | std::ios::ate);
  if (!file) throw std::runtime_error("cannot read " + path);
  std::vector<float> data(static_cast<size_t>(file.tellg()) / sizeof(float));
  file.seekg(0);
  file.read(reinterpret_cast<char*>(data.data()), data.size() * sizeof(float));
  return data;
}

RawModel::RawModel(const ModelSize& size, const std::string& path) : data_(ReadFloats(path)) {
  int64_t at = 0;
  const auto take = [&](int64_t elements) {
    at += elements;
    if (at > static_cast<int64_t>(data_.size())) throw std::runtime_error(path + " is too short");
    return data_.data() + at - elements;
  };
  const auto dense = [&](int64_t inputs, int64_t outputs) {
    const float* kernel = take(inputs * outputs);
    return DenseWeights{kernel, take(outputs)};
  };
  const int64_t e = size.embed_dim;
  const auto norm = [&] {
    const float* gamma = take(e);
    return NormWeights{gamma, take(e)};
  };
  embedding = dense(size.features, e);
  positions = take(size.position_rows() * e);
  for (int64_t i = 0; i < size.layers; ++i) {
    BlockWeights block;
    for (DenseWeights* layer : {&block.query, &block.key, &block.value, &block.output}) {
      *layer = dense(e, e);
    }
    block.attention_norm = norm();
    block.feed_forward = dense(e, e);
    block.feed_forward_output = dense(e, e);
    block.output_norm = norm();
    blocks.push_back(block);
  }
  classifier = dense(e, kModelOutputs);
  if (at != static_cast<int64_t>(data_.size())) throw std::runtime_error(path + " is too long");
}

}  // namespace continual_transformers
