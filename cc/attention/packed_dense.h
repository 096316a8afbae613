// Dense layers whose kernel was packed when the model was loaded: x W + b, with what follows in the
// same pass. At one row a product runs at the speed at which its kernel can be read; at many,
// blocks of the output stay in registers while the kernel goes by.

#ifndef CONTINUAL_TRANSFORMERS_ATTENTION_PACKED_DENSE_H_
#define CONTINUAL_TRANSFORMERS_ATTENTION_PACKED_DENSE_H_

#include <cstdint>
#include <memory>

namespace continual_transformers {

// A kernel [inputs, outputs] cut into panels of kPanelColumns columns, each [inputs, width] and
// contiguous, so that a product reads memory in order. The last panel is as wide as what is left,
// rounded up to kPanelStep, and filled up with zeros.
//
// T is what is computed in, W what the kernel is kept in: T, or under float BFloat16.
constexpr int64_t kPanelColumns = 64;
constexpr int64_t kPanelStep = 16;

template <typename T, typename W = T>
class PackedKernel {
 public:
  // `kernel` is [inputs, outputs], rows after one another; it is copied, and rounded to W.
  PackedKernel(const T* kernel, int64_t inputs, int64_t outputs);
  PackedKernel() = default;

  int64_t inputs() const { return inputs_; }
  int64_t outputs() const { return outputs_; }
  int64_t panels() const { return (outputs_ + kPanelColumns - 1) / kPanelColumns; }
  const W* panel(int64_t i) const { return data_.get() + i * kPanelColumns * inputs_; }
  int64_t bytes() const;

 private:
  struct Free {
    void operator()(void* p) const;
  };
  int64_t inputs_ = 0, outputs_ = 0;
  std::unique_ptr<W[], Free> data_;
};

template <typename T, typename W = T>
struct PackedDense {
  const PackedKernel<T, W>* kernel;
  const T* bias;      // [outputs]; null: none
  const T* input;     // [rows, inputs]
  const T* residual;  // [rows, outputs], added to the result; null: none
  T* output;          // [rows, outputs]; may be `residual`
  int64_t rows;
};

// Computes panels begin, ..., end - 1 of the output. Instantiated for (T, W) of (float, float),
// (float, BFloat16) and (double, double).
template <typename T, typename W>
void TakePackedDense(const PackedDense<T, W>& dense, int64_t begin, int64_t end);

// Roughly what a panel costs, in CPU cycles.
template <typename T, typename W>
int64_t PackedDenseCyclesPerPanel(const PackedDense<T, W>& dense);

}  // namespace continual_transformers

#endif  // CONTINUAL_TRANSFORMERS_ATTENTION_PACKED_DENSE_H_
