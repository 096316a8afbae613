// CoSiMultiHeadAttentionStep's kernel: check everything, allocate, call, and only then let the
// streams' positions advance. Whatever fails, fails before any state has changed.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>

#include "absl/container/inlined_vector.h"
#include "absl/status/status.h"
#include "cc/attention/co_si_mha_step.h"
#include "cc/attention/half.h"
#include "cc/tensorflow/bound_variables.h"
#include "cc/tensorflow/inputs.h"
#include "cc/tensorflow/threads.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "tensorflow/core/framework/resource_var.h"

namespace continual_transformers {
namespace {

using absl::Status;
using tensorflow::DataType;
using tensorflow::DataTypeString;
using tensorflow::OpInputList;
using tensorflow::OpKernel;
using tensorflow::OpKernelConstruction;
using tensorflow::OpKernelContext;
using tensorflow::Tensor;
using tensorflow::TensorShape;
using tensorflow::Var;

// The op's attributes: which variables there are, and what is wanted.
struct Options {
  bool use_bias, use_gate, use_delay, return_attention_scores, update_state;
  int64_t first_step;

  int rings() const { return use_delay ? (use_gate ? 3 : 2) : 0; }
  int weights_per_layer() const { return use_bias ? 2 : 1; }
  int layers() const { return use_gate ? 5 : 4; }
  int variables() const { return kCache + rings() + layers() * weights_per_layer(); }

  static constexpr int kCache = 4;
};

Status ExpectDtype(const char* name, const Tensor& tensor, DataType dtype) {
  if (tensor.dtype() == dtype) return absl::OkStatus();
  return InvalidArgument("expected ", name, " of ", DataTypeString(dtype), ", but got ",
                         DataTypeString(tensor.dtype()));
}

// One call of the op, once it is known what keys and values (C) and kernels (W) are kept in.
template <typename T, typename C, typename W>
class Call {
 public:
  Call(OpKernelContext* ctx, const Options& options, const VariablesOfInput& variables)
      : ctx_(ctx), options_(options), variables_(variables), attention_(step_.attention) {}

  Status Run() {
    TF_RETURN_IF_ERROR(ReadWeights());
    TF_RETURN_IF_ERROR(LockState());
    TensorShape result_shape;
    TF_RETURN_IF_ERROR(FillInputs(&result_shape));
    const bool has_outputs = HasOutputs();
    const int64_t rows = has_outputs ? attention_.num_streams : 0;
    result_shape.InsertDim(0, rows);
    Tensor* result;
    TF_RETURN_IF_ERROR(ctx_->allocate_output(0, result_shape, &result));
    step_.result = has_outputs ? result->flat<T>().data() : nullptr;
    if (options_.return_attention_scores) {
      const int64_t h = attention_.num_heads, n = attention_.window;
      Tensor* scores;
      TF_RETURN_IF_ERROR(ctx_->allocate_output(1, {rows, h, n}, &scores));
      attention_.scores = has_outputs ? scores->flat<T>().data() : nullptr;
      attention_.scores_strides = BatchHeadTime(h, 1, n);
    }
    TakeCoSiMhaStep(step_, ThreadsOf(ctx_));
    state_.Advance(attention_);
    return absl::OkStatus();
  }

 private:
  // As they are when the step begins: who assigns to one meanwhile writes into another buffer.
  Status ReadWeights() {
    for (int i = Options::kCache + options_.rings(); i < variables_.size(); ++i) {
      tensorflow::tf_shared_lock lock(*variables_[i]->mu());
      if (!variables_[i]->is_initialized) {
        return InvalidArgument("expected initialized weights, but one is not");
      }
      weights_.push_back(*variables_[i]->tensor());
    }
    return absl::OkStatus();
  }

  Status LockState() {
    static constexpr const char* kNames[] = {"query ring", "query mask ring", "gate ring"};
    absl::InlinedVector<LockedVariables::Variable, 3> rings;
    for (int i = 0; i < options_.rings(); ++i) {
      rings.push_back({variables_[Options::kCache + i], kNames[i],
                       i == 1 ? tensorflow::DT_BOOL : kDataType<T>});
    }
    return state_.Lock({variables_[0], variables_[1], variables_[2], variables_[3]}, kDataType<C>,
                       rings);
  }

