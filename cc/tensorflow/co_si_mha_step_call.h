// A call that takes a step of a multi-head attention layer, on a device; see cpu_device.h. It
// checks everything and allocates. Only then does the device take the step, so an op that fails
// changes no state. CoSiMultiHeadAttentionStep is such a call, and CoSiTransformerEncoderStep
// contains one.

#ifndef CONTINUAL_TRANSFORMERS_TENSORFLOW_CO_SI_MHA_STEP_CALL_H_
#define CONTINUAL_TRANSFORMERS_TENSORFLOW_CO_SI_MHA_STEP_CALL_H_

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>

#include "absl/container/inlined_vector.h"
#include "absl/status/status.h"
#include "cc/attention/co_si_mha_step.h"
#include "cc/attention/step_types.h"
#include "cc/tensorflow/attention_state.h"
#include "cc/tensorflow/co_si_mha_step_options.h"
#include "cc/tensorflow/dtypes.h"
#include "cc/tensorflow/expect.h"
#include "cc/tensorflow/masks.h"
#include "cc/tensorflow/op_io.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "tensorflow/core/framework/resource_var.h"
#include "tensorflow/core/framework/tensor.h"
#include "tensorflow/core/framework/types.h"

namespace continual_transformers {

// Null: not given. The query is always given.
struct CoSiMhaStepInputs {
  const tensorflow::Tensor *query, *value, *key, *streams, *attention_mask, *query_mask, *key_mask;
};

// The input `variables`.
class StepVariables {
 public:
  absl::Status Get(tensorflow::OpKernelContext* ctx, const OpInput& input, int expected) {
    if (input.size() != expected) {
      return InvalidArgument("expected ", expected, " variables, but got ", input.size());
    }
    variables_.resize(expected);
    for (int i = 0; i < expected; ++i) {
      TF_RETURN_IF_ERROR(input.GetVariable(ctx, &variables_[i], i));
    }
    return absl::OkStatus();
  }

  int size() const { return variables_.size(); }
  tensorflow::Var* operator[](int i) const { return variables_[i].get(); }
  tensorflow::DataType DtypeOf(int i) const {
    tensorflow::tf_shared_lock lock(*variables_[i]->mu());
    return variables_[i]->tensor()->dtype();
  }

 private:
  absl::InlinedVector<VariablePtr, 16> variables_;
};

template <typename Device, typename T, typename C, typename W>
class CoSiMhaStepCall {
 public:
  CoSiMhaStepCall(const CoSiMhaStepOptions& options, const CoSiMhaStepInputs& inputs,
                  const StepVariables& variables, Device* device)
      : options_(options),
        inputs_(inputs),
        variables_(variables),
        device_(device),
        attention_(step_.attention),
        state_({options.sequence_first}, options.advance_position, device->memory()) {}

  // Checks everything, locks the state until this goes out of scope, and allocates the outputs.
  absl::Status Prepare(tensorflow::OpKernelContext* ctx, const OpOutput& result_output,
                       const OpOutput& scores_output) {
    TF_RETURN_IF_ERROR(ReadWeights());
    TF_RETURN_IF_ERROR(LockState());
    tensorflow::TensorShape result_shape;
    TF_RETURN_IF_ERROR(FillInputs(&result_shape));
    bool has_outputs;
    TF_RETURN_IF_ERROR(HasOutputs(&has_outputs));
    const int64_t rows = has_outputs ? attention_.num_streams : 0;
    result_shape.InsertDim(0, rows);
    tensorflow::Tensor* result;
    TF_RETURN_IF_ERROR(result_output.Allocate(ctx, result_shape, &result));
    step_.result = has_outputs ? Data<T>(result) : nullptr;
    if (!options_.return_attention_scores) return absl::OkStatus();
    const int64_t h = attention_.num_heads, n = attention_.window;
    tensorflow::Tensor* scores;
    TF_RETURN_IF_ERROR(scores_output.Allocate(ctx, {rows, h, n}, &scores));
    attention_.scores = has_outputs ? Data<T>(scores) : nullptr;
    attention_.scores_strides = BatchHeadTime(h, 1, n);
    return absl::OkStatus();
  }

  const CoSiMhaStep<T, C, W>& step() const { return step_; }
  const tensorflow::Tensor* streams() const { return streams_; }
  AttentionState* state() { return &state_; }

  // Returns variable i, which is a weight.
  const tensorflow::Tensor& weight(int i) const { return weights_[i - options_.kernel(0)]; }

 private:
  using Options = CoSiMhaStepOptions;

