// Nodes of a plan that keep earlier steps in a stream's block, except attention.

#ifndef CONTINUAL_TRANSFORMERS_SESSION_RING_INSTRUCTIONS_H_
#define CONTINUAL_TRANSFORMERS_SESSION_RING_INSTRUCTIONS_H_

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <utility>
#include <vector>

#include "cc/session/row_instructions.h"

namespace continual_transformers {

// Calls f(frame, block, position, row) for every step, each stream's oldest step first.
template <class F>
std::unique_ptr<Instruction> MakeSteps(int64_t cycles_a_row, F f) {
  return MakeRows(cycles_a_row, [f = std::move(f)](const Frame& frame) {
    for (int64_t m = 0; m < frame.streams; ++m) {
      for (int64_t t = 0; t < frame.steps; ++t) {
        f(frame, frame.blocks[m], frame.Position(m, t), m * frame.steps + t);
      }
    }
  });
}

// Adds rows of a cyclic table, `each` of them in a step. The int64 at `offset_at` of the block is
// the stream's offset in the table.
template <typename T>
std::unique_ptr<Instruction> MakePositional(std::vector<T> rows, int64_t start, int64_t offset_at,
                                            int input, int output, int64_t size, int64_t each) {
  const int64_t count = static_cast<int64_t>(rows.size()) / size;
  return MakeSteps(
      each * (size / 4 + 40), [=, rows = std::move(rows)](const Frame& frame, const char* block,
                                                          int64_t position, int64_t r) {
        int64_t offset;
        std::memcpy(&offset, block + offset_at, sizeof(offset));
        // The offset may come from a copied state, so any value is possible.
        int64_t at = (start % count + offset % count + position % count * each) % count;
        if (at < 0) at += count;
        const T* x = frame.Rows<T>(input) + r * each * size;
        T* y = frame.Rows<T>(output) + r * each * size;
        for (int64_t row = 0; row < each; ++row, x += size, y += size) {
          const T* added = rows.data() + at * size;
          for (int64_t i = 0; i < size; ++i) y[i] = x[i] + added[i];
          if (++at == count) at = 0;
        }
      });
}

// Writes x of `steps` steps ago, or zeros if the stream has not taken that many.
inline std::unique_ptr<Instruction> MakeDelay(int64_t steps, int64_t ring_at, int input, int output,
                                              int64_t bytes) {
  return MakeSteps(bytes / 8 + 20,
                   [=](const Frame& frame, char* block, int64_t position, int64_t r) {
                     char* row = block + ring_at + position % steps * bytes;
                     char* to = frame.values[output] + r * bytes;
                     if (position >= steps) {
                       std::memcpy(to, row, bytes);
                     } else {
                       std::memset(to, 0, bytes);
                     }
                     std::memcpy(row, frame.values[input] + r * bytes, bytes);
                   });
}

// Writes x of the `window` newest steps, oldest first. Steps that were never taken are zeros.
inline std::unique_ptr<Instruction> MakeWindow(int64_t window, int64_t ring_at, int input,
                                               int output, int64_t bytes) {
  return MakeSteps(
      window * bytes / 16 + 20, [=](const Frame& frame, char* block, int64_t position, int64_t r) {
        const int64_t rows = std::max<int64_t>(1, window - 1);
        char* ring = block + ring_at;
        const char* x = frame.values[input] + r * bytes;
        char* to = frame.values[output] + r * window * bytes;
        for (int64_t step = position - window + 1; step < position; ++step, to += bytes) {
          if (step < 0) {
            std::memset(to, 0, bytes);
          } else {
            std::memcpy(to, ring + step % rows * bytes, bytes);
          }
        }
        std::memcpy(to, x, bytes);
        std::memcpy(ring + position % rows * bytes, x, bytes);
      });
}

// Sets the rows of steps that were never taken to zeros. May write into its input's storage.
inline std::unique_ptr<Instruction> MakeZeroUntaken(int64_t window, int input, int output,
                                                    int64_t bytes) {
  return MakeSteps(
      window * bytes / 16 + 20, [=](const Frame& frame, const char*, int64_t position, int64_t r) {
        const int64_t untaken = std::max<int64_t>(0, window - 1 - position) * bytes;
        const int64_t size = window * bytes;
        char* to = frame.values[output] + r * size;
        if (untaken > 0) std::memset(to, 0, untaken);
        if (input != output) {
          std::memcpy(to + untaken, frame.values[input] + r * size + untaken, size - untaken);
        }
      });
}

// Writes 1 for rows that a stream has made by now, and 0 for those before its first. Each step
// makes `rows` rows; at position 0 the first of the `size` rows has the number `first`.
template <typename T>
std::unique_ptr<Instruction> MakePresent(int64_t rows, int64_t first, int64_t size, int output) {
  return MakeSteps(
      size / 4 + 10, [=](const Frame& frame, const char*, int64_t position, int64_t r) {
        // Rows before the first. Far into a stream the product could overflow.
        const int64_t none = position > -first ? 0 : std::max<int64_t>(0, -first - position * rows);
        T* y = frame.Rows<T>(output) + r * size;
        for (int64_t i = 0; i < size; ++i) y[i] = i < none ? T(0) : T(1);
      });
}

}  // namespace continual_transformers

#endif  // CONTINUAL_TRANSFORMERS_SESSION_RING_INSTRUCTIONS_H_
