// Nodes that compute each element from the elements at the same place.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <map>
#include <string>
#include <type_traits>

#include "cc/session/plan.h"
#include "cuda/for_each.cuh"
#include "cuda/session/activate.cuh"
#include "cuda/session/node_kernels.h"

namespace continual_transformers {
namespace {

struct ActivateEach {
  const float* x;
  float* y;
  DeviceActivation f;
  __device__ void operator()(int64_t i) const { y[i] = Activate(f, x[i]); }
};

struct PReluEach {
  const float *x, *alpha;
  float* y;
  int64_t size;
  __device__ void operator()(int64_t i) const { y[i] = x[i] < 0 ? alpha[i % size] * x[i] : x[i]; }
};

enum class Binary {
  kAdd,
  kSubtract,
  kMultiply,
  kDivide,
  kMaximum,
  kMinimum,
  kPower,
  kArctan2,
  kEqual,
  kFmod,
  kGreater,
  kGreaterEqual,
  kHypot,
  kLogaddexp,
  kMod,
  kNotEqual,
};

Binary BinaryNamed(const std::string& function) {
  static const std::map<std::string, Binary> functions = {
      {"add", Binary::kAdd},           {"subtract", Binary::kSubtract},
      {"multiply", Binary::kMultiply}, {"divide", Binary::kDivide},
      {"maximum", Binary::kMaximum},   {"minimum", Binary::kMinimum},
      {"power", Binary::kPower},       {"arctan2", Binary::kArctan2},
      {"equal", Binary::kEqual},       {"fmod", Binary::kFmod},
      {"greater", Binary::kGreater},   {"greater_equal", Binary::kGreaterEqual},
      {"hypot", Binary::kHypot},       {"logaddexp", Binary::kLogaddexp},
      {"mod", Binary::kMod},           {"not_equal", Binary::kNotEqual},
  };
  return functions.at(function);
}

struct BinaryEach {
  Binary function;
  const float *a, *b;
  float* y;
  __device__ void operator()(int64_t i) const { y[i] = Of(a[i], b[i]); }

