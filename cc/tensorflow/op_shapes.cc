#include "cc/tensorflow/op_shapes.h"

#include <cstddef>
#include <utility>

#include "cc/tensorflow/expect.h"
#include "tensorflow/core/framework/op.h"
#include "tensorflow/core/framework/op_def.pb.h"
#include "tensorflow/core/framework/types.h"

namespace continual_transformers {

using absl::Status;
using tensorflow::shape_inference::DimensionHandle;
using tensorflow::shape_inference::ShapeHandle;

Status OpShapes::Find(const char* op) {
  const tensorflow::OpDef* def;
  TF_RETURN_IF_ERROR(tensorflow::OpRegistry::Global()->LookUpOpDef(op, &def));
  int begin = 0;
  for (const auto& input : def->input_arg()) {
    int size = 1;
    if (!input.number_attr().empty()) {
      TF_RETURN_IF_ERROR(c_->GetAttr(input.number_attr(), &size));
    } else if (!input.type_list_attr().empty()) {
      std::vector<tensorflow::DataType> types;
      TF_RETURN_IF_ERROR(c_->GetAttr(input.type_list_attr(), &types));
      size = types.size();
    }
    inputs_[input.name()] = {begin, begin + size};
    begin += size;
  }
  return absl::OkStatus();
}

bool OpShapes::Has(const char* name) const {
  const Range& input = inputs_.at(name);
  return input.begin < input.end;
}

Status OpShapes::Merge(const char* name, const Axes& axes) const {
  const Range& input = inputs_.at(name);
  for (int i = input.begin; i < input.end; ++i) TF_RETURN_IF_ERROR(MergeShape(c_->input(i), axes));
  return absl::OkStatus();
}

Status OpShapes::MergeFirst(const char* name, DimensionHandle* axis) const {
  const Range& input = inputs_.at(name);
  for (int i = input.begin; i < input.end; ++i) {
    ShapeHandle shape;
    TF_RETURN_IF_ERROR(c_->WithRankAtLeast(c_->input(i), 1, &shape));
    TF_RETURN_IF_ERROR(c_->Merge(*axis, c_->Dim(shape, 0), axis));
  }
  return absl::OkStatus();
}

Status OpShapes::MergeOptional(const char* name, const Axes& axes) const {
  TF_RETURN_IF_ERROR(ExpectAtMostOne(name));
  return Merge(name, axes);
}

Status OpShapes::MergeOptionalMask(const char* name, const Axes& axes) const {
  TF_RETURN_IF_ERROR(ExpectAtMostOne(name));
  if (!Has(name)) return absl::OkStatus();
  ShapeHandle mask;
  TF_RETURN_IF_ERROR(c_->WithRank(c_->input(inputs_.at(name).begin), axes.size(), &mask));
  for (size_t axis = 0; axis < axes.size(); ++axis) {
    const DimensionHandle dim = c_->Dim(mask, axis);
    const bool is_last = axis + 1 == axes.size();
    // An unknown dimension may turn out to be 1.
    if (!is_last && (!c_->ValueKnown(dim) || c_->Value(dim) == 1)) continue;
    TF_RETURN_IF_ERROR(c_->Merge(*axes[axis], dim, axes[axis]));
  }
  return absl::OkStatus();
}

Status OpShapes::MergeVariable(const char* name, const Axes& axes, int i) const {
  return MergeShape(Variable(name, i), axes);
}

ShapeHandle OpShapes::Variable(const char* name, int i) const {
  const Range& input = inputs_.at(name);
  if (i < 0 || input.begin + i >= input.end) return c_->UnknownShape();
  const auto* shapes_and_types = c_->input_handle_shapes_and_types(input.begin + i);
  if (shapes_and_types == nullptr || shapes_and_types->empty()) return c_->UnknownShape();
  return (*shapes_and_types)[0].shape;
}

Status OpShapes::RingAxes(const Axes& sequence_first, Axes* axes) const {
  bool is_sequence_first;
  TF_RETURN_IF_ERROR(c_->GetAttr("sequence_first", &is_sequence_first));
  *axes = sequence_first;
  if (!is_sequence_first) std::swap((*axes)[1], (*axes)[2]);
  return absl::OkStatus();
}

Status OpShapes::ExpectSteps(DimensionHandle steps) const {
  if (!c_->ValueKnown(steps) || c_->Value(steps) >= 1) return absl::OkStatus();
  return InvalidArgument("expected at least one step, query [M, T, H, D] with T >= 1, but got T = ",
                         c_->Value(steps));
}

Status OpShapes::MergeShape(ShapeHandle shape, const Axes& axes) const {
  TF_RETURN_IF_ERROR(c_->WithRank(shape, axes.size(), &shape));
  for (size_t axis = 0; axis < axes.size(); ++axis) {
    TF_RETURN_IF_ERROR(c_->Merge(*axes[axis], c_->Dim(shape, axis), axes[axis]));
  }
  return absl::OkStatus();
}

Status OpShapes::ExpectAtMostOne(const char* name) const {
  const Range& input = inputs_.at(name);
  if (input.end - input.begin <= 1) return absl::OkStatus();
  return InvalidArgument("expected at most one ", name, ", but got ", input.end - input.begin);
}

}  // namespace continual_transformers
