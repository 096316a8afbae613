// Dense layers with a kernel that was packed when the model was loaded: x W + b, plus a residual in
// the same pass. With one row, a product runs at the speed of reading its kernel. With many rows,
// blocks of the output stay in registers while the kernel passes.

#ifndef CONTINUAL_TRANSFORMERS_ATTENTION_PACKED_DENSE_H_
#define CONTINUAL_TRANSFORMERS_ATTENTION_PACKED_DENSE_H_

#include <cstdint>
#include <memory>
#include <vector>

namespace continual_transformers {

// A kernel [inputs, outputs], cut into panels of kPanelColumns columns. Each panel is contiguous,
// [inputs, width], so that a product reads memory in order. The last panel holds the remaining
// columns, padded with zeros to a multiple of kPanelStep.
//
// T is the compute type, W the type of the kernel: T, or with float BFloat16 or int8_t. A kernel of
// int8_t has a scale for each column: its largest magnitude is 127 scales.
constexpr int64_t kPanelColumns = 64;
constexpr int64_t kPanelStep = 16;

template <typename T, typename W = T>
class PackedKernel {
 public:
  // Copies `kernel`, [inputs, outputs], row-major, and rounds it to W.
  PackedKernel(const T* kernel, int64_t inputs, int64_t outputs);
  PackedKernel() = default;

  int64_t inputs() const { return inputs_; }
  int64_t outputs() const { return outputs_; }
  int64_t panels() const { return (outputs_ + kPanelColumns - 1) / kPanelColumns; }
  const W* panel(int64_t i) const { return data_.get() + i * kPanelColumns * inputs_; }
  // [panels * kPanelColumns], zeros past the last column; null unless W is int8_t.
  const T* scale() const { return scale_.empty() ? nullptr : scale_.data(); }
  int64_t bytes() const;

 private:
  struct Free {
    void operator()(void* p) const;
  };
  void SetScales(const T* kernel);

  int64_t inputs_ = 0, outputs_ = 0;
  std::unique_ptr<W[], Free> data_;
  std::vector<T> scale_;
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

// The part of a product that one panel of its kernel computes. dense.h makes panels of kernels that
// are not packed.
template <typename T, typename W>
struct DensePanel {
  const W* kernel;    // [inputs, width], `columns` of them and zeros
  const T* scale;     // [columns], null unless W is int8_t
  const T* bias;      // [columns]; null: none
  const T* input;     // [rows, inputs]
  const T* residual;  // [rows, outputs], from the panel's first column on; null: none
  T* output;          // the same; may be `residual`
  int64_t rows, inputs, outputs;
  int64_t columns;  // at most kPanelColumns

  int64_t width() const { return (columns + kPanelStep - 1) / kPanelStep * kPanelStep; }
};

template <typename T, typename W>
void MultiplyPanel(const DensePanel<T, W>& panel);

// Computes panels begin, ..., end - 1 of the output. Instantiated for the weight types of
// step_types.h.
template <typename T, typename W>
void TakePackedDense(const PackedDense<T, W>& dense, int64_t begin, int64_t end);

// A rough estimate of the CPU cycles per panel.
template <typename T, typename W>
int64_t PackedDenseCyclesPerPanel(const PackedDense<T, W>& dense);

}  // namespace continual_transformers

#endif  // CONTINUAL_TRANSFORMERS_ATTENTION_PACKED_DENSE_H_
