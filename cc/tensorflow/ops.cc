// The ops as TensorFlow's graphs see them: names, types, documentation and shape functions.

#include <cstdint>

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

constexpr int kKeyCache = 3;
constexpr int kValueCache = 4;
constexpr int kPosition = 5;

// The shape of the variable behind a resource input; unknown where the graph does not know it.
ShapeHandle VariableShape(InferenceContext* c, int input) {
  const auto* shapes_and_types = c->input_handle_shapes_and_types(input);
  if (shapes_and_types == nullptr || shapes_and_types->empty()) return c->UnknownShape();
  return (*shapes_and_types)[0].shape;
}

Status SingleOutputAttentionShape(InferenceContext* c) {
  ShapeHandle query, key, value, key_cache, value_cache, position, streams, unused;
  TF_RETURN_IF_ERROR(c->WithRank(c->input(0), 4, &query));
  TF_RETURN_IF_ERROR(c->WithRank(c->input(1), 4, &key));
  TF_RETURN_IF_ERROR(c->WithRank(c->input(2), 4, &value));
  TF_RETURN_IF_ERROR(c->WithRank(VariableShape(c, kKeyCache), 4, &key_cache));
  TF_RETURN_IF_ERROR(c->WithRank(VariableShape(c, kValueCache), 4, &value_cache));
  TF_RETURN_IF_ERROR(c->WithRank(VariableShape(c, kPosition), 1, &position));
  TF_RETURN_IF_ERROR(c->WithRank(c->input(6), 1, &streams));
  TF_RETURN_IF_ERROR(c->WithRank(c->input(7), 0, &unused));

  DimensionHandle m = c->Dim(query, 0), t = c->Dim(query, 1), h = c->Dim(query, 2);
  DimensionHandle d = c->Dim(query, 3), dv = c->Dim(value, 3);
  DimensionHandle s = c->Dim(position, 0), n = c->Dim(key_cache, 2);
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
  TF_RETURN_IF_ERROR(c->Merge(m, c->Dim(streams, 0), &m));
  TF_RETURN_IF_ERROR(c->Merge(d, c->Dim(key, 3), &d));
  TF_RETURN_IF_ERROR(c->Merge(d, c->Dim(key_cache, 3), &d));
  TF_RETURN_IF_ERROR(c->Merge(dv, c->Dim(value_cache, 3), &dv));
  if (c->ValueKnown(t) && c->Value(t) < 1) {
    return absl::InvalidArgumentError(
        absl::StrCat("expected at least one step, query [M, T, H, D] with T >= 1, but got ",
                     c->DebugString(query)));
  }

  int32_t num_masks;
  TF_RETURN_IF_ERROR(c->GetAttr("num_masks", &num_masks));
  if (num_masks > 1) {
    return absl::InvalidArgumentError(
        absl::StrCat("expected at most one attention_mask, but got ", num_masks));
  }
  if (num_masks == 1) {
    ShapeHandle mask;
    TF_RETURN_IF_ERROR(c->WithRank(c->input(8), 4, &mask));
    TF_RETURN_IF_ERROR(c->Merge(n, c->Dim(mask, 3), &n));
    const DimensionHandle broadcast_to[] = {m, h, t};
    for (int axis = 0; axis < 3; ++axis) {
      const DimensionHandle dim = c->Dim(mask, axis);
      if (c->ValueKnown(dim) && c->Value(dim) == 1) continue;
      DimensionHandle merged;
      TF_RETURN_IF_ERROR(c->Merge(dim, broadcast_to[axis], &merged));
    }
  }

  bool return_attention_scores;
  TF_RETURN_IF_ERROR(c->GetAttr("return_attention_scores", &return_attention_scores));
  c->set_output(0, c->MakeShape({m, t, h, dv}));
  c->set_output(1, c->MakeShape({m, h, t, return_attention_scores ? n : c->MakeDim(0)}));
  c->set_output(2, c->Vector(m));
  return absl::OkStatus();
}

REGISTER_OP("ContinualTransformers>SingleOutputAttention")
    .Input("query: T")
    .Input("key: T")
    .Input("value: T")
    .Input("key_cache: resource")
    .Input("value_cache: resource")
    .Input("position: resource")
    .Input("streams: int32")
    // A tensor and not an attribute: attributes hold float32, too coarse for float64's bound.
    .Input("scale: double")
    .Input("attention_mask: num_masks * bool")
    .Output("output: T")
    .Output("attention_scores: T")
    .Output("steps_taken: int64")
    .Attr("T: {float, double}")
    .Attr("num_masks: int >= 0 = 0")
    .Attr("return_attention_scores: bool = false")
    .Attr("update_state: bool = true")
    .SetIsStateful()
    .SetShapeFn(SingleOutputAttentionShape)
    .Doc(R"doc(
Takes T steps of M streams: continual single-output attention (arXiv 2201.06268).

Step t of a stream attends to the N newest steps that end with it: those of this call and, from the
caches, those before. The caches are rings, changed in place: step number p of a stream is row
p mod N. Only then do the streams' positions advance by T. While fewer than N steps were taken, a
step attends to those there are.

query: [M, T, H, D].
key: [M, T, H, D].
value: [M, T, H, Dv].
key_cache: A variable of type T, [S, H, N, D].
value_cache: A variable of type T, [S, H, N, Dv].
position: A variable of type int64, [S]: the steps each stream has taken.
streams: [M]. Which stream each row belongs to; distinct, each in [0, S).
scale: What the logits, query . key, are multiplied by; usually 1 / sqrt(D).
attention_mask: None, or one of shape [M, H, T, N], each of the first three axes may be 1. Column
  N - 1 is the newest step; where false, the step is not attended to.
output: [M, T, H, Dv]. Zeros where every column is masked.
attention_scores: [M, H, T, N], the softmax, column N - 1 the newest step and 0 where there is no
  step yet; [M, H, T, 0] without return_attention_scores.
steps_taken: [M], the steps that each of these streams has taken, this call's among them, as they
  are after a real call. A window is full from N on.
update_state: If false, the outputs are those of a real call, but the caches and positions stay.
)doc");

}  // namespace
}  // namespace continual_transformers
