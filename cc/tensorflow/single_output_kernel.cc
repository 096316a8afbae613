// SingleOutputAttention's kernel on the CPU: share out over threads, call, and only then let the
// streams' positions advance.

#include <cstdint>

#include "cc/attention/half.h"
#include "cc/attention/params.h"
#include "cc/attention/single_output.h"
#include "cc/tensorflow/inputs.h"
#include "cc/tensorflow/single_output_call.h"
#include "cc/tensorflow/threads.h"
#include "tensorflow/core/framework/op_kernel.h"

namespace continual_transformers {
namespace {

using tensorflow::OpKernel;
using tensorflow::OpKernelConstruction;
using tensorflow::OpKernelContext;
using tensorflow::Tensor;

template <typename T, typename C>
class SingleOutputAttentionOp : public OpKernel {
 public:
  explicit SingleOutputAttentionOp(OpKernelConstruction* ctx) : OpKernel(ctx) {
    OP_REQUIRES_OK(ctx, ExpectTarget());
    OP_REQUIRES_OK(ctx, options_.Read(ctx));
  }

  void Compute(OpKernelContext* ctx) override {
    SingleOutputCall<T, C> call(options_, ctx);
    SingleOutputParams<T, C> params = {};
    OP_REQUIRES_OK(ctx, call.Prepare(&params));

    const Threads threads = ThreadsOf(ctx->device());
    const SingleOutputPlan plan = PlanSingleOutput(params, threads.count);
    params.window_parts = plan.window_parts;
    params.heads_per_task = plan.heads_per_task;
    Tensor parts;
    if (plan.window_parts > 1) {
      OP_REQUIRES_OK(ctx,
                     ctx->allocate_temp(kDataType<T>, {plan.tasks, params.value_dim + 2}, &parts));
      params.parts = parts.flat<T>().data();
    }
    threads.share(plan.tasks, plan.cycles_per_task, [&params](int64_t begin, int64_t end) {
      SingleOutputAttention(params, begin, end);
    });
    FinishSingleOutput(params);
    auto steps_taken = call.steps_taken()->template vec<int64_t>();
    for (int64_t m = 0; m < params.num_streams; ++m) {
      steps_taken(m) = params.position[params.streams[m]] + params.num_steps;
    }
    call.state().Advance(params);
  }

 private:
  SingleOutputOptions options_;
};

#define REGISTER_CPU(T, C)                                                    \
  REGISTER_KERNEL_BUILDER(Name("ContinualTransformers>SingleOutputAttention") \
                              .Device(tensorflow::DEVICE_CPU)                 \
                              .TypeConstraint<T>("T")                         \
                              .TypeConstraint<TensorFlowType<C>::type>("C"),  \
                          SingleOutputAttentionOp<T, C>)
REGISTER_CPU(float, float);
REGISTER_CPU(float, BFloat16);
REGISTER_CPU(float, Float16);
REGISTER_CPU(double, double);
#undef REGISTER_CPU

}  // namespace
}  // namespace continual_transformers
