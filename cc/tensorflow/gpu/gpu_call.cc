#include "cc/tensorflow/gpu/gpu_call.h"

#include "cc/tensorflow/gpu/cuda_status.h"
#include "cc/tensorflow/gpu/op_stream.h"
#include "tensorflow/core/framework/allocator.h"
#include "tensorflow/core/framework/tensor_shape.h"

namespace continual_transformers {

using absl::Status;
using tensorflow::Tensor;

GpuCall::GpuCall(tensorflow::OpKernelContext* ctx) : ctx_(ctx), stream_(StreamOf(ctx)) {}

// Eigen's device also holds the GPU's properties. But they are a struct of the CUDA that TensorFlow
// was built with, and its layout changes from version to version.
Status GpuCall::Multiprocessors(int* count) const {
  int device;
  TF_RETURN_IF_ERROR(CudaStatus(cudaGetDevice(&device), "asking for the GPU"));
  return CudaStatus(cudaDeviceGetAttribute(count, cudaDevAttrMultiProcessorCount, device),
                    "asking for the GPU's multiprocessors");
}

Status GpuCall::Copy(const Tensor& from, Tensor* to) {
  // TensorFlow allocates variables with these attributes.
  tensorflow::AllocatorAttributes attributes;
  attributes.set_gpu_compatible(true);
  attributes.set_nic_compatible(true);
  TF_RETURN_IF_ERROR(ctx_->allocate_temp(from.dtype(), from.shape(), to, attributes));
  if (from.TotalBytes() == 0) return absl::OkStatus();
  return CudaStatus(cudaMemcpyAsync(to->data(), from.data(), from.TotalBytes(),
                                    cudaMemcpyDeviceToDevice, stream_),
                    "copying a variable that another op reads");
}

Status GpuCall::Allocate(int64_t bytes, Tensor* memory) {
  return ctx_->allocate_temp(tensorflow::DT_INT8, {bytes}, memory);
}

Status GpuCall::AllocateZeros(int64_t bytes, Tensor* memory) {
  TF_RETURN_IF_ERROR(Allocate(bytes, memory));
  if (bytes == 0) return absl::OkStatus();
  return CudaStatus(cudaMemsetAsync(memory->data(), 0, bytes, stream_), "setting memory to zero");
}

Status GpuCall::Streams(const Tensor& streams, Tensor* memory, const int32_t** data) {
  const int32_t* given = streams.flat<int32_t>().data();
  const int64_t count = streams.NumElements();
  int64_t in_order = 0;
  while (in_order < count && given[in_order] == in_order) ++in_order;
  if (in_order == count) {
    *data = nullptr;
    return absl::OkStatus();
  }
  // CUDA reads pageable memory before the call returns. A tensor may be in pinned memory, which
  // CUDA would read later, when the tensor may have been changed.
  const std::vector<int32_t> pageable(given, given + count);
  TF_RETURN_IF_ERROR(Allocate(count * sizeof(int32_t), memory));
  *data = reinterpret_cast<const int32_t*>(memory->data());
  return CudaStatus(cudaMemcpyAsync(memory->data(), pageable.data(), count * sizeof(int32_t),
                                    cudaMemcpyHostToDevice, stream_),
                    "copying streams to the GPU");
}

Status GpuCall::Positions(const Tensor& position, int64_t first, std::vector<int64_t>* positions) {
  if (positions->empty()) return absl::OkStatus();
  TF_RETURN_IF_ERROR(CudaStatus(
      cudaMemcpyAsync(positions->data(), position.flat<int64_t>().data() + first,
                      positions->size() * sizeof(int64_t), cudaMemcpyDeviceToHost, stream_),
      "copying positions from the GPU"));
  return CudaStatus(cudaStreamSynchronize(stream_), "waiting for positions from the GPU");
}

}  // namespace continual_transformers
