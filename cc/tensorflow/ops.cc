// The ops for TensorFlow's graphs: names, types, documentation and shape functions.

#include <cstdint>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "tensorflow/core/framework/op.h"
#include "tensorflow/core/framework/shape_inference.h"

namespace continual_transformers {
namespace {

using absl::Status;
using tensorflow::shape_inference::DimensionHandle;
using tensorflow::shape_inference::InferenceContext;
using tensorflow::shape_inference::ShapeHandle;

// Returns the shape of the variable behind a resource input, or an unknown shape.
ShapeHandle VariableShape(InferenceContext* c, int input) {
  const auto* shapes_and_types = c->input_handle_shapes_and_types(input);
  if (shapes_and_types == nullptr || shapes_and_types->empty()) return c->UnknownShape();
  return (*shapes_and_types)[0].shape;
}

// The axes of the window and of the heads in a ring.
struct RingAxes {
  int window = 2, heads = 1;
};

Status ReadRingAxes(InferenceContext* c, RingAxes* axes) {
  bool sequence_first;
  TF_RETURN_IF_ERROR(c->GetAttr("sequence_first", &sequence_first));
  if (sequence_first) *axes = {1, 2};
  return absl::OkStatus();
}

// Reads an optional input, a list of at most one tensor: sets *given, and its shape with the given
// rank. The shape stays unchanged if the input is absent.
Status OptionalInput(InferenceContext* c, const char* name, int rank, ShapeHandle* shape,
                     bool* given) {
  std::vector<ShapeHandle> shapes;
  TF_RETURN_IF_ERROR(c->input(name, &shapes));
  if (shapes.size() > 1) {
    return absl::InvalidArgumentError(
        absl::StrCat("expected at most one ", name, ", but got ", shapes.size()));
  }
  *given = !shapes.empty();
  return *given ? c->WithRank(shapes[0], rank, shape) : absl::OkStatus();
}

Status SingleOutputAttentionShape(InferenceContext* c) {
  ShapeHandle query, key, value, key_cache, value_cache, key_mask_cache, position, streams, unused;
  TF_RETURN_IF_ERROR(c->WithRank(c->input(0), 4, &query));
  TF_RETURN_IF_ERROR(c->WithRank(c->input(1), 4, &key));
  TF_RETURN_IF_ERROR(c->WithRank(c->input(2), 4, &value));
  TF_RETURN_IF_ERROR(c->WithRank(VariableShape(c, 3), 4, &key_cache));
  TF_RETURN_IF_ERROR(c->WithRank(VariableShape(c, 4), 4, &value_cache));
  TF_RETURN_IF_ERROR(c->WithRank(VariableShape(c, 5), 2, &key_mask_cache));
  TF_RETURN_IF_ERROR(c->WithRank(VariableShape(c, 6), 1, &position));
  TF_RETURN_IF_ERROR(c->WithRank(c->input(7), 1, &streams));
  TF_RETURN_IF_ERROR(c->WithRank(c->input(8), 0, &unused));

  DimensionHandle m = c->Dim(query, 0), t = c->Dim(query, 1), h = c->Dim(query, 2);
  DimensionHandle d = c->Dim(query, 3), dv = c->Dim(value, 3);
  DimensionHandle s = c->Dim(position, 0), n = c->Dim(key_mask_cache, 1);
  for (ShapeHandle input : {key, value}) {
    TF_RETURN_IF_ERROR(c->Merge(m, c->Dim(input, 0), &m));
    TF_RETURN_IF_ERROR(c->Merge(t, c->Dim(input, 1), &t));
    TF_RETURN_IF_ERROR(c->Merge(h, c->Dim(input, 2), &h));
  }
  RingAxes axes;
  TF_RETURN_IF_ERROR(ReadRingAxes(c, &axes));
  for (ShapeHandle cache : {key_cache, value_cache}) {
    TF_RETURN_IF_ERROR(c->Merge(s, c->Dim(cache, 0), &s));
    TF_RETURN_IF_ERROR(c->Merge(h, c->Dim(cache, axes.heads), &h));
    TF_RETURN_IF_ERROR(c->Merge(n, c->Dim(cache, axes.window), &n));
  }
  TF_RETURN_IF_ERROR(c->Merge(s, c->Dim(key_mask_cache, 0), &s));
  TF_RETURN_IF_ERROR(c->Merge(m, c->Dim(streams, 0), &m));
  TF_RETURN_IF_ERROR(c->Merge(d, c->Dim(key, 3), &d));
  TF_RETURN_IF_ERROR(c->Merge(d, c->Dim(key_cache, 3), &d));
  TF_RETURN_IF_ERROR(c->Merge(dv, c->Dim(value_cache, 3), &dv));
  if (c->ValueKnown(t) && c->Value(t) < 1) {
    return absl::InvalidArgumentError(
        absl::StrCat("expected at least one step, query [M, T, H, D] with T >= 1, but got ",
                     c->DebugString(query)));
  }

  bool given;
  ShapeHandle mask, key_mask;
  TF_RETURN_IF_ERROR(OptionalInput(c, "attention_mask", 4, &mask, &given));
  if (given) {
    TF_RETURN_IF_ERROR(c->Merge(n, c->Dim(mask, 3), &n));
    const DimensionHandle broadcast_to[] = {m, h, t};
    for (int axis = 0; axis < 3; ++axis) {
      const DimensionHandle dim = c->Dim(mask, axis);
      if (c->ValueKnown(dim) && c->Value(dim) == 1) continue;
      DimensionHandle merged;
      TF_RETURN_IF_ERROR(c->Merge(dim, broadcast_to[axis], &merged));
    }
  }
  TF_RETURN_IF_ERROR(OptionalInput(c, "key_mask", 2, &key_mask, &given));
  if (given) {
    TF_RETURN_IF_ERROR(c->Merge(m, c->Dim(key_mask, 0), &m));
    TF_RETURN_IF_ERROR(c->Merge(t, c->Dim(key_mask, 1), &t));
  }

  bool return_attention_scores, return_window;
  TF_RETURN_IF_ERROR(c->GetAttr("return_attention_scores", &return_attention_scores));
  TF_RETURN_IF_ERROR(c->GetAttr("return_window", &return_window));
  c->set_output(0, c->MakeShape({m, t, h, dv}));
  c->set_output(1, c->MakeShape({m, h, t, return_attention_scores ? n : c->MakeDim(0)}));
  c->set_output(2, c->Vector(m));
  DimensionHandle before = c->MakeDim(0);  // steps before this call that are returned
  if (return_window) TF_RETURN_IF_ERROR(c->Subtract(n, 1, &before));
  c->set_output(3, c->MakeShape({m, h, before, d}));
  c->set_output(4, c->MakeShape({m, h, before, dv}));
  c->set_output(5, c->MakeShape({m, before}));
  return absl::OkStatus();
}

REGISTER_OP("ContinualTransformers>SingleOutputAttention")
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
    .SetShapeFn(SingleOutputAttentionShape)
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
advance_position: If false, the caches change and the positions do not: whoever shares them among
  several ops advances them when all have succeeded.
sequence_first: Whether the rings of queries, keys and values are [S, N, H, D], as above. If false,
  they are [S, H, N, D], as in graphs that were saved before this attribute existed.
)doc");

Status RetroactiveAttentionShape(InferenceContext* c) {
  ShapeHandle query, key, value, streams, unused, key_mask;
  TF_RETURN_IF_ERROR(c->WithRank(c->input(0), 4, &query));
  TF_RETURN_IF_ERROR(c->WithRank(c->input(1), 4, &key));
  TF_RETURN_IF_ERROR(c->WithRank(c->input(2), 4, &value));
  TF_RETURN_IF_ERROR(c->WithRank(c->input(11), 1, &streams));
  TF_RETURN_IF_ERROR(c->WithRank(c->input(12), 0, &unused));
  DimensionHandle m = c->Dim(query, 0), t = c->Dim(query, 1), h = c->Dim(query, 2);
  DimensionHandle d = c->Dim(query, 3), dv = c->Dim(value, 3);
  DimensionHandle s = c->UnknownDim(), n = c->UnknownDim();
  for (ShapeHandle input : {key, value}) {
    TF_RETURN_IF_ERROR(c->Merge(m, c->Dim(input, 0), &m));
    TF_RETURN_IF_ERROR(c->Merge(t, c->Dim(input, 1), &t));
    TF_RETURN_IF_ERROR(c->Merge(h, c->Dim(input, 2), &h));
  }
  TF_RETURN_IF_ERROR(c->Merge(d, c->Dim(key, 3), &d));
  TF_RETURN_IF_ERROR(c->Merge(m, c->Dim(streams, 0), &m));

  // The variables from input 3 on. Null marks an axis of a fixed size.
  const DimensionHandle two = c->MakeDim(2), four = c->MakeDim(4);
  std::vector<DimensionHandle*> axes[] = {
      {&s, &h, &n, &d}, {&s, &h, &n, &dv},     {&s, &n},          {&s},
      {&s, &h, &n, &d}, {&s, &h, nullptr, &n}, {&s, &h, &n, &dv}, {&s, nullptr}};
  bool sequence_first;
  TF_RETURN_IF_ERROR(c->GetAttr("sequence_first", &sequence_first));
  for (int ring : {0, 1, 4}) {
    if (sequence_first) std::swap(axes[ring][1], axes[ring][2]);
  }
  for (int i = 0; i < 8; ++i) {
    ShapeHandle variable;
    const int rank = axes[i].size();
    TF_RETURN_IF_ERROR(c->WithRank(VariableShape(c, 3 + i), rank, &variable));
    for (int axis = 0; axis < rank; ++axis) {
      DimensionHandle fixed = rank == 4 ? four : two;
      DimensionHandle* expected = axes[i][axis] == nullptr ? &fixed : axes[i][axis];
      TF_RETURN_IF_ERROR(c->Merge(*expected, c->Dim(variable, axis), expected));
    }
  }
  if (c->ValueKnown(t) && c->Value(t) < 1) {
    return absl::InvalidArgumentError(
        absl::StrCat("expected at least one step, query [M, T, H, D] with T >= 1, but got ",
                     c->DebugString(query)));
  }
  bool given;
  TF_RETURN_IF_ERROR(OptionalInput(c, "key_mask", 2, &key_mask, &given));
  if (given) {
    TF_RETURN_IF_ERROR(c->Merge(m, c->Dim(key_mask, 0), &m));
    TF_RETURN_IF_ERROR(c->Merge(t, c->Dim(key_mask, 1), &t));
  }
  c->set_output(0, c->MakeShape({m, t, h, n, dv}));
  c->set_output(1, c->Vector(m));
  return absl::OkStatus();
}

REGISTER_OP("ContinualTransformers>RetroactiveAttention")
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
    .SetShapeFn(RetroactiveAttentionShape)
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
advance_position: If false, the caches change and the positions do not: whoever shares them among
  several ops advances them when all have succeeded.
sequence_first: Whether the rings of queries, keys and values are [S, N, H, D], as above. If false,
  they are [S, H, N, D], as in graphs that were saved before this attribute existed.
)doc");