  // See MakeBinary in cc/session/row_instructions.h.
  __device__ float Of(float x, float y) const {
    switch (function) {
      case Binary::kAdd:
        return x + y;
      case Binary::kSubtract:
        return x - y;
      case Binary::kMultiply:
        return x * y;
      case Binary::kDivide:
        return x / y;
      case Binary::kMaximum:
        return x > y || std::isnan(x) ? x : y;
      case Binary::kMinimum:
        return x < y || std::isnan(x) ? x : y;
      case Binary::kPower:
        return std::pow(x, y);
      case Binary::kArctan2:
        return std::atan2(x, y);
      case Binary::kEqual:
        return x == y ? 1.f : 0.f;
      case Binary::kFmod:
        return std::fmod(x, y);
      case Binary::kGreater:
        return x > y ? 1.f : 0.f;
      case Binary::kGreaterEqual:
        return x >= y ? 1.f : 0.f;
      case Binary::kHypot:
        return std::hypot(x, y);
      case Binary::kLogaddexp: {
        const float difference = x - y;
        if (std::isnan(difference)) return x + y;  // two equal infinities, or a NaN
        return (x > y ? x : y) + std::log1p(std::exp(-std::abs(difference)));
      }
      case Binary::kMod: {
        const float rest = std::fmod(x, y);
        return rest != 0 && (rest < 0) != (y < 0) ? rest + y : rest;
      }
      case Binary::kNotEqual:
        return x != y ? 1.f : 0.f;
    }
    return x;
  }
};

struct WhereEach {
  const bool* condition;
  const float *a, *b;
  float* y;
  __device__ void operator()(int64_t i) const { y[i] = condition[i] ? a[i] : b[i]; }
};

struct AffineEach {
  const float *x, *scale, *offset;
  float* y;
  int64_t columns;
  __device__ void operator()(int64_t i) const {
    y[i] = x[i] * scale[i % columns] + offset[i % columns];
  }
};

struct MaskedEach {
  const float* x;
  const bool* mask;
  float* y;
  int64_t size;
  __device__ void operator()(int64_t i) const { y[i] = mask[i / size] ? x[i] : 0.f; }
};

struct MaskAndEach {
  const bool *a, *b;
  bool* y;
  __device__ void operator()(int64_t i) const { y[i] = a[i] && b[i]; }
};

// As C casts, except where C++ leaves it undefined; see MakeCast in cc/session/row_instructions.h.
template <typename From, typename To>
struct CastEach {
  const From* x;
  To* y;
  __device__ void operator()(int64_t i) const {
    if constexpr (std::is_same_v<To, bool>) {
      y[i] = x[i] != From(0);
    } else if constexpr (std::is_floating_point_v<From> && std::is_integral_v<To>) {
      constexpr To kLeast = std::numeric_limits<To>::min();
      const bool fits = x[i] >= static_cast<From>(kLeast) && x[i] < -static_cast<From>(kLeast);
      y[i] = fits ? static_cast<To>(x[i]) : kLeast;
    } else {
      y[i] = static_cast<To>(x[i]);
    }
  }
};

template <typename From>
NodeKernels CastFrom(DType to, int input, int output, int64_t size) {
  const auto node = [=](auto example) -> NodeKernels {
    using To = decltype(example);
    return [=](const DeviceFrame& frame, cudaStream_t stream) {
      return ForEach(frame.streams * size,
                     CastEach<From, To>{frame.Rows<From>(input), frame.Rows<To>(output)},
                     frame.overlap, stream);
    };
  };
  switch (to) {
    case DType::kInt32:
      return node(int32_t{});
    case DType::kInt64:
      return node(int64_t{});
    case DType::kBool:
      return node(bool{});
    default:
      return node(float{});
  }
}

// i is a row.
template <typename T>
struct NotEqualEach {
  const T* x;
  bool* y;
  T number;
  bool has, any;  // has: whether T has the number at all
  int64_t size;
  __device__ void operator()(int64_t i) const {
    int64_t differ = 0;
    for (int64_t j = 0; j < size; ++j) differ += !has || x[i * size + j] != number;
    y[i] = any ? differ > 0 : differ == size;
  }
};

template <typename T>
NodeKernels NotEqualOf(double number, bool any, int input, int output, int64_t size) {
  bool has = true;
  if constexpr (std::is_integral_v<T>) {
    // Converting a number that T does not have is undefined.
    constexpr double kEnd =
        std::is_same_v<T, bool> ? 2 : -2.0 * (std::numeric_limits<T>::min() / 2);
    has = number >= static_cast<double>(std::numeric_limits<T>::min()) && number < kEnd &&
          number == std::floor(number);
  }
  const T as_T = has ? static_cast<T>(number) : T(0);
  return [=](const DeviceFrame& frame, cudaStream_t stream) {
    return ForEach(
        frame.streams,
        NotEqualEach<T>{frame.Rows<T>(input), frame.Rows<bool>(output), as_T, has, any, size},
        frame.overlap, stream);
  };
}

}  // namespace

NodeKernels ActivationNode(const ActivationSpec& spec, int input, int output, int64_t size) {
  const DeviceActivation f(spec);
  return [=](const DeviceFrame& frame, cudaStream_t stream) {
    return ForEach(frame.streams * size,
                   ActivateEach{frame.Rows<float>(input), frame.Rows<float>(output), f},
                   frame.overlap, stream);
  };
}

NodeKernels PReluNode(const float* alpha, int input, int output, int64_t size) {
  return [=](const DeviceFrame& frame, cudaStream_t stream) {
    return ForEach(frame.streams * size,
                   PReluEach{frame.Rows<float>(input), alpha, frame.Rows<float>(output), size},
                   frame.overlap, stream);
  };
}

NodeKernels BinaryNode(const std::string& function, int a, int b, int output, int64_t size) {
  const Binary named = BinaryNamed(function);
  return [=](const DeviceFrame& frame, cudaStream_t stream) {
    return ForEach(
        frame.streams * size,
        BinaryEach{named, frame.Rows<float>(a), frame.Rows<float>(b), frame.Rows<float>(output)},
        frame.overlap, stream);
  };
}

NodeKernels WhereNode(int condition, int a, int b, int output, int64_t size) {
  return [=](const DeviceFrame& frame, cudaStream_t stream) {
    return ForEach(frame.streams * size,
                   WhereEach{frame.Rows<bool>(condition), frame.Rows<float>(a),
                             frame.Rows<float>(b), frame.Rows<float>(output)},
                   frame.overlap, stream);
  };
}

NodeKernels AffineNode(const float* scale, const float* offset, int64_t columns, int input,
                       int output, int64_t size) {
  return [=](const DeviceFrame& frame, cudaStream_t stream) {
    return ForEach(
        frame.streams * size,
        AffineEach{frame.Rows<float>(input), scale, offset, frame.Rows<float>(output), columns},
        frame.overlap, stream);
  };
}

NodeKernels MaskedNode(int input, int mask, int output, int64_t size) {
  return [=](const DeviceFrame& frame, cudaStream_t stream) {
    return ForEach(frame.streams * size,
                   MaskedEach{frame.Rows<float>(input), frame.Rows<bool>(mask),
                              frame.Rows<float>(output), size},
                   frame.overlap, stream);
  };
}

NodeKernels MaskAndNode(int a, int b, int output, int64_t size) {
  return [=](const DeviceFrame& frame, cudaStream_t stream) {
    return ForEach(frame.streams * size,
                   MaskAndEach{frame.Rows<bool>(a), frame.Rows<bool>(b), frame.Rows<bool>(output)},
                   frame.overlap, stream);
  };
}

NodeKernels CastNode(DType from, DType to, int input, int output, int64_t size) {
  switch (from) {
    case DType::kInt32:
      return CastFrom<int32_t>(to, input, output, size);
    case DType::kInt64:
      return CastFrom<int64_t>(to, input, output, size);
    case DType::kBool:
      return CastFrom<bool>(to, input, output, size);
    default:
      return CastFrom<float>(to, input, output, size);
  }
}

NodeKernels NotEqualNode(DType dtype, double number, bool any, int input, int output,
                         int64_t size) {
  switch (dtype) {
    case DType::kInt32:
      return NotEqualOf<int32_t>(number, any, input, output, size);
    case DType::kInt64:
      return NotEqualOf<int64_t>(number, any, input, output, size);
    case DType::kBool:
      return NotEqualOf<bool>(number, any, input, output, size);
    default:
      return NotEqualOf<float>(number, any, input, output, size);
  }
}

}  // namespace continual_transformers
