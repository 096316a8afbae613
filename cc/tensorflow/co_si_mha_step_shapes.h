// The dimensions of a step of a multi-head attention layer, for the shape functions of
// CoSiMultiHeadAttentionStep and CoSiTransformerEncoderStep.

#ifndef CONTINUAL_TRANSFORMERS_TENSORFLOW_CO_SI_MHA_STEP_SHAPES_H_
#define CONTINUAL_TRANSFORMERS_TENSORFLOW_CO_SI_MHA_STEP_SHAPES_H_

#include "absl/status/status.h"
#include "cc/tensorflow/co_si_mha_step_options.h"
#include "cc/tensorflow/op_shapes.h"
#include "tensorflow/core/framework/shape_inference.h"

namespace continual_transformers {

struct CoSiMhaStepDims {
  using Dim = tensorflow::shape_inference::DimensionHandle;

  explicit CoSiMhaStepDims(tensorflow::shape_inference::InferenceContext* c);

  // Merges the variables with these dimensions. The features of two inputs may be the same
  // dimension: an input that is not given is another input.
  absl::Status MergeVariables(tensorflow::shape_inference::InferenceContext* c,
                              const OpShapes& shapes, const CoSiMhaStepOptions& options,
                              Dim* query_features, Dim* key_features, Dim* value_features);

  Dim rows, streams, heads, window, key_dim, value_dim;
  tensorflow::shape_inference::ShapeHandle output_features;
};

}  // namespace continual_transformers

#endif  // CONTINUAL_TRANSFORMERS_TENSORFLOW_CO_SI_MHA_STEP_SHAPES_H_