// The kernel checks everything else.
Status CoSiMultiHeadAttentionStepShape(InferenceContext* c) {
  const auto expect_rank = [c](const char* name, int rank) {
    std::vector<ShapeHandle> inputs;
    TF_RETURN_IF_ERROR(c->input(name, &inputs));
    for (ShapeHandle& input : inputs) TF_RETURN_IF_ERROR(c->WithRank(input, rank, &input));
    return absl::OkStatus();
  };
  for (const char* name : {"query", "value", "key"}) TF_RETURN_IF_ERROR(expect_rank(name, 2));
  for (const char* name : {"streams", "query_mask", "key_mask"}) {
    TF_RETURN_IF_ERROR(expect_rank(name, 1));
  }
  TF_RETURN_IF_ERROR(expect_rank("attention_mask", 4));

  // What the variables' shapes say, if the graph knows them.
  int values, keys, variables, scores, first_step;
  bool use_bias;
  TF_RETURN_IF_ERROR(c->GetAttr("num_values", &values));
  TF_RETURN_IF_ERROR(c->GetAttr("num_keys", &keys));
  TF_RETURN_IF_ERROR(c->GetAttr("num_variables", &variables));
  TF_RETURN_IF_ERROR(c->GetAttr("num_scores", &scores));
  TF_RETURN_IF_ERROR(c->GetAttr("first_step", &first_step));
  TF_RETURN_IF_ERROR(c->GetAttr("use_bias", &use_bias));
  const auto shape_of_variable = [&](int i) {
    const auto* shapes = c->input_handle_shapes_and_types(1 + values + keys + i);
    return shapes == nullptr || shapes->empty() ? c->UnknownShape() : (*shapes)[0].shape;
  };
  const DimensionHandle m = first_step > 0 ? c->UnknownDim() : c->Dim(c->input(0), 0);
  ShapeHandle cache = c->UnknownShapeOfRank(4), result = c->UnknownShape();
  TF_RETURN_IF_ERROR(c->WithRank(shape_of_variable(0), 4, &cache));
  const int of_kernel = variables - (use_bias ? 2 : 1);
  const ShapeHandle kernel = of_kernel < 0 ? c->UnknownShape() : shape_of_variable(of_kernel);
  if (c->RankKnown(kernel) && c->Rank(kernel) >= 2) {
    ShapeHandle features;
    TF_RETURN_IF_ERROR(c->Subshape(kernel, 2, &features));
    TF_RETURN_IF_ERROR(c->Concatenate(c->Vector(m), features, &result));
  }
  c->set_output(0, result);
  RingAxes axes;
  TF_RETURN_IF_ERROR(ReadRingAxes(c, &axes));
  if (scores == 1) {
    c->set_output(1, c->MakeShape({m, c->Dim(cache, axes.heads), c->Dim(cache, axes.window)}));
  }
  return absl::OkStatus();
}

