// SingleOutputAttention: its signature, documentation and shape function.

#include "absl/status/status.h"
#include "cc/tensorflow/op_shapes.h"
#include "tensorflow/core/framework/op.h"
#include "tensorflow/core/framework/shape_inference.h"

namespace continual_transformers {
namespace {

using absl::Status;
using tensorflow::shape_inference::DimensionHandle;
using tensorflow::shape_inference::InferenceContext;

constexpr char kOp[] = "ContinualTransformers>SingleOutputAttention";

Status Shape(InferenceContext* c) {
  OpShapes shapes(c);
  TF_RETURN_IF_ERROR(shapes.Find(kOp));
  DimensionHandle m = c->UnknownDim(), t = c->UnknownDim(), h = c->UnknownDim();
  DimensionHandle d = c->UnknownDim(), dv = c->UnknownDim();
  DimensionHandle s = c->UnknownDim(), n = c->UnknownDim();
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
  TF_RETURN_IF_ERROR(shapes.Merge("streams", {&m}));
  TF_RETURN_IF_ERROR(shapes.Merge("scale", {}));
  TF_RETURN_IF_ERROR(shapes.MergeOptional("key_mask", {&m, &t}));
  TF_RETURN_IF_ERROR(shapes.MergeOptionalMask("attention_mask", {&m, &h, &t, &n}));
  TF_RETURN_IF_ERROR(shapes.ExpectSteps(t));

  bool return_attention_scores, return_window;
  TF_RETURN_IF_ERROR(c->GetAttr("return_attention_scores", &return_attention_scores));
  TF_RETURN_IF_ERROR(c->GetAttr("return_window", &return_window));
  const DimensionHandle none = c->MakeDim(0), columns = return_attention_scores ? n : none;
  DimensionHandle before = none;  // the steps before this call that are returned
  if (return_window) TF_RETURN_IF_ERROR(c->Subtract(n, 1, &before));
  TF_RETURN_IF_ERROR(shapes.SetOutput("output", c->MakeShape({m, t, h, dv})));
  TF_RETURN_IF_ERROR(shapes.SetOutput("attention_scores", c->MakeShape({m, h, t, columns})));
  TF_RETURN_IF_ERROR(shapes.SetOutput("steps_taken", c->Vector(m)));
  TF_RETURN_IF_ERROR(shapes.SetOutput("window_key", c->MakeShape({m, h, before, d})));
  TF_RETURN_IF_ERROR(shapes.SetOutput("window_value", c->MakeShape({m, h, before, dv})));
  return shapes.SetOutput("window_key_mask", c->MakeShape({m, before}));
}

REGISTER_OP(kOp)
    .Input("query: T")
    .Input("key: C")
    .Input("value: C")
    .Input("key_cache: resource")
    .Input("value_cache: resource")
    .Input("key_mask_cache: resource")
    .Input("position: resource")
    .Input("streams: int32")
    // A tensor, because attributes hold float32, too coarse for float64's bound.
    .Input("scale: double")
    .Input("attention_mask: num_attention_masks * bool")
    .Input("key_mask: num_key_masks * bool")
    .Output("output: T")
    .Output("attention_scores: T")
    .Output("steps_taken: int64")
    .Output("window_key: C")
    .Output("window_value: C")
    .Output("window_key_mask: bool")
    .Attr("T: {float, double}")
    .Attr("C: {float, double, bfloat16, half}")
    .Attr("num_attention_masks: int >= 0 = 0")
    .Attr("num_key_masks: int >= 0 = 0")
    .Attr("return_attention_scores: bool = false")
    .Attr("return_window: bool = false")
    .Attr("update_state: bool = true")
    .Attr("advance_position: bool = true")
    .Attr("sequence_first: bool = false")
    .SetIsStateful()
    .SetShapeFn(Shape)
    .Doc(R"doc(
Takes T steps of M streams: continual single-output attention (arXiv 2201.06268).

Step t of a stream attends to itself and the N - 1 steps before it. Steps of this call come from the
inputs, and earlier ones from the caches. The caches are rings that the op changes in place: step p
of a stream is in row p mod N. Then the op advances the streams' positions by T. While a stream has
taken fewer than N steps, a step attends to those that exist.

T is the compute type. C is the type of keys and values, in the inputs and in the caches. C is T, or
with float also bfloat16 or half.

query: [M, T, H, D].
key: [M, T, H, D].
value: [M, T, H, Dv].
key_cache: A variable of type C, [S, N, H, D].
value_cache: A variable of type C, [S, N, H, Dv].
key_mask_cache: A variable of type bool, [S, N]: which steps have a key.
position: A variable of type int64, [S]: the steps each stream has taken.
streams: [M]. The stream of each row; distinct, each in [0, S).
scale: Multiplies the logits, query . key; usually 1 / sqrt(D).
attention_mask: None, or one of shape [M, H, T, N]; each of the first three axes may be 1. Column
  N - 1 is the newest step. If false, the query does not attend to that step.
key_mask: None, or one of shape [M, T]. If false, the step has no key: its stream advances, but no
  query attends to the step, now or later.
output: [M, T, H, Dv]. Zeros if every column is masked.
attention_scores: [M, H, T, N], the softmax. Column N - 1 is the newest step. Columns of steps that
  do not exist yet are 0. [M, H, T, 0] without return_attention_scores.
steps_taken: [M], the number of steps that each of these streams has taken, including this call's,
  also if update_state is false. A window is full from N on.
window_key: [M, H, N - 1, D], the keys of the steps before this call, oldest first. Zeros for steps
  that do not exist. The gradient needs them, and this call may overwrite them in the cache.
  [M, H, 0, D] without return_window.
window_value: [M, H, N - 1, Dv], likewise.
window_key_mask: [M, N - 1], likewise.
update_state: If false, the outputs are the same, but the caches and positions do not change.
advance_position: If false, the caches change but the positions do not. A caller that shares the
  positions among several ops advances them after all ops have succeeded.
sequence_first: Whether the rings of queries, keys and values are [S, N, H, D], as above. If false,
  they are [S, H, N, D], as in graphs that were saved before this attribute existed.
)doc");

}  // namespace
}  // namespace continual_transformers
