// TensorFlow's threads, and when they are worth waking.

#ifndef CONTINUAL_TRANSFORMERS_TENSORFLOW_THREADS_H_
#define CONTINUAL_TRANSFORMERS_TENSORFLOW_THREADS_H_

#include "cc/attention/threads.h"
#include "tensorflow/core/framework/op_kernel.h"

namespace continual_transformers {

// Those of the op's device.
Threads ThreadsOf(tensorflow::OpKernelContext* ctx);

}  // namespace continual_transformers

#endif  // CONTINUAL_TRANSFORMERS_TENSORFLOW_THREADS_H_
