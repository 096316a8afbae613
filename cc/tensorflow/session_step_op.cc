// SessionStep: its signature, documentation, shape function and kernel.

#include <cstdint>
#include <vector>

#include "absl/container/inlined_vector.h"
#include "absl/status/status.h"
#include "absl/types/span.h"
#include "cc/session/plan.h"
#include "cc/session/session.h"
#include "cc/tensorflow/expect.h"
#include "cc/tensorflow/op_io.h"
#include "cc/tensorflow/op_shapes.h"
#include "cc/tensorflow/session_op.h"
#include "tensorflow/core/framework/op.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "tensorflow/core/framework/shape_inference.h"
#include "tensorflow/core/framework/tensor.h"
#include "tensorflow/core/framework/types.h"

namespace continual_transformers {
namespace {

using absl::Status;
using tensorflow::DataType;
using tensorflow::OpKernel;
using tensorflow::OpKernelConstruction;
using tensorflow::OpKernelContext;
using tensorflow::Tensor;
using tensorflow::TensorShape;
using tensorflow::shape_inference::DimensionHandle;
using tensorflow::shape_inference::InferenceContext;
using tensorflow::shape_inference::ShapeHandle;

constexpr char kOp[] = "ContinualTransformers>SessionStep";

Status Shape(InferenceContext* c) {
  OpShapes shapes(c);
  TF_RETURN_IF_ERROR(shapes.Find(kOp));
  DimensionHandle m = c->UnknownDim();
  TF_RETURN_IF_ERROR(shapes.Merge("session", {}));
  TF_RETURN_IF_ERROR(shapes.Merge("streams", {&m}));
  TF_RETURN_IF_ERROR(shapes.MergeFirst("inputs", &m));
  std::vector<DataType> types;
  std::vector<tensorflow::PartialTensorShape> of_streams;
  TF_RETURN_IF_ERROR(c->GetAttr("output_types", &types));
  TF_RETURN_IF_ERROR(c->GetAttr("output_shapes", &of_streams));
  if (types.size() != of_streams.size()) {
    return InvalidArgument("expected one of output_shapes for each output, ", types.size(),
                           ", but got ", of_streams.size());
  }
  std::vector<ShapeHandle> outputs(of_streams.size());
  for (size_t i = 0; i < outputs.size(); ++i) {
    TF_RETURN_IF_ERROR(c->MakeShapeFromPartialTensorShape(of_streams[i], &outputs[i]));
    TF_RETURN_IF_ERROR(c->Concatenate(c->Vector(m), outputs[i], &outputs[i]));
  }
  TF_RETURN_IF_ERROR(c->set_output("outputs", outputs));
  return shapes.SetOutput("ready", c->Vector(m));
}

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
    .SetShapeFn(Shape)
    .Doc(R"doc(
Takes one step of M streams through a whole model.

session: A session that has a model.
streams: [M]. The stream of each row; distinct, each in [0, S), where S streams are held.
inputs: [M, ...], the model's inputs in the model's order.
outputs: [M, ...], the model's outputs in the model's order.
ready: [M]. Whether the stream's receptive field is full, including this step.
output_shapes: The shape of each output for one stream, without M.
)doc");

DataType TypeOf(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return tensorflow::DT_FLOAT;
    case DType::kFloat64:
      return tensorflow::DT_DOUBLE;
    case DType::kInt32:
      return tensorflow::DT_INT32;
    case DType::kInt64:
      return tensorflow::DT_INT64;
    case DType::kBool:
      return tensorflow::DT_BOOL;
    default:
      return tensorflow::DT_INVALID;  // a plan has no such values
  }
}

TensorShape ShapeOf(int64_t streams, const Value& value) {
  TensorShape shape({streams});
  for (const int64_t size : value.shape) shape.AddDim(size);
  return shape;
}

class SessionStepOp : public OpKernel {
 public:
  explicit SessionStepOp(OpKernelConstruction* ctx) : OpKernel(ctx) {
    OP_REQUIRES_OK(ctx, session_.Find(*this, "session"));
    OP_REQUIRES_OK(ctx, streams_.Find(*this, "streams"));
    OP_REQUIRES_OK(ctx, inputs_.Find(*this, "inputs"));
    OP_REQUIRES_OK(ctx, outputs_.Find(*this, "outputs"));
    OP_REQUIRES_OK(ctx, ready_.Find(*this, "ready"));
  }

