"""The CUDA toolkit as an external repository, and rules that compile with cuda/nvcc.py."""

load("//cc:library.bzl", "CUDA_LINK_OPTIONS")

_BUILD = """
# CUDA {VERSION}, as cuda/nvcc.py found it. Made by //bazel:cuda.bzl.

package(default_visibility = ["//visibility:public"])

exports_files(["toolkit.json"])

cc_library(
    name = "runtime",
    hdrs = glob(
        ["include/**"],
        exclude = [
            "include/cccl/**",
            "include/cub/**",
            "include/thrust/**",
        ],
    ),
    defines = ["CONTINUAL_TRANSFORMERS_CUDA_BUILD='\\"{DESCRIPTION}\\"'"],
    includes = ["include"],
    linkopts = {LINK_OPTIONS},
)
"""

def _cuda_configure_impl(repository_ctx):
    python = repository_ctx.which("python3")
    if python == None:
        fail("found no python3 on PATH, expected one to run cuda/nvcc.py")
    script = repository_ctx.path(repository_ctx.attr._script)
    result = repository_ctx.execute([python, script, "describe"])
    if result.return_code != 0:
        fail("--config=cuda: " + result.stderr)
    toolkit = json.decode(result.stdout)
    repository_ctx.file("toolkit.json", result.stdout)
    for folder in toolkit["include"][:1]:  # Empty if the headers are the system's.
        repository_ctx.symlink(folder, "include")
    repository_ctx.file("BUILD", _BUILD.format(
        VERSION = toolkit["version"],
        DESCRIPTION = toolkit["description"],
        LINK_OPTIONS = ["-L" + folder for folder in toolkit["lib"]] + CUDA_LINK_OPTIONS,
    ))

cuda_configure = repository_rule(
    implementation = _cuda_configure_impl,
    attrs = {
        "_lists": attr.label(default = "//cc:library.bzl"),
        "_compiler_errors": attr.label(default = "//tools:compiler_errors.py"),
        "_object_files": attr.label(default = "//tools:object_files.py"),
        "_script": attr.label(default = "//cuda:nvcc.py"),
    },
    environ = ["CONTINUAL_TRANSFORMERS_CUDA_ARCHITECTURES", "CUDA_HOME", "PATH"],
    local = True,
)

def _object(source):
    return source.rsplit(".", 1)[0] + ".pic.o"

def cuda_objects(srcs, hdrs):
    """Compile sources with nvcc. Return the names of their objects."""
    for source in srcs:
        native.genrule(
            name = source + ".object",
            srcs = [source, "@cuda//:toolkit.json"] + hdrs,
            outs = [_object(source)],
            cmd = "python3 $(location nvcc.py) object $(location @cuda//:toolkit.json) " +
                  "$(location %s) $@" % source,
            message = "Compiling for GPUs",
            tags = ["manual"],
            tools = ["nvcc.py", "//cc:library.bzl", "//tools:compiler_errors.py", "//tools:object_files.py"],
        )
    return [_object(source) for source in srcs]
