// CoSiMultiHeadAttentionStep: its signature, documentation and shape function.

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
using tensorflow::shape_inference::ShapeHandle;

constexpr char kOp[] = "ContinualTransformers>CoSiMultiHeadAttentionStep";

Status Shape(InferenceContext* c) {
  OpShapes shapes(c);
  TF_RETURN_IF_ERROR(shapes.Find(kOp));
  CoSiMhaStepOptions options;
  TF_RETURN_IF_ERROR(options.ReadAll(c));
  CoSiMhaStepDims dims(c);
  DimensionHandle *m = &dims.rows, one = c->MakeDim(1);
  DimensionHandle query = c->UnknownDim(), value = c->UnknownDim(), key = c->UnknownDim();
  // A value that is not given is the query, and a key that is not given is the value.
  DimensionHandle* const value_features = shapes.Has("value") ? &value : &query;
  DimensionHandle* const key_features = shapes.Has("key") ? &key : value_features;
  TF_RETURN_IF_ERROR(shapes.Merge("query", {m, &query}));
  TF_RETURN_IF_ERROR(shapes.MergeOptional("value", {m, value_features}));
  TF_RETURN_IF_ERROR(shapes.MergeOptional("key", {m, key_features}));
  TF_RETURN_IF_ERROR(dims.MergeVariables(c, shapes, options, &query, key_features, value_features));
  TF_RETURN_IF_ERROR(shapes.MergeOptional("streams", {m}));
  TF_RETURN_IF_ERROR(shapes.MergeOptional("query_mask", {m}));
  TF_RETURN_IF_ERROR(shapes.MergeOptional("key_mask", {m}));
  TF_RETURN_IF_ERROR(
      shapes.MergeOptionalMask("attention_mask", {m, &dims.heads, &one, &dims.window}));

  const DimensionHandle rows = options.first_step > 0 ? c->UnknownDim() : *m;
  ShapeHandle result;
  TF_RETURN_IF_ERROR(c->Concatenate(c->Vector(rows), dims.output_features, &result));
  TF_RETURN_IF_ERROR(shapes.SetOutput("result", result));
  if (!options.return_attention_scores) return absl::OkStatus();
  return shapes.SetOutput("attention_scores", c->MakeShape({rows, dims.heads, dims.window}));
}

REGISTER_OP(kOp)
    .Input("query: T")
    .Input("value: num_values * T")
    .Input("key: num_keys * T")
    .Input("variables: num_variables * resource")
    .Input("streams: num_streams * int32")
    .Input("attention_mask: num_attention_masks * bool")
    .Input("query_mask: num_query_masks * bool")
    .Input("key_mask: num_key_masks * bool")
    .Output("result: T")
    .Output("attention_scores: num_scores * T")
    .Attr("T: {float, double}")
    .Attr("num_values: int >= 0 = 0")
    .Attr("num_keys: int >= 0 = 0")
    .Attr("num_variables: int >= 1")
    .Attr("num_streams: int >= 0 = 0")
    .Attr("num_attention_masks: int >= 0 = 0")
    .Attr("num_query_masks: int >= 0 = 0")
    .Attr("num_key_masks: int >= 0 = 0")
    .Attr("num_scores: int >= 0 = 0")
    .Attr("use_bias: bool = true")
    .Attr("use_gate: bool = false")
    .Attr("use_delay: bool = false")
    .Attr("first_step: int >= 0 = 0")
    .Attr("update_state: bool = true")
    .Attr("advance_position: bool = true")
    .Attr("sequence_first: bool = false")
    .SetIsStateful()
    .SetShapeFn(Shape)
    .Doc(R"doc(
Takes one step of M streams through a whole multi-head attention layer: input projections, continual
single-output attention (arXiv 2201.06268) with logits query . key / sqrt(D), output projection.

query: [M, E].
value: None (the query is used), or one of shape [M, Ev].
key: None (the value is used), or one of shape [M, Ek].
variables: In this order:
  the rings, key [S, N, H, D] and value [S, N, H, Dv], of type T, or with float also bfloat16 or
  half;
  bool [S, N], which steps have a key; int64 [S], the steps each stream has taken;
  with use_delay, the queries that wait: [S, delay, H, D] of type T, their masks, bool [S, delay],
  and with use_gate their gates, [S, delay, H, Dv] of type T. The query of `delay` steps before
  attends now, and row p mod delay holds the query of step p until then;
  the kernel, and with use_bias the bias, of the layers for query, key, value, with use_gate gate,
  and output. Kernels are [features, H, D or Dv], the output's [H, Dv, ...], of type T, or with
  float all of bfloat16. Biases are of type T.
streams: None (row i is stream i), or one of shape [M]: the stream of each row; distinct, each in
  [0, S).
attention_mask: None, or one of shape [M, H, 1, N]; the first two axes may be 1. Column N - 1 is the
  newest step. If false, the query does not attend to that step.
query_mask: None, or one of shape [M]. If false, the query attends to nothing.
key_mask: None, or one of shape [M]. If false, the step has no key: its stream advances, but no
  query attends to the step, now or later.
result: [M, ...], the output's features; no rows before first_step.
attention_scores: With num_scores = 1, the softmax, [M, H, N]; no rows before first_step.
first_step: The first step with outputs. While no stream of the call has taken this many steps,
  including this one, the op only updates the state.
use_gate: Whether the attention output is multiplied by the sigmoid of a dense layer of the query.
update_state: If false, the outputs are the same, but the state does not change.
advance_position: If false, the rings change but the positions do not. A caller that shares the
  positions among several ops advances them after all ops have succeeded.
sequence_first: Whether the rings of queries, keys and values are [S, N, H, D], as above. If false,
  they are [S, H, N, D], as in graphs that were saved before this attribute existed.
)doc");

}  // namespace
}  // namespace continual_transformers
