#include "cc/tensorflow/session_op.h"

#include "cc/tensorflow/expect.h"
#include "tensorflow/core/framework/resource_handle.h"
#include "tensorflow/core/framework/tensor.h"

namespace continual_transformers {

using absl::Status;
using tensorflow::OpKernelContext;
using tensorflow::shape_inference::InferenceContext;
using tensorflow::shape_inference::ShapeHandle;

Status SessionCall::LookUp(OpKernelContext* ctx, const OpInput& session) {
  const auto& handle = session.Get(ctx).flat<tensorflow::ResourceHandle>()(0);
  return tensorflow::LookupResource(ctx, handle, &resource_);
}

Status SessionCall::LookUp(OpKernelContext* ctx, const OpInput& session, const OpInput& streams) {
  TF_RETURN_IF_ERROR(LookUp(ctx, session));
  TF_RETURN_IF_ERROR(resource_->Get(&session_));
  const tensorflow::Tensor& numbers = streams.Get(ctx);
  TF_RETURN_IF_ERROR(ExpectRank("streams", numbers, 1, "[M]"));
  streams_ = {numbers.flat<int32_t>().data(), static_cast<size_t>(numbers.NumElements())};
  return resource_->Ids(streams_, &ids_);
}

Status SessionCall::Run(absl::FunctionRef<void()> call) const {
  const Status status = StatusOf(call);
  if (status.ok()) return status;
  // The session's error for a stream named twice has its id, which the graph does not know.
  TF_RETURN_IF_ERROR(ExpectDistinct(streams_));
  return status;
}

Status ScalarsShape(InferenceContext* c) {
  ShapeHandle unused;
  for (int i = 0; i < c->num_inputs(); ++i) {
    TF_RETURN_IF_ERROR(c->WithRank(c->input(i), 0, &unused));
  }
  for (int i = 0; i < c->num_outputs(); ++i) c->set_output(i, c->Scalar());
  return absl::OkStatus();
}

Status OnePerStreamShape(InferenceContext* c) {
  ShapeHandle unused, streams = c->UnknownShapeOfRank(1);
  TF_RETURN_IF_ERROR(c->WithRank(c->input(0), 0, &unused));  // session
  for (int i = 1; i < c->num_inputs(); ++i) {
    TF_RETURN_IF_ERROR(c->Merge(streams, c->input(i), &streams));
  }
  for (int i = 0; i < c->num_outputs(); ++i) c->set_output(i, streams);
  return absl::OkStatus();
}

}  // namespace continual_transformers
