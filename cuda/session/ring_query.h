// Attention of queries over the rings of M streams; ring_query.cuh computes it.

#ifndef CONTINUAL_TRANSFORMERS_CUDA_SESSION_RING_QUERY_H_
#define CONTINUAL_TRANSFORMERS_CUDA_SESSION_RING_QUERY_H_

#include <cstdint>

#include "cuda/session/node_kernels.h"

namespace continual_transformers {

struct RingQueryParams {
  char* const* blocks;
  const int64_t* positions;
  const bool* key_mask;  // [M], the caller's
  const float *query, *key, *value;
  const bool *node_key_mask, *node_query_mask;  // [M, rows]; null: all true
  float* output;
  int64_t row;  // of each step; a launch takes one
  int window_parts;
  float* parts;        // [M, H, window_parts, Dv + 2]; see PartsMerger
  uint32_t* arrivals;  // [M, H], zeros
  DeviceAttention s;
  bool prefetch;
};

}  // namespace continual_transformers

#endif  // CONTINUAL_TRANSFORMERS_CUDA_SESSION_RING_QUERY_H_
