// Rotary positions of queries and keys.

#ifndef CONTINUAL_TRANSFORMERS_SESSION_ROTARY_INSTRUCTIONS_H_
#define CONTINUAL_TRANSFORMERS_SESSION_ROTARY_INSTRUCTIONS_H_

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "cc/session/ring_instructions.h"

namespace continual_transformers {

// Cosine and sine of an angle in 2^-64 of a turn, within 3e-16. A table has the nearest of 256
// angles, and the rest is at most a 512th of a turn, so that a few terms of the series are enough.
class Turn {
 public:
  struct CosSin {
    double cos, sin;
  };

  static CosSin Of(uint64_t angle) {
    const uint64_t nearest = (angle + (uint64_t{1} << 55)) >> 56;
    // The conversion is to the nearest, of a number of either sign.
    const double r = static_cast<double>(static_cast<int64_t>(angle - (nearest << 56))) * kUnit;
    const double s = r * r;
    const double cos = 1 + s * (-1. / 2 + s * (1. / 24 + s * (-1. / 720 + s * (1. / 40320))));
    const double sin = r * (1 + s * (-1. / 6 + s * (1. / 120 + s * (-1. / 5040))));
    const CosSin& at = Table()[nearest & 255];
    return {at.cos * cos - at.sin * sin, at.sin * cos + at.cos * sin};
  }

 private:
  static constexpr double kUnit = 6.283185307179586476925 / 18446744073709551616.0;

  static const std::array<CosSin, 256>& Table() {
    static const std::array<CosSin, 256> table = [] {
      std::array<CosSin, 256> entries{};
      for (int i = 0; i < 256; ++i) {
        const double angle = i * (6.283185307179586476925 / 256);
        entries[i] = {std::cos(angle), std::sin(angle)};
      }
      return entries;
    }();
    return table;
  }
};

// Writes the cosines and then the sines of the angles of each of a step's `each` rows. An angle is
// the row's number times its entry of `turns`, in 2^-64 of a turn. Unsigned products wrap around,
// which drops whole turns: this is exact for rows of any number.
template <typename T>
std::unique_ptr<Instruction> MakeRotaryAngles(std::vector<int64_t> turns, int output,
                                              int64_t each) {
  const int64_t size = turns.size();
  return MakeSteps(each * size * 12, [=, turns = std::move(turns)](const Frame& frame, const char*,
                                                                   int64_t position, int64_t r) {
    T* y = frame.Rows<T>(output) + r * each * 2 * size;
    const uint64_t first = static_cast<uint64_t>(position) * static_cast<uint64_t>(each);
    for (int64_t row = 0; row < each; ++row, y += 2 * size) {
      for (int64_t i = 0; i < size; ++i) {
        const auto turn = Turn::Of((first + row) * static_cast<uint64_t>(turns[i]));
        y[i] = static_cast<T>(turn.cos);
        y[size + i] = static_cast<T>(turn.sin);
      }
    }
  });
}

// Turns the first `pairs` pairs of each head by the angles. Pair i is elements 2 i and 2 i + 1 if
// `interleaved`, otherwise i and i + pairs. Each of a step's `each` rows has `heads` heads.
template <typename T>
std::unique_ptr<Instruction> MakeRotary(bool interleaved, int input, int angles, int output,
                                        int64_t each, int64_t heads, int64_t size, int64_t pairs) {
  const int64_t stride = interleaved ? 2 : 1, apart = interleaved ? 1 : pairs;
  return MakeRows(each * heads * (size + 4), [=](const Frame& frame) {
    const T* x = frame.Rows<T>(input);
    T* y = frame.Rows<T>(output);
    for (int64_t r = 0; r < frame.rows() * each; ++r) {
      const T* cos = frame.Rows<T>(angles) + r * 2 * pairs;
      const T* sin = cos + pairs;
      for (int64_t h = 0; h < heads; ++h, x += size, y += size) {
        for (int64_t i = 0; i < pairs; ++i) {
          const T a = x[i * stride], b = x[i * stride + apart];
          y[i * stride] = a * cos[i] - b * sin[i];
          y[i * stride + apart] = b * cos[i] + a * sin[i];
        }
        std::copy(x + 2 * pairs, x + size, y + 2 * pairs);
      }
    }
  });
}

}  // namespace continual_transformers

#endif  // CONTINUAL_TRANSFORMERS_SESSION_ROTARY_INSTRUCTIONS_H_
