// Helpers for shape functions. They merge the dimensions that must be equal, and never compute with
// unknown dimensions.

#ifndef CONTINUAL_TRANSFORMERS_TENSORFLOW_OP_SHAPES_H_
#define CONTINUAL_TRANSFORMERS_TENSORFLOW_OP_SHAPES_H_

#include <map>
#include <string>
#include <vector>

#include "absl/container/inlined_vector.h"
#include "absl/status/status.h"
#include "tensorflow/core/framework/shape_inference.h"

namespace continual_transformers {

// One dimension for each axis of a shape.
using Axes = absl::InlinedVector<tensorflow::shape_inference::DimensionHandle*, 5>;

// The shapes of an op's inputs and outputs, by name. Merge...() checks that a shape has as many
// axes as `axes`, and merges each dimension with the one in `axes`, which it updates.
class OpShapes {
 public:
  explicit OpShapes(tensorflow::shape_inference::InferenceContext* c) : c_(c) {}

  // Finds the inputs of the op that is registered by this name. Call it first.
  absl::Status Find(const char* op);

  // Returns whether an input that is a list of tensors has one.
  bool Has(const char* name) const;

  // Every tensor of an input.
  absl::Status Merge(const char* name, const Axes& axes) const;
  // The first axis of every tensor of an input.
  absl::Status MergeFirst(const char* name,
                          tensorflow::shape_inference::DimensionHandle* axis) const;
  // An input that is a list of at most one tensor.
  absl::Status MergeOptional(const char* name, const Axes& axes) const;
  // Likewise. Every axis but the last may be 1, which broadcasts.
  absl::Status MergeOptionalMask(const char* name, const Axes& axes) const;
  // The variable behind an input, if the graph knows its shape. `i`: the variable's place in a
  // list.
  absl::Status MergeVariable(const char* name, const Axes& axes, int i = 0) const;

  tensorflow::shape_inference::ShapeHandle Variable(const char* name, int i) const;

  // Returns the axes of a ring: [S, N, H, size] with the op's attribute sequence_first, else
  // [S, H, N, size].
  absl::Status RingAxes(const Axes& sequence_first, Axes* axes) const;

  // Checks that a call has at least one step.
  absl::Status ExpectSteps(tensorflow::shape_inference::DimensionHandle steps) const;

  absl::Status SetOutput(const char* name, tensorflow::shape_inference::ShapeHandle shape) const {
    return c_->set_output(name, {shape});
  }

 private:
  struct Range {
    int begin, end;
  };

  absl::Status MergeShape(tensorflow::shape_inference::ShapeHandle shape, const Axes& axes) const;
  absl::Status ExpectAtMostOne(const char* name) const;

  tensorflow::shape_inference::InferenceContext* const c_;
  std::map<std::string, Range> inputs_;
};

}  // namespace continual_transformers

#endif  // CONTINUAL_TRANSFORMERS_TENSORFLOW_OP_SHAPES_H_
