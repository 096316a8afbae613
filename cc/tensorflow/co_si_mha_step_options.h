// The attributes of CoSiMultiHeadAttentionStep, and the order of its variables. The variables of
// CoSiTransformerEncoderStep begin with these.

#ifndef CONTINUAL_TRANSFORMERS_TENSORFLOW_CO_SI_MHA_STEP_OPTIONS_H_
#define CONTINUAL_TRANSFORMERS_TENSORFLOW_CO_SI_MHA_STEP_OPTIONS_H_

#include <cstdint>

#include "absl/status/status.h"
#include "cc/tensorflow/expect.h"

namespace continual_transformers {

struct CoSiMhaStepOptions {
  bool use_bias, use_gate = false, use_delay = false, return_attention_scores = false;
  bool update_state, advance_position, sequence_first;
  int64_t first_step;

  // Reads the attributes that both ops have. `Context` is that of a kernel's construction or of a
  // shape function.
  template <typename Context>
  absl::Status Read(Context* ctx) {
    TF_RETURN_IF_ERROR(ctx->GetAttr("use_bias", &use_bias));
    TF_RETURN_IF_ERROR(ctx->GetAttr("first_step", &first_step));
    TF_RETURN_IF_ERROR(ctx->GetAttr("update_state", &update_state));
    TF_RETURN_IF_ERROR(ctx->GetAttr("advance_position", &advance_position));
    return ctx->GetAttr("sequence_first", &sequence_first);
  }

  // Also reads those that only CoSiMultiHeadAttentionStep has.
  template <typename Context>
  absl::Status ReadAll(Context* ctx) {
    TF_RETURN_IF_ERROR(Read(ctx));
    TF_RETURN_IF_ERROR(ctx->GetAttr("use_gate", &use_gate));
    TF_RETURN_IF_ERROR(ctx->GetAttr("use_delay", &use_delay));
    int64_t scores;
    TF_RETURN_IF_ERROR(ctx->GetAttr("num_scores", &scores));
    if (scores > 1) return InvalidArgument("expected num_scores 0 or 1, but got ", scores);
    return_attention_scores = scores == 1;
    return absl::OkStatus();
  }

  // The order of the variables: the cache, the rings of a delay, the weights of one layer after the
  // other. A layer has a kernel and with use_bias a bias.
  enum Cache { kKeyCache, kValueCache, kKeyMaskCache, kPosition, kCache };
  enum Ring { kQueryRing, kQueryMaskRing, kGateRing };
  enum Layer { kQueryLayer, kKeyLayer, kValueLayer, kGateLayer };

  int rings() const { return use_delay ? (use_gate ? 3 : 2) : 0; }
  int ring(Ring ring) const { return kCache + ring; }
  int output_layer() const { return use_gate ? kGateLayer + 1 : kGateLayer; }  // the last
  int kernel(int layer) const { return kCache + rings() + layer * (use_bias ? 2 : 1); }
  int bias(int layer) const { return kernel(layer) + 1; }
  int variables() const { return kernel(output_layer() + 1); }
};

// The variables of CoSiTransformerEncoderStep that follow: those of the layers around the
// attention.
enum CoSiEncoderStepWeight {
  kAttentionNormScale,
  kAttentionNormOffset,
  kHiddenKernel,
  kHiddenBias,
  kOutputKernel,
  kOutputBias,
  kOutputNormScale,
  kOutputNormOffset,
  kCoSiEncoderStepWeights
};

}  // namespace continual_transformers

#endif  // CONTINUAL_TRANSFORMERS_TENSORFLOW_CO_SI_MHA_STEP_OPTIONS_H_
