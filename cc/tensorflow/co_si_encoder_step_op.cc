// CoSiTransformerEncoderStep: its signature, documentation and shape function.

#include "absl/status/status.h"
#include "cc/tensorflow/co_si_mha_step_options.h"
#include "cc/tensorflow/co_si_mha_step_shapes.h"
#include "cc/tensorflow/op_shapes.h"
#include "tensorflow/core/framework/op.h"
#include "tensorflow/core/framework/shape_inference.h"

namespace continual_transformers {
namespace {

using absl::Status;
using tensorflow::shape_inference::DimensionHandle;
using tensorflow::shape_inference::InferenceContext;

constexpr char kOp[] = "ContinualTransformers>CoSiTransformerEncoderStep";

Status Shape(InferenceContext* c) {
  OpShapes shapes(c);
  TF_RETURN_IF_ERROR(shapes.Find(kOp));
  CoSiMhaStepOptions options;
  TF_RETURN_IF_ERROR(options.Read(c));
  CoSiMhaStepDims dims(c);
  DimensionHandle e = c->UnknownDim(), f = c->UnknownDim();
  TF_RETURN_IF_ERROR(shapes.Merge("x", {&dims.rows, &e}));
  TF_RETURN_IF_ERROR(dims.MergeVariables(c, shapes, options, &e, &e, &e));
  TF_RETURN_IF_ERROR(c->Merge(dims.output_features, c->Vector(e), &dims.output_features));
  e = c->Dim(dims.output_features, 0);
  const auto merge = [&](CoSiEncoderStepWeight weight, const Axes& axes) {
    return shapes.MergeVariable("variables", axes, options.variables() + weight);
  };
  TF_RETURN_IF_ERROR(merge(kAttentionNormScale, {&e}));
  TF_RETURN_IF_ERROR(merge(kAttentionNormOffset, {&e}));
  TF_RETURN_IF_ERROR(merge(kHiddenKernel, {&e, &f}));
  TF_RETURN_IF_ERROR(merge(kHiddenBias, {&f}));
  TF_RETURN_IF_ERROR(merge(kOutputKernel, {&f, &e}));
  TF_RETURN_IF_ERROR(merge(kOutputBias, {&e}));
  TF_RETURN_IF_ERROR(merge(kOutputNormScale, {&e}));
  TF_RETURN_IF_ERROR(merge(kOutputNormOffset, {&e}));
  TF_RETURN_IF_ERROR(shapes.MergeOptional("streams", {&dims.rows}));
  const DimensionHandle rows = options.first_step > 0 ? c->UnknownDim() : dims.rows;
  return shapes.SetOutput("result", c->Matrix(rows, e));
}

REGISTER_OP(kOp)
    .Input("x: T")
    .Input("variables: num_variables * resource")
    .Input("streams: num_streams * int32")
    .Output("result: T")
    .Attr("T: {float, double}")
    .Attr("num_variables: int >= 1")
    .Attr("num_streams: int >= 0 = 0")
    .Attr("use_bias: bool = true")
    .Attr("norm_first: bool = false")
    .Attr("activation: {'linear', 'gelu', 'relu'} = 'gelu'")
    // A float64 in two parts, because attributes hold float32, too coarse for float64's bound.
    .Attr("epsilon: float = 1e-6")
    .Attr("epsilon_low: float = 0")
    .Attr("first_step: int >= 0 = 0")
    .Attr("update_state: bool = true")
    .Attr("advance_position: bool = true")
    .Attr("sequence_first: bool = false")
    .SetIsStateful()
    .SetShapeFn(Shape)
    .Doc(R"doc(
Takes one step of M streams through a transformer encoder block: the attention of
CoSiMultiHeadAttentionStep, residual, layer norm, two dense layers, residual, layer norm.

x: [M, E].
variables: In this order:
  those of CoSiMultiHeadAttentionStep, without gate and delay;
  scale and offset, [E], of the layer norm of the attention;
  kernel and bias of the hidden layer, [E, F] and [F], and of the output, [F, E] and [E];
  scale and offset, [E], of the layer norm of the output.
streams: None (row i is stream i), or one of shape [M]: the stream of each row; distinct, each in
  [0, S).
result: [M, E]; no rows before first_step.
use_bias: Whether the attention's layers have biases.
norm_first: If true, the norms apply to the inputs of the attention and of the dense layers. If
  false, they apply to the residual sums.
activation: The activation of the hidden layer.
epsilon, epsilon_low: The layer norms add the sum of both to the variance.
first_step: The first step with outputs, as in CoSiMultiHeadAttentionStep.
update_state: If false, the outputs are the same, but the state does not change.
advance_position: If false, the rings change but the positions do not. A caller that shares the
  positions among several ops advances them after all ops have succeeded.
sequence_first: Whether the rings of queries, keys and values are [S, N, H, D], as above. If false,
  they are [S, H, N, D], as in graphs that were saved before this attribute existed.
)doc");

}  // namespace
}  // namespace continual_transformers