  // Takes the weights as they are when the step begins. An assignment during the step writes to
  // another buffer.
  absl::Status ReadWeights() {
    for (int i = options_.kernel(0); i < variables_.size(); ++i) {
      tensorflow::tf_shared_lock lock(*variables_[i]->mu());
      if (!variables_[i]->is_initialized) {
        return InvalidArgument("expected initialized weights, but one is not");
      }
      weights_.push_back(*variables_[i]->tensor());
    }
    return absl::OkStatus();
  }

  absl::Status LockState() {
    static constexpr const char* kNames[] = {"query ring", "query mask ring", "gate ring"};
    absl::InlinedVector<LockedVariables::Variable, 3> rings;
    for (int i = 0; i < options_.rings(); ++i) {
      const auto ring = static_cast<Options::Ring>(i);
      const bool is_mask = ring == Options::kQueryMaskRing;
      rings.push_back({variables_[options_.ring(ring)], kNames[ring],
                       is_mask ? tensorflow::DT_BOOL : kDataType<T>});
    }
    return state_.Lock({variables_[Options::kKeyCache], variables_[Options::kValueCache],
                        variables_[Options::kKeyMaskCache], variables_[Options::kPosition]},
                       kDataType<C>, rings);
  }

  absl::Status FillInputs(tensorflow::TensorShape* result_shape) {
    const tensorflow::Tensor& query = *inputs_.query;
    const tensorflow::Tensor& value = inputs_.value == nullptr ? query : *inputs_.value;
    const tensorflow::Tensor& key = inputs_.key == nullptr ? value : *inputs_.key;
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

    TF_RETURN_IF_ERROR(FillProjection("query", query, Options::kQueryLayer, h, d, &step_.query));
    TF_RETURN_IF_ERROR(FillProjection("key", key, Options::kKeyLayer, h, d, &step_.key));
    TF_RETURN_IF_ERROR(FillProjection("value", value, Options::kValueLayer, h, dv, &step_.value));
    if (options_.use_gate) {
      TF_RETURN_IF_ERROR(FillProjection("query", query, Options::kGateLayer, h, dv, &step_.gate));
    }
    TF_RETURN_IF_ERROR(FillOutput(h, dv, result_shape));

    streams_ = inputs_.streams;
    if (streams_ == nullptr && device_->memory() == nullptr) {
      first_streams_ = tensorflow::Tensor(tensorflow::DT_INT32, {m});
      int32_t* first = Data<int32_t>(&first_streams_);
      std::iota(first, first + m, 0);
      streams_ = &first_streams_;
    }
    TF_RETURN_IF_ERROR(state_.Fill(streams_, &p));
    TF_RETURN_IF_ERROR(FillAttentionMask(inputs_.attention_mask, &p));
    TF_RETURN_IF_ERROR(FillMask("key_mask", inputs_.key_mask, {m}, &p.key_mask));
    TF_RETURN_IF_ERROR(FillMask("query_mask", inputs_.query_mask, {m}, &step_.query_mask));
    return options_.use_delay ? FillDelayRings() : absl::OkStatus();
  }

  // Sets whether one of the streams has come to the first step that has an output. If every step
  // has one, positions are not read: on a GPU, the host would wait for them.
  absl::Status HasOutputs(bool* has_outputs) {
    *has_outputs = true;
    if (options_.first_step <= 1) return absl::OkStatus();
    const int64_t count = attention_.num_streams;
    const int32_t* streams = streams_ == nullptr ? nullptr : Data<int32_t>(*streams_);
    int64_t first = 0, end = count;
    if (streams != nullptr && count > 0) {
      const auto [lowest, highest] = std::minmax_element(streams, streams + count);
      first = *lowest;
      end = *highest + int64_t{1};
    }
    const int64_t* positions;
    TF_RETURN_IF_ERROR(device_->Positions(&state_, first, end - first, &positions));
    int64_t furthest = 0;
    for (int64_t m = 0; m < count; ++m) {
      furthest = std::max(furthest, positions[streams == nullptr ? m : streams[m] - first] + 1);
    }
    *has_outputs = furthest >= options_.first_step;
    return absl::OkStatus();
  }

  // The weights of a layer that takes x [M, features] to [M, heads, size].
  absl::Status FillProjection(const char* name, const tensorflow::Tensor& x, int layer,
                              int64_t heads, int64_t size, Projection<T, W>* projection) const {
    const tensorflow::Tensor& kernel = weight(options_.kernel(layer));
    TF_RETURN_IF_ERROR(ExpectDtype("kernels", kernel, kDataType<W>));
    TF_RETURN_IF_ERROR(ExpectRank("kernels", kernel, 3, "[features, H, D or Dv]"));
    const int64_t features = kernel.dim_size(0);
    TF_RETURN_IF_ERROR(ExpectShape("a kernel", kernel, {features, heads, size}));
    TF_RETURN_IF_ERROR(ExpectShape(name, x, {attention_.num_streams, features}));
    *projection = {Data<T>(x), Data<W>(kernel), nullptr, features};
    return FillBias(layer, {heads, size}, &projection->bias);
  }