  Status FillInputs(TensorShape* result_shape) {
    const Tensor& query = ctx_->input(0);
    OpInputList values, keys, streams;
    TF_RETURN_IF_ERROR(ctx_->input_list("value", &values));
    TF_RETURN_IF_ERROR(ctx_->input_list("key", &keys));
    TF_RETURN_IF_ERROR(ctx_->input_list("streams", &streams));
    if (values.size() > 1 || keys.size() > 1 || streams.size() > 1) {
      return InvalidArgument("expected at most one value, one key and one streams, but got ",
                             values.size(), ", ", keys.size(), " and ", streams.size());
    }
    const Tensor& value = values.size() == 1 ? values[0] : query;
    const Tensor& key = keys.size() == 1 ? keys[0] : value;
    TF_RETURN_IF_ERROR(ExpectRank("query", query, 2, "[M, E]"));
    TF_RETURN_IF_ERROR(ExpectRank("value_cache", *state_.value(), 4, "[S, H, N, Dv]"));
    auto& p = attention_;
    const int64_t m = p.num_streams = query.dim_size(0);
    const int64_t h = p.num_heads = state_.key()->dim_size(1);
    p.num_steps = 1;
    p.window = state_.key()->dim_size(2);
    const int64_t d = p.key_dim = state_.key()->dim_size(3);
    const int64_t dv = p.value_dim = state_.value()->dim_size(3);
    p.scale = static_cast<T>(1 / std::sqrt(static_cast<double>(d)));
    p.update_state = options_.update_state;

    TF_RETURN_IF_ERROR(FillProjection("query", query, 0, h, d, &step_.query));
    TF_RETURN_IF_ERROR(FillProjection("key", key, 1, h, d, &step_.key));
    TF_RETURN_IF_ERROR(FillProjection("value", value, 2, h, dv, &step_.value));
    if (options_.use_gate) {
      TF_RETURN_IF_ERROR(FillProjection("query", query, 3, h, dv, &step_.gate));
    }
    TF_RETURN_IF_ERROR(FillOutput(h, dv, result_shape));

    if (streams.size() == 0) {
      TF_RETURN_IF_ERROR(ctx_->allocate_temp(tensorflow::DT_INT32, {m}, &first_streams_));
      int32_t* first = first_streams_.flat<int32_t>().data();
      std::iota(first, first + m, 0);
    }
    TF_RETURN_IF_ERROR(state_.Fill(streams.size() == 0 ? first_streams_ : streams[0], &p));
    TF_RETURN_IF_ERROR(FillAttentionMask(ctx_, &p));
    TF_RETURN_IF_ERROR(FillMask(ctx_, "key_mask", {m}, &p.key_mask));
    TF_RETURN_IF_ERROR(FillMask(ctx_, "query_mask", {m}, &step_.query_mask));
    return options_.use_delay ? FillDelayRings() : absl::OkStatus();
  }

  // Whether any of the streams has come as far as the first step that is to have an output.
  bool HasOutputs() const {
    int64_t furthest = 0;
    for (int64_t m = 0; m < attention_.num_streams; ++m) {
      furthest = std::max(furthest, attention_.position[attention_.streams[m]] + 1);
    }
    return furthest >= options_.first_step;
  }

  const Tensor& Kernel(int layer) const { return weights_[layer * options_.weights_per_layer()]; }

  // The weights of a layer that takes x [M, features] to [M, heads, size].
  Status FillProjection(const char* name, const Tensor& x, int layer, int64_t heads, int64_t size,
                        Projection<T, W>* projection) const {
    const Tensor& kernel = Kernel(layer);
    TF_RETURN_IF_ERROR(ExpectDtype("kernels", kernel, kDataType<W>));
    TF_RETURN_IF_ERROR(ExpectRank("kernels", kernel, 3, "[features, H, D or Dv]"));
    const int64_t features = kernel.dim_size(0);
    TF_RETURN_IF_ERROR(ExpectShape("a kernel", kernel, {features, heads, size}));
    TF_RETURN_IF_ERROR(ExpectShape(name, x, {attention_.num_streams, features}));
    *projection = {x.flat<T>().data(), Data<W>(kernel), nullptr, features};
    return FillBias(layer, {heads, size}, &projection->bias);
  }

  Status FillOutput(int64_t heads, int64_t size, TensorShape* features) {
    const int layer = options_.layers() - 1;
    const Tensor& kernel = Kernel(layer);
    TF_RETURN_IF_ERROR(ExpectDtype("kernels", kernel, kDataType<W>));
    for (int axis = 2; axis < kernel.dims(); ++axis) features->AddDim(kernel.dim_size(axis));
    TensorShape expected = {heads, size};
    expected.AppendShape(*features);
    TF_RETURN_IF_ERROR(ExpectShape("the output's kernel", kernel, expected));
    step_.output = {nullptr, Data<W>(kernel), nullptr, heads * size};
    step_.output_features = features->num_elements();
    return FillBias(layer, *features, &step_.output.bias);
  }

  Status FillBias(int layer, const TensorShape& expected, const T** data) const {
    if (!options_.use_bias) return absl::OkStatus();
    const Tensor& bias = weights_[layer * options_.weights_per_layer() + 1];
    TF_RETURN_IF_ERROR(ExpectDtype("biases", bias, kDataType<T>));
    TF_RETURN_IF_ERROR(ExpectShape("a bias", bias, expected));
    *data = bias.flat<T>().data();
    return absl::OkStatus();
  }

