// The lock by which graphs take turns on a model's streams. StreamLockHandle makes one,
// AcquireStreamLock waits for it, and ReleaseStreamLock frees it.
//
// TensorFlow's MutexLock switches to another thread for every request, even if the mutex is free.
// AcquireStreamLock continues in its own thread if the lock is free.

#include <atomic>
#include <functional>
#include <list>
#include <memory>
#include <mutex>
#include <string>
#include <utility>

#include "absl/status/status.h"
#include "tensorflow/core/framework/cancellation.h"
#include "tensorflow/core/framework/common_shape_fns.h"
#include "tensorflow/core/framework/op.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "tensorflow/core/framework/resource_handle.h"
#include "tensorflow/core/framework/resource_mgr.h"
#include "tensorflow/core/framework/tensor.h"
#include "tensorflow/core/framework/variant.h"
#include "tensorflow/core/framework/variant_tensor_data.h"
#include "tensorflow/core/platform/env.h"
#include "tensorflow/core/platform/threadpool.h"

namespace continual_transformers {
namespace {

using absl::Status;
using tensorflow::AsyncOpKernel;
using tensorflow::CancellationManager;
using tensorflow::OpKernel;
using tensorflow::OpKernelConstruction;
using tensorflow::OpKernelContext;
using tensorflow::ResourceHandle;
using tensorflow::Tensor;
using tensorflow::TensorShape;
using tensorflow::Variant;
using tensorflow::core::RefCountPtr;

// The thread that continues the steps that have waited. The thread that frees the lock does not run
// them, because it has its own step to finish. The pool is never destroyed, so no step outlives it.
tensorflow::thread::ThreadPool* ThreadOfWaiters() {
  static auto* const pool =
      new tensorflow::thread::ThreadPool(tensorflow::Env::Default(), "stream_lock", 1);
  return pool;
}

// One step at a time holds it. Waiting steps get it in the order of their arrival.
class StreamLock : public tensorflow::ResourceBase {
 public:
  using Done = std::function<void(const Status&)>;

  // Calls `done` when the caller has the lock, which may be at once, or with an error when the step
  // is cancelled before. `done` keeps this lock alive. `manager` may be null.
  void Acquire(CancellationManager* manager, Done done) {
    if (TryAcquire()) return done(absl::OkStatus());
    auto waiter = std::make_shared<Waiter>();
    waiter->done = std::move(done);
    waiter->manager = manager;
    // First of all: once the waiter is in the list, its step may end at any moment.
    if (manager != nullptr) {
      waiter->token = manager->get_cancellation_token();
      const bool registered =
          manager->RegisterCallback(waiter->token, [this, waiter] { Cancel(waiter); });
      if (!registered) return waiter->done(Cancelled());
    }
    bool cancelled;
    {
      std::lock_guard<std::mutex> guard(mutex_);
      cancelled = waiter->cancelled;
      if (!cancelled && held_) {
        waiter->place = waiting_.insert(waiting_.end(), waiter);
        waiter->waits = true;
        return;
      }
      if (!cancelled) held_ = true;
    }
    if (cancelled) return waiter->done(Cancelled());
    Grant(*waiter);
  }

  void Release() {
    std::shared_ptr<Waiter> next;
    {
      std::lock_guard<std::mutex> guard(mutex_);
      if (waiting_.empty()) {
        held_ = false;
        return;
      }
      next = std::move(waiting_.front());
      waiting_.pop_front();
      next->waits = false;
    }
    ThreadOfWaiters()->Schedule([next] { Grant(*next); });
  }

  std::string DebugString() const override { return "the lock of a model's streams"; }

 private:
  struct Waiter {
    Done done;
    CancellationManager* manager = nullptr;
    tensorflow::CancellationToken token = 0;
    std::list<std::shared_ptr<Waiter>>::iterator place;  // in waiting_, if it waits
    bool waits = false;
    bool cancelled = false;
  };

  static Status Cancelled() {
    return absl::CancelledError("cancelled while it waited for the model's streams");
  }

  bool TryAcquire() {
    std::lock_guard<std::mutex> guard(mutex_);
    if (held_) return false;
    held_ = true;
    return true;
  }

  static void Grant(const Waiter& waiter) {
    // After `done` the manager may be gone.
    if (waiter.manager != nullptr) waiter.manager->DeregisterCallback(waiter.token);
    waiter.done(absl::OkStatus());
  }

  void Cancel(const std::shared_ptr<Waiter>& waiter) {
    {
      std::lock_guard<std::mutex> guard(mutex_);
      waiter->cancelled = true;
      if (!waiter->waits) return;  // It has the lock, or Acquire answers.
      waiter->waits = false;
      waiting_.erase(waiter->place);
    }
    waiter->done(Cancelled());
  }

  std::mutex mutex_;
  bool held_ = false;
  std::list<std::shared_ptr<Waiter>> waiting_;
};

// A step's hold on the lock. It ends with Release, or when the step's tensors are freed.
class HeldLock {
 public:
  explicit HeldLock(std::shared_ptr<StreamLock> lock) : lock_(std::move(lock)) {}
  HeldLock(const HeldLock&) = delete;
  HeldLock& operator=(const HeldLock&) = delete;
  ~HeldLock() { Release(); }

  void Release() {
    if (!released_.exchange(true)) lock_->Release();
  }

 private:
  const std::shared_ptr<StreamLock> lock_;
  std::atomic<bool> released_{false};
};

// A HeldLock in a tensor. It cannot be sent or saved.
struct HeldLockVariant {
  std::shared_ptr<HeldLock> held;

