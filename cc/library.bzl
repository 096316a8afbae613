"""What the op library is made of: read by Bazel and, being plain Python too, by setup.py."""

LIBRARY_NAME = "libcontinual_transformers.so"

ATTENTION_HEADERS = [
    "attention/half.h",
    "attention/online_softmax.h",
    "attention/params.h",
    "attention/ring_cache.h",
    "attention/single_output.h",
]

ATTENTION_SOURCES = [
    "attention/single_output.cc",
]

TENSORFLOW_SOURCES = [
    "tensorflow/build_info.cc",
    "tensorflow/kernels.cc",
    "tensorflow/ops.cc",
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

# The minor version of TensorFlow that is built for where none is installed.
TENSORFLOW_DEFAULT = "2.21"
