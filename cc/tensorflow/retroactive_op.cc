// RetroactiveAttention: its signature, documentation and shape function.

#include "absl/status/status.h"
#include "cc/tensorflow/op_shapes.h"
#include "tensorflow/core/framework/op.h"
#include "tensorflow/core/framework/shape_inference.h"

namespace continual_transformers {
namespace {

using absl::Status;
using tensorflow::shape_inference::DimensionHandle;
using tensorflow::shape_inference::InferenceContext;

constexpr char kOp[] = "ContinualTransformers>RetroactiveAttention";

Status Shape(InferenceContext* c) {
  OpShapes shapes(c);
  TF_RETURN_IF_ERROR(shapes.Find(kOp));
  DimensionHandle m = c->UnknownDim(), t = c->UnknownDim(), h = c->UnknownDim();
  DimensionHandle d = c->UnknownDim(), dv = c->UnknownDim();
  DimensionHandle s = c->UnknownDim(), n = c->UnknownDim();
  DimensionHandle two = c->MakeDim(2), four = c->MakeDim(4);
  Axes key_ring, value_ring;
  TF_RETURN_IF_ERROR(shapes.RingAxes({&s, &n, &h, &d}, &key_ring));
  TF_RETURN_IF_ERROR(shapes.RingAxes({&s, &n, &h, &dv}, &value_ring));
  TF_RETURN_IF_ERROR(shapes.Merge("query", {&m, &t, &h, &d}));
  TF_RETURN_IF_ERROR(shapes.Merge("key", {&m, &t, &h, &d}));
  TF_RETURN_IF_ERROR(shapes.Merge("value", {&m, &t, &h, &dv}));
  TF_RETURN_IF_ERROR(shapes.MergeVariable("key_cache", key_ring));
  TF_RETURN_IF_ERROR(shapes.MergeVariable("value_cache", value_ring));
  TF_RETURN_IF_ERROR(shapes.MergeVariable("key_mask_cache", {&s, &n}));
  TF_RETURN_IF_ERROR(shapes.MergeVariable("position", {&s}));
  TF_RETURN_IF_ERROR(shapes.MergeVariable("query_cache", key_ring));
  TF_RETURN_IF_ERROR(shapes.MergeVariable("softmax", {&s, &h, &four, &n}));
  TF_RETURN_IF_ERROR(shapes.MergeVariable("weighted_sum", {&s, &h, &n, &dv}));
  TF_RETURN_IF_ERROR(shapes.MergeVariable("made_with", {&s, &two}));
  TF_RETURN_IF_ERROR(shapes.Merge("streams", {&m}));
  TF_RETURN_IF_ERROR(shapes.Merge("scale", {}));
  TF_RETURN_IF_ERROR(shapes.MergeOptional("key_mask", {&m, &t}));
  TF_RETURN_IF_ERROR(shapes.ExpectSteps(t));
  TF_RETURN_IF_ERROR(shapes.SetOutput("output", c->MakeShape({m, t, h, n, dv})));
  return shapes.SetOutput("steps_taken", c->Vector(m));
}

REGISTER_OP(kOp)
    .Input("query: T")
    .Input("key: T")
    .Input("value: T")
    .Input("key_cache: resource")
    .Input("value_cache: resource")
    .Input("key_mask_cache: resource")
    .Input("position: resource")
    .Input("query_cache: resource")
    .Input("softmax: resource")
    .Input("weighted_sum: resource")
    .Input("made_with: resource")
    .Input("streams: int32")
    .Input("scale: double")
    .Input("key_mask: num_key_masks * bool")
    .Output("output: T")
    .Output("steps_taken: int64")
    .Attr("T: {float, double}")
    .Attr("num_key_masks: int >= 0 = 0")
    .Attr("algorithm: {'auto', 'update', 'recompute'} = 'auto'")
    .Attr("update_state: bool = true")
    .Attr("advance_position: bool = true")
    .Attr("sequence_first: bool = false")
    .SetIsStateful()
    .SetShapeFn(Shape)
    .Doc(R"doc(
Takes T steps of M streams: continual retroactive attention (arXiv 2201.06268).

At step t of a stream, the queries of this step and the N - 1 steps before it all attend to these N
steps. The caches are rings that the op changes in place: step p of a stream is in row p mod N. Then
the op advances the streams' positions by T. While a stream has taken fewer than N steps, those that
exist attend to each other.

query: [M, T, H, D].
key: [M, T, H, D].
value: [M, T, H, Dv].
key_cache: A variable of type T, [S, N, H, D].
value_cache: A variable of type T, [S, N, H, Dv].
key_mask_cache: A variable of type bool, [S, N]: which steps have a key.
position: A variable of type int64, [S]: the steps each stream has taken.
query_cache: A variable of type T, [S, N, H, D].
softmax: A variable of type double, [S, H, 4, N]. For each row of the window: what is subtracted
  from its logits, its denominator, and the largest denominator and the largest magnitude of a sum
  of values since the row was last computed exactly.
weighted_sum: A variable of type double, [S, H, N, Dv], each row's sum of values.
made_with: A variable of type double, [S, 2]: the arithmetic that computed the rows' weights, and
  their scale. Rows made with another arithmetic or scale than this call's are recomputed. 0: the
  rows have no softmax state.
streams: [M]. The stream of each row; distinct, each in [0, S).
scale: Multiplies the logits, query . key; usually 1 / sqrt(D).
key_mask: None, or one of shape [M, T]. If false, the step has no key: no query attends to it, now
  or later, but its own query attends.
output: [M, T, H, N, Dv], the outputs of the N queries. Row N - 1 is the newest step's. Zeros for
  steps that were never taken, and if no step has a key.
steps_taken: [M], the number of steps that each of these streams has taken, including this call's,
  also if update_state is false. A window is full from N on.
algorithm: "update" adds the new key to each row and subtracts the oldest; "recompute" recomputes
  every row; "auto" picks the faster one for these sizes.
update_state: If false, the outputs are the same, but the caches and positions do not change.
advance_position: If false, the caches change but the positions do not. A caller that shares the
  positions among several ops advances them after all ops have succeeded.
sequence_first: Whether the rings of queries, keys and values are [S, N, H, D], as above. If false,
  they are [S, H, N, D], as in graphs that were saved before this attribute existed.
)doc");

}  // namespace
}  // namespace continual_transformers
