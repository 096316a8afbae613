// SingleOutputAttention's kernel: check everything, allocate, share out over threads, call, and
// only then let the streams' positions advance. Whatever fails, fails before any state has changed.

#include <array>
#include <cstdint>

#include "absl/status/status.h"
#include "cc/attention/half.h"
#include "cc/attention/params.h"
#include "cc/attention/single_output.h"
#include "cc/tensorflow/inputs.h"
#include "cc/tensorflow/threads.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "tensorflow/core/framework/resource_mgr.h"
#include "tensorflow/core/framework/resource_var.h"

namespace continual_transformers {
namespace {

using absl::Status;
using tensorflow::OpKernel;
using tensorflow::OpKernelConstruction;
using tensorflow::OpKernelContext;
using tensorflow::Tensor;

template <typename T, typename C>
class SingleOutputAttentionOp : public OpKernel {
 public:
  explicit SingleOutputAttentionOp(OpKernelConstruction* ctx) : OpKernel(ctx) {
    OP_REQUIRES_OK(ctx, ExpectTarget());
    OP_REQUIRES_OK(ctx, ctx->GetAttr("return_attention_scores", &return_attention_scores_));
    OP_REQUIRES_OK(ctx, ctx->GetAttr("return_window", &return_window_));
    OP_REQUIRES_OK(ctx, ctx->GetAttr("update_state", &update_state_));
  }

  void Compute(OpKernelContext* ctx) override {
    std::array<tensorflow::core::RefCountPtr<tensorflow::Var>, 4> variables;
    for (int i = 0; i < 4; ++i) {
      OP_REQUIRES_OK(ctx, LookupResource(ctx, HandleFromInput(ctx, 3 + i), &variables[i]));
    }
    AttentionState state;
    OP_REQUIRES_OK(ctx, state.Lock({variables[0].get(), variables[1].get(), variables[2].get(),
                                    variables[3].get()},
                                   kDataType<C>));
    SingleOutputParams<T, C> params = {};
    OP_REQUIRES_OK(ctx, FillInputs(ctx, &state, &params));
    Tensor* steps_taken = nullptr;
    OP_REQUIRES_OK(ctx, AllocateOutputs(ctx, &params, &steps_taken));

    const Threads threads = ThreadsOf(ctx->device());
    const SingleOutputPlan plan = PlanSingleOutput(params, threads.count);
    params.window_parts = plan.window_parts;
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
    for (int64_t m = 0; m < params.num_streams; ++m) {
      steps_taken->vec<int64_t>()(m) = params.position[params.streams[m]] + params.num_steps;
    }
    state.Advance(params);
  }

 private:
  Status FillInputs(OpKernelContext* ctx, AttentionState* state,
                    SingleOutputParams<T, C>* p) const {
    const Tensor& query = ctx->input(0);
    const Tensor& key = ctx->input(1);
    const Tensor& value = ctx->input(2);
    TF_RETURN_IF_ERROR(ExpectRank("query", query, 4, "[M, T, H, D]"));
    TF_RETURN_IF_ERROR(ExpectRank("value", value, 4, "[M, T, H, Dv]"));
    const int64_t m = p->num_streams = query.dim_size(0);
    const int64_t t = p->num_steps = query.dim_size(1);
    const int64_t h = p->num_heads = query.dim_size(2);
    const int64_t d = p->key_dim = query.dim_size(3);
    const int64_t dv = p->value_dim = value.dim_size(3);
    p->window = state->key()->dim_size(2);
    if (t < 1 || h < 1 || p->window < 1 || d < 1 || dv < 1) {
      return InvalidArgument(
          "expected at least one step, head, feature and row of the window, "
          "but got query [M, T, H, D] = ",
          query.shape().DebugString(), ", value [M, T, H, Dv] = ", value.shape().DebugString(),
          " and key_cache [S, H, N, D] = ", state->key()->shape().DebugString());
    }
    TF_RETURN_IF_ERROR(ExpectShape("key", key, {m, t, h, d}));
    TF_RETURN_IF_ERROR(ExpectShape("value", value, {m, t, h, dv}));
    TF_RETURN_IF_ERROR(state->Fill(ctx->input(7), p));
    const Tensor& scale = ctx->input(8);
    TF_RETURN_IF_ERROR(ExpectShape("scale", scale, {}));
    p->scale = static_cast<T>(scale.scalar<double>()());
    const Tensor *attention_mask, *key_mask;
    TF_RETURN_IF_ERROR(OptionalInput(ctx, "attention_mask", &attention_mask));
    TF_RETURN_IF_ERROR(FillAttentionMask(attention_mask, p));
    TF_RETURN_IF_ERROR(OptionalInput(ctx, "key_mask", &key_mask));
    TF_RETURN_IF_ERROR(FillMask("key_mask", key_mask, {m, t}, &p->key_mask));
    p->query = query.flat<T>().data();
    p->query_strides = BatchTimeHead(t, h, d);
    p->key = Data<C>(key);
    p->key_strides = p->query_strides;
    p->value = Data<C>(value);
    p->value_strides = BatchTimeHead(t, h, dv);
    p->update_state = update_state_;
    return absl::OkStatus();
  }

  Status AllocateOutputs(OpKernelContext* ctx, SingleOutputParams<T, C>* p,
                         Tensor** steps_taken) const {
    const int64_t m = p->num_streams, t = p->num_steps, h = p->num_heads, n = p->window;
    const int64_t columns = return_attention_scores_ ? n : 0;
    const int64_t before = return_window_ ? n - 1 : 0;
    Tensor *output, *scores, *window_key, *window_value, *window_key_mask;
    TF_RETURN_IF_ERROR(ctx->allocate_output(0, {m, t, h, p->value_dim}, &output));
    TF_RETURN_IF_ERROR(ctx->allocate_output(1, {m, h, t, columns}, &scores));
    TF_RETURN_IF_ERROR(ctx->allocate_output(2, {m}, steps_taken));
    TF_RETURN_IF_ERROR(ctx->allocate_output(3, {m, h, before, p->key_dim}, &window_key));
    TF_RETURN_IF_ERROR(ctx->allocate_output(4, {m, h, before, p->value_dim}, &window_value));
    TF_RETURN_IF_ERROR(ctx->allocate_output(5, {m, before}, &window_key_mask));
    p->output = output->flat<T>().data();
    p->output_strides = BatchTimeHead(t, h, p->value_dim);
    if (return_attention_scores_) {
      p->scores = scores->flat<T>().data();
      p->scores_strides = BatchHeadTime(h, t, n);
    }
    if (return_window_) {
      p->window_key = Data<C>(window_key);
      p->window_value = Data<C>(window_value);
      p->window_key_mask = window_key_mask->flat<bool>().data();
    }
    return absl::OkStatus();
  }

  bool return_attention_scores_;
  bool return_window_;
  bool update_state_;
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
