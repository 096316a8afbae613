// RetroactiveAttention: its signature, documentation, shape function, and kernel on the CPU.

#include <cstdint>
#include <string>

#include "absl/status/status.h"
#include "cc/attention/params.h"
#include "cc/attention/retroactive.h"
#include "cc/attention/step_types.h"
#include "cc/tensorflow/attention_state.h"
#include "cc/tensorflow/dtypes.h"
#include "cc/tensorflow/expect.h"
#include "cc/tensorflow/op_io.h"
#include "cc/tensorflow/op_shapes.h"
#include "cc/tensorflow/ring_inputs.h"
#include "cc/tensorflow/threads.h"
#include "tensorflow/core/framework/op.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "tensorflow/core/framework/shape_inference.h"
#include "tensorflow/core/framework/tensor.h"

namespace continual_transformers {
namespace {

using absl::Status;
using tensorflow::OpKernel;
using tensorflow::OpKernelConstruction;
using tensorflow::OpKernelContext;
using tensorflow::Tensor;
using tensorflow::shape_inference::DimensionHandle;
using tensorflow::shape_inference::InferenceContext;

constexpr char kOp[] = "ContinualTransformers>RetroactiveAttention";

Status Shape(InferenceContext* c) {
  OpShapes shapes(c);
  TF_RETURN_IF_ERROR(shapes.Find(kOp));
  DimensionHandle m = c->UnknownDim(), t = c->UnknownDim(), h = c->UnknownDim();
  DimensionHandle d = c->UnknownDim(), dv = c->UnknownDim();
  DimensionHandle s = c->UnknownDim(), n = c->UnknownDim();
  DimensionHandle two = c->MakeDim(2), four = c->MakeDim(4);
  Axes key_ring, value_ring;
  TF_RETURN_IF_ERROR(shapes.RingAxes({&s, &n, &h, &d}, &key_ring));
  TF_RETURN_IF_ERROR(shapes.RingAxes({&s, &n, &h, &dv}, &value_ring));
  TF_RETURN_IF_ERROR(shapes.Merge("query", {&m, &t, &h, &d}));
  TF_RETURN_IF_ERROR(shapes.Merge("key", {&m, &t, &h, &d}));
  TF_RETURN_IF_ERROR(shapes.Merge("value", {&m, &t, &h, &dv}));
  TF_RETURN_IF_ERROR(shapes.MergeVariable("key_cache", key_ring));
  TF_RETURN_IF_ERROR(shapes.MergeVariable("value_cache", value_ring));
  TF_RETURN_IF_ERROR(shapes.MergeVariable("key_mask_cache", {&s, &n}));
  TF_RETURN_IF_ERROR(shapes.MergeVariable("position", {&s}));
  TF_RETURN_IF_ERROR(shapes.MergeVariable("query_cache", key_ring));
  TF_RETURN_IF_ERROR(shapes.MergeVariable("softmax", {&s, &h, &four, &n}));
  TF_RETURN_IF_ERROR(shapes.MergeVariable("weighted_sum", {&s, &h, &n, &dv}));
  TF_RETURN_IF_ERROR(shapes.MergeVariable("made_with", {&s, &two}));
  TF_RETURN_IF_ERROR(shapes.Merge("streams", {&m}));
  TF_RETURN_IF_ERROR(shapes.Merge("scale", {}));
  TF_RETURN_IF_ERROR(shapes.MergeOptional("key_mask", {&m, &t}));
  TF_RETURN_IF_ERROR(shapes.ExpectSteps(t));
  TF_RETURN_IF_ERROR(shapes.SetOutput("output", c->MakeShape({m, t, h, n, dv})));
  return shapes.SetOutput("steps_taken", c->Vector(m));
}

REGISTER_OP(kOp)
    .Input("query: T")
    .Input("key: T")
    .Input("value: T")
    .Input("key_cache: resource")
    .Input("value_cache: resource")
    .Input("key_mask_cache: resource")
    .Input("position: resource")
    .Input("query_cache: resource")
    .Input("softmax: resource")
    .Input("weighted_sum: resource")
    .Input("made_with: resource")
    .Input("streams: int32")
    .Input("scale: double")
    .Input("key_mask: num_key_masks * bool")
    .Output("output: T")
    .Output("steps_taken: int64")
    .Attr("T: {float, double}")
    .Attr("num_key_masks: int >= 0 = 0")
    .Attr("algorithm: {'auto', 'update', 'recompute'} = 'auto'")
    .Attr("update_state: bool = true")
    .Attr("advance_position: bool = true")
    .Attr("sequence_first: bool = false")
    .SetIsStateful()
    .SetShapeFn(Shape)
    .Doc(R"doc(
Takes T steps of M streams: continual retroactive attention (arXiv 2201.06268).

At step t of a stream, the queries of this step and the N - 1 steps before it all attend to these N
steps. The caches are rings that the op changes in place: step p of a stream is in row p mod N. Then
the op advances the streams' positions by T. While a stream has taken fewer than N steps, those that
exist attend to each other.

query: [M, T, H, D].
key: [M, T, H, D].
value: [M, T, H, Dv].
key_cache: A variable of type T, [S, N, H, D].
value_cache: A variable of type T, [S, N, H, Dv].
key_mask_cache: A variable of type bool, [S, N]: which steps have a key.
position: A variable of type int64, [S]: the steps each stream has taken.
query_cache: A variable of type T, [S, N, H, D].
softmax: A variable of type double, [S, H, 4, N]. For each row of the window: what is subtracted
  from its logits, its denominator, and the largest denominator and the largest magnitude of a sum
  of values since the row was last computed exactly.
weighted_sum: A variable of type double, [S, H, N, Dv], each row's sum of values.
made_with: A variable of type double, [S, 2]: the arithmetic that computed the rows' weights, and
  their scale. Rows made with another arithmetic or scale than this call's are recomputed. 0: the
  rows have no softmax state.
streams: [M]. The stream of each row; distinct, each in [0, S).
scale: Multiplies the logits, query . key; usually 1 / sqrt(D).
key_mask: None, or one of shape [M, T]. If false, the step has no key: no query attends to it, now
  or later, but its own query attends.
output: [M, T, H, N, Dv], the outputs of the N queries. Row N - 1 is the newest step's. Zeros for
  steps that were never taken, and if no step has a key.
steps_taken: [M], the number of steps that each of these streams has taken, including this call's,
  also if update_state is false. A window is full from N on.
algorithm: "update" adds the new key to each row and subtracts the oldest; "recompute" recomputes
  every row; "auto" picks the faster one for these sizes.
update_state: If false, the outputs are the same, but the caches and positions do not change.
advance_position: If false, the caches change but the positions do not. A caller that shares the
  positions among several ops advances them after all ops have succeeded.
sequence_first: Whether the rings of queries, keys and values are [S, N, H, D], as above. If false,
  they are [S, H, N, D], as in graphs that were saved before this attribute existed.
)doc");

// The op checks everything and allocates. Only then does the kernel take the steps, so an op that
// fails changes no state.
template <typename T>
class RetroactiveAttentionOp : public OpKernel {
 public:
  explicit RetroactiveAttentionOp(OpKernelConstruction* ctx) : OpKernel(ctx) {
    OP_REQUIRES_OK(ctx, ExpectTarget());
    OP_REQUIRES_OK(ctx, ctx->GetAttr("algorithm", &algorithm_));
    OP_REQUIRES_OK(ctx, inputs_.Read(ctx, *this));
    OP_REQUIRES_OK(ctx, query_cache_.Find(*this, "query_cache"));
    OP_REQUIRES_OK(ctx, softmax_.Find(*this, "softmax"));
    OP_REQUIRES_OK(ctx, weighted_sum_.Find(*this, "weighted_sum"));
    OP_REQUIRES_OK(ctx, made_with_.Find(*this, "made_with"));
    OP_REQUIRES_OK(ctx, output_.Find(*this, "output"));
    OP_REQUIRES_OK(ctx, steps_taken_.Find(*this, "steps_taken"));
  }

