#include "cc/tensorflow/co_si_mha_step_shapes.h"

namespace continual_transformers {

using absl::Status;
using tensorflow::shape_inference::InferenceContext;
using tensorflow::shape_inference::ShapeHandle;

CoSiMhaStepDims::CoSiMhaStepDims(InferenceContext* c)
    : rows(c->UnknownDim()),
      streams(c->UnknownDim()),
      heads(c->UnknownDim()),
      window(c->UnknownDim()),
      key_dim(c->UnknownDim()),
      value_dim(c->UnknownDim()),
      output_features(c->UnknownShape()) {}

Status CoSiMhaStepDims::MergeVariables(InferenceContext* c, const OpShapes& shapes,
                                       const CoSiMhaStepOptions& options, Dim* query_features,
                                       Dim* key_features, Dim* value_features) {
  using Options = CoSiMhaStepOptions;
  const auto merge = [&](int i, const Axes& axes) {
    return shapes.MergeVariable("variables", axes, i);
  };
  Axes key_ring, value_ring;
  TF_RETURN_IF_ERROR(shapes.RingAxes({&streams, &window, &heads, &key_dim}, &key_ring));
  TF_RETURN_IF_ERROR(shapes.RingAxes({&streams, &window, &heads, &value_dim}, &value_ring));
  TF_RETURN_IF_ERROR(merge(Options::kKeyCache, key_ring));
  TF_RETURN_IF_ERROR(merge(Options::kValueCache, value_ring));
  TF_RETURN_IF_ERROR(merge(Options::kKeyMaskCache, {&streams, &window}));
  TF_RETURN_IF_ERROR(merge(Options::kPosition, {&streams}));

  Dim delay = c->UnknownDim();
  if (options.use_delay) {
    TF_RETURN_IF_ERROR(
        merge(options.ring(Options::kQueryRing), {&streams, &delay, &heads, &key_dim}));
    TF_RETURN_IF_ERROR(merge(options.ring(Options::kQueryMaskRing), {&streams, &delay}));
    if (options.use_gate) {
      TF_RETURN_IF_ERROR(
          merge(options.ring(Options::kGateRing), {&streams, &delay, &heads, &value_dim}));
    }
  }

  const auto merge_layer = [&](Options::Layer layer, Dim* features, Dim* size) {
    TF_RETURN_IF_ERROR(merge(options.kernel(layer), {features, &heads, size}));
    return options.use_bias ? merge(options.bias(layer), {&heads, size}) : absl::OkStatus();
  };
  TF_RETURN_IF_ERROR(merge_layer(Options::kQueryLayer, query_features, &key_dim));
  TF_RETURN_IF_ERROR(merge_layer(Options::kKeyLayer, key_features, &key_dim));
  TF_RETURN_IF_ERROR(merge_layer(Options::kValueLayer, value_features, &value_dim));
  if (options.use_gate) {
    TF_RETURN_IF_ERROR(merge_layer(Options::kGateLayer, query_features, &value_dim));
  }

  // The output's kernel, [H, Dv, ...].
  ShapeHandle kernel = shapes.Variable("variables", options.kernel(options.output_layer()));
  TF_RETURN_IF_ERROR(c->WithRankAtLeast(kernel, 2, &kernel));
  if (c->RankKnown(kernel)) {
    TF_RETURN_IF_ERROR(c->Merge(heads, c->Dim(kernel, 0), &heads));
    TF_RETURN_IF_ERROR(c->Merge(value_dim, c->Dim(kernel, 1), &value_dim));
    TF_RETURN_IF_ERROR(c->Subshape(kernel, 2, &output_features));
  }
  if (!options.use_bias) return absl::OkStatus();
  const ShapeHandle bias = shapes.Variable("variables", options.bias(options.output_layer()));
  return c->Merge(output_features, bias, &output_features);
}

}  // namespace continual_transformers
