// Nodes of a plan that multiply values: matrices with each other, and rows with a kernel.

#ifndef CONTINUAL_TRANSFORMERS_SESSION_PRODUCT_INSTRUCTIONS_H_
#define CONTINUAL_TRANSFORMERS_SESSION_PRODUCT_INSTRUCTIONS_H_

#include <algorithm>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "cc/attention/row_products.h"
#include "cc/session/instruction.h"
#include "cc/session/row_instructions.h"

namespace continual_transformers {

// Products of `count` pairs of matrices: [rows, depth] times [depth, columns].
template <typename T>
std::unique_ptr<Instruction> MakeMatmul(const Operand<T>& a, const Operand<T>& b, int output,
                                        int64_t count, int64_t rows, int64_t depth,
                                        int64_t columns) {
  return MakeRows(count * (20 + rows * depth * columns / 8), [=](const Frame& frame) {
    const T* x = a.constant == nullptr ? frame.Rows<T>(a.value) : a.constant;
    const T* w = b.constant == nullptr ? frame.Rows<T>(b.value) : b.constant;
    T* y = frame.Rows<T>(output);
    for (int64_t r = 0; r < frame.rows(); ++r) {
      for (int64_t i = 0; i < count; ++i, y += rows * columns) {
        MultiplyMatrices(x + i * rows * depth, w + i * depth * columns, rows, depth, columns, y);
      }
      if (a.constant == nullptr) x += count * rows * depth;
      if (b.constant == nullptr) w += count * depth * columns;
    }
  });
}

// A convolution of each channel by itself, over the rows of a step or over those of earlier steps.
template <typename T>
struct DepthwiseSpec {
  std::vector<T> kernel;  // [taps, outputs of a row]
  std::vector<T> bias;    // [outputs of a row]
  int64_t channels;       // of the input; output c is of channel c / (outputs / channels)
  int64_t rows;           // of the input, in a step
  int64_t output_rows, stride, dilation;
  int input, output;
  // The ring of a window that the rows come from, whose newest row is the input; -1: none.
  int64_t ring_at = -1;
};

template <typename T>
class DepthwiseInstruction : public Instruction {
 public:
  explicit DepthwiseInstruction(DepthwiseSpec<T> spec)
      : spec_(std::move(spec)),
        outputs_(spec_.bias.size()),
        taps_(static_cast<int64_t>(spec_.kernel.size()) / outputs_) {}

  void Run(const Frame& frame) const override {
    const T** rows = reinterpret_cast<const T**>(frame.scratch);
    T* y = frame.Rows<T>(spec_.output);
    const T* x = frame.Rows<T>(spec_.input);
    if (spec_.ring_at < 0) {
      for (int64_t r = 0; r < frame.rows(); ++r, x += spec_.rows * spec_.channels) {
        for (int64_t o = 0; o < spec_.output_rows; ++o, y += outputs_) {
          for (int64_t i = 0; i < taps_; ++i) {
            rows[i] = x + (o * spec_.stride + i * spec_.dilation) * spec_.channels;
          }
          Sum(rows, 0, y);
        }
      }
      return;
    }
    for (int64_t m = 0; m < frame.streams; ++m) {
      T* ring = reinterpret_cast<T*>(frame.blocks[m] + spec_.ring_at);
      for (int64_t t = 0; t < frame.steps; ++t, x += spec_.channels, y += outputs_) {
        SumRing(ring, frame.Position(m, t), x, rows, y);
      }
    }
  }

  int64_t Cycles(int64_t rows) const override {
    return 50 + rows * spec_.output_rows * (20 + taps_ * (2 + outputs_ / 8));
  }
  int64_t ScratchBytes() const override { return taps_ * static_cast<int64_t>(sizeof(T*)); }
  int64_t WeightsBytes() const override {
    return static_cast<int64_t>((spec_.kernel.size() + spec_.bias.size()) * sizeof(T));
  }

 private:
  // Computes the output of a step from the ring and the step's row x, and writes x to the ring.
  void SumRing(T* ring, int64_t position, const T* x, const T** rows, T* y) const {
    const int64_t size = std::max<int64_t>(1, spec_.rows - 1);
    int64_t step = position - (spec_.rows - 1);  // Of the first tap; there is none below 0.
    int64_t at = ((step % size) + size) % size;
    int64_t first = 0;
    for (int64_t i = 0; i < taps_; ++i, step += spec_.dilation) {
      if (step < 0) first = i + 1;
      rows[i] = step == position ? x : ring + at * spec_.channels;
      at += spec_.dilation % size;
      if (at >= size) at -= size;
    }
    Sum(rows, first, y);
    std::copy_n(x, spec_.channels, ring + position % size * spec_.channels);
  }

  // Writes the weighted sum of the rows from tap `first` on, plus the bias.
  void Sum(const T* const* rows, int64_t first, T* y) const {
    std::copy_n(spec_.bias.data(), outputs_, y);
    const T* kernel = spec_.kernel.data() + first * outputs_;
    if (outputs_ == spec_.channels) {
      AddWeightedRows(rows + first, kernel, taps_ - first, outputs_, y);
      return;
    }
    const int64_t several = outputs_ / spec_.channels;
    for (int64_t i = first; i < taps_; ++i, kernel += outputs_) {
      for (int64_t c = 0; c < spec_.channels; ++c) {
        for (int64_t j = c * several; j < (c + 1) * several; ++j) y[j] += rows[i][c] * kernel[j];
      }
    }
  }

  const DepthwiseSpec<T> spec_;
  const int64_t outputs_, taps_;
};

}  // namespace continual_transformers

#endif  // CONTINUAL_TRANSFORMERS_SESSION_PRODUCT_INSTRUCTIONS_H_
