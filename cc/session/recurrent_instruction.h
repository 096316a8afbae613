// Recurrent cells: LSTM (Hochreiter and Schmidhuber 1997), GRU (Cho et al. 2014, and the variant of
// cuDNN that resets after the product), and the simple cell.

#ifndef CONTINUAL_TRANSFORMERS_SESSION_RECURRENT_INSTRUCTION_H_
#define CONTINUAL_TRANSFORMERS_SESSION_RECURRENT_INSTRUCTION_H_

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#include "cc/attention/activations.h"
#include "cc/attention/packed_dense.h"
#include "cc/session/instruction.h"

namespace continual_transformers {

enum class Cell { kSimple, kGru, kGruResetBefore, kLstm };

struct RecurrentSpec {
  Cell cell;
  int64_t units;
  int64_t rows_a_step;  // of one step of one stream
  // Whether the state goes on from step to step. If not, the rows of a step are a window of steps,
  // and each step begins with zeros; rows of steps that were never taken are skipped.
  bool goes_on;
  int64_t first;  // if it goes on, the number of the first step's row; rows before 0 are skipped
  int input, output, mask;  // plan values; mask -1: none. A row that it hides changes nothing.
  int64_t state, memory;    // offsets in a stream's block, if it goes on; memory only for kLstm
  ActivationSpec activation, gate;  // of new values, and of gates
};

// The input is x W + b, with the units of all gates side by side in Keras' order: i, f, c, o, or z,
// r, h. Kernels: [units, gates * units]; of kGruResetBefore that of z and r, and one for h, whose
// input is r * state. Bias: [gates * units] or empty.
//
// The steps of a stream follow one another, so the product of a step has a row for each stream.
template <typename T, typename W>
class RecurrentInstruction : public Instruction {
 public:
  RecurrentInstruction(const RecurrentSpec& spec, const std::vector<T>& kernel, std::vector<T> bias)
      : s_(spec), bias_(std::move(bias)) {
    const int64_t units = s_.units, columns = Gates() * units;
    const int64_t together = s_.cell == Cell::kGruResetBefore ? 2 * units : columns;
    kernel_ = Columns(kernel, 0, together);
    if (together < columns) candidate_ = Columns(kernel, together, columns);
  }

  void Run(const Frame& frame) const override {
    // Streams are taken in groups that fit the scratch memory.
    for (int64_t first = 0; first < frame.streams; first += kGroup) {
      const int64_t streams = std::min(kGroup, frame.streams - first);
      for (int64_t t = 0; t < frame.steps; ++t) TakeStep(frame, first, streams, t);
    }
  }

  int64_t Cycles(int64_t rows) const override {
    const int64_t steps = rows * s_.rows_a_step;
    PackedDense<T, W> dense = {};
    dense.kernel = &kernel_;
    dense.rows = 1;
    return steps * (kernel_.panels() * PackedDenseCyclesPerPanel(dense) +
                    Gates() * s_.units * CyclesPerElement(s_.gate.kind));
  }

  int64_t ScratchBytes() const override {
    return (kGroup * (3 + Gates()) * s_.units + Gates() * s_.units) *
           static_cast<int64_t>(sizeof(T));
  }

  int64_t WeightsBytes() const override {
    return kernel_.bytes() + (candidate_.outputs() > 0 ? candidate_.bytes() : 0) +
           static_cast<int64_t>(bias_.size() * sizeof(T));
  }

 private:
  static constexpr int64_t kGroup = 64;

  // Columns begin to end - 1 of a kernel.
  PackedKernel<T, W> Columns(const std::vector<T>& kernel, int64_t begin, int64_t end) const {
    std::vector<T> part;
    part.reserve(s_.units * (end - begin));
    for (auto row = kernel.begin(); row != kernel.end(); row += Gates() * s_.units) {
      part.insert(part.end(), row + begin, row + end);
    }
    return PackedKernel<T, W>(part.data(), s_.units, end - begin);
  }

  int64_t Gates() const { return s_.cell == Cell::kSimple ? 1 : s_.cell == Cell::kLstm ? 4 : 3; }

  static void Multiply(const Frame& frame, const PackedKernel<T, W>& kernel, const T* bias,
                       const T* input, int64_t rows, T* output) {
    const PackedDense<T, W> dense = {&kernel, bias, input, nullptr, output, rows};
    if (frame.pool != nullptr &&
        kernel.panels() * PackedDenseCyclesPerPanel(dense) >= kCyclesWorthThreads) {
      frame.pool->Share(kernel.panels(),
                        [&](int64_t panel, int64_t) { TakePackedDense(dense, panel, panel + 1); });
    } else {
      TakePackedDense(dense, 0, kernel.panels());
    }
  }

