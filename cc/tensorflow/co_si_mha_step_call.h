// A call of CoSiMultiHeadAttentionStep or CoSiTransformerEncoderStep, on any device: check
// everything, allocate, call, and only then let the streams' positions advance. Whatever fails,
// fails before any state has changed.

#ifndef CONTINUAL_TRANSFORMERS_TENSORFLOW_CO_SI_MHA_STEP_CALL_H_
#define CONTINUAL_TRANSFORMERS_TENSORFLOW_CO_SI_MHA_STEP_CALL_H_

#include <cstdint>
#include <optional>

#include "absl/container/inlined_vector.h"
#include "absl/status/status.h"
#include "cc/attention/co_si_encoder_step.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "tensorflow/core/framework/resource_var.h"
#include "tensorflow/core/framework/tensor.h"

namespace continual_transformers {

// What of an encoder there is round the attention.
struct CoSiEncoderOptions {
  bool norm_first;
  Activation activation;
  double epsilon;  // Of the layer norms.

  static constexpr int kVariables = 8;
};

// The op's attributes: which variables there are, and what is wanted.
struct CoSiMhaStepOptions {
  bool use_bias, use_gate, use_delay, return_attention_scores, update_state, advance_position;
  bool sequence_first;
  int64_t first_step;
  std::optional<CoSiEncoderOptions> encoder;

  int rings() const { return use_delay ? (use_gate ? 3 : 2) : 0; }
  int weights_per_layer() const { return use_bias ? 2 : 1; }
  int layers() const { return use_gate ? 5 : 4; }
  int attention_weights() const { return layers() * weights_per_layer(); }
  int variables() const {
    return kCache + rings() + attention_weights() +
           (encoder.has_value() ? CoSiEncoderOptions::kVariables : 0);
  }

  static constexpr int kCache = 4;
};

// Null where left out, which query is not.
struct CoSiMhaStepInputs {
  const tensorflow::Tensor *query, *value, *key, *streams, *attention_mask, *query_mask, *key_mask;
};

using Variables = absl::InlinedVector<tensorflow::core::RefCountPtr<tensorflow::Var>, 16>;

// What the ops are given: attributes, variables, and the other inputs.
absl::Status ReadCoSiMhaStepOptions(tensorflow::OpKernelConstruction* ctx,
                                    CoSiMhaStepOptions* options);
absl::Status ReadCoSiMhaStepInputs(tensorflow::OpKernelContext* ctx, CoSiMhaStepInputs* inputs);
absl::Status ReadCoSiEncoderStepOptions(tensorflow::OpKernelConstruction* ctx,
                                        CoSiMhaStepOptions* options);
absl::Status ReadCoSiEncoderStepInputs(tensorflow::OpKernelContext* ctx, CoSiMhaStepInputs* inputs);
absl::Status ReadVariables(tensorflow::OpKernelContext* ctx, Variables* variables);

}  // namespace continual_transformers

#endif  // CONTINUAL_TRANSFORMERS_TENSORFLOW_CO_SI_MHA_STEP_CALL_H_