  void Compute(OpKernelContext* ctx) override {
    SessionCall call;
    OP_REQUIRES_OK(ctx, call.LookUp(ctx, session_, streams_));
    const Plan& plan = call.session()->plan();
    const int64_t count = call.count();
    absl::InlinedVector<const void*, 4> inputs(inputs_.size());
    OP_REQUIRES_OK(ctx, ReadInputs(ctx, plan, count, absl::MakeSpan(inputs)));
    absl::InlinedVector<void*, 4> outputs(outputs_.size());
    OP_REQUIRES_OK(ctx, AllocateOutputs(ctx, plan, count, absl::MakeSpan(outputs)));
    Tensor* ready;
    OP_REQUIRES_OK(ctx, ready_.Allocate(ctx, {count}, &ready));
    absl::InlinedVector<int64_t, 64> positions(count);

    OP_REQUIRES_OK(ctx, call.Run([&] {
      call.session()->Step(call.ids().data(), count, 1, inputs.data(), outputs.data(), nullptr,
                           positions.data());
    }));
    bool* const is_ready = ready->flat<bool>().data();
    for (int64_t m = 0; m < count; ++m) is_ready[m] = plan.IsReadyAt(positions[m]);
  }

 private:
  Status ReadInputs(OpKernelContext* ctx, const Plan& plan, int64_t count,
                    absl::Span<const void*> inputs) const {
    TF_RETURN_IF_ERROR(ExpectCount("inputs", plan.inputs.size(), inputs_.size()));
    for (int i = 0; i < inputs_.size(); ++i) {
      const Tensor& given = inputs_.Get(ctx, i);
      const Port& port = plan.inputs[i];
      const Value& value = plan.values[port.value];
      TF_RETURN_IF_ERROR(ExpectType(port, value, given.dtype()));
      TF_RETURN_IF_ERROR(ExpectShape(port.name.c_str(), given, ShapeOf(count, value)));
      inputs[i] = given.data();
    }
    return absl::OkStatus();
  }

  Status AllocateOutputs(OpKernelContext* ctx, const Plan& plan, int64_t count,
                         absl::Span<void*> outputs) const {
    TF_RETURN_IF_ERROR(ExpectCount("outputs", plan.outputs.size(), outputs_.size()));
    for (int i = 0; i < outputs_.size(); ++i) {
      const Port& port = plan.outputs[i];
      const Value& value = plan.values[port.value];
      TF_RETURN_IF_ERROR(ExpectType(port, value, outputs_.dtype(ctx, i)));
      Tensor* tensor;
      TF_RETURN_IF_ERROR(outputs_.Allocate(ctx, ShapeOf(count, value), &tensor, i));
      outputs[i] = tensor->data();
    }
    return absl::OkStatus();
  }

  static Status ExpectCount(const char* what, int64_t expected, int64_t got) {
    if (got == expected) return absl::OkStatus();
    return InvalidArgument("expected ", expected, " ", what, ", as the model file has, but got ",
                           got, ": the graph belongs to another model file");
  }

  static Status ExpectType(const Port& port, const Value& value, DataType got) {
    if (got == TypeOf(value.dtype)) return absl::OkStatus();
    return InvalidArgument("expected ", port.name, " to be ", NameOf(value.dtype), ", but got ",
                           tensorflow::DataTypeString(got));
  }

  OpInput session_, streams_, inputs_;
  OpOutput outputs_, ready_;
};

REGISTER_KERNEL_BUILDER(Name("ContinualTransformers>SessionStep").Device(tensorflow::DEVICE_CPU),
                        SessionStepOp);

}  // namespace
}  // namespace continual_transformers
