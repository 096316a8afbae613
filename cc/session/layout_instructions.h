// Nodes of a plan that only move elements. They work for every dtype.

#ifndef CONTINUAL_TRANSFORMERS_SESSION_LAYOUT_INSTRUCTIONS_H_
#define CONTINUAL_TRANSFORMERS_SESSION_LAYOUT_INSTRUCTIONS_H_

#include <cstdint>
#include <cstring>
#include <memory>
#include <utility>
#include <vector>

#include "cc/session/row_instructions.h"

namespace continual_transformers {

// One input of a concatenation, with its bytes in each of the blocks before the axis.
struct ConcatPart {
  int value;
  int64_t bytes;
};

inline std::unique_ptr<Instruction> MakeConcat(std::vector<ConcatPart> parts, int64_t outer,
                                               int output) {
  int64_t width = 0;
  for (const ConcatPart& part : parts) width += part.bytes;
  return MakeRows(outer * width / 16 + 20, [=, parts = std::move(parts)](const Frame& frame) {
    char* to = frame.values[output];
    for (const ConcatPart& part : parts) {
      const char* from = frame.values[part.value];
      for (int64_t o = 0; o < frame.rows() * outer; ++o) {
        std::memcpy(to + o * width, from + o * part.bytes, part.bytes);
      }
      to += part.bytes;
    }
  });
}

// Copies runs of elements that are contiguous in the input.
inline std::unique_ptr<Instruction> MakeStrided(int64_t offset, std::vector<int64_t> shape,
                                                std::vector<int64_t> strides, int64_t element,
                                                int input, int64_t input_size, int output) {
  int64_t size = 1;
  for (int64_t n : shape) size *= n;
  struct Run {
    int64_t from, bytes;
  };
  std::vector<Run> runs;
  std::vector<int64_t> index(shape.size(), 0);
  for (int64_t i = 0; i < size; ++i) {
    int64_t at = offset;
    for (size_t axis = 0; axis < shape.size(); ++axis) at += index[axis] * strides[axis];
    if (!runs.empty() && runs.back().from + runs.back().bytes == at * element) {
      runs.back().bytes += element;
    } else {
      runs.push_back({at * element, element});
    }
    for (size_t axis = shape.size(); axis-- > 0;) {
      if (++index[axis] < shape[axis]) break;
      index[axis] = 0;
    }
  }
  const int64_t from_row = input_size * element;
  const int64_t cycles = static_cast<int64_t>(runs.size()) * 5 + size * element / 16 + 20;
  return MakeRows(cycles, [=, runs = std::move(runs)](const Frame& frame) {
    const char* from = frame.values[input];
    char* to = frame.values[output];
    for (int64_t r = 0; r < frame.rows(); ++r, from += from_row) {
      for (const Run& run : runs) {
        if (run.bytes == 4) {
          std::memcpy(to, from + run.from, 4);
        } else {
          std::memcpy(to, from + run.from, run.bytes);
        }
        to += run.bytes;
      }
    }
  });
}

// Writes the same elements to every row.
inline std::unique_ptr<Instruction> MakeConstant(std::vector<char> bytes, int output) {
  const int64_t size = bytes.size();
  return MakeRows(size / 16 + 20, [=, bytes = std::move(bytes)](const Frame& frame) {
    char* to = frame.values[output];
    for (int64_t r = 0; r < frame.rows(); ++r, to += size) std::memcpy(to, bytes.data(), size);
  });
}

}  // namespace continual_transformers

#endif  // CONTINUAL_TRANSFORMERS_SESSION_LAYOUT_INSTRUCTIONS_H_
