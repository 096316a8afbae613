// TensorFlow's threads, and when they are worth waking.

#ifndef CONTINUAL_TRANSFORMERS_TENSORFLOW_THREADS_H_
#define CONTINUAL_TRANSFORMERS_TENSORFLOW_THREADS_H_

#include "cc/attention/threads.h"
#include "tensorflow/core/framework/device_base.h"

namespace continual_transformers {

// Those of a device.
Threads ThreadsOf(tensorflow::DeviceBase* device);

}  // namespace continual_transformers

#endif  // CONTINUAL_TRANSFORMERS_TENSORFLOW_THREADS_H_