REGISTER_OP("ContinualTransformers>CoSiMultiHeadAttentionStep")
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
    .SetShapeFn(CoSiMultiHeadAttentionStepShape)
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
advance_position: If false, the rings change and the positions do not: whoever shares them among
  several ops advances them when all have succeeded.
sequence_first: Whether the rings of queries, keys and values are [S, N, H, D], as above. If false,
  they are [S, H, N, D], as in graphs that were saved before this attribute existed.
)doc");

Status CoSiTransformerEncoderStepShape(InferenceContext* c) {
  ShapeHandle x, unused;
  TF_RETURN_IF_ERROR(c->WithRank(c->input(0), 2, &x));
  std::vector<ShapeHandle> streams;
  TF_RETURN_IF_ERROR(c->input("streams", &streams));
  for (const ShapeHandle& shape : streams) TF_RETURN_IF_ERROR(c->WithRank(shape, 1, &unused));
  int first_step;
  TF_RETURN_IF_ERROR(c->GetAttr("first_step", &first_step));
  const DimensionHandle m = first_step > 0 ? c->UnknownDim() : c->Dim(x, 0);
  c->set_output(0, c->Matrix(m, c->Dim(x, 1)));
  return absl::OkStatus();
}

REGISTER_OP("ContinualTransformers>CoSiTransformerEncoderStep")
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
    .SetShapeFn(CoSiTransformerEncoderStepShape)
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
advance_position: If false, the rings change and the positions do not: whoever shares them among
  several ops advances them when all have succeeded.
