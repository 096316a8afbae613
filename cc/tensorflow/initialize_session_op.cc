// InitializeSession: its signature, documentation, shape function and kernel.

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
using tensorflow::tstring;

REGISTER_OP("ContinualTransformers>InitializeSession")
    .Input("session: resource")
    .Input("model_file: string")
    .Input("states: string")
    .Attr("streams: int >= 0")
    .SetIsStateful()
    .SetShapeFn(ScalarsShape)
    .Doc(R"doc(
Loads a session's model and opens its streams. Does nothing if the session already has a model.

session: A session.
model_file: The path of a model file; see docs/model_file.md. It is mapped into memory and must not
  change while the session lives.
states: The path of a file with the states of streams 0, 1, ..., one after another, each in the
  format of SessionGetState; '': all streams are clean.
streams: The number of streams to open.
)doc");

class InitializeSessionOp : public OpKernel {
 public:
  explicit InitializeSessionOp(OpKernelConstruction* ctx) : OpKernel(ctx) {
    OP_REQUIRES_OK(ctx, ExpectTarget());
    OP_REQUIRES_OK(ctx, ctx->GetAttr("streams", &streams_));
    OP_REQUIRES_OK(ctx, session_.Find(*this, "session"));
    OP_REQUIRES_OK(ctx, model_file_.Find(*this, "model_file"));
    OP_REQUIRES_OK(ctx, states_.Find(*this, "states"));
  }

  void Compute(OpKernelContext* ctx) override {
    SessionCall call;
    OP_REQUIRES_OK(ctx, call.LookUp(ctx, session_));
    const Tensor &model_file = model_file_.Get(ctx), &states = states_.Get(ctx);
    OP_REQUIRES_OK(ctx, ExpectRank("model_file", model_file, 0, "a path"));
    OP_REQUIRES_OK(ctx, ExpectRank("states", states, 0, "a path"));
    OP_REQUIRES_OK(ctx, call.resource()->Initialize(ctx->env(), model_file.scalar<tstring>()(),
                                                    states.scalar<tstring>()(), streams_));
  }

 private:
  OpInput session_, model_file_, states_;
  int64_t streams_;
};

REGISTER_KERNEL_BUILDER(
    Name("ContinualTransformers>InitializeSession").Device(tensorflow::DEVICE_CPU),
    InitializeSessionOp);

}  // namespace
}  // namespace continual_transformers
