// SessionEnsureStreams: its signature, documentation, shape function and kernel.

#include <cstdint>

#include "cc/tensorflow/expect.h"
#include "cc/tensorflow/op_io.h"
#include "cc/tensorflow/session_op.h"
#include "cc/tensorflow/session_resource.h"
#include "tensorflow/core/framework/op.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "tensorflow/core/framework/tensor.h"

namespace continual_transformers {
namespace {

using tensorflow::OpKernel;
using tensorflow::OpKernelConstruction;
using tensorflow::OpKernelContext;
using tensorflow::Tensor;

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

class SessionEnsureStreamsOp : public OpKernel {
 public:
  explicit SessionEnsureStreamsOp(OpKernelConstruction* ctx) : OpKernel(ctx) {
    OP_REQUIRES_OK(ctx, session_.Find(*this, "session"));
    OP_REQUIRES_OK(ctx, count_.Find(*this, "count"));
    OP_REQUIRES_OK(ctx, held_.Find(*this, "held"));
  }

  void Compute(OpKernelContext* ctx) override {
    SessionCall call;
    OP_REQUIRES_OK(ctx, call.LookUp(ctx, session_));
    const Tensor& count = count_.Get(ctx);
    OP_REQUIRES_OK(ctx, ExpectRank("count", count, 0, "a number"));
    Tensor* held;
    OP_REQUIRES_OK(ctx, held_.Allocate(ctx, {}, &held));
    int64_t streams;
    OP_REQUIRES_OK(ctx, call.resource()->EnsureStreams(count.scalar<int32_t>()(), &streams));
    held->scalar<int32_t>()() = static_cast<int32_t>(streams);
  }

 private:
  OpInput session_, count_;
  OpOutput held_;
};

REGISTER_KERNEL_BUILDER(
    Name("ContinualTransformers>SessionEnsureStreams").Device(tensorflow::DEVICE_CPU),
    SessionEnsureStreamsOp);

}  // namespace
}  // namespace continual_transformers