  void Compute(OpKernelContext* ctx) override { OP_REQUIRES_OK(ctx, Run(ctx)); }

 private:
  // The variables that only this op has.
  struct RowVariables {
    VariablePtr query_cache, softmax, weighted_sum, made_with;
  };

  Status Run(OpKernelContext* ctx) const {
    RingInputs::Variables rings;
    RowVariables rows;
    TF_RETURN_IF_ERROR(inputs_.GetVariables(ctx, &rings));
    TF_RETURN_IF_ERROR(query_cache_.GetVariable(ctx, &rows.query_cache));
    TF_RETURN_IF_ERROR(softmax_.GetVariable(ctx, &rows.softmax));
    TF_RETURN_IF_ERROR(weighted_sum_.GetVariable(ctx, &rows.weighted_sum));
    TF_RETURN_IF_ERROR(made_with_.GetVariable(ctx, &rows.made_with));
    AttentionState state = inputs_.State(nullptr);
    TF_RETURN_IF_ERROR(state.Lock(CacheOf(rings), kDataType<T>,
                                  {{rows.query_cache.get(), "query_cache", kDataType<T>},
                                   {rows.softmax.get(), "softmax", tensorflow::DT_DOUBLE},
                                   {rows.weighted_sum.get(), "weighted_sum", tensorflow::DT_DOUBLE},
                                   {rows.made_with.get(), "made_with", tensorflow::DT_DOUBLE}}));
    RetroactiveParams<T> params = {};
    TF_RETURN_IF_ERROR(inputs_.Fill(ctx, &state, &params));
    TF_RETURN_IF_ERROR(FillRows(rows, state.held(), &params));
    Tensor *output, *steps_taken;
    const int64_t m = params.num_streams, t = params.num_steps, h = params.num_heads;
    const int64_t n = params.window, dv = params.value_dim;
    TF_RETURN_IF_ERROR(output_.Allocate(ctx, {m, t, h, n, dv}, &output));
    TF_RETURN_IF_ERROR(steps_taken_.Allocate(ctx, {m}, &steps_taken));
    params.output = Data<T>(output);
    params.output_strides = BatchTimeHead(t, h, n * dv);
    params.output_row_stride = dv;

    ThreadsOf(ctx->device())
        .share(m * h, RetroactiveCyclesPerTask(params),
               [&params](int64_t begin, int64_t end) { RetroactiveAttention(params, begin, end); });
    FinishRetroactive(params);
    state.Advance(params, steps_taken->flat<int64_t>().data());
    return absl::OkStatus();
  }

  Status FillRows(const RowVariables& rows, int64_t held, RetroactiveParams<T>* p) const {
    Tensor *query = rows.query_cache->tensor(), *softmax = rows.softmax->tensor();
    Tensor *weighted_sum = rows.weighted_sum->tensor(), *made_with = rows.made_with->tensor();
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
    p->recompute = algorithm_ == "recompute" || (algorithm_ == "auto" && RecomputingIsFaster(*p));
    return absl::OkStatus();
  }

  std::string algorithm_;
  RingInputs inputs_;
  OpInput query_cache_, softmax_, weighted_sum_, made_with_;
  OpOutput output_, steps_taken_;
};

#define REGISTER(T)                                                                        \
  REGISTER_KERNEL_BUILDER(Name(kOp).Device(tensorflow::DEVICE_CPU).TypeConstraint<T>("T"), \
                          RetroactiveAttentionOp<T>);
CONTINUAL_TRANSFORMERS_FOR_COMPUTE_TYPES(REGISTER)
#undef REGISTER

}  // namespace
}  // namespace continual_transformers