sequence_first: Whether the rings of queries, keys and values are [S, N, H, D], as above. If false,
  they are [S, H, N, D], as in graphs that were saved before this attribute existed.
)doc");

// The second input of the ops on a session: the streams, int32 [M].
Status StreamsOfSession(InferenceContext* c, ShapeHandle* streams) {
  ShapeHandle unused;
  TF_RETURN_IF_ERROR(c->WithRank(c->input(0), 0, &unused));
  return c->WithRank(c->input(1), 1, streams);
}

// One output element per stream.
Status OnePerStreamShape(InferenceContext* c) {
  ShapeHandle streams;
  TF_RETURN_IF_ERROR(StreamsOfSession(c, &streams));
  if (c->num_inputs() > 2) TF_RETURN_IF_ERROR(c->Merge(streams, c->input(2), &streams));
  c->set_output(0, streams);
  return absl::OkStatus();
}

Status ScalarsShape(InferenceContext* c) {
  ShapeHandle unused;
  for (int i = 0; i < c->num_inputs(); ++i) {
    TF_RETURN_IF_ERROR(c->WithRank(c->input(i), 0, &unused));
  }
  for (int i = 0; i < c->num_outputs(); ++i) c->set_output(i, c->Scalar());
  return absl::OkStatus();
}

Status SessionStepShape(InferenceContext* c) {
  ShapeHandle streams;
  TF_RETURN_IF_ERROR(StreamsOfSession(c, &streams));
  DimensionHandle m = c->Dim(streams, 0);
  std::vector<ShapeHandle> inputs;
  TF_RETURN_IF_ERROR(c->input("inputs", &inputs));
  for (ShapeHandle input : inputs) {
    TF_RETURN_IF_ERROR(c->WithRankAtLeast(input, 1, &input));
    TF_RETURN_IF_ERROR(c->Merge(m, c->Dim(input, 0), &m));
  }
  std::vector<tensorflow::DataType> types;
  std::vector<tensorflow::PartialTensorShape> shapes;
  TF_RETURN_IF_ERROR(c->GetAttr("output_types", &types));
  TF_RETURN_IF_ERROR(c->GetAttr("output_shapes", &shapes));
  if (types.size() != shapes.size()) {
    return absl::InvalidArgumentError(
        absl::StrCat("expected one of output_shapes for each output, ", types.size(), ", but got ",
                     shapes.size()));
  }
  for (size_t i = 0; i < shapes.size(); ++i) {
    ShapeHandle output;
    TF_RETURN_IF_ERROR(c->MakeShapeFromPartialTensorShape(shapes[i], &output));
    TF_RETURN_IF_ERROR(c->Concatenate(c->Vector(m), output, &output));
    c->set_output(i, output);
  }
  c->set_output(shapes.size(), c->Vector(m));
  return absl::OkStatus();
}