  // Takes step t of some streams.
  void TakeStep(const Frame& frame, int64_t first, int64_t streams, int64_t t) const {
    const int64_t units = s_.units, width = Gates() * units, rows = s_.rows_a_step;
    T* state = reinterpret_cast<T*>(frame.scratch);  // [kGroup, units], h
    T* memory = state + kGroup * units;              // [kGroup, units], c
    T* reset = memory + kGroup * units;
    T* products = reset + kGroup * units;
    T* gates = products + kGroup * width;
    const auto load = [&](T* to, int64_t offset) {
      if (!s_.goes_on) return std::fill(to, to + streams * units, T(0));
      for (int64_t m = 0; m < streams; ++m) {
        std::memcpy(to + m * units, frame.blocks[first + m] + offset, units * sizeof(T));
      }
    };
    const auto store = [&](const T* from, int64_t offset) {
      for (int64_t m = 0; m < streams; ++m) {
        std::memcpy(frame.blocks[first + m] + offset, from + m * units, units * sizeof(T));
      }
    };
    load(state, s_.state);
    if (s_.cell == Cell::kLstm) load(memory, s_.memory);
    for (int64_t r = 0; r < rows; ++r) {
      const auto x = [&](int64_t m) {
        const int64_t step = (first + m) * frame.steps + t;
        return frame.Rows<T>(s_.input) + (step * rows + r) * width;
      };
      Multiply(frame, kernel_, bias_.empty() ? nullptr : bias_.data(), state, streams, products);
      if (s_.cell == Cell::kGruResetBefore) {
        for (int64_t m = 0; m < streams; ++m) {
          Gate(x(m) + units, products + m * 2 * units + units, units, gates);
          for (int64_t i = 0; i < units; ++i)
            reset[m * units + i] = gates[i] * state[m * units + i];
        }
        // Behind the products of z and r, which are still needed.
        Multiply(frame, candidate_, nullptr, reset, streams, products + kGroup * 2 * units);
      }
      for (int64_t m = 0; m < streams; ++m) {
        const int64_t step = (first + m) * frame.steps + t;
        T* h = state + m * units;
        const int64_t position = frame.Position(first + m, t);
        // A position beyond -first is of no row before 0; there a product could overflow.
        const bool untaken = s_.goes_on
                                 ? position <= -s_.first && position * rows + s_.first + r < 0
                                 : rows - 1 - r > position;
        if (!untaken && (s_.mask < 0 || frame.Rows<bool>(s_.mask)[step * rows + r])) {
          Take(x(m), products, m, gates, memory + m * units, h);
        }
        std::memcpy(frame.Rows<T>(s_.output) + (step * rows + r) * units, h, units * sizeof(T));
      }
    }
    if (!s_.goes_on) return;
    store(state, s_.state);
    if (s_.cell == Cell::kLstm) store(memory, s_.memory);
  }

  // y = gate(a + b).
  void Gate(const T* a, const T* b, int64_t size, T* y) const {
    for (int64_t i = 0; i < size; ++i) y[i] = a[i] + b[i];
    Apply(s_.gate, y, size, y);
  }

  // y = activation(a + b).
  void Activate(const T* a, const T* b, int64_t size, T* y) const {
    for (int64_t i = 0; i < size; ++i) y[i] = a[i] + b[i];
    Apply(s_.activation, y, size, y);
  }

  // Takes one row of stream m of the group: x is its input; c and h are its state, which changes.
  void Take(const T* x, const T* products, int64_t m, T* y, T* c, T* h) const {
    const int64_t n = s_.units;
    switch (s_.cell) {
      case Cell::kSimple:
        Activate(x, products + m * n, n, h);
        return;
      case Cell::kLstm: {
        const T* p = products + m * 4 * n;
        Gate(x, p, 2 * n, y);
        Activate(x + 2 * n, p + 2 * n, n, y + 2 * n);
        Gate(x + 3 * n, p + 3 * n, n, y + 3 * n);
        for (int64_t i = 0; i < n; ++i) c[i] = y[n + i] * c[i] + y[i] * y[2 * n + i];
        Apply(s_.activation, c, n, h);
        for (int64_t i = 0; i < n; ++i) h[i] *= y[3 * n + i];
        return;
      }
      case Cell::kGru: {
        const T* p = products + m * 3 * n;
        Gate(x, p, 2 * n, y);
        for (int64_t i = 0; i < n; ++i) y[2 * n + i] = y[n + i] * p[2 * n + i];
        Activate(x + 2 * n, y + 2 * n, n, y + 2 * n);
        break;
      }
      case Cell::kGruResetBefore:
        Gate(x, products + m * 2 * n, n, y);
        Activate(x + 2 * n, products + kGroup * 2 * n + m * n, n, y + 2 * n);
        break;
    }
    for (int64_t i = 0; i < n; ++i) h[i] = y[i] * h[i] + (1 - y[i]) * y[2 * n + i];
  }

  const RecurrentSpec s_;
  PackedKernel<T, W> kernel_, candidate_;
  const std::vector<T> bias_;
};

}  // namespace continual_transformers

#endif  // CONTINUAL_TRANSFORMERS_SESSION_RECURRENT_INSTRUCTION_H_