  Status FillDelayRings() {
    const auto& p = attention_;
    const int64_t held = state_.key()->dim_size(0);
    const auto ring = [&](int i) { return variables_[Options::kCache + i]->tensor(); };
    TF_RETURN_IF_ERROR(ExpectRank("query mask ring", *ring(1), 2, "[S, delay]"));
    const int64_t delay = step_.delay = ring(1)->dim_size(1);
    if (delay < 1) return InvalidArgument("expected a delay >= 1, but got ", delay);
    TF_RETURN_IF_ERROR(ExpectShape("query mask ring", *ring(1), {held, delay}));
    TF_RETURN_IF_ERROR(ExpectShape("query ring", *ring(0), {held, delay, p.num_heads, p.key_dim}));
    step_.query_ring = ring(0)->template flat<T>().data();
    step_.query_mask_ring = ring(1)->template flat<bool>().data();
    if (!options_.use_gate) return absl::OkStatus();
    TF_RETURN_IF_ERROR(ExpectShape("gate ring", *ring(2), {held, delay, p.num_heads, p.value_dim}));
    step_.gate_ring = ring(2)->template flat<T>().data();
    return absl::OkStatus();
  }

  OpKernelContext* ctx_;
  const Options& options_;
  const VariablesOfInput& variables_;
  absl::InlinedVector<Tensor, 10> weights_;
  Tensor first_streams_;
  CoSiMhaStep<T, C, W> step_ = {};
  SingleOutputParams<T, C>& attention_;
  AttentionState state_;
};

template <typename T>
class CoSiMultiHeadAttentionStepOp : public OpKernel {
 public:
  explicit CoSiMultiHeadAttentionStepOp(OpKernelConstruction* ctx) : OpKernel(ctx) {
    OP_REQUIRES_OK(ctx, ExpectTarget());
    OP_REQUIRES_OK(ctx, ctx->GetAttr("use_bias", &options_.use_bias));
    OP_REQUIRES_OK(ctx, ctx->GetAttr("use_gate", &options_.use_gate));
    OP_REQUIRES_OK(ctx, ctx->GetAttr("use_delay", &options_.use_delay));
    OP_REQUIRES_OK(ctx, ctx->GetAttr("first_step", &options_.first_step));
    OP_REQUIRES_OK(ctx, ctx->GetAttr("update_state", &options_.update_state));
    int scores;
    OP_REQUIRES_OK(ctx, ctx->GetAttr("num_scores", &scores));
    OP_REQUIRES(ctx, scores <= 1, InvalidArgument("expected num_scores 0 or 1, but got ", scores));
    options_.return_attention_scores = scores == 1;
  }

  void Compute(OpKernelContext* ctx) override {
    VariablesOfInput variables;
    OP_REQUIRES_OK(ctx, variables.Look(ctx, "variables"));
    OP_REQUIRES(ctx, variables.size() == options_.variables(),
                InvalidArgument("expected ", options_.variables(), " variables, but got ",
                                variables.size()));
    OP_REQUIRES_OK(ctx, Run(ctx, variables));
  }

 private:
  // What keys, values and kernels are kept in is seen from the variables: a type attribute each
  // would be more for an eager call to set up.
  Status Run(OpKernelContext* ctx, const VariablesOfInput& variables) const {
    const auto dtype_of = [&](int i) {
      tensorflow::tf_shared_lock lock(*variables[i]->mu());
      return variables[i]->tensor()->dtype();
    };
    const DataType cache = dtype_of(0);
    const DataType kernel = dtype_of(Options::kCache + options_.rings());
    const auto run = [&](auto c, auto w) {
      return Call<T, decltype(c), decltype(w)>(ctx, options_, variables).Run();
    };
    if (cache == kDataType<T> && kernel == kDataType<T>) return run(T(), T());
    if constexpr (std::is_same_v<T, float>) {
      const bool narrow = kernel == tensorflow::DT_BFLOAT16;
      if (narrow || kernel == tensorflow::DT_FLOAT) {
        switch (cache) {
          case tensorflow::DT_FLOAT:
            return run(T(), BFloat16());
          case tensorflow::DT_BFLOAT16:
            return narrow ? run(BFloat16(), BFloat16()) : run(BFloat16(), T());
          case tensorflow::DT_HALF:
            return narrow ? run(Float16(), BFloat16()) : run(Float16(), T());
          default:
            break;
        }
      }
    }
    return InvalidArgument(
        "expected keys and values of float, bfloat16 or half and kernels of float or bfloat16 "
        "under float, or all of double under double, but got ",
        DataTypeString(cache), " and ", DataTypeString(kernel), " under ",
        DataTypeString(kDataType<T>));
  }

  Options options_;
};

#define REGISTER_CPU(T)                                                            \
  REGISTER_KERNEL_BUILDER(Name("ContinualTransformers>CoSiMultiHeadAttentionStep") \
                              .Device(tensorflow::DEVICE_CPU)                      \
                              .TypeConstraint<T>("T"),                             \
                          CoSiMultiHeadAttentionStepOp<T>)
REGISTER_CPU(float);
REGISTER_CPU(double);
#undef REGISTER_CPU

}  // namespace
}  // namespace continual_transformers
