// The CUDA stream that TensorFlow runs an op on. Eigen's GPU device keeps it, which needs more of
// CUDA than its runtime, so this is a separate file.

#ifndef CONTINUAL_TRANSFORMERS_TENSORFLOW_GPU_OP_STREAM_H_
#define CONTINUAL_TRANSFORMERS_TENSORFLOW_GPU_OP_STREAM_H_

#include <cuda_runtime.h>

#include "tensorflow/core/framework/op_kernel.h"

namespace continual_transformers {

cudaStream_t StreamOf(tensorflow::OpKernelContext* ctx);

}  // namespace continual_transformers

#endif  // CONTINUAL_TRANSFORMERS_TENSORFLOW_GPU_OP_STREAM_H_
