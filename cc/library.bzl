"""The sources and options of the libraries. Bazel reads it, and as plain Python also setup.py."""

# Kernels, sessions and the C interface: no TensorFlow, no Python. The other two libraries link it.
CORE_LIBRARY = "libcontinual_transformers.so"

# Sessions on a GPU. The core library loads it when one is asked for; it links the core library.
CUDA_LIBRARY = "libcontinual_transformers_cuda.so"

# The TensorFlow ops, for one minor version of TensorFlow.
OP_LIBRARY = "libcontinual_transformers_tf{MINOR}.so"

# The Python extension. Its file name has a suffix that depends on the interpreter.
EXTENSION = "_session"

ATTENTION_HEADERS = [
    "attention/activations.h",
    "attention/co_si_encoder_step.h",
    "attention/co_si_mha_step.h",
    "attention/dense.h",
    "attention/elementwise.h",
    "attention/half.h",
    "attention/host_device.h",
    "attention/int8.h",
    "attention/online_softmax.h",
    "attention/packed_dense.h",
    "attention/params.h",
    "attention/read_loop.h",
    "attention/retroactive.h",
    "attention/retroactive_row-inl.h",
    "attention/retroactive_rule.h",
    "attention/ring_attention.h",
    "attention/ring_cache.h",
    "attention/row_products.h",
    "attention/single_output.h",
    "attention/step_types.h",
    "attention/targets.h",
    "attention/threads.h",
    "attention/vector_math-inl.h",
    "attention/window_attention.h",
]

ATTENTION_SOURCES = [
    "attention/activations.cc",
    "attention/c_api.cc",
    "attention/co_si_encoder_step.cc",
    "attention/co_si_mha_step.cc",
    "attention/dense.cc",
    "attention/elementwise.cc",
    "attention/packed_dense.cc",
    "attention/read_loop.cc",
    "attention/retroactive.cc",
    "attention/ring_attention.cc",
    "attention/row_products.cc",
    "attention/single_output.cc",
    "attention/targets.cc",
    "attention/window_attention.cc",
]

SESSION_HEADERS = [
    "session/activations.h",
    "session/attention_instructions.h",
    "session/block_memory.h",
    "session/compiler.h",
    "session/cpu_executor.h",
    "session/dense_instruction.h",
    "session/device.h",
    "session/error.h",
    "session/executor.h",
    "session/few_queries_instruction.h",
    "session/fingerprint.h",
    "session/fork.h",
    "session/instruction.h",
    "session/layout_instructions.h",
    "session/model_file.h",
    "session/node_weights.h",
    "session/plan.h",
    "session/plan_ops.h",
    "session/product_instructions.h",
    "session/recurrent_instruction.h",
    "session/retroactive_instruction.h",
    "session/ring_instructions.h",
    "session/rotary_instructions.h",
    "session/row_instructions.h",
    "session/session.h",
    "session/state_layout.h",
    "session/stream_store.h",
    "session/strict_json.h",
    "session/thread_pool.h",
]

SESSION_SOURCES = [
    "session/activations.cc",
    "session/block_memory.cc",
    "session/c_api.cc",
    "session/compiler.cc",
    "session/cpu_executor.cc",
    "session/device.cc",
    "session/executor.cc",
    "session/fingerprint.cc",
    "session/fork.cc",
    "session/model_file.cc",
    "session/plan.cc",
    "session/plan_ops.cc",
    "session/session.cc",
    "session/state_layout.cc",
    "session/stream_store.cc",
    "session/strict_json.cc",
    "session/thread_pool.cc",
]

PYTHON_HEADERS = [
    "python/gpu_array.h",
    "python/numpy_api.h",
    "python/python_session.h",
    "python/small_vector.h",
]

PYTHON_SOURCES = [
    "python/gpu_array.cc",
    "python/python_session.cc",
    "python/session_module.cc",
    "python/session_step.cc",
]

