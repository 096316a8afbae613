// A mark that the loader reads from the library's bytes before it loads the library. TensorFlow's
// C++ API is not stable, so a library for another minor version may crash instead of failing with
// an error.

#ifndef CONTINUAL_TRANSFORMERS_TENSORFLOW
#error "The build defines TensorFlow's version as a string literal: see setup.py and bazel/."
#endif

extern "C" __attribute__((visibility("default"), used))
const char continual_transformers_build_info[] =
    "continual-transformers-tf built for TensorFlow " CONTINUAL_TRANSFORMERS_TENSORFLOW ".";

// Returns the CUDA and the GPUs that the kernels were built for; "" if there are no GPU kernels.
extern "C" __attribute__((visibility("default"))) const char* continual_transformers_cuda_build() {
#ifdef CONTINUAL_TRANSFORMERS_CUDA_BUILD
  return CONTINUAL_TRANSFORMERS_CUDA_BUILD;
#else
  return "";
#endif
}
