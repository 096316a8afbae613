// The ops as TensorFlow's graphs see them: names, types, documentation and shape functions.

#include <cstdint>
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

// The shape of the variable behind a resource input; unknown where the graph does not know it.
ShapeHandle VariableShape(InferenceContext* c, int input) {
  const auto* shapes_and_types = c->input_handle_shapes_and_types(input);
  if (shapes_and_types == nullptr || shapes_and_types->empty()) return c->UnknownShape();
  return (*shapes_and_types)[0].shape;
}

// An optional input, which is a list of at most one: its shape, of this rank; or none, and the
// shape is unknown.
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
  for (ShapeHandle cache : {key_cache, value_cache}) {
    TF_RETURN_IF_ERROR(c->Merge(s, c->Dim(cache, 0), &s));
    TF_RETURN_IF_ERROR(c->Merge(h, c->Dim(cache, 1), &h));
    TF_RETURN_IF_ERROR(c->Merge(n, c->Dim(cache, 2), &n));
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
  DimensionHandle before = c->MakeDim(0);  // How many steps before this call are returned.
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
    // A tensor and not an attribute: attributes hold float32, too coarse for float64's bound.
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
    .SetIsStateful()
    .SetShapeFn(SingleOutputAttentionShape)
    .Doc(R"doc(
Takes T steps of M streams: continual single-output attention (arXiv 2201.06268).

Step t of a stream attends to the N newest steps that end with it: those of this call and, from the
caches, those before. The caches are rings, changed in place: step number p of a stream is row
p mod N. Only then do the streams' positions advance by T. While fewer than N steps were taken, a
step attends to those there are.

T is what is computed in. C is what keys and values come and are kept in: T, or under float bfloat16
or half.

query: [M, T, H, D].
key: [M, T, H, D].
value: [M, T, H, Dv].
key_cache: A variable of type C, [S, H, N, D].
value_cache: A variable of type C, [S, H, N, Dv].
key_mask_cache: A variable of type bool, [S, N]: which steps have a key.
position: A variable of type int64, [S]: the steps each stream has taken.
streams: [M]. Which stream each row belongs to; distinct, each in [0, S).
scale: What the logits, query . key, are multiplied by; usually 1 / sqrt(D).
attention_mask: None, or one of shape [M, H, T, N], each of the first three axes may be 1. Column
  N - 1 is the newest step; where false, the step is not attended to.
key_mask: None, or one of shape [M, T]. Where false, the step has no key: its stream advances, but
  the step is attended to neither now nor later.
output: [M, T, H, Dv]. Zeros where every column is masked.
attention_scores: [M, H, T, N], the softmax, column N - 1 the newest step and 0 where there is no
  step yet; [M, H, T, 0] without return_attention_scores.
steps_taken: [M], the steps that each of these streams has taken, this call's among them, as they
  are after a real call. A window is full from N on.
window_key: [M, H, N - 1, D], the keys of the steps before this call, oldest first, zeros where there
  was none: what the gradient needs, and this call may overwrite. [M, H, 0, D] without return_window.
window_value: [M, H, N - 1, Dv], likewise.
window_key_mask: [M, N - 1], likewise.
update_state: If false, the outputs are those of a real call, but the caches and positions stay.
)doc");

}  // namespace
}  // namespace continual_transformers
