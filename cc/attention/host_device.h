// Marks functions in these headers that the kernels in cuda/ also call.

#ifndef CONTINUAL_TRANSFORMERS_ATTENTION_HOST_DEVICE_H_
#define CONTINUAL_TRANSFORMERS_ATTENTION_HOST_DEVICE_H_

#ifdef __CUDACC__
#define CONTINUAL_TRANSFORMERS_HOST_DEVICE __host__ __device__
#else
#define CONTINUAL_TRANSFORMERS_HOST_DEVICE
#endif

#endif  // CONTINUAL_TRANSFORMERS_ATTENTION_HOST_DEVICE_H_
