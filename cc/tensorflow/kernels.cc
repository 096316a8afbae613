// The ops' kernels: check everything, allocate, share out over threads, call, and only then let the
// streams' positions advance. Whatever fails, fails before any state has changed.

#include <algorithm>
#include <array>
#include <cstdint>
#include <limits>

#include "absl/container/inlined_vector.h"
#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "cc/attention/half.h"
#include "cc/attention/params.h"
#include "cc/attention/single_output.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "tensorflow/core/framework/resource_mgr.h"
#include "tensorflow/core/framework/resource_var.h"
#include "tensorflow/core/framework/tensor_util.h"
#include "tensorflow/core/lib/core/threadpool.h"

namespace continual_transformers {
namespace {

using absl::Status;
using tensorflow::DataType;
using tensorflow::DataTypeString;
using tensorflow::DataTypeToEnum;
using tensorflow::OpInputList;
using tensorflow::OpKernel;
using tensorflow::OpKernelConstruction;
using tensorflow::OpKernelContext;
using tensorflow::Tensor;
using tensorflow::TensorShape;
using tensorflow::Var;
using tensorflow::core::RefCountPtr;
using SchedulingParams = tensorflow::thread::ThreadPool::SchedulingParams;

// Below this a call stays on its caller's thread. Two threads of a 2-core AMD Zen 4 took 210 us for
// 250,000 cycles of work where one took 126, came out even at 500,000, and took 290 against 425 at
// a million. ParallelFor by itself would share out from 200,000 on.
constexpr int64_t kCyclesWorthSharing = 500'000;

template <typename... Args>
Status InvalidArgument(const Args&... args) {
  return absl::InvalidArgumentError(absl::StrCat("SingleOutputAttention: ", args...));
}

// The variables of a cache, locked against every other op until this goes out of scope.
class LockedCache {
 public:
  LockedCache() = default;
  LockedCache(const LockedCache&) = delete;
  LockedCache& operator=(const LockedCache&) = delete;
  ~LockedCache() {
    for (Var* var : locked_) var->mu()->unlock();
  }

  // `dtype`: of keys and values.
  Status Lock(OpKernelContext* ctx, int first_input, DataType dtype) {
    const std::array<DataType, kVariables> dtypes = {dtype, dtype, tensorflow::DT_BOOL,
                                                     tensorflow::DT_INT64};
    for (int i = 0; i < kVariables; ++i) {
      TF_RETURN_IF_ERROR(LookupResource(ctx, HandleFromInput(ctx, first_input + i), &vars_[i]));
    }
    // In the order of their addresses, so that two ops on the same variables cannot each hold what
    // the other waits for. A variable given twice is locked once.
    std::array<Var*, kVariables> ordered;
    for (int i = 0; i < kVariables; ++i) ordered[i] = vars_[i].get();
    std::sort(ordered.begin(), ordered.end());
    const auto end = std::unique(ordered.begin(), ordered.end());
    for (auto var = ordered.begin(); var != end; ++var) {
      (*var)->mu()->lock();
      locked_.push_back(*var);
    }
    for (int i = 0; i < kVariables; ++i) TF_RETURN_IF_ERROR(PrepareInPlaceUpdate(dtypes[i], i));
    return absl::OkStatus();
  }

  Tensor* key() { return vars_[0]->tensor(); }
  Tensor* value() { return vars_[1]->tensor(); }
  Tensor* key_mask() { return vars_[2]->tensor(); }
  Tensor* position() { return vars_[3]->tensor(); }

 private:
  static constexpr int kVariables = 4;

  Status PrepareInPlaceUpdate(DataType dtype, int i) {
    static constexpr const char* kNames[] = {"key_cache", "value_cache", "key_mask_cache",
                                             "position"};
    Var* var = vars_[i].get();
    if (!var->is_initialized) {
      return InvalidArgument("expected initialized variables, but ", kNames[i], " is not");
    }
    if (var->tensor()->dtype() != dtype) {
      return InvalidArgument("expected ", kNames[i], " to hold ", DataTypeString(dtype),
                             ", but got ", DataTypeString(var->tensor()->dtype()));
    }
    // From now on whoever reads the variable gets a copy; one who holds its buffer keeps the values
    // as they were, in the old buffer.
    var->copy_on_read_mode.store(true);
    if (!var->tensor()->RefCountIsOne()) {
      *var->tensor() = tensorflow::tensor::DeepCopy(*var->tensor());
    }
    return absl::OkStatus();
  }

