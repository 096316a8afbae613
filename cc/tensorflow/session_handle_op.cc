// SessionHandle: its signature, documentation, shape function and kernel.

#include <mutex>

#include "cc/tensorflow/op_io.h"
#include "cc/tensorflow/session_op.h"
#include "cc/tensorflow/session_resource.h"
#include "tensorflow/core/framework/op.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "tensorflow/core/framework/resource_handle.h"
#include "tensorflow/core/framework/resource_mgr.h"
#include "tensorflow/core/framework/tensor.h"

namespace continual_transformers {
namespace {

using tensorflow::OpKernel;
using tensorflow::OpKernelConstruction;
using tensorflow::OpKernelContext;
using tensorflow::ResourceHandle;
using tensorflow::Tensor;

REGISTER_OP("ContinualTransformers>SessionHandle")
    .Output("session: resource")
    .Attr("container: string = ''")
    .Attr("shared_name: string = ''")
    .SetIsStateful()
    .SetShapeFn(ScalarsShape)
    .Doc(R"doc(
Makes a session without a model, or finds an existing session.

session: A handle of the session, which lives until it is released and its last handle is gone.
container: The container of TensorFlow's resources that holds it; '': the default one.
shared_name: Its name in the container; '': no other op can find it.
)doc");

// One session per container and name. TensorFlow's resource manager holds it, so that every run of
// a graph finds it. Every handle holds it too: an object that captured a handle, such as a function
// of a SavedModel, keeps the session after the manager has released it.
class SessionHandleOp : public OpKernel {
 public:
  explicit SessionHandleOp(OpKernelConstruction* ctx) : OpKernel(ctx) {
    OP_REQUIRES_OK(ctx, output_.Find(*this, "session"));
  }

  ~SessionHandleOp() override {
    if (!info_.resource_is_private_to_kernel()) return;
    // It may already be deleted, together with its container.
    info_.resource_manager()
        ->Delete<SessionResource>(info_.container(), info_.name())
        .IgnoreError();
  }

  void Compute(OpKernelContext* ctx) override {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      if (info_.resource_manager() == nullptr) {
        OP_REQUIRES_OK(ctx, info_.Init(ctx->resource_manager(), def()));
      }
    }
    SessionResource* resource;
    OP_REQUIRES_OK(ctx, info_.resource_manager()->LookupOrCreate<SessionResource>(
                            info_.container(), info_.name(), &resource, [](SessionResource** made) {
                              *made = new SessionResource;
                              return absl::OkStatus();
                            }));
    // The handle takes over the reference from LookupOrCreate.
    const ResourceHandle handle =
        ResourceHandle::MakeRefCountingHandle(resource, ctx->device()->name());
    Tensor* output;
    OP_REQUIRES_OK(ctx, output_.Allocate(ctx, {}, &output));
    output->scalar<ResourceHandle>()() = handle;
  }

 private:
  OpOutput output_;
  std::mutex mutex_;
  tensorflow::ContainerInfo info_;
};

REGISTER_KERNEL_BUILDER(Name("ContinualTransformers>SessionHandle").Device(tensorflow::DEVICE_CPU),
                        SessionHandleOp);

}  // namespace
}  // namespace continual_transformers
