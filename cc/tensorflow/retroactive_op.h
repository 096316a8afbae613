// RetroactiveAttention on a device; see cpu_device.h for what a device is. The op checks everything
// and allocates. Only then does the device take the steps, so an op that fails changes no state.

#ifndef CONTINUAL_TRANSFORMERS_TENSORFLOW_RETROACTIVE_OP_H_
#define CONTINUAL_TRANSFORMERS_TENSORFLOW_RETROACTIVE_OP_H_

#include <cstdint>
#include <string>

#include "absl/status/status.h"
#include "cc/attention/params.h"
#include "cc/tensorflow/attention_state.h"
#include "cc/tensorflow/dtypes.h"
#include "cc/tensorflow/expect.h"
#include "cc/tensorflow/op_io.h"
#include "cc/tensorflow/ring_inputs.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "tensorflow/core/framework/tensor.h"

namespace continual_transformers {

template <typename Device, typename T>
class RetroactiveAttentionOp : public tensorflow::OpKernel {
 public:
  explicit RetroactiveAttentionOp(tensorflow::OpKernelConstruction* ctx) : OpKernel(ctx) {
    OP_REQUIRES_OK(ctx, Device::Check());
    OP_REQUIRES_OK(ctx, ctx->GetAttr("algorithm", &algorithm_));
    OP_REQUIRES_OK(ctx, inputs_.Read(ctx, *this));
    OP_REQUIRES_OK(ctx, query_cache_.Find(*this, "query_cache"));
    OP_REQUIRES_OK(ctx, softmax_.Find(*this, "softmax"));
    OP_REQUIRES_OK(ctx, weighted_sum_.Find(*this, "weighted_sum"));
    OP_REQUIRES_OK(ctx, made_with_.Find(*this, "made_with"));
    OP_REQUIRES_OK(ctx, output_.Find(*this, "output"));
    OP_REQUIRES_OK(ctx, steps_taken_.Find(*this, "steps_taken"));
  }

  void Compute(tensorflow::OpKernelContext* ctx) override { OP_REQUIRES_OK(ctx, Run(ctx)); }

 private:
  // The variables that only this op has.
  struct RowVariables {
    VariablePtr query_cache, softmax, weighted_sum, made_with;
  };

  absl::Status Run(tensorflow::OpKernelContext* ctx) const {
    Device device(ctx, &kept_);
    RingInputs::Variables rings;
    RowVariables rows;
    TF_RETURN_IF_ERROR(inputs_.GetVariables(ctx, &rings));
    TF_RETURN_IF_ERROR(query_cache_.GetVariable(ctx, &rows.query_cache));
    TF_RETURN_IF_ERROR(softmax_.GetVariable(ctx, &rows.softmax));
    TF_RETURN_IF_ERROR(weighted_sum_.GetVariable(ctx, &rows.weighted_sum));
    TF_RETURN_IF_ERROR(made_with_.GetVariable(ctx, &rows.made_with));
    AttentionState state = inputs_.State(device.memory());
    TF_RETURN_IF_ERROR(state.Lock(CacheOf(rings), kDataType<T>,
                                  {{rows.query_cache.get(), "query_cache", kDataType<T>},
                                   {rows.softmax.get(), "softmax", tensorflow::DT_DOUBLE},
                                   {rows.weighted_sum.get(), "weighted_sum", tensorflow::DT_DOUBLE},
                                   {rows.made_with.get(), "made_with", tensorflow::DT_DOUBLE}}));
    RetroactiveParams<T> params = {};
    TF_RETURN_IF_ERROR(inputs_.Fill(ctx, &state, &params));
    TF_RETURN_IF_ERROR(FillRows(rows, state.held(), &params));
    tensorflow::Tensor *output, *steps_taken;
    const int64_t m = params.num_streams, t = params.num_steps, h = params.num_heads;
    const int64_t n = params.window, dv = params.value_dim;
    TF_RETURN_IF_ERROR(output_.Allocate(ctx, {m, t, h, n, dv}, &output));
    TF_RETURN_IF_ERROR(steps_taken_.Allocate(ctx, {m}, &steps_taken));
    params.output = Data<T>(output);
    params.output_strides = BatchTimeHead(t, h, n * dv);
    params.output_row_stride = dv;
    return device.Take(params, &inputs_.streams(ctx), steps_taken->flat<int64_t>().data(), &state);
  }

  absl::Status FillRows(const RowVariables& rows, int64_t held, RetroactiveParams<T>* p) const {
    tensorflow::Tensor *query = rows.query_cache->tensor(), *softmax = rows.softmax->tensor();
    tensorflow::Tensor *weighted_sum = rows.weighted_sum->tensor(),
                       *made_with = rows.made_with->tensor();
    const int64_t h = p->num_heads, n = p->window;
    const RingOrder& order = inputs_.order();
    TF_RETURN_IF_ERROR(ExpectShape("query_cache", *query, order.Shape(held, h, n, p->key_dim)));
    TF_RETURN_IF_ERROR(ExpectShape("softmax", *softmax, {held, h, 4, n}));
    TF_RETURN_IF_ERROR(ExpectShape("weighted_sum", *weighted_sum, {held, h, n, p->value_dim}));
    TF_RETURN_IF_ERROR(ExpectShape("made_with", *made_with, {held, 2}));
    p->query_cache = Data<T>(query);
    p->query_cache_strides = order.RingStrides(h, n, p->key_dim);
    p->softmax = Data<double>(softmax);
    p->weighted_sum = Data<double>(weighted_sum);
    p->made_with = Data<double>(made_with);
    p->recompute =
        algorithm_ == "recompute" || (algorithm_ == "auto" && Device::RecomputingIsFaster(*p));
    return absl::OkStatus();
  }

  mutable typename Device::Kept kept_;
  std::string algorithm_;
  RingInputs inputs_;
  OpInput query_cache_, softmax_, weighted_sum_, made_with_;
  OpOutput output_, steps_taken_;
};

}  // namespace continual_transformers

#endif  // CONTINUAL_TRANSFORMERS_TENSORFLOW_RETROACTIVE_OP_H_
