// What an op's call on a GPU asks of the GPU: everything on the op's own stream, in order with what
// came before and comes after, so that the host waits for nothing.

#ifndef CONTINUAL_TRANSFORMERS_TENSORFLOW_GPU_GPU_CALL_H_
#define CONTINUAL_TRANSFORMERS_TENSORFLOW_GPU_GPU_CALL_H_

#include <cuda_runtime.h>

#include <cstdint>
#include <vector>

#include "absl/status/status.h"
#include "cc/tensorflow/locked_variables.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "tensorflow/core/framework/tensor.h"

namespace continual_transformers {

class GpuCall : public DeviceMemory {
 public:
  explicit GpuCall(tensorflow::OpKernelContext* ctx);

  cudaStream_t stream() const { return stream_; }
  absl::Status Multiprocessors(int* count) const;

  absl::Status Copy(const tensorflow::Tensor& from, tensorflow::Tensor* to) override;

  // Temporary memory: as it comes, and of zeros.
  absl::Status Allocate(int64_t bytes, tensorflow::Tensor* memory);
  absl::Status AllocateZeros(int64_t bytes, tensorflow::Tensor* memory);

  // The host's streams where a kernel can read them, kept by *memory: null where row m is stream m.
  absl::Status Streams(const tensorflow::Tensor& streams, tensorflow::Tensor* memory,
                       const int32_t** data);

  // The positions of all streams on the host, which waits for them.
  absl::Status Positions(const tensorflow::Tensor& position, std::vector<int64_t>* positions);

 private:
  tensorflow::OpKernelContext* const ctx_;
  const cudaStream_t stream_;
};

}  // namespace continual_transformers

#endif  // CONTINUAL_TRANSFORMERS_TENSORFLOW_GPU_GPU_CALL_H_
