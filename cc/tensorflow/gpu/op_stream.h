// The stream that TensorFlow runs an op on. In a file of its own, since Eigen's GPU device is what
// keeps it, and that is the only thing here that needs more of CUDA than its runtime's functions.

#ifndef CONTINUAL_TRANSFORMERS_TENSORFLOW_GPU_OP_STREAM_H_
#define CONTINUAL_TRANSFORMERS_TENSORFLOW_GPU_OP_STREAM_H_

#include <cuda_runtime.h>

#include "tensorflow/core/framework/op_kernel.h"

namespace continual_transformers {

cudaStream_t StreamOf(tensorflow::OpKernelContext* ctx);

}  // namespace continual_transformers

#endif  // CONTINUAL_TRANSFORMERS_TENSORFLOW_GPU_OP_STREAM_H_
