// The race's model in plain C++: its sizes and weights, without a plan.

#ifndef CONTINUAL_TRANSFORMERS_BENCHMARKS_RAW_MODEL_H_
#define CONTINUAL_TRANSFORMERS_BENCHMARKS_RAW_MODEL_H_

#include <cstdint>
#include <string>
#include <vector>

namespace continual_transformers {

constexpr int64_t kModelOutputs = 10;

struct ModelSize {
  int64_t streams, window, features, embed_dim, heads, layers;

  int64_t head() const { return embed_dim / heads; }
  int64_t position_rows() const { return 2 * window - 1; }
  int64_t receptive_field() const { return 1 + layers * (window - 1); }
};

struct DenseWeights {
  const float* kernel;  // [inputs, outputs]
  const float* bias;    // [outputs]
};

struct NormWeights {
  const float* gamma;
  const float* beta;
};

struct BlockWeights {
  DenseWeights query, key, value, output;
  NormWeights attention_norm;
  DenseWeights feed_forward, feed_forward_output;
  NormWeights output_norm;
};

struct RawModel {
  // Reads the file of bench/model_rivals: all arrays of float32, one after another, in the order of
  // `Weights.arrays()`.
  RawModel(const ModelSize& size, const std::string& path);

  DenseWeights embedding;
  const float* positions;  // [2N - 1, E]
  std::vector<BlockWeights> blocks;
  DenseWeights classifier;

 private:
  std::vector<float> data_;
};

// Reads a whole file of float32.
std::vector<float> ReadFloats(const std::string& path);

}  // namespace continual_transformers

#endif  // CONTINUAL_TRANSFORMERS_BENCHMARKS_RAW_MODEL_H_