TENSORFLOW_HEADERS = [
    "tensorflow/attention_state.h",
    "tensorflow/co_si_encoder_step_op.h",
    "tensorflow/co_si_mha_step_call.h",
    "tensorflow/co_si_mha_step_op.h",
    "tensorflow/co_si_mha_step_options.h",
    "tensorflow/co_si_mha_step_shapes.h",
    "tensorflow/cpu_device.h",
    "tensorflow/dtypes.h",
    "tensorflow/expect.h",
    "tensorflow/locked_variables.h",
    "tensorflow/masks.h",
    "tensorflow/op_io.h",
    "tensorflow/op_shapes.h",
    "tensorflow/retroactive_op.h",
    "tensorflow/ring_inputs.h",
    "tensorflow/session_op.h",
    "tensorflow/session_resource.h",
    "tensorflow/single_output_op.h",
    "tensorflow/threads.h",
]

TENSORFLOW_SOURCES = [
    "tensorflow/attention_state.cc",
    "tensorflow/co_si_encoder_step_kernel.cc",
    "tensorflow/co_si_encoder_step_op.cc",
    "tensorflow/co_si_mha_step_kernel.cc",
    "tensorflow/co_si_mha_step_op.cc",
    "tensorflow/co_si_mha_step_shapes.cc",
    "tensorflow/expect.cc",
    "tensorflow/initialize_session_op.cc",
    "tensorflow/locked_variables.cc",
    "tensorflow/op_shapes.cc",
    "tensorflow/release_session_op.cc",
    "tensorflow/retroactive_kernel.cc",
    "tensorflow/retroactive_op.cc",
    "tensorflow/session_clean_op.cc",
    "tensorflow/session_ensure_streams_op.cc",
    "tensorflow/session_get_state_op.cc",
    "tensorflow/session_handle_op.cc",
    "tensorflow/session_op.cc",
    "tensorflow/session_resource.cc",
    "tensorflow/session_set_state_op.cc",
    "tensorflow/session_step_op.cc",
    "tensorflow/single_output_kernel.cc",
    "tensorflow/single_output_op.cc",
    "tensorflow/stream_lock.cc",
    "tensorflow/threads.cc",
]

# Headers that pip's build precompiles for each TensorFlow. A source then takes 3 s instead of 9.
TENSORFLOW_PRECOMPILED = [
    "tensorflow/core/framework/op.h",
    "tensorflow/core/framework/op_kernel.h",
    "tensorflow/core/framework/resource_mgr.h",
    "tensorflow/core/framework/resource_var.h",
    "tensorflow/core/framework/shape_inference.h",
]

# The part of the op library that says what it was built for. A build with CUDA defines
# CONTINUAL_TRANSFORMERS_CUDA_BUILD. Only this part and the GPU's read it, so the objects of the
# other sources are the same with and without CUDA.
BUILD_INFO_SOURCES = [
    "tensorflow/build_info.cc",
]

# Only a build with CUDA compiles the following. These are in //cc, for the C++ compiler:
TENSORFLOW_GPU_HEADERS = [
    "tensorflow/gpu/cuda_status.h",
    "tensorflow/gpu/gpu_call.h",
    "tensorflow/gpu/gpu_device.h",
    "tensorflow/gpu/op_stream.h",
]

TENSORFLOW_GPU_SOURCES = [
    "tensorflow/gpu/co_si_encoder_step_kernel.cc",
    "tensorflow/gpu/co_si_mha_step_kernel.cc",
    "tensorflow/gpu/cuda_status.cc",
    "tensorflow/gpu/gpu_call.cc",
    "tensorflow/gpu/op_stream.cc",
    "tensorflow/gpu/retroactive_kernel.cc",
    "tensorflow/gpu/single_output_kernel.cc",
]

