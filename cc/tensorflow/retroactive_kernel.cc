// RetroactiveAttention's kernel: check everything, allocate, share out over threads, call, and only
// then let the streams' positions advance. Whatever fails, fails before any state has changed.

#include <array>
#include <cstdint>
#include <string>

#include "absl/status/status.h"
#include "cc/attention/params.h"
#include "cc/attention/retroactive.h"
#include "cc/attention/retroactive_params.h"
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

// Where the variables are among the op's inputs.
enum Variable { kKey, kValue, kKeyMask, kPosition, kQuery, kSoftmax, kWeightedSum, kMadeWith };
constexpr int kVariables = 8, kFirstVariable = 3;

template <typename T>
class RetroactiveAttentionOp : public OpKernel {
 public:
  explicit RetroactiveAttentionOp(OpKernelConstruction* ctx) : OpKernel(ctx) {
    OP_REQUIRES_OK(ctx, ExpectTarget());
    OP_REQUIRES_OK(ctx, ctx->GetAttr("algorithm", &algorithm_));
    OP_REQUIRES_OK(ctx, ctx->GetAttr("update_state", &update_state_));
    OP_REQUIRES_OK(ctx, ctx->GetAttr("advance_position", &advance_position_));
    OP_REQUIRES_OK(ctx, ctx->GetAttr("sequence_first", &order_.sequence_first));
  }

  void Compute(OpKernelContext* ctx) override {
    std::array<tensorflow::core::RefCountPtr<tensorflow::Var>, kVariables> variables;
    for (int i = 0; i < kVariables; ++i) {
      OP_REQUIRES_OK(ctx,
                     LookupResource(ctx, HandleFromInput(ctx, kFirstVariable + i), &variables[i]));
    }
    const auto var = [&](Variable v) { return variables[v].get(); };
    AttentionState state(order_);
    state.set_advances(advance_position_);
    OP_REQUIRES_OK(ctx,
                   state.Lock({var(kKey), var(kValue), var(kKeyMask), var(kPosition)}, kDataType<T>,
                              {{var(kQuery), "query_cache", kDataType<T>},
                               {var(kSoftmax), "softmax", tensorflow::DT_DOUBLE},
                               {var(kWeightedSum), "weighted_sum", tensorflow::DT_DOUBLE},
                               {var(kMadeWith), "made_with", tensorflow::DT_DOUBLE}}));
    RetroactiveParams<T> params = {};
    OP_REQUIRES_OK(ctx, FillRings(ctx, &state, &params));
    OP_REQUIRES_OK(ctx, FillRows(var(kQuery)->tensor(), var(kSoftmax)->tensor(),
                                 var(kWeightedSum)->tensor(), var(kMadeWith)->tensor(), &params));
    Tensor *output = nullptr, *steps_taken = nullptr;
    const int64_t m = params.num_streams, t = params.num_steps, h = params.num_heads;
    const int64_t n = params.window, dv = params.value_dim;
    OP_REQUIRES_OK(ctx, ctx->allocate_output(0, {m, t, h, n, dv}, &output));
    OP_REQUIRES_OK(ctx, ctx->allocate_output(1, {m}, &steps_taken));
    params.output = output->flat<T>().data();
    params.output_strides = BatchTimeHead(t, h, n * dv);
    params.output_row_stride = dv;

    ThreadsOf(ctx->device())
        .share(m * h, RetroactiveCyclesPerTask(params),
               [&params](int64_t begin, int64_t end) { RetroactiveAttention(params, begin, end); });
    FinishRetroactive(params);
    for (int64_t i = 0; i < m; ++i) {
      steps_taken->vec<int64_t>()(i) = params.position[params.streams[i]] + t;
    }
    state.Advance(params);
  }

 private:
  Status FillRings(OpKernelContext* ctx, AttentionState* state, RingParams<T>* p) const {
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
    p->window = state->window();
    if (t < 1 || h < 1 || p->window < 1 || d < 1 || dv < 1) {
      return InvalidArgument(
          "expected at least one step, head, feature and row of the window, "
          "but got query [M, T, H, D] = ",
          query.shape().DebugString(), ", value [M, T, H, Dv] = ", value.shape().DebugString(),
          " and key_cache ", order_.axes(), " = ", state->key()->shape().DebugString());
    }
    TF_RETURN_IF_ERROR(ExpectShape("key", key, {m, t, h, d}));
    TF_RETURN_IF_ERROR(ExpectShape("value", value, {m, t, h, dv}));
    TF_RETURN_IF_ERROR(state->Fill(&ctx->input(kFirstVariable + kVariables), p));
    const Tensor& scale = ctx->input(kFirstVariable + kVariables + 1);
    TF_RETURN_IF_ERROR(ExpectShape("scale", scale, {}));
    p->scale = static_cast<T>(scale.scalar<double>()());
    const Tensor* key_mask;
    TF_RETURN_IF_ERROR(OptionalInput(ctx, "key_mask", &key_mask));
    TF_RETURN_IF_ERROR(FillMask("key_mask", key_mask, {m, t}, &p->key_mask));
    p->query = query.flat<T>().data();
    p->query_strides = BatchTimeHead(t, h, d);
    p->key = key.flat<T>().data();
    p->key_strides = p->query_strides;
    p->value = value.flat<T>().data();
    p->value_strides = BatchTimeHead(t, h, dv);
    p->update_state = update_state_;
    return absl::OkStatus();
  }

  Status FillRows(Tensor* query, Tensor* softmax, Tensor* weighted_sum, Tensor* made_with,
                  RetroactiveParams<T>* p) const {
    const int64_t held = made_with->dims() > 0 ? made_with->dim_size(0) : 0;
    const int64_t h = p->num_heads, n = p->window;
    TF_RETURN_IF_ERROR(ExpectShape("query_cache", *query, order_.Shape(held, h, n, p->key_dim)));
    TF_RETURN_IF_ERROR(ExpectShape("softmax", *softmax, {held, h, 4, n}));
    TF_RETURN_IF_ERROR(ExpectShape("weighted_sum", *weighted_sum, {held, h, n, p->value_dim}));
    TF_RETURN_IF_ERROR(ExpectShape("made_with", *made_with, {held, 2}));
    for (int64_t m = 0; m < p->num_streams; ++m) {
      if (p->streams[m] >= held) {
        return InvalidArgument("expected made_with of as many streams as key_cache, but got ",
                               made_with->shape().DebugString());
      }
    }
    p->query_cache = query->flat<T>().data();
    p->query_cache_strides = order_.RingStrides(h, n, p->key_dim);
    p->softmax = softmax->flat<double>().data();
    p->weighted_sum = weighted_sum->flat<double>().data();
    p->made_with = made_with->flat<double>().data();
    p->recompute = algorithm_ == "recompute" || (algorithm_ == "auto" && RecomputingIsFaster(*p));
    return absl::OkStatus();
  }

  std::string algorithm_;
  RingOrder order_;
  bool update_state_, advance_position_;
};

#define REGISTER_CPU(T)                                                      \
  REGISTER_KERNEL_BUILDER(Name("ContinualTransformers>RetroactiveAttention") \
                              .Device(tensorflow::DEVICE_CPU)                \
                              .TypeConstraint<T>("T"),                       \
                          RetroactiveAttentionOp<T>)
REGISTER_CPU(float);
REGISTER_CPU(double);
#undef REGISTER_CPU

}  // namespace
}  // namespace continual_transformers
