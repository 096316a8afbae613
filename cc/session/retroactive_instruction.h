// Retroactive attention in a plan: one output per query of a stream's window.

#ifndef CONTINUAL_TRANSFORMERS_SESSION_RETROACTIVE_INSTRUCTION_H_
#define CONTINUAL_TRANSFORMERS_SESSION_RETROACTIVE_INSTRUCTION_H_

#include <cstdint>
#include <string>

#include "cc/attention/params.h"
#include "cc/attention/retroactive.h"
#include "cc/session/attention_instructions.h"
#include "cc/session/instruction.h"

namespace continual_transformers {

// Plan values, sizes, and byte offsets in the stream block.
struct RetroactiveSpec {
  int query, key, value, output;
  int key_mask = -1;  // a plan value, bool [1]; -1: none
  int64_t heads, window, key_dim, value_dim;
  double scale;
  std::string algorithm;  // "auto", "update" or "recompute"
  int64_t query_ring, key_ring, value_ring, softmax, weighted_sum, made_with, mask_ring;
};

template <typename T>
class RetroactiveInstruction : public Instruction {
 public:
  explicit RetroactiveInstruction(const RetroactiveSpec& spec) : s_(spec), p_{} {
    const int64_t key_size = spec.heads * spec.key_dim, value_size = spec.heads * spec.value_dim;
    p_.num_streams = 1;
    p_.num_steps = 1;
    p_.num_heads = spec.heads;
    p_.window = spec.window;
    p_.key_dim = spec.key_dim;
    p_.value_dim = spec.value_dim;
    p_.scale = static_cast<T>(spec.scale);
    p_.update_state = true;
    p_.query_strides = p_.key_strides = {key_size, key_size, spec.key_dim};
    p_.value_strides = {value_size, value_size, spec.value_dim};
    p_.output_strides = {spec.window * value_size, spec.window * value_size, spec.value_dim};
    p_.output_row_stride = value_size;
    p_.query_cache_strides = p_.key_cache_strides =
        RowMajorRing(spec.heads, spec.window, spec.key_dim);
    p_.value_cache_strides = RowMajorRing(spec.heads, spec.window, spec.value_dim);
    p_.recompute =
        spec.algorithm == "recompute" || (spec.algorithm == "auto" && RecomputingIsFaster(p_));
  }

  void Run(const Frame& frame) const override {
    for (int64_t m = 0; m < frame.streams; ++m) {
      for (int64_t t = 0; t < frame.steps; ++t) Step(frame, m, t);
    }
  }

  int64_t Cycles(int64_t rows) const override {
    return rows * s_.heads * RetroactiveCyclesPerTask(p_);
  }

  // Threads may work on several heads at the same time, so each head has its own part.
  int64_t ScratchBytes() const override { return s_.heads * RetroactiveScratchBytes(p_); }

 private:
  void Step(const Frame& frame, int64_t m, int64_t t) const {
    static constexpr int32_t kStream = 0;
    const int64_t r = m * frame.steps + t, position = frame.Position(m, t);
    char* block = frame.blocks[m];
    const bool has_key = HasKey(frame, s_.key_mask, r, r);
    RetroactiveParams<T> p = p_;
    p.query = frame.Rows<T>(s_.query) + r * p.query_strides.stream;
    p.key = frame.Rows<T>(s_.key) + r * p.key_strides.stream;
    p.value = frame.Rows<T>(s_.value) + r * p.value_strides.stream;
    p.key_mask = &has_key;
    p.query_cache = reinterpret_cast<T*>(block + s_.query_ring);
    p.key_cache = reinterpret_cast<T*>(block + s_.key_ring);
    p.value_cache = reinterpret_cast<T*>(block + s_.value_ring);
    p.key_mask_cache = reinterpret_cast<bool*>(block + s_.mask_ring);
    p.position = &position;
    p.streams = &kStream;
    p.softmax = reinterpret_cast<double*>(block + s_.softmax);
    p.weighted_sum = reinterpret_cast<double*>(block + s_.weighted_sum);
    p.made_with = reinterpret_cast<double*>(block + s_.made_with);
    p.output = frame.Rows<T>(s_.output) + r * p.output_strides.stream;
    p.scratch = frame.scratch;
    if (frame.pool == nullptr || s_.heads == 1 || Cycles(1) < kCyclesWorthThreads) {
      RetroactiveAttention(p, 0, s_.heads);
    } else {
      frame.pool->Share(s_.heads, [&](int64_t head, int64_t) {
        RetroactiveParams<T> one = p;
        one.scratch += head * RetroactiveScratchBytes(p);
        RetroactiveAttention(one, head, head + 1);
      });
    }
    FinishRetroactive(p);
  }

  const RetroactiveSpec s_;
  RetroactiveParams<T> p_;  // everything that does not change from step to step
};

}  // namespace continual_transformers

#endif  // CONTINUAL_TRANSFORMERS_SESSION_RETROACTIVE_INSTRUCTION_H_
