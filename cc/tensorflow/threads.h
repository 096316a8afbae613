// TensorFlow's threads for kernels.

#ifndef CONTINUAL_TRANSFORMERS_TENSORFLOW_THREADS_H_
#define CONTINUAL_TRANSFORMERS_TENSORFLOW_THREADS_H_

#include "cc/attention/threads.h"
#include "tensorflow/core/framework/device_base.h"

namespace continual_transformers {

// Returns the threads of a device. Calls that are too short for several threads use one.
Threads ThreadsOf(tensorflow::DeviceBase* device);

}  // namespace continual_transformers

#endif  // CONTINUAL_TRANSFORMERS_TENSORFLOW_THREADS_H_
