#define EIGEN_USE_GPU

#include "cc/tensorflow/gpu/op_stream.h"

namespace continual_transformers {

cudaStream_t StreamOf(tensorflow::OpKernelContext* ctx) { return ctx->eigen_gpu_device().stream(); }

}  // namespace continual_transformers
