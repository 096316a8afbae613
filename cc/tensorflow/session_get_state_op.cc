// SessionGetState: its signature, documentation, shape function and kernel.

#include <cstdint>

#include "cc/session/session.h"
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
using tensorflow::tstring;

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

class SessionGetStateOp : public OpKernel {
 public:
  explicit SessionGetStateOp(OpKernelConstruction* ctx) : OpKernel(ctx) {
    OP_REQUIRES_OK(ctx, session_.Find(*this, "session"));
    OP_REQUIRES_OK(ctx, streams_.Find(*this, "streams"));
    OP_REQUIRES_OK(ctx, states_.Find(*this, "states"));
  }

  void Compute(OpKernelContext* ctx) override {
    SessionCall call;
    OP_REQUIRES_OK(ctx, call.LookUp(ctx, session_, streams_));
    Tensor* states;
    OP_REQUIRES_OK(ctx, states_.Allocate(ctx, {call.count()}, &states));
    auto texts = states->vec<tstring>();
    OP_REQUIRES_OK(ctx, StatusOf([&] {
                     for (int64_t m = 0; m < call.count(); ++m) {
                       texts(m).resize_uninitialized(call.session()->state_bytes());
                       call.session()->GetState(call.ids()[m], texts(m).mdata());
                     }
                   }));
  }

 private:
  OpInput session_, streams_;
  OpOutput states_;
};

REGISTER_KERNEL_BUILDER(
    Name("ContinualTransformers>SessionGetState").Device(tensorflow::DEVICE_CPU),
    SessionGetStateOp);

}  // namespace
}  // namespace continual_transformers
