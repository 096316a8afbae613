"""What the op library is made of: read by Bazel and, being plain Python too, by setup.py."""

LIBRARY_NAME = "libcontinual_transformers.so"

ATTENTION_HEADERS = [
    "attention/co_si_encoder_step.h",
    "attention/co_si_mha_step.h",
    "attention/dense.h",
    "attention/elementwise.h",
    "attention/half.h",
    "attention/host_device.h",
    "attention/online_softmax.h",
    "attention/params.h",
    "attention/read_loop.h",
    "attention/retroactive.h",
    "attention/retroactive_params.h",
    "attention/retroactive_row-inl.h",
    "attention/ring_cache.h",
    "attention/rows.h",
    "attention/single_output.h",
    "attention/targets.h",
    "attention/threads.h",
    "attention/vector_math-inl.h",
    "attention/window_pass-inl.h",
]

ATTENTION_SOURCES = [
    "attention/co_si_encoder_step.cc",
    "attention/co_si_mha_step.cc",
    "attention/dense.cc",
    "attention/elementwise.cc",
    "attention/read_loop.cc",
    "attention/retroactive.cc",
    "attention/single_output.cc",
    "attention/targets.cc",
]

TENSORFLOW_HEADERS = [
    "tensorflow/bound_variables.h",
    "tensorflow/co_si_mha_step_call.h",
    "tensorflow/inputs.h",
    "tensorflow/locked_variables.h",
    "tensorflow/threads.h",
]

TENSORFLOW_SOURCES = [
    "attention/c_api.cc",
    "tensorflow/bound_variables.cc",
    "tensorflow/build_info.cc",
    "tensorflow/co_si_mha_step_call.cc",
    "tensorflow/co_si_mha_step_kernel.cc",
    "tensorflow/direct_step.cc",
    "tensorflow/inputs.cc",
    "tensorflow/locked_variables.cc",
    "tensorflow/ops.cc",
    "tensorflow/retroactive_kernel.cc",
    "tensorflow/single_output_kernel.cc",
    "tensorflow/threads.cc",
]

COMPILER_OPTIONS = [
    "-std=c++17",
    "-O3",
    "-Wall",
    "-Wextra",
    "-fvisibility=hidden",
]

# What TensorFlow's own headers must be compiled with, as tf.sysconfig.get_compile_flags() says of
# the wheels on PyPI.
TENSORFLOW_OPTIONS = [
    "-D_GLIBCXX_USE_CXX11_ABI=1",
    "-DEIGEN_MAX_ALIGN_BYTES=64",
]

# Where in TensorFlow's headers those of Google Highway are.
HIGHWAY_INCLUDE = "include/external/com_google_highway"

# The minor version of TensorFlow that is built for where none is installed.
TENSORFLOW_DEFAULT = "2.21"
