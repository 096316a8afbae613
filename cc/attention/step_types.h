// The types that kernels, steps and launchers are instantiated for, listed once. T is the compute
// type, C the type of cached keys and values, W the type of the kernels of dense layers.
//
// Each macro calls X once for each entry of its list. X can be an explicit instantiation, a
// registration, or a case of a dispatch from runtime types.

#ifndef CONTINUAL_TRANSFORMERS_ATTENTION_STEP_TYPES_H_
#define CONTINUAL_TRANSFORMERS_ATTENTION_STEP_TYPES_H_

#include <cstdint>

#include "cc/attention/half.h"

// The caches that go with a compute type. What follows X is passed on to it.
#define CONTINUAL_TRANSFORMERS_FLOAT_CACHES(X, ...) \
  X(float, float __VA_OPT__(, ) __VA_ARGS__)        \
  X(float, BFloat16 __VA_OPT__(, ) __VA_ARGS__)     \
  X(float, Float16 __VA_OPT__(, ) __VA_ARGS__)
#define CONTINUAL_TRANSFORMERS_DOUBLE_CACHES(X, ...) X(double, double __VA_OPT__(, ) __VA_ARGS__)

// X(T)
#define CONTINUAL_TRANSFORMERS_FOR_COMPUTE_TYPES(X) X(float) X(double)

// X(T, C): attention.
#define CONTINUAL_TRANSFORMERS_FOR_CACHE_TYPES(X) \
  CONTINUAL_TRANSFORMERS_FLOAT_CACHES(X)          \
  CONTINUAL_TRANSFORMERS_DOUBLE_CACHES(X)

// X(T, C): attention over a session's rings, which may also be int8 with a scale for each row.
#define CONTINUAL_TRANSFORMERS_FOR_RING_TYPES(X) \
  CONTINUAL_TRANSFORMERS_FOR_CACHE_TYPES(X)      \
  X(float, int8_t)

// X(T, W): dense layers.
#define CONTINUAL_TRANSFORMERS_FOR_WEIGHT_TYPES(X) \
  X(float, float) X(float, BFloat16) X(double, double)

// X(T, W): dense layers with packed kernels, which may also be int8 with a scale for each column.
#define CONTINUAL_TRANSFORMERS_FOR_PACKED_TYPES(X) \
  CONTINUAL_TRANSFORMERS_FOR_WEIGHT_TYPES(X)       \
  X(float, int8_t)

// X(T, C, W): the steps of layers with both, for each of these caches and weights.
#define CONTINUAL_TRANSFORMERS_FOR_STEP_TYPES(X)   \
  CONTINUAL_TRANSFORMERS_FLOAT_CACHES(X, float)    \
  CONTINUAL_TRANSFORMERS_FLOAT_CACHES(X, BFloat16) \
  CONTINUAL_TRANSFORMERS_DOUBLE_CACHES(X, double)

#endif  // CONTINUAL_TRANSFORMERS_ATTENTION_STEP_TYPES_H_