  std::array<RefCountPtr<Var>, kVariables> vars_;
  absl::InlinedVector<Var*, kVariables> locked_;
};

Status ExpectShape(const char* name, const Tensor& tensor, const TensorShape& expected) {
  if (tensor.shape() == expected) return absl::OkStatus();
  return InvalidArgument("expected ", name, " of shape ", expected.DebugString(), ", but got ",
                         tensor.shape().DebugString());
}

Status ExpectRank(const char* name, const Tensor& tensor, int rank, const char* axes) {
  if (tensor.dims() == rank) return absl::OkStatus();
  return InvalidArgument("expected ", name, " of rank ", rank, ", ", axes, ", but got ",
                         tensor.shape().DebugString());
}

// Each stream within the cache and named once: a stream twice in one call has no order of steps.
Status CheckStreams(const int32_t* streams, int64_t count, int64_t num_steps,
                    const int64_t* position, int64_t num_held) {
  bool ascending = true;
  for (int64_t m = 0; m < count; ++m) {
    if (streams[m] < 0 || streams[m] >= num_held) {
      return InvalidArgument("expected streams in [0, ", num_held,
                             "), the streams that are held, but got ", streams[m], " at index ", m,
                             ". (ensure_streams makes room for more.)");
    }
    const int64_t taken = position[streams[m]];
    if (taken < 0 || taken > std::numeric_limits<int64_t>::max() - num_steps) {
      return InvalidArgument("expected a position >= 0 with room for ", num_steps,
                             " more steps in 63 bits, but got ", taken, " for stream ", streams[m]);
    }
    ascending = ascending && (m == 0 || streams[m] > streams[m - 1]);
  }
  if (ascending) return absl::OkStatus();
  absl::InlinedVector<int32_t, 64> sorted(streams, streams + count);
  std::sort(sorted.begin(), sorted.end());
  const auto twice = std::adjacent_find(sorted.begin(), sorted.end());
  if (twice == sorted.end()) return absl::OkStatus();
  return InvalidArgument("expected each stream once in a call, but got ", *twice, " twice");
}

Strides BatchTimeHead(int64_t steps, int64_t heads, int64_t size) {
  return {/*stream=*/steps * heads * size, /*step=*/heads * size, /*head=*/size};
}

Strides BatchHeadTime(int64_t heads, int64_t steps, int64_t size) {
  return {/*stream=*/heads * steps * size, /*step=*/size, /*head=*/steps * size};
}

// How a type of a ring is called by TensorFlow; the bits are the same.
template <typename C>
struct TensorFlowType {
  using type = C;
};
template <>
struct TensorFlowType<BFloat16> {
  using type = Eigen::bfloat16;
};
template <>
struct TensorFlowType<Float16> {
  using type = Eigen::half;
};
template <typename C>
constexpr DataType kDataType = DataTypeToEnum<typename TensorFlowType<C>::type>::value;

template <typename C>
C* Data(Tensor* tensor) {
  return reinterpret_cast<C*>(tensor->flat<typename TensorFlowType<C>::type>().data());
}
template <typename C>
const C* Data(const Tensor& tensor) {
  return reinterpret_cast<const C*>(tensor.flat<typename TensorFlowType<C>::type>().data());
}

template <typename T, typename C>
class SingleOutputAttentionOp : public OpKernel {
 public:
  explicit SingleOutputAttentionOp(OpKernelConstruction* ctx) : OpKernel(ctx) {
    OP_REQUIRES_OK(ctx, ctx->GetAttr("return_attention_scores", &return_attention_scores_));
    OP_REQUIRES_OK(ctx, ctx->GetAttr("return_window", &return_window_));
    OP_REQUIRES_OK(ctx, ctx->GetAttr("update_state", &update_state_));
  }

  void Compute(OpKernelContext* ctx) override {
    LockedCache cache;
    OP_REQUIRES_OK(ctx, cache.Lock(ctx, 3, kDataType<C>));
    SingleOutputParams<T, C> params = {};
    OP_REQUIRES_OK(ctx, FillInputs(ctx, &cache, &params));
    Tensor* steps_taken = nullptr;
    OP_REQUIRES_OK(ctx, AllocateOutputs(ctx, &params, &steps_taken));

    const int64_t pairs = params.num_streams * params.num_heads;
    const int64_t cycles_per_pair = SingleOutputCyclesPerPair(params);
    if (pairs * cycles_per_pair < kCyclesWorthSharing) {
      SingleOutputAttention(params, 0, pairs);
    } else {
      auto* workers = ctx->device()->tensorflow_cpu_worker_threads()->workers;
      workers->ParallelFor(
          pairs, SchedulingParams::Adaptive(cycles_per_pair),
          [&params](int64_t begin, int64_t end) { SingleOutputAttention(params, begin, end); });
    }
    WriteKeyMask(params);

    auto position = cache.position()->template flat<int64_t>();
    for (int64_t m = 0; m < params.num_streams; ++m) {
      const int64_t taken = position(params.streams[m]) + params.num_steps;
      steps_taken->vec<int64_t>()(m) = taken;
      if (update_state_) position(params.streams[m]) = taken;
    }
  }