  std::string TypeName() const { return "ContinualTransformers::HeldLock"; }
  std::string DebugString() const { return TypeName(); }
  void Encode(tensorflow::VariantTensorData*) const {}
  bool Decode(const tensorflow::VariantTensorData&) { return false; }
};

// One lock per container and name. TensorFlow's resource manager holds it, so that every run of a
// graph finds it, and so does every handle.
class StreamLockHandleOp : public OpKernel {
 public:
  explicit StreamLockHandleOp(OpKernelConstruction* ctx) : OpKernel(ctx) {}

  void Compute(OpKernelContext* ctx) override {
    tensorflow::ContainerInfo info;
    OP_REQUIRES_OK(ctx, info.Init(ctx->resource_manager(), def()));
    StreamLock* lock;
    OP_REQUIRES_OK(ctx, info.resource_manager()->LookupOrCreate<StreamLock>(
                            info.container(), info.name(), &lock, [](StreamLock** made) {
                              *made = new StreamLock;
                              return absl::OkStatus();
                            }));
    // The handle takes over the reference from LookupOrCreate.
    const ResourceHandle handle =
        ResourceHandle::MakeRefCountingHandle(lock, ctx->device()->name());
    Tensor* output;
    OP_REQUIRES_OK(ctx, ctx->allocate_output(0, TensorShape({}), &output));
    output->scalar<ResourceHandle>()() = handle;
  }
};

// Asynchronous: a thread of TensorFlow's that waited here might be the one that the holder needs.
class AcquireStreamLockOp : public AsyncOpKernel {
 public:
  explicit AcquireStreamLockOp(OpKernelConstruction* ctx) : AsyncOpKernel(ctx) {}

  void ComputeAsync(OpKernelContext* ctx, DoneCallback done) override {
    RefCountPtr<StreamLock> lock;
    OP_REQUIRES_OK_ASYNC(
        ctx, tensorflow::LookupResource(ctx, tensorflow::HandleFromInput(ctx, 0), &lock), done);
    StreamLock* const acquired = lock.get();
    std::shared_ptr<StreamLock> kept(lock.release(), [](StreamLock* x) { x->Unref(); });
    acquired->Acquire(ctx->cancellation_manager(), [ctx, done, kept](const Status& status) {
      OP_REQUIRES_OK_ASYNC(ctx, status, done);
      // If anything fails after this line, the destructor of `held` frees the lock.
      auto held = std::make_shared<HeldLock>(kept);
      Tensor* output;
      OP_REQUIRES_OK_ASYNC(ctx, ctx->allocate_output(0, TensorShape({}), &output), done);
      output->scalar<Variant>()() = HeldLockVariant{std::move(held)};
      done();
    });
  }
};

class ReleaseStreamLockOp : public OpKernel {
 public:
  explicit ReleaseStreamLockOp(OpKernelConstruction* ctx) : OpKernel(ctx) {}

  void Compute(OpKernelContext* ctx) override {
    const Tensor& input = ctx->input(0);
    const HeldLockVariant* const variant =
        input.NumElements() == 1 ? input.flat<Variant>()(0).get<HeldLockVariant>() : nullptr;
    OP_REQUIRES(ctx, variant != nullptr && variant->held != nullptr,
                absl::InvalidArgumentError("expected an output of AcquireStreamLock"));
    variant->held->Release();
  }

  bool IsExpensive() override { return false; }
};

Status ScalarOutput(tensorflow::shape_inference::InferenceContext* c) {
  c->set_output(0, c->Scalar());
  return absl::OkStatus();
}

REGISTER_OP("ContinualTransformers>StreamLockHandle")
    .Output("lock: resource")
    .Attr("container: string = ''")
    .Attr("shared_name: string")
    .SetIsStateful()
    .SetShapeFn(ScalarOutput)
    .Doc(R"doc(
Makes a lock of a model's streams, or finds an existing lock.

lock: A handle of the lock.
container: The container of TensorFlow's resources that holds it; '': the default one.
shared_name: Its name in the container.
)doc");

REGISTER_OP("ContinualTransformers>AcquireStreamLock")
    .Input("lock: resource")
    .Output("held: variant")
    .SetIsStateful()
    .SetShapeFn(ScalarOutput)
    .Doc(R"doc(
Takes the lock, after waiting for the steps that hold it or came before.

lock: A handle of a lock.
held: The lock as long as this tensor lives, or until ReleaseStreamLock is given it. So it is also
  freed if the step fails.
)doc");

REGISTER_OP("ContinualTransformers>ReleaseStreamLock")
    .Input("held: variant")
    .SetIsStateful()
    .SetShapeFn(tensorflow::shape_inference::NoOutputs)
    .Doc(R"doc(
Frees a lock. Does nothing if it was already freed.

held: An output of AcquireStreamLock.
)doc");

REGISTER_KERNEL_BUILDER(
    Name("ContinualTransformers>StreamLockHandle").Device(tensorflow::DEVICE_CPU),
    StreamLockHandleOp);
REGISTER_KERNEL_BUILDER(
    Name("ContinualTransformers>AcquireStreamLock").Device(tensorflow::DEVICE_CPU),
    AcquireStreamLockOp);
REGISTER_KERNEL_BUILDER(
    Name("ContinualTransformers>ReleaseStreamLock").Device(tensorflow::DEVICE_CPU),
    ReleaseStreamLockOp);

}  // namespace
}  // namespace continual_transformers
