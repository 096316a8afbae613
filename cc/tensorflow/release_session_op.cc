// ReleaseSession: its signature, documentation, shape function and kernel.

#include "absl/status/status.h"
#include "cc/tensorflow/session_op.h"
#include "cc/tensorflow/session_resource.h"
#include "tensorflow/core/framework/op.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "tensorflow/core/framework/resource_mgr.h"

namespace continual_transformers {
namespace {

using absl::Status;
using tensorflow::OpKernel;
using tensorflow::OpKernelConstruction;
using tensorflow::OpKernelContext;

REGISTER_OP("ContinualTransformers>ReleaseSession")
    .Attr("container: string = ''")
    .Attr("shared_name: string")
    .SetIsStateful()
    .SetShapeFn(ScalarsShape)
    .Doc(R"doc(
Releases a session: its name is free, and it ends with its last handle. Does nothing if no session
has this name.

container, shared_name: As in SessionHandle.
)doc");

class ReleaseSessionOp : public OpKernel {
 public:
  explicit ReleaseSessionOp(OpKernelConstruction* ctx) : OpKernel(ctx) {}

  void Compute(OpKernelContext* ctx) override {
    tensorflow::ContainerInfo info;
    OP_REQUIRES_OK(ctx, info.Init(ctx->resource_manager(), def()));
    const Status status =
        info.resource_manager()->Delete<SessionResource>(info.container(), info.name());
    if (!absl::IsNotFound(status)) OP_REQUIRES_OK(ctx, status);
  }
};

REGISTER_KERNEL_BUILDER(Name("ContinualTransformers>ReleaseSession").Device(tensorflow::DEVICE_CPU),
                        ReleaseSessionOp);

}  // namespace
}  // namespace continual_transformers