# These are in //cuda, for nvcc. The C interface is not in the op library: tests and benchmarks of
# the kernels have a separate library with it.
CUDA_HEADERS = [
    "arrival.cuh",
    "block_sum.cuh",
    "c_api.h",
    "co_si_encoder_step.h",
    "co_si_mha_step.h",
    "dense.h",
    "elements.cuh",
    "for_each.cuh",
    "graph_builder.h",
    "launch.cuh",
    "normalize.h",
    "partial_attention.cuh",
    "retroactive.cuh",
    "retroactive.h",
    "row_norm.cuh",
    "scratch.h",
    "single_output.h",
    "strip_block.cuh",
    "warp.cuh",
    "window_parts.h",
]

CUDA_SOURCES = [
    "co_si_encoder_step.cu",
    "co_si_mha_step.cu",
    "dense.cu",
    "normalize.cu",
    "retroactive.cu",
    "single_output.cu",
    "window_parts.cu",
]

CUDA_C_API_SOURCES = [
    "c_api.cu",
]

# Sessions on a GPU, also in //cuda and for nvcc.
CUDA_SESSION_HEADERS = [
    "session/activate.cuh",
    "session/device_arena.h",
    "session/device_executor.h",
    "session/device_frame.h",
    "session/device_memory.h",
    "session/device_plan.h",
    "session/element_size.h",
    "session/mailbox.h",
    "session/node_kernels.h",
    "session/phases.h",
    "session/positional_each.h",
    "session/ring_query.cuh",
    "session/ring_query.h",
    "session/step_ends.h",
]

CUDA_SESSION_SOURCES = [
    "session/attention_nodes.cu",
    "session/axis_nodes.cu",
    "session/backend.cc",
    "session/device_arena.cc",
    "session/device_executor.cc",
    "session/device_memory.cc",
    "session/device_plan.cc",
    "session/element_nodes.cu",
    "session/layout_nodes.cu",
    "session/mailbox.cc",
    "session/phases.cu",
    "session/product_nodes.cu",
    "session/recurrent_node.cu",
    "session/ring_nodes.cu",
    "session/step_ends.cu",
]

# Those of CUDA_SOURCES that sessions use.
CUDA_SESSION_KERNEL_SOURCES = [
    "dense.cu",
    "normalize.cu",
    "window_parts.cu",
]

# The server: a program that links the core library. tools/server_packages.py finds the rest.
SERVER_PROGRAM = "continual-transformers-server"

SERVER_HEADERS = [
    "server/batch_queue.h",
    "server/grpc_infer.h",
    "server/grpc_server.h",
    "server/history.h",
    "server/http_api.h",
    "server/http_infer.h",
    "server/http_message.h",
    "server/http_server.h",
    "server/http_target.h",
    "server/infer_call.h",
    "server/journal.h",
    "server/journal_entry.h",
    "server/log.h",
    "server/logged_load.h",
    "server/message_json.h",
    "server/metrics.h",
    "server/model_description.h",
    "server/model_observer.h",
    "server/model_repository.h",
    "server/options.h",
    "server/outcome.h",
    "server/page.h",
    "server/redis.h",
    "server/replay.h",
    "server/security.h",
    "server/served_model.h",
    "server/server_parts.h",
    "server/shard_history.h",
    "server/shard_log.h",
    "server/shard_owner.h",
    "server/shard_table.h",
    "server/shards.h",
    "server/snapshot_file.h",
    "server/snapshots.h",
    "server/statistics.h",
    "server/step_request.h",
    "server/stream_copy.h",
    "server/stream_keeper.h",
    "server/stream_outputs.h",
    "server/stream_table.h",
]

# Without a protocol: models, streams and batches. They need only the core library.
SERVER_MODEL_SOURCES = [
    "server/batch_queue.cc",
    "server/history.cc",
    "server/infer_call.cc",
    "server/model_repository.cc",
    "server/outcome.cc",
    "server/served_model.cc",
    "server/shard_table.cc",
    "server/stream_copy.cc",
    "server/stream_table.cc",
]

