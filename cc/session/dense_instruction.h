// A dense layer of a plan, with the nodes fused into it.

#ifndef CONTINUAL_TRANSFORMERS_SESSION_DENSE_INSTRUCTION_H_
#define CONTINUAL_TRANSFORMERS_SESSION_DENSE_INSTRUCTION_H_

#include <algorithm>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "cc/attention/activations.h"
#include "cc/attention/packed_dense.h"
#include "cc/session/instruction.h"

namespace continual_transformers {

// activation(x W + b + residual).
template <typename T>
struct DenseSpec {
  std::vector<T> bias;  // [outputs], or empty
  int64_t inputs, outputs;
  int64_t rows_a_step;  // of one step of one stream: the product of the axes before the last
  int input, output;
  int residual = -1;  // a plan value; -1: none
  ActivationSpec activation;
};

template <typename T, typename W>
class DenseInstruction : public Instruction {
 public:
  // Instructions may share a kernel.
  DenseInstruction(DenseSpec<T> spec, std::shared_ptr<const PackedKernel<T, W>> kernel)
      : spec_(std::move(spec)), kernel_(std::move(kernel)) {}

  void Run(const Frame& frame) const override {
    const int64_t rows = frame.rows() * spec_.rows_a_step;
    PackedDense<T, W> dense = {kernel_.get(),
                               spec_.bias.empty() ? nullptr : spec_.bias.data(),
                               frame.Rows<T>(spec_.input),
                               spec_.residual < 0 ? nullptr : frame.Rows<T>(spec_.residual),
                               frame.Rows<T>(spec_.output),
                               rows};
    if (frame.pool == nullptr || Cycles(frame.rows()) < kCyclesWorthThreads) {
      TakePackedDense(dense, 0, kernel_->panels());
      Finish(dense.output, rows * spec_.outputs);
      return;
    }
    frame.pool->Share(kernel_->panels(),
                      [&](int64_t panel, int64_t) { TakePackedDense(dense, panel, panel + 1); });
    Finish(dense.output, rows * spec_.outputs);
  }

  int64_t Cycles(int64_t rows) const override {
    PackedDense<T, W> dense = {};
    dense.kernel = kernel_.get();
    dense.rows = rows * spec_.rows_a_step;
    return kernel_->panels() * PackedDenseCyclesPerPanel(dense) +
           dense.rows * spec_.outputs * CyclesPerElement(spec_.activation.kind);
  }

  int64_t WeightsBytes() const override {
    return static_cast<int64_t>(spec_.bias.size() * sizeof(T));
  }

 private:
  // Runs after the product, while the rows are still cached. Fused into the product, the
  // activation would take registers from the sums.
  void Finish(T* output, int64_t size) const {
    if (spec_.activation.kind == Activation::kLinear) return;
    Apply(spec_.activation, output, size, output);
  }

  DenseSpec<T> spec_;
  const std::shared_ptr<const PackedKernel<T, W>> kernel_;
};

}  // namespace continual_transformers

#endif  // CONTINUAL_TRANSFORMERS_SESSION_DENSE_INSTRUCTION_H_
