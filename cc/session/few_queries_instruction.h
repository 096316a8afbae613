// Attention of a few queries to a window that a step changes as a whole, together with the
// projections of its keys and values. They are not computed: a query q of a head attends to the
// rows x of the window by q . (Wk x) = (Wk^T q) . x, and the sum of its values is Wv applied to a
// sum of rows. So all queries of all heads attend to the same rows.

#ifndef CONTINUAL_TRANSFORMERS_SESSION_FEW_QUERIES_INSTRUCTION_H_
#define CONTINUAL_TRANSFORMERS_SESSION_FEW_QUERIES_INSTRUCTION_H_

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "cc/attention/packed_dense.h"
#include "cc/attention/window_attention.h"
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
class FewQueriesInstruction : public Instruction {
 public:
  // The key and value of `spec` are not used. With several queries it must be neither causal nor
  // have a band. A bias of the keys adds the same to every logit of a query, and so changes
  // nothing.
  FewQueriesInstruction(const WindowAttentionSpec& spec, const RowProjection<T>& key,
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

  // Returns the multiply-adds of a step.
  static int64_t Products(const WindowAttentionSpec& spec, int64_t key_inputs,
                          int64_t value_inputs) {
    return spec.queries * spec.heads *
           (key_inputs * (spec.window + spec.key_dim) +
            value_inputs * (spec.window + spec.value_dim));
  }

  int64_t Cycles(int64_t rows) const override {
    return rows * (Products(s_, key_inputs_, value_inputs_) / 8 +
                   s_.queries * s_.heads * (300 + s_.window * 2));
  }

  int64_t ScratchBytes() const override {
    return (OfHeadSize() + OfAllHeads(key_inputs_) + OfAllHeads(value_inputs_) +
            Params().ScratchSize()) *
           static_cast<int64_t>(sizeof(T));
  }

  int64_t WeightsBytes() const override {
    int64_t bytes = static_cast<int64_t>(bias_.size() * sizeof(T));
    for (const auto& kernel : key_kernels_) bytes += kernel.bytes();
    for (const auto& kernel : value_kernels_) bytes += kernel.bytes();
    return bytes;
  }

 private:
  // The queries of all heads, one head after the other, as queries of one head.
  WindowAttentionParams<T> Params() const {
    WindowAttentionParams<T> p = {};
    p.queries = s_.heads * s_.queries;
    p.rows = s_.window;
    p.heads = 1;
    p.key_dim = key_inputs_;
    p.value_dim = value_inputs_;
    p.scale = static_cast<T>(s_.scale);
    return p;
  }

  // The elements of the queries or the outputs of one head, and of the vectors of all heads, each
  // in whole vectors of the processor: the scratch of the attention begins after them.
  int64_t OfHeadSize() const { return Aligned(s_.queries * std::max(s_.key_dim, s_.value_dim)); }
  int64_t OfAllHeads(int64_t size) const { return Aligned(s_.heads * s_.queries * size); }
  static int64_t Aligned(int64_t elements) { return (elements + 15) / 16 * 16; }

  void Step(const Frame& frame, int64_t r, int64_t position) const {
    const int64_t n = s_.window, d = s_.key_dim, dv = s_.value_dim, heads = s_.heads;
    const T* from = frame.Rows<T>(s_.query) + r * s_.queries * heads * d;
    T* to = frame.Rows<T>(s_.output) + r * s_.queries * heads * dv;
    const int64_t first = std::max(s_.Untaken(position), s_.band > 0 ? n - s_.band : int64_t{0});
    if (first == n) {  // No bias either: a query without keys gives zeros.
      std::fill_n(to, s_.queries * heads * dv, T(0));
      return;
    }
    T* const of_head = reinterpret_cast<T*>(frame.scratch);
    T* const queries = of_head + OfHeadSize();
    T* const sums = queries + OfAllHeads(key_inputs_);
    for (int64_t h = 0; h < heads; ++h) {
      for (int64_t i = 0; i < s_.queries; ++i) {
        std::copy_n(from + (i * heads + h) * d, d, of_head + i * d);
      }
      Multiply(key_kernels_[h], nullptr, of_head, queries + h * s_.queries * key_inputs_);
    }
    WindowAttentionParams<T> p = Params();
    p.query = queries;
    p.key = frame.Rows<T>(key_) + r * n * key_inputs_;
    p.value = frame.Rows<T>(value_) + r * n * value_inputs_;
    p.output = sums;
    p.first_row = first;
    p.scratch = sums + OfAllHeads(value_inputs_);
    WindowAttention(p, 0, 1);
    for (int64_t h = 0; h < heads; ++h) {
      Multiply(value_kernels_[h], bias_.empty() ? nullptr : bias_.data() + h * dv,
               sums + h * s_.queries * value_inputs_, of_head);
      for (int64_t i = 0; i < s_.queries; ++i) {
        std::copy_n(of_head + i * dv, dv, to + (i * heads + h) * dv);
      }
    }
  }

  void Multiply(const PackedKernel<T, W>& kernel, const T* bias, const T* input, T* output) const {
    const PackedDense<T, W> dense = {&kernel, bias, input, nullptr, output, s_.queries};
    TakePackedDense(dense, 0, kernel.panels());
  }

  const WindowAttentionSpec s_;
  const int key_, value_;
  const int64_t key_inputs_, value_inputs_;
  const std::vector<T> bias_;
  std::vector<PackedKernel<T, W>> key_kernels_, value_kernels_;  // one per head
};

}  // namespace continual_transformers

#endif  // CONTINUAL_TRANSFORMERS_SESSION_FEW_QUERIES_INSTRUCTION_H_
