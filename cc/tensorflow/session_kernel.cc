// The ops on a session. SessionHandle makes one, InitializeSession loads its model, and
// ReleaseSession releases it. The others step, clean and copy its streams, and make room for them.
// An op that fails does so before any stream changes.

#include <algorithm>
#include <cstdint>
#include <mutex>
#include <string>
#include <vector>

#include "absl/container/inlined_vector.h"
#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/types/span.h"
#include "cc/session/plan.h"
#include "cc/session/session.h"
#include "cc/tensorflow/inputs.h"
#include "cc/tensorflow/session_resource.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "tensorflow/core/framework/resource_handle.h"
#include "tensorflow/core/framework/resource_mgr.h"
#include "tensorflow/core/framework/tensor.h"
#include "tensorflow/core/framework/types.h"

namespace continual_transformers {
namespace {

using absl::Status;
using tensorflow::DataType;
using tensorflow::OpInputList;
using tensorflow::OpKernel;
using tensorflow::OpKernelConstruction;
using tensorflow::OpKernelContext;
using tensorflow::OpOutputList;
using tensorflow::ResourceHandle;
using tensorflow::Tensor;
using tensorflow::TensorShape;
using tensorflow::tstring;

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

// One session per container and name. TensorFlow's resource manager holds it, so that every run of
// a graph finds it. Every handle holds it too: an object that captured a handle, such as a function
// of a SavedModel, keeps the session after the manager has released it.
class SessionHandleOp : public OpKernel {
 public:
  explicit SessionHandleOp(OpKernelConstruction* ctx) : OpKernel(ctx) {}

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
    OP_REQUIRES_OK(ctx, ctx->allocate_output(0, TensorShape({}), &output));
    output->scalar<ResourceHandle>()() = handle;
  }

 private:
  std::mutex mutex_;
  tensorflow::ContainerInfo info_;
};

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

// The common beginning of all ops on a session.
class OnSession {
 public:
  // Looks up the resource of the handle in the first input.
  Status LookUp(OpKernelContext* ctx) {
    return tensorflow::LookupResource(ctx, tensorflow::HandleFromInput(ctx, 0), &resource_);
  }

  // Also looks up its session, and the ids of the streams in the second input.
  Status LookUpWithStreams(OpKernelContext* ctx) {
    TF_RETURN_IF_ERROR(LookUp(ctx));
    TF_RETURN_IF_ERROR(resource_->Get(&session_));
    TF_RETURN_IF_ERROR(ExpectRank("streams", ctx->input(1), 1, "[M]"));
    const auto numbers = ctx->input(1).vec<int32_t>();
    streams_ = {numbers.data(), static_cast<size_t>(numbers.size())};
    return resource_->Ids(streams_, &ids_);
  }

  // Runs `call` on these streams.
  Status Run(absl::FunctionRef<void()> call) const {
    Status status = StatusOf(call);
    if (status.ok()) return status;
    // The session's errors name ids, which the graph does not know.
    absl::InlinedVector<int32_t, 64> sorted(streams_.begin(), streams_.end());
    std::sort(sorted.begin(), sorted.end());
    const auto twice = std::adjacent_find(sorted.begin(), sorted.end());
    if (twice == sorted.end()) return status;
    return InvalidArgument("expected each stream once in a call, but got ", *twice, " twice");
  }

  SessionResource* resource() const { return resource_.get(); }
  Session* session() const { return session_; }
  const StreamIds& ids() const { return ids_; }
  int64_t count() const { return ids_.size(); }

 private:
  tensorflow::core::RefCountPtr<SessionResource> resource_;
  Session* session_ = nullptr;
  absl::Span<const int32_t> streams_;
  StreamIds ids_;
};

class InitializeSessionOp : public OpKernel {
 public:
  explicit InitializeSessionOp(OpKernelConstruction* ctx) : OpKernel(ctx) {
    OP_REQUIRES_OK(ctx, ExpectTarget());
    OP_REQUIRES_OK(ctx, ctx->GetAttr("streams", &streams_));
  }

