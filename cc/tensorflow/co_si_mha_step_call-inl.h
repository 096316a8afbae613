// CallCoSiMhaStep on a device: what its .cc files instantiate. A `Device` has
//
//   DeviceMemory* memory();    whose memory all but streams lie in; null: the host's
//   Status Positions(AttentionState*, const int64_t**);   of all streams, for the host to see
//   Status Take(const Step&, const Tensor* streams, AttentionState*);   of CoSiMhaStep and
//       CoSiEncoderStep: takes the step, and lets positions advance; `streams` may be null where
//       memory() is not, and row m then is stream m

#ifndef CONTINUAL_TRANSFORMERS_TENSORFLOW_CO_SI_MHA_STEP_CALL_INL_H_
#define CONTINUAL_TRANSFORMERS_TENSORFLOW_CO_SI_MHA_STEP_CALL_INL_H_

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>

#include "absl/container/inlined_vector.h"
#include "absl/status/status.h"
#include "cc/attention/co_si_encoder_step.h"
#include "cc/attention/co_si_mha_step.h"
#include "cc/attention/half.h"
#include "cc/tensorflow/co_si_mha_step_call.h"
#include "cc/tensorflow/inputs.h"
#include "tensorflow/core/framework/resource_var.h"

namespace continual_transformers {
namespace co_si_mha_step_call {

using absl::Status;
using tensorflow::DataType;
using tensorflow::DataTypeString;
using tensorflow::Tensor;
using tensorflow::TensorShape;

inline Status NoKernel(DataType compute, DataType cache, DataType kernel) {
  return InvalidArgument(
      "expected keys and values of float, bfloat16 or half and kernels of float or bfloat16 under "
      "float, or all of double under double, but got ",
      DataTypeString(cache), " and ", DataTypeString(kernel), " under ", DataTypeString(compute));
}

inline Status ExpectDtype(const char* name, const Tensor& tensor, DataType dtype) {
  if (tensor.dtype() == dtype) return absl::OkStatus();
  return InvalidArgument("expected ", name, " of ", DataTypeString(dtype), ", but got ",
                         DataTypeString(tensor.dtype()));
}

// One call, once it is known what keys and values (C) and kernels (W) are kept in.
template <typename T, typename C, typename W, typename Device>
class Call {
 public:
  Call(const CoSiMhaStepOptions& options, const CoSiMhaStepInputs& inputs,
       const Variables& variables, Device* device)
      : options_(options),
        inputs_(inputs),
        variables_(variables),
        device_(device),
        attention_(step_.attention),
        state_({options.sequence_first}, device->memory()) {
    state_.set_advances(options.advance_position);
  }

  Status Run(tensorflow::OpKernelContext* ctx) {
    TF_RETURN_IF_ERROR(ReadWeights());
    TF_RETURN_IF_ERROR(LockState());
    TensorShape result_shape;
    TF_RETURN_IF_ERROR(FillInputs(&result_shape));
    bool has_outputs;
    TF_RETURN_IF_ERROR(HasOutputs(&has_outputs));
    const int64_t rows = has_outputs ? attention_.num_streams : 0;
    result_shape.InsertDim(0, rows);
    Tensor* result;
    TF_RETURN_IF_ERROR(ctx->allocate_output(0, result_shape, &result));
    step_.result = has_outputs ? result->flat<T>().data() : nullptr;
    if (options_.return_attention_scores) {
      const int64_t h = attention_.num_heads, n = attention_.window;
      Tensor* scores;
      TF_RETURN_IF_ERROR(ctx->allocate_output(1, {rows, h, n}, &scores));
      attention_.scores = has_outputs ? scores->flat<T>().data() : nullptr;
      attention_.scores_strides = BatchHeadTime(h, 1, n);
    }
    if (!options_.encoder.has_value()) return device_->Take(step_, streams_, &state_);
    CoSiEncoderStep<T, C, W> encoder = {};
    encoder.result = step_.result;
    TF_RETURN_IF_ERROR(FillEncoder(&encoder));
    return device_->Take(encoder, streams_, &state_);
  }