REGISTER_OP("ContinualTransformers>SessionHandle")
    .Output("session: resource")
    .Attr("container: string = ''")
    .Attr("shared_name: string = ''")
    .SetIsStateful()
    .SetShapeFn(ScalarsShape)
    .Doc(R"doc(
Makes a session without a model, or finds an existing session.

session: A handle of the session, which lives until it is released and its last handle is gone.
container: The container of TensorFlow's resources that holds it; '': the default one.
shared_name: Its name in the container; '': no other op can find it.
)doc");

REGISTER_OP("ContinualTransformers>ReleaseSession")
    .Attr("container: string = ''")
    .Attr("shared_name: string")
    .SetIsStateful()
    .SetShapeFn(ScalarsShape)
    .Doc(R"doc(
Releases a session: its name is free, and it ends with its last handle. Does nothing if no session
has this name.

container, shared_name: As in SessionHandle.
)doc");

REGISTER_OP("ContinualTransformers>InitializeSession")
    .Input("session: resource")
    .Input("model_file: string")
    .Input("states: string")
    .Attr("streams: int >= 0")
    .SetIsStateful()
    .SetShapeFn(ScalarsShape)
    .Doc(R"doc(
Loads a session's model and opens its streams. Does nothing if the session already has a model.

session: A session.
model_file: The path of a model file; see docs/model_file.md. It is mapped into memory and must not
  change while the session lives.
states: The path of a file with the states of streams 0, 1, ..., one after another, each in the
  format of SessionGetState; '': all streams are clean.
streams: The number of streams to open.
)doc");

REGISTER_OP("ContinualTransformers>SessionStep")
    .Input("session: resource")
    .Input("streams: int32")
    .Input("inputs: input_types")
    .Output("outputs: output_types")
    .Output("ready: bool")
    .Attr("input_types: list({float, double, int32, int64, bool}) >= 1")
    .Attr("output_types: list({float, double, int32, int64, bool}) >= 1")
    .Attr("output_shapes: list(shape) >= 1")
    .SetIsStateful()
    .SetShapeFn(SessionStepShape)
    .Doc(R"doc(
Takes one step of M streams through a whole model.

session: A session that has a model.
streams: [M]. The stream of each row; distinct, each in [0, S), where S streams are held.
inputs: [M, ...], the model's inputs in the model's order.
outputs: [M, ...], the model's outputs in the model's order.
ready: [M]. Whether the stream's receptive field is full, including this step.
output_shapes: The shape of each output for one stream, without M.
)doc");

REGISTER_OP("ContinualTransformers>SessionClean")
    .Input("session: resource")
    .Input("streams: int32")
    .Output("position: int64")
    .SetIsStateful()
    .SetShapeFn(OnePerStreamShape)
    .Doc(R"doc(
Resets streams: they begin again.

session: A session that has a model.
streams: [M]. Distinct, each in [0, S), where S streams are held.
position: [M]. The steps that each stream has taken afterwards: zeros.
)doc");

REGISTER_OP("ContinualTransformers>SessionEnsureStreams")
    .Input("session: resource")
    .Input("count: int32")
    .Output("held: int32")
    .SetIsStateful()
    .SetShapeFn(ScalarsShape)
    .Doc(R"doc(
Makes room for streams 0, ..., count - 1. Existing streams keep their state.

session: A session that has a model.
count: The number of streams needed.
held: The number of streams held afterwards.
)doc");

REGISTER_OP("ContinualTransformers>SessionGetState")
    .Input("session: resource")
    .Input("streams: int32")
    .Output("states: string")
    .SetIsStateful()
    .SetShapeFn(OnePerStreamShape)
    .Doc(R"doc(
Copies the states of streams.

session: A session that has a model.
streams: [M], each in [0, S), where S streams are held.
states: [M]. Copies in the format of continual_transformers_tf.Session.get_state. Each has the
  fingerprints of its model and its weights.
)doc");

REGISTER_OP("ContinualTransformers>SessionSetState")
    .Input("session: resource")
    .Input("streams: int32")
    .Input("states: string")
    .Output("position: int64")
    .Attr("other_weights: bool = false")
    .SetIsStateful()
    .SetShapeFn(OnePerStreamShape)
    .Doc(R"doc(
Restores copies of states into streams, all or none. The streams continue from there.

session: A session that has a model.
streams: [M]. Distinct, each in [0, S), where S streams are held.
states: [M], copies from SessionGetState, of the same model.
position: [M]. The steps that each stream has taken afterwards.
other_weights: Whether to accept copies of the same model with other weights.
)doc");

}  // namespace
}  // namespace continual_transformers