  void Compute(OpKernelContext* ctx) override {
    OnSession on;
    OP_REQUIRES_OK(ctx, on.LookUp(ctx));
    std::string paths[2];
    for (int i = 0; i < 2; ++i) {
      const char* const name = i == 0 ? "model_file" : "states";
      OP_REQUIRES_OK(ctx, ExpectRank(name, ctx->input(1 + i), 0, "a path"));
      paths[i] = ctx->input(1 + i).scalar<tstring>()();
    }
    OP_REQUIRES_OK(ctx, on.resource()->Initialize(ctx->env(), paths[0], paths[1], streams_));
  }

 private:
  int64_t streams_;
};

class SessionStepOp : public OpKernel {
 public:
  explicit SessionStepOp(OpKernelConstruction* ctx) : OpKernel(ctx) {}

  void Compute(OpKernelContext* ctx) override {
    OnSession on;
    OP_REQUIRES_OK(ctx, on.LookUpWithStreams(ctx));
    const Plan& plan = on.session()->plan();
    const int64_t count = on.count();
    OpInputList given;
    OP_REQUIRES_OK(ctx, ctx->input_list("inputs", &given));
    absl::InlinedVector<const void*, 4> inputs(given.size());
    OP_REQUIRES_OK(ctx, ReadInputs(plan, count, given, absl::MakeSpan(inputs)));
    OpOutputList made;
    OP_REQUIRES_OK(ctx, ctx->output_list("outputs", &made));
    absl::InlinedVector<void*, 4> outputs(made.size());
    OP_REQUIRES_OK(ctx, AllocateOutputs(plan, count, &made, absl::MakeSpan(outputs)));
    Tensor* ready;
    OP_REQUIRES_OK(ctx, ctx->allocate_output("ready", TensorShape({count}), &ready));
    absl::InlinedVector<int64_t, 64> positions(count);

    OP_REQUIRES_OK(ctx, on.Run([&] {
      on.session()->Step(on.ids().data(), count, 1, inputs.data(), outputs.data(), nullptr,
                         positions.data());
    }));
    bool* const is_ready = ready->flat<bool>().data();
    for (int64_t m = 0; m < count; ++m) is_ready[m] = positions[m] >= plan.receptive_field;
  }

 private:
  static Status ReadInputs(const Plan& plan, int64_t count, const OpInputList& given,
                           absl::Span<const void*> inputs) {
    TF_RETURN_IF_ERROR(ExpectCount("inputs", plan.inputs.size(), given.size()));
    for (int i = 0; i < given.size(); ++i) {
      const Port& port = plan.inputs[i];
      const Value& value = plan.values[port.value];
      TF_RETURN_IF_ERROR(ExpectType(port, value, given[i].dtype()));
      TF_RETURN_IF_ERROR(ExpectShape(port.name.c_str(), given[i], ShapeOf(count, value)));
      inputs[i] = given[i].data();
    }
    return absl::OkStatus();
  }