 private:
  // As they are when the step begins: who assigns to one meanwhile writes into another buffer.
  Status ReadWeights() {
    for (size_t i = CoSiMhaStepOptions::kCache + options_.rings(); i < variables_.size(); ++i) {
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
      rings.push_back({variables_[CoSiMhaStepOptions::kCache + i].get(), kNames[i],
                       i == 1 ? tensorflow::DT_BOOL : kDataType<T>});
    }
    return state_.Lock(
        {variables_[0].get(), variables_[1].get(), variables_[2].get(), variables_[3].get()},
        kDataType<C>, rings);
  }

  Status FillInputs(TensorShape* result_shape) {
    const Tensor& query = *inputs_.query;
    const Tensor& value = inputs_.value == nullptr ? query : *inputs_.value;
    const Tensor& key = inputs_.key == nullptr ? value : *inputs_.key;
    TF_RETURN_IF_ERROR(ExpectRank("query", query, 2, "[M, E]"));
    TF_RETURN_IF_ERROR(ExpectRank("value_cache", *state_.value(), 4, state_.order().axes()));
    auto& p = attention_;
    const int64_t m = p.num_streams = query.dim_size(0);
    const int64_t h = p.num_heads = state_.heads();
    p.num_steps = 1;
    p.window = state_.window();
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

    streams_ = inputs_.streams;
    if (streams_ == nullptr && device_->memory() == nullptr) {
      first_streams_ = Tensor(tensorflow::DT_INT32, {m});
      int32_t* first = first_streams_.flat<int32_t>().data();
      std::iota(first, first + m, 0);
      streams_ = &first_streams_;
    }
    TF_RETURN_IF_ERROR(state_.Fill(streams_, &p));
    TF_RETURN_IF_ERROR(FillAttentionMask(inputs_.attention_mask, &p));
    TF_RETURN_IF_ERROR(FillMask("key_mask", inputs_.key_mask, {m}, &p.key_mask));
    TF_RETURN_IF_ERROR(FillMask("query_mask", inputs_.query_mask, {m}, &step_.query_mask));
    return options_.use_delay ? FillDelayRings() : absl::OkStatus();
  }