 private:
  Status FillInputs(OpKernelContext* ctx, LockedCache* cache, SingleOutputParams<T, C>* p) const {
    const Tensor& query = ctx->input(0);
    const Tensor& key = ctx->input(1);
    const Tensor& value = ctx->input(2);
    const Tensor& streams = ctx->input(7);
    const Tensor& scale = ctx->input(8);

    TF_RETURN_IF_ERROR(ExpectRank("query", query, 4, "[M, T, H, D]"));
    TF_RETURN_IF_ERROR(ExpectRank("value", value, 4, "[M, T, H, Dv]"));
    TF_RETURN_IF_ERROR(ExpectRank("key_cache", *cache->key(), 4, "[S, H, N, D]"));
    TF_RETURN_IF_ERROR(ExpectRank("streams", streams, 1, "[M]"));
    TF_RETURN_IF_ERROR(ExpectShape("scale", scale, {}));
    p->num_streams = query.dim_size(0);
    p->num_steps = query.dim_size(1);
    p->num_heads = query.dim_size(2);
    p->key_dim = query.dim_size(3);
    p->value_dim = value.dim_size(3);
    p->window = cache->key()->dim_size(2);
    const int64_t num_held = cache->key()->dim_size(0);
    const int64_t m = p->num_streams, t = p->num_steps, h = p->num_heads, n = p->window;
    const int64_t d = p->key_dim, dv = p->value_dim;
    if (t < 1 || h < 1 || n < 1 || d < 1 || dv < 1) {
      return InvalidArgument(
          "expected at least one step, head, feature and row of the window, "
          "but got query [M, T, H, D] = ",
          query.shape().DebugString(), ", value [M, T, H, Dv] = ", value.shape().DebugString(),
          " and key_cache [S, H, N, D] = ", cache->key()->shape().DebugString());
    }
    TF_RETURN_IF_ERROR(ExpectShape("key", key, {m, t, h, d}));
    TF_RETURN_IF_ERROR(ExpectShape("value", value, {m, t, h, dv}));
    TF_RETURN_IF_ERROR(ExpectShape("key_cache", *cache->key(), {num_held, h, n, d}));
    TF_RETURN_IF_ERROR(ExpectShape("value_cache", *cache->value(), {num_held, h, n, dv}));
    TF_RETURN_IF_ERROR(ExpectShape("key_mask_cache", *cache->key_mask(), {num_held, n}));
    TF_RETURN_IF_ERROR(ExpectShape("position", *cache->position(), {num_held}));
    TF_RETURN_IF_ERROR(ExpectShape("streams", streams, {m}));
    TF_RETURN_IF_ERROR(FillMasks(ctx, p));
    p->streams = streams.flat<int32_t>().data();
    p->position = cache->position()->template flat<int64_t>().data();
    TF_RETURN_IF_ERROR(CheckStreams(p->streams, m, t, p->position, num_held));

    p->query = query.flat<T>().data();
    p->query_strides = BatchTimeHead(t, h, d);
    p->key = Data<C>(key);
    p->key_strides = p->query_strides;
    p->value = Data<C>(value);
    p->value_strides = BatchTimeHead(t, h, dv);
    p->key_cache = Data<C>(cache->key());
    p->value_cache = Data<C>(cache->value());
    p->key_mask_cache = cache->key_mask()->template flat<bool>().data();
    p->scale = static_cast<T>(scale.scalar<double>()());
    p->update_state = update_state_;
    return absl::OkStatus();
  }

  // At most one of each; those that are not given stay null.
  static Status FillMasks(OpKernelContext* ctx, SingleOutputParams<T, C>* p) {
    OpInputList attention_masks, key_masks;
    TF_RETURN_IF_ERROR(ctx->input_list("attention_mask", &attention_masks));
    TF_RETURN_IF_ERROR(ctx->input_list("key_mask", &key_masks));
    if (attention_masks.size() > 1 || key_masks.size() > 1) {
      return InvalidArgument("expected at most one attention_mask and one key_mask, but got ",
                             attention_masks.size(), " and ", key_masks.size());
    }
    if (key_masks.size() == 1) {
      TF_RETURN_IF_ERROR(ExpectShape("key_mask", key_masks[0], {p->num_streams, p->num_steps}));
      p->key_mask = key_masks[0].flat<bool>().data();
    }
    return attention_masks.size() == 1 ? FillAttentionMask(attention_masks[0], p)
                                       : absl::OkStatus();
  }

  // Each axis but the last may be 1, which a stride of 0 broadcasts.
  static Status FillAttentionMask(const Tensor& mask, SingleOutputParams<T, C>* p) {
    const TensorShape full = {p->num_streams, p->num_heads, p->num_steps, p->window};
    bool fits = mask.dims() == 4 && mask.dim_size(3) == p->window;
    for (int axis = 0; fits && axis < 3; ++axis) {
      fits = mask.dim_size(axis) == 1 || mask.dim_size(axis) == full.dim_size(axis);
    }
    if (!fits) {
      return InvalidArgument("expected attention_mask of shape ", full.DebugString(),
                             ", [M, H, T, N], where M, H and T may be 1, but got ",
                             mask.shape().DebugString());
    }
    p->mask = mask.flat<bool>().data();
    p->mask_strides = BatchHeadTime(mask.dim_size(1), mask.dim_size(2), p->window);
    if (mask.dim_size(0) == 1) p->mask_strides.stream = 0;
    if (mask.dim_size(1) == 1) p->mask_strides.head = 0;
    if (mask.dim_size(2) == 1) p->mask_strides.step = 0;
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