  static Status AllocateOutputs(const Plan& plan, int64_t count, OpOutputList* made,
                                absl::Span<void*> outputs) {
    TF_RETURN_IF_ERROR(ExpectCount("outputs", plan.outputs.size(), made->size()));
    for (int i = 0; i < made->size(); ++i) {
      const Port& port = plan.outputs[i];
      const Value& value = plan.values[port.value];
      TF_RETURN_IF_ERROR(ExpectType(port, value, made->expected_output_dtype(i)));
      Tensor* tensor;
      TF_RETURN_IF_ERROR(made->allocate(i, ShapeOf(count, value), &tensor));
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
};

class SessionCleanOp : public OpKernel {
 public:
  explicit SessionCleanOp(OpKernelConstruction* ctx) : OpKernel(ctx) {}

  void Compute(OpKernelContext* ctx) override {
    OnSession on;
    OP_REQUIRES_OK(ctx, on.LookUpWithStreams(ctx));
    Tensor* position;
    OP_REQUIRES_OK(ctx, ctx->allocate_output(0, TensorShape({on.count()}), &position));
    OP_REQUIRES_OK(ctx, on.Run([&] { on.session()->Clean(on.ids().data(), on.count()); }));
    position->flat<int64_t>().setZero();
  }
};

class SessionEnsureStreamsOp : public OpKernel {
 public:
  explicit SessionEnsureStreamsOp(OpKernelConstruction* ctx) : OpKernel(ctx) {}

  void Compute(OpKernelContext* ctx) override {
    OnSession on;
    OP_REQUIRES_OK(ctx, on.LookUp(ctx));
    OP_REQUIRES_OK(ctx, ExpectRank("count", ctx->input(1), 0, "a number"));
    Tensor* held;
    OP_REQUIRES_OK(ctx, ctx->allocate_output(0, TensorShape({}), &held));
    int64_t streams;
    OP_REQUIRES_OK(ctx, on.resource()->EnsureStreams(ctx->input(1).scalar<int32_t>()(), &streams));
    held->scalar<int32_t>()() = static_cast<int32_t>(streams);
  }
};

class SessionGetStateOp : public OpKernel {
 public:
  explicit SessionGetStateOp(OpKernelConstruction* ctx) : OpKernel(ctx) {}

  void Compute(OpKernelContext* ctx) override {
    OnSession on;
    OP_REQUIRES_OK(ctx, on.LookUpWithStreams(ctx));
    Tensor* states;
    OP_REQUIRES_OK(ctx, ctx->allocate_output(0, TensorShape({on.count()}), &states));
    auto texts = states->vec<tstring>();
    OP_REQUIRES_OK(ctx, StatusOf([&] {
                     for (int64_t m = 0; m < on.count(); ++m) {
                       texts(m).resize_uninitialized(on.session()->state_bytes());
                       on.session()->GetState(on.ids()[m], texts(m).mdata());
                     }
                   }));
  }
};

class SessionSetStateOp : public OpKernel {
 public:
  explicit SessionSetStateOp(OpKernelConstruction* ctx) : OpKernel(ctx) {
    OP_REQUIRES_OK(ctx, ctx->GetAttr("other_weights", &other_weights_));
  }

  void Compute(OpKernelContext* ctx) override {
    OnSession on;
    OP_REQUIRES_OK(ctx, on.LookUpWithStreams(ctx));
    OP_REQUIRES_OK(ctx, ExpectShape("states", ctx->input(2), TensorShape({on.count()})));
    const auto texts = ctx->input(2).vec<tstring>();
    std::vector<const void*> states(on.count());
    std::vector<int64_t> bytes(on.count());
    for (int64_t m = 0; m < on.count(); ++m) {
      states[m] = texts(m).data();
      bytes[m] = texts(m).size();
    }
    Tensor* position;
    OP_REQUIRES_OK(ctx, ctx->allocate_output(0, TensorShape({on.count()}), &position));
    OP_REQUIRES_OK(ctx, on.Run([&] {
      on.session()->SetStates(on.ids().data(), on.count(), states.data(), bytes.data(),
                              other_weights_);
    }));
    OP_REQUIRES_OK(ctx, StatusOf([&] {
                     on.session()->Positions(on.ids().data(), on.count(),
                                             position->flat<int64_t>().data());
                   }));
  }

 private:
  bool other_weights_;
};

#define REGISTER_CPU(NAME)                                                                     \
  REGISTER_KERNEL_BUILDER(Name("ContinualTransformers>" #NAME).Device(tensorflow::DEVICE_CPU), \
                          NAME##Op)
REGISTER_CPU(SessionHandle);
REGISTER_CPU(ReleaseSession);
REGISTER_CPU(InitializeSession);
REGISTER_CPU(SessionStep);
REGISTER_CPU(SessionClean);
REGISTER_CPU(SessionEnsureStreams);
REGISTER_CPU(SessionGetState);
REGISTER_CPU(SessionSetState);
#undef REGISTER_CPU

}  // namespace
}  // namespace continual_transformers
