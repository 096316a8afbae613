// Attention of one query to a window that a step changes as a whole, together with the projections
// of its keys and values. They are not computed: a query q of a head attends to the rows x of the
// window by q . (Wk x) = (Wk^T q) . x, and the sum of its values is Wv applied to a sum of rows. So
// a head costs 2 N E instead of N E (D + Dv), with E features in a row.

#ifndef CONTINUAL_TRANSFORMERS_SESSION_ONE_QUERY_INSTRUCTION_H_
#define CONTINUAL_TRANSFORMERS_SESSION_ONE_QUERY_INSTRUCTION_H_

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "cc/attention/packed_dense.h"
#include "cc/attention/ring_attention.h"
#include "cc/session/attention_instructions.h"
#include "cc/session/instruction.h"

namespace continual_transformers {

// A projection of the rows of a window: a dense layer.
template <typename T>
struct RowProjection {
  int input;              // a plan value, [N, inputs]
  std::vector<T> kernel;  // [inputs, outputs]
  std::vector<T> bias;    // [outputs], or empty
  int64_t inputs, outputs;
};

// W is the type of the kernels in memory.
template <typename T, typename W>
class OneQueryInstruction : public Instruction {
 public:
  // `spec.queries` must be 1. Its key and value are not used. A bias of the keys adds the same to
  // every logit of a query, and so changes nothing.
  OneQueryInstruction(const WindowAttentionSpec& spec, const RowProjection<T>& key,
                      RowProjection<T> value)
      : s_(spec),
        key_(key.input),
        value_(value.input),
        key_inputs_(key.inputs),
        value_inputs_(value.inputs),
        bias_(std::move(value.bias)) {
    const int64_t d = s_.key_dim, dv = s_.value_dim;
    for (int64_t h = 0; h < s_.heads; ++h) {
      std::vector<T> transposed(d * key.inputs), columns(value.inputs * dv);
      for (int64_t i = 0; i < key.inputs; ++i) {
        for (int64_t j = 0; j < d; ++j) {
          transposed[j * key.inputs + i] = key.kernel[i * key.outputs + h * d + j];
        }
      }
      for (int64_t i = 0; i < value.inputs; ++i) {
        std::copy_n(value.kernel.data() + i * value.outputs + h * dv, dv, columns.data() + i * dv);
      }
      key_kernels_.emplace_back(transposed.data(), d, key.inputs);
      value_kernels_.emplace_back(columns.data(), value.inputs, dv);
    }
  }

  void Run(const Frame& frame) const override {
    for (int64_t m = 0; m < frame.streams; ++m) {
      for (int64_t t = 0; t < frame.steps; ++t) {
        Step(frame, m * frame.steps + t, frame.Position(m, t));
      }
    }
  }

  int64_t Cycles(int64_t rows) const override {
    const int64_t size = key_inputs_ + value_inputs_;
    const int64_t products = size * (s_.window + s_.key_dim + s_.value_dim);
    return rows * s_.heads * (products / 8 + 300 + s_.window * 2);
  }

  int64_t ScratchBytes() const override {
    return (Aligned(key_inputs_) + Aligned(value_inputs_) + RingAttentionLogits(s_.window)) *
           static_cast<int64_t>(sizeof(T));
  }

  int64_t WeightsBytes() const override {
    int64_t bytes = static_cast<int64_t>(bias_.size() * sizeof(T));
    for (const auto& kernel : key_kernels_) bytes += kernel.bytes();
    for (const auto& kernel : value_kernels_) bytes += kernel.bytes();
    return bytes;
  }

 private:
  void Step(const Frame& frame, int64_t r, int64_t position) const {
    const int64_t n = s_.window, d = s_.key_dim, dv = s_.value_dim;
    const int64_t first =
        std::max({int64_t{0}, s_.Untaken(position), s_.band > 0 ? n - s_.band : int64_t{0}});
    T* query = reinterpret_cast<T*>(frame.scratch);
    T* sum = query + Aligned(key_inputs_);
    RingAttentionParams<T, T> p = {};
    p.query = query;
    p.key = frame.Rows<T>(key_) + r * n * key_inputs_;
    p.key_stride = key_inputs_;
    p.value = frame.Rows<T>(value_) + r * n * value_inputs_;
    p.value_stride = value_inputs_;
    p.spans = {{first, n - first}, {0, 0}};
    p.output = sum;
    p.heads = p.key_heads = 1;
    p.key_dim = key_inputs_;
    p.value_dim = value_inputs_;
    p.scale = static_cast<T>(s_.scale);
    p.logits = sum + Aligned(value_inputs_);
    for (int64_t h = 0; h < s_.heads; ++h) {
      const int64_t head = r * s_.heads + h;
      Multiply(key_kernels_[h], nullptr, frame.Rows<T>(s_.query) + head * d, query);
      RingAttention(p, 0, 1);
      Multiply(value_kernels_[h], bias_.empty() ? nullptr : bias_.data() + h * dv, sum,
               frame.Rows<T>(s_.output) + head * dv);
    }
  }

  // Rounds up to whole vectors.
  static int64_t Aligned(int64_t elements) { return (elements + 15) / 16 * 16; }

  static void Multiply(const PackedKernel<T, W>& kernel, const T* bias, const T* input, T* output) {
    const PackedDense<T, W> dense = {&kernel, bias, input, nullptr, output, 1};
    TakePackedDense(dense, 0, kernel.panels());
  }

  const WindowAttentionSpec s_;
  const int key_, value_;
  const int64_t key_inputs_, value_inputs_;
  const std::vector<T> bias_;
  std::vector<PackedKernel<T, W>> key_kernels_, value_kernels_;  // one per head
};

}  // namespace continual_transformers

#endif  // CONTINUAL_TRANSFORMERS_SESSION_ONE_QUERY_INSTRUCTION_H_
