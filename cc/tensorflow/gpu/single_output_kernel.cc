// SingleOutputAttention's kernel on a GPU: one launch, which lets the streams' positions advance
// too. They stay on the GPU, and so it is the launch that finds one below 0: its outputs are NaN.

#include <cstdint>

#include "cc/attention/half.h"
#include "cc/tensorflow/gpu/cuda_status.h"
#include "cc/tensorflow/gpu/gpu_call.h"
#include "cc/tensorflow/inputs.h"
#include "cc/tensorflow/single_output_call.h"
#include "cuda/single_output.h"
#include "tensorflow/core/framework/op_kernel.h"

namespace continual_transformers {
namespace {

using tensorflow::OpKernel;
using tensorflow::OpKernelConstruction;
using tensorflow::OpKernelContext;
using tensorflow::Tensor;

template <typename T, typename C>
class SingleOutputAttentionGpuOp : public OpKernel {
 public:
  explicit SingleOutputAttentionGpuOp(OpKernelConstruction* ctx) : OpKernel(ctx) {
    OP_REQUIRES_OK(ctx, options_.Read(ctx));
  }

  void Compute(OpKernelContext* ctx) override {
    GpuCall gpu(ctx);
    SingleOutputCall<T, C> call(options_, ctx, &gpu);
    DeviceSingleOutputParams<T, C> params = {};
    OP_REQUIRES_OK(ctx, call.Prepare(&params));
    if (params.num_streams == 0) return;

    int multiprocessors;
    OP_REQUIRES_OK(ctx, gpu.Multiprocessors(&multiprocessors));
    params.window_parts = PlanWindowParts(params.NumQueries(), params.window, multiprocessors);
    params.num_held = call.state().key()->dim_size(0);
    params.next_position = call.state().advances()
                               ? call.state().position()->template flat<int64_t>().data()
                               : nullptr;
    params.steps_taken = call.steps_taken()->template flat<int64_t>().data();
    OP_REQUIRES_OK(ctx, NotRefused(RefusesSingleOutput(params), params));

    Tensor streams, parts, arrivals;
    OP_REQUIRES_OK(ctx, gpu.Streams(call.streams(), &streams, &params.streams));
    OP_REQUIRES_OK(ctx, gpu.Allocate(params.NumParts() * sizeof(T), &parts));
    params.parts = reinterpret_cast<T*>(parts.data());
    OP_REQUIRES_OK(ctx, gpu.AllocateZeros(params.NumArrivals() * sizeof(uint32_t), &arrivals));
    params.arrivals = reinterpret_cast<uint32_t*>(arrivals.data());
    OP_REQUIRES_OK(ctx, CudaStatus(LaunchSingleOutput(params, gpu.stream()),
                                   "launching SingleOutputAttention"));
  }

 private:
  SingleOutputOptions options_;
};

#define REGISTER_GPU(T, C)                                                    \
  REGISTER_KERNEL_BUILDER(Name("ContinualTransformers>SingleOutputAttention") \
                              .Device(tensorflow::DEVICE_GPU)                 \
                              .HostMemory("key_cache")                        \
                              .HostMemory("value_cache")                      \
                              .HostMemory("key_mask_cache")                   \
                              .HostMemory("position")                         \
                              .HostMemory("streams")                          \
                              .HostMemory("scale")                            \
                              .TypeConstraint<T>("T")                         \
                              .TypeConstraint<TensorFlowType<C>::type>("C"),  \
                          SingleOutputAttentionGpuOp<T, C>)
REGISTER_GPU(float, float);
REGISTER_GPU(float, BFloat16);
REGISTER_GPU(float, Float16);
REGISTER_GPU(double, double);
#undef REGISTER_GPU

}  // namespace
}  // namespace continual_transformers