  // Whether any of the streams has come as far as the first step that is to have an output. Where
  // every step has one, nobody asks for positions, for which the host would wait.
  Status HasOutputs(bool* has_outputs) {
    *has_outputs = true;
    if (options_.first_step <= 1) return absl::OkStatus();
    const int64_t* positions;
    TF_RETURN_IF_ERROR(device_->Positions(&state_, &positions));
    const int32_t* streams = streams_ == nullptr ? nullptr : streams_->flat<int32_t>().data();
    int64_t furthest = 0;
    for (int64_t m = 0; m < attention_.num_streams; ++m) {
      furthest = std::max(furthest, positions[streams == nullptr ? m : streams[m]] + 1);
    }
    *has_outputs = furthest >= options_.first_step;
    return absl::OkStatus();
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

  // What is round the attention, whose input and output have as many features: its norm, two dense
  // layers, and their norm.
  Status FillEncoder(CoSiEncoderStep<T, C, W>* encoder) const {
    const int64_t features = step_.query.inputs;
    const int first = options_.attention_weights();
    const Tensor &hidden = weights_[first + 2], &output = weights_[first + 4];
    for (const Tensor& kernel : {hidden, output}) {
      TF_RETURN_IF_ERROR(ExpectDtype("kernels", kernel, kDataType<W>));
    }
    TF_RETURN_IF_ERROR(ExpectRank("the hidden layer's kernel", hidden, 2, "[E, F]"));
    const int64_t width = hidden.dim_size(1);
    TF_RETURN_IF_ERROR(ExpectShape("the hidden layer's kernel", hidden, {features, width}));
    TF_RETURN_IF_ERROR(ExpectShape("the feed-forward kernel", output, {width, features}));
    const auto vector = [&](int i, int64_t size, const T** data) {
      const Tensor& tensor = weights_[first + i];
      TF_RETURN_IF_ERROR(ExpectDtype("biases and norms", tensor, kDataType<T>));
      TF_RETURN_IF_ERROR(ExpectShape("a bias or norm", tensor, {size}));
      *data = tensor.flat<T>().data();
      return absl::OkStatus();
    };
    encoder->hidden = {nullptr, Data<W>(hidden), nullptr, features};
    encoder->output = {nullptr, Data<W>(output), nullptr, width};
    encoder->hidden_features = width;
    TF_RETURN_IF_ERROR(vector(0, features, &encoder->attention_norm.scale));
    TF_RETURN_IF_ERROR(vector(1, features, &encoder->attention_norm.offset));
    TF_RETURN_IF_ERROR(vector(3, width, &encoder->hidden.bias));
    TF_RETURN_IF_ERROR(vector(5, features, &encoder->output.bias));
    TF_RETURN_IF_ERROR(vector(6, features, &encoder->output_norm.scale));
    TF_RETURN_IF_ERROR(vector(7, features, &encoder->output_norm.offset));
    const T epsilon = static_cast<T>(options_.encoder->epsilon);
    encoder->attention_norm.epsilon = encoder->output_norm.epsilon = epsilon;
    encoder->activation = options_.encoder->activation;
    encoder->norm_first = options_.encoder->norm_first;
    encoder->attention = step_;
    if (step_.output_features != features) {
      return InvalidArgument("expected attention from ", features, " features to as many, but got ",
                             step_.output_features);
    }
    return absl::OkStatus();
  }

  Status FillDelayRings() {
    const auto& p = attention_;
    const int64_t held = state_.key()->dim_size(0);
    const auto ring = [&](int i) { return variables_[CoSiMhaStepOptions::kCache + i]->tensor(); };
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

  const CoSiMhaStepOptions& options_;
  const CoSiMhaStepInputs& inputs_;
  const Variables& variables_;
  Device* const device_;
  absl::InlinedVector<Tensor, 10> weights_;
  const Tensor* streams_ = nullptr;
  Tensor first_streams_;
  CoSiMhaStep<T, C, W> step_ = {};
  SingleOutputParams<T, C>& attention_;
  AttentionState state_;
};

}  // namespace co_si_mha_step_call

// What keys, values and kernels are kept in is seen from the variables.
template <typename Device>
absl::Status CallCoSiMhaStep(Device* device, const CoSiMhaStepOptions& options,
                             const CoSiMhaStepInputs& inputs, const Variables& variables,
                             tensorflow::OpKernelContext* ctx) {
  using tensorflow::DataType;
  if (static_cast<int>(variables.size()) != options.variables()) {
    return InvalidArgument("expected ", options.variables(), " variables, but got ",
                           variables.size());
  }
  const auto dtype_of = [&](int i) {
    tensorflow::tf_shared_lock lock(*variables[i]->mu());
    return variables[i]->tensor()->dtype();
  };
  const DataType compute = inputs.query->dtype();
  const DataType cache = dtype_of(0);
  const DataType kernel = dtype_of(CoSiMhaStepOptions::kCache + options.rings());
  const auto run = [&](auto t, auto c, auto w) {
    using Call = co_si_mha_step_call::Call<decltype(t), decltype(c), decltype(w), Device>;
    return Call(options, inputs, variables, device).Run(ctx);
  };
  if (compute == tensorflow::DT_DOUBLE && cache == compute && kernel == compute) {
    return run(double(), double(), double());
  }
  if (compute == tensorflow::DT_FLOAT) {
    const auto run_with = [&](auto w) {
      switch (cache) {
        case tensorflow::DT_FLOAT:
          return run(float(), float(), w);
        case tensorflow::DT_BFLOAT16:
          return run(float(), BFloat16(), w);
        case tensorflow::DT_HALF:
          return run(float(), Float16(), w);
        default:
          return co_si_mha_step_call::NoKernel(compute, cache, kernel);
      }
    };
    if (kernel == tensorflow::DT_FLOAT) return run_with(float());
    if (kernel == tensorflow::DT_BFLOAT16) return run_with(BFloat16());
  }
  return co_si_mha_step_call::NoKernel(compute, cache, kernel);
}

}  // namespace continual_transformers

#endif  // CONTINUAL_TRANSFORMERS_TENSORFLOW_CO_SI_MHA_STEP_CALL_INL_H_
