// SessionClean: its signature, documentation, shape function and kernel.

#include "cc/session/session.h"
#include "cc/tensorflow/op_io.h"
#include "cc/tensorflow/session_op.h"
#include "tensorflow/core/framework/op.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "tensorflow/core/framework/tensor.h"

namespace continual_transformers {
namespace {

using tensorflow::OpKernel;
using tensorflow::OpKernelConstruction;
using tensorflow::OpKernelContext;
using tensorflow::Tensor;

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

class SessionCleanOp : public OpKernel {
 public:
  explicit SessionCleanOp(OpKernelConstruction* ctx) : OpKernel(ctx) {
    OP_REQUIRES_OK(ctx, session_.Find(*this, "session"));
    OP_REQUIRES_OK(ctx, streams_.Find(*this, "streams"));
    OP_REQUIRES_OK(ctx, position_.Find(*this, "position"));
  }

  void Compute(OpKernelContext* ctx) override {
    SessionCall call;
    OP_REQUIRES_OK(ctx, call.LookUp(ctx, session_, streams_));
    Tensor* position;
    OP_REQUIRES_OK(ctx, position_.Allocate(ctx, {call.count()}, &position));
    OP_REQUIRES_OK(ctx, call.Run([&] { call.session()->Clean(call.ids().data(), call.count()); }));
    position->flat<int64_t>().setZero();
  }

 private:
  OpInput session_, streams_;
  OpOutput position_;
};

REGISTER_KERNEL_BUILDER(Name("ContinualTransformers>SessionClean").Device(tensorflow::DEVICE_CPU),
                        SessionCleanOp);

}  // namespace
}  // namespace continual_transformers
