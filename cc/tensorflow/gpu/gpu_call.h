// Memory and copies for an op's call on a GPU. All work is on the op's own stream, in order with
// the work before and after it, so the host does not wait.

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

  // Allocate temporary memory: not initialized, and zeros.
  absl::Status Allocate(int64_t bytes, tensorflow::Tensor* memory);
  absl::Status AllocateZeros(int64_t bytes, tensorflow::Tensor* memory);

  // Copies streams from the host to *memory, and sets *data to them. Sets null if row m is stream
  // m.
  absl::Status Streams(const tensorflow::Tensor& streams, tensorflow::Tensor* memory,
                       const int32_t** data);

  // Copies positions from stream `first` on to the host, and waits for them.
  absl::Status Positions(const tensorflow::Tensor& position, int64_t first,
                         std::vector<int64_t>* positions);

 private:
  tensorflow::OpKernelContext* const ctx_;
  const cudaStream_t stream_;
};

}  // namespace continual_transformers

#endif  // CONTINUAL_TRANSFORMERS_TENSORFLOW_GPU_GPU_CALL_H_