SERVER_SOURCES = [
    "server/grpc_infer.cc",
    "server/grpc_server.cc",
    "server/http_api.cc",
    "server/http_infer.cc",
    "server/http_server.cc",
    "server/http_target.cc",
    "server/journal.cc",
    "server/journal_entry.cc",
    "server/log.cc",
    "server/logged_load.cc",
    "server/message_json.cc",
    "server/metrics.cc",
    "server/model_description.cc",
    "server/options.cc",
    "server/redis.cc",
    "server/replay.cc",
    "server/security.cc",
    "server/shard_history.cc",
    "server/shard_log.cc",
    "server/shard_owner.cc",
    "server/snapshot_file.cc",
    "server/snapshots.cc",
    "server/stream_outputs.cc",
]

SERVER_MAIN_SOURCES = ["server/main.cc"]

SERVER_PROTO = "server/inference.proto"

# The page, which tools/embed.py puts into the program.
SERVER_PAGE = [
    "server/page/icon.svg",
    "server/page/index.html",
    "server/page/page.css",
    "server/page/page.js",
]

SERVER_PKG_CONFIG = [
    "grpc++",
    "hiredis",
    "openssl",
    "prometheus-cpp-core",
    "protobuf",
    "sqlite3",
]

# Libraries without a file for pkg-config.
SERVER_LIBRARIES = ["grpc++_reflection"]

SERVER_HEADER_ONLY = [
    "CLI/CLI.hpp",
    "boost/beast/version.hpp",
    "spdlog/version.h",
]

COMPILER_OPTIONS = [
    "-std=c++17",
    "-O3",
    "-Wall",
    "-Wextra",
]

# The core library exports its C++ functions to the other two (see EXPORTS_FILE). Its own calls to
# them do not go through the dynamic linker's tables.
CORE_OPTIONS = [
    "-fno-semantic-interposition",
    "-fvisibility-inlines-hidden",
]

EXPORTS_FILE = "exports.lds"

CORE_LINK_OPTIONS = [
    "-Wl,-soname," + CORE_LIBRARY,
    "-Wl,-Bsymbolic",
    "-Wl,-z,defs",
    "-pthread",
    "-ldl",
]

# The libraries that link the core library export only what is marked in their sources.
HIDDEN_OPTIONS = ["-fvisibility=hidden"]

# They look for the core library in their own folder. The op libraries of the package with GPU
# kernels look beside that package.
BESIDE_CORE_LINK_OPTIONS = ["-Wl,-rpath,$ORIGIN:$ORIGIN/../continual_transformers_tf"]

# TensorFlow's headers need these options; for the wheels on PyPI, tf.sysconfig.get_compile_flags()
# returns them.
TENSORFLOW_OPTIONS = [
    "-D_GLIBCXX_USE_CXX11_ABI=1",
    "-DEIGEN_MAX_ALIGN_BYTES=64",
]

# The folder of Google Highway's headers within TensorFlow. 2.19 and 2.20 have none.
HIGHWAY_INCLUDE = "include/external/com_google_highway"

# The minor versions of TensorFlow that there is an op library for. pyproject.toml's extras name the
# same ones. `make` and the builds of Highway's headers take the last.
TENSORFLOWS = [
    "2.19",
    "2.20",
    "2.21",
]

# The compute capabilities with machine code. For newer ones there is PTX of the last, which the
# driver compiles.
CUDA_ARCHITECTURES = ["75", "80", "86", "89", "90"]

# The oldest nvcc that works.
CUDA_OLDEST = "12.0"

# nvcc's options. cuda/resources.py reads the report that ptxas prints with -v.
CUDA_OPTIONS = [
    "-std=c++17",
    "-O3",
    "--expt-relaxed-constexpr",
    "-DNDEBUG",
    "-Xcompiler=-Wall,-Wextra,-fPIC,-fvisibility=hidden",
    "-Xptxas=-v",
]

# CUDA's runtime is linked statically, so that the library loads on machines without CUDA or a
# driver. Its functions are not exported, because TensorFlow has functions with the same names.
CUDA_LINK_OPTIONS = [
    "-l:libcudart_static.a",
    "-Wl,--exclude-libs,libcudart_static.a",
    "-ldl",
    "-lrt",
    "-lpthread",
]