  absl::Status FillOutput(int64_t heads, int64_t size, tensorflow::TensorShape* features) {
    const int layer = options_.output_layer();
    const tensorflow::Tensor& kernel = weight(options_.kernel(layer));
    TF_RETURN_IF_ERROR(ExpectDtype("kernels", kernel, kDataType<W>));
    for (int axis = 2; axis < kernel.dims(); ++axis) features->AddDim(kernel.dim_size(axis));
    tensorflow::TensorShape expected = {heads, size};
    expected.AppendShape(*features);
    TF_RETURN_IF_ERROR(ExpectShape("the output's kernel", kernel, expected));
    step_.output = {nullptr, Data<W>(kernel), nullptr, heads * size};
    step_.output_features = features->num_elements();
    return FillBias(layer, *features, &step_.output.bias);
  }

  absl::Status FillBias(int layer, const tensorflow::TensorShape& expected, const T** data) const {
    if (!options_.use_bias) return absl::OkStatus();
    const tensorflow::Tensor& bias = weight(options_.bias(layer));
    TF_RETURN_IF_ERROR(ExpectDtype("biases", bias, kDataType<T>));
    TF_RETURN_IF_ERROR(ExpectShape("a bias", bias, expected));
    *data = Data<T>(bias);
    return absl::OkStatus();
  }

  absl::Status FillDelayRings() {
    const auto& p = attention_;
    const auto ring = [&](Options::Ring ring) { return variables_[options_.ring(ring)]->tensor(); };
    tensorflow::Tensor* const queries = ring(Options::kQueryRing);
    tensorflow::Tensor* const masks = ring(Options::kQueryMaskRing);
    TF_RETURN_IF_ERROR(ExpectRank("query mask ring", *masks, 2, "[S, delay]"));
    const int64_t held = state_.held(), delay = step_.delay = masks->dim_size(1);
    if (delay < 1) return InvalidArgument("expected a delay >= 1, but got ", delay);
    TF_RETURN_IF_ERROR(ExpectShape("query mask ring", *masks, {held, delay}));
    TF_RETURN_IF_ERROR(ExpectShape("query ring", *queries, {held, delay, p.num_heads, p.key_dim}));
    step_.query_ring = Data<T>(queries);
    step_.query_mask_ring = Data<bool>(masks);
    if (!options_.use_gate) return absl::OkStatus();
    tensorflow::Tensor* const gates = ring(Options::kGateRing);
    TF_RETURN_IF_ERROR(ExpectShape("gate ring", *gates, {held, delay, p.num_heads, p.value_dim}));
    step_.gate_ring = Data<T>(gates);
    return absl::OkStatus();
  }

  const CoSiMhaStepOptions& options_;
  const CoSiMhaStepInputs& inputs_;
  const StepVariables& variables_;
  Device* const device_;
  absl::InlinedVector<tensorflow::Tensor, 10> weights_;
  const tensorflow::Tensor* streams_ = nullptr;
  tensorflow::Tensor first_streams_;
  CoSiMhaStep<T, C, W> step_ = {};
  SingleOutputParams<T, C>& attention_;
  AttentionState state_;
};

// Returns run(call) for a call of the types of the query, of the cache and of the kernels.
template <typename Device, typename F>
absl::Status RunCoSiMhaStep(const CoSiMhaStepOptions& options, const CoSiMhaStepInputs& inputs,
                            const StepVariables& variables, Device* device, const F& run) {
  const tensorflow::DataType compute = inputs.query->dtype(),
                             cache = variables.DtypeOf(CoSiMhaStepOptions::kKeyCache);
  const tensorflow::DataType weights = variables.DtypeOf(options.kernel(0));
#define TRY(T, C, W)                                                                 \
  if (compute == kDataType<T> && cache == kDataType<C> && weights == kDataType<W>) { \
    CoSiMhaStepCall<Device, T, C, W> call(options, inputs, variables, device);       \
    return run(&call);                                                               \
  }
  CONTINUAL_TRANSFORMERS_FOR_STEP_TYPES(TRY)
#undef TRY
  using tensorflow::DataTypeString;
  return InvalidArgument(
      "expected keys and values of float, bfloat16 or half and kernels of float or bfloat16 under "
      "float, or all of double under double, but got ",
      DataTypeString(cache), " and ", DataTypeString(weights), " under ", DataTypeString(compute));
}

}  // namespace continual_transformers

#endif  // CONTINUAL_TRANSFORMERS_TENSORFLOW_CO_SI_MHA_STEP_CALL_H_
