// SessionSetState: its signature, documentation, shape function and kernel.

#include <cstdint>
#include <vector>

#include "cc/session/session.h"
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
using tensorflow::tstring;

REGISTER_OP("ContinualTransformers>SessionSetState")
    .Input("session: resource")
    .Input("streams: int32")
    .Input("states: string")
    .Output("position: int64")
    .Attr("other_weights: bool = false")
    .SetIsStateful()
    .SetShapeFn(OnePerStreamShape)
    .Doc(R"doc(
Restores copies of states into streams, all or none. The streams continue from there.

session: A session that has a model.
streams: [M]. Distinct, each in [0, S), where S streams are held.
states: [M], copies from SessionGetState, of the same model.
position: [M]. The steps that each stream has taken afterwards.
other_weights: Whether to accept copies of the same model with other weights.
)doc");

class SessionSetStateOp : public OpKernel {
 public:
  explicit SessionSetStateOp(OpKernelConstruction* ctx) : OpKernel(ctx) {
    OP_REQUIRES_OK(ctx, ctx->GetAttr("other_weights", &other_weights_));
    OP_REQUIRES_OK(ctx, session_.Find(*this, "session"));
    OP_REQUIRES_OK(ctx, streams_.Find(*this, "streams"));
    OP_REQUIRES_OK(ctx, states_.Find(*this, "states"));
    OP_REQUIRES_OK(ctx, position_.Find(*this, "position"));
  }

  void Compute(OpKernelContext* ctx) override {
    SessionCall call;
    OP_REQUIRES_OK(ctx, call.LookUp(ctx, session_, streams_));
    const Tensor& given = states_.Get(ctx);
    OP_REQUIRES_OK(ctx, ExpectShape("states", given, {call.count()}));
    const auto texts = given.vec<tstring>();
    std::vector<const void*> states(call.count());
    std::vector<int64_t> bytes(call.count());
    for (int64_t m = 0; m < call.count(); ++m) {
      states[m] = texts(m).data();
      bytes[m] = texts(m).size();
    }
    Tensor* position;
    OP_REQUIRES_OK(ctx, position_.Allocate(ctx, {call.count()}, &position));
    OP_REQUIRES_OK(ctx, call.Run([&] {
      call.session()->SetStates(call.ids().data(), call.count(), states.data(), bytes.data(),
                                other_weights_);
    }));
    OP_REQUIRES_OK(ctx, StatusOf([&] {
                     call.session()->Positions(call.ids().data(), call.count(),
                                               position->flat<int64_t>().data());
                   }));
  }

 private:
  bool other_weights_;
  OpInput session_, streams_, states_;
  OpOutput position_;
};

REGISTER_KERNEL_BUILDER(
    Name("ContinualTransformers>SessionSetState").Device(tensorflow::DEVICE_CPU),
    SessionSetStateOp);

}  // namespace
}  // namespace continual_transformers
