"""The TensorFlow that pip installed for the python3 on PATH, as an external repository."""

load("//cc:library.bzl", "HIGHWAY_INCLUDE")

_FACTS = """
import importlib.metadata, importlib.util, pathlib
folder = pathlib.Path(importlib.util.find_spec("tensorflow").submodule_search_locations[0])
names = {d.name: d.version for d in importlib.metadata.distributions()}
print(folder)
print(names.get("tensorflow-cpu") or names.get("tensorflow_cpu") or names["tensorflow"])
"""

def _tensorflow_configure_impl(repository_ctx):
    python = repository_ctx.which("python3")
    if python == None:
        fail("found no python3 on PATH; expected one with TensorFlow installed")
    result = repository_ctx.execute([python, "-c", _FACTS])
    if result.return_code != 0:
        fail("%s has no TensorFlow, which the op library is built against: " % python +
             "pip install 'tensorflow-cpu'. Its error: " + result.stderr)
    folder, version = result.stdout.strip().split("\n")
    repository_ctx.symlink(folder + "/include", "include")
    repository_ctx.symlink(
        folder + "/libtensorflow_framework.so.2",
        "libtensorflow_framework.so.2",
    )
    minor = ".".join(version.split(".")[:2])
    repository_ctx.file("version.bzl", 'MINOR = "%s"\n' % minor, executable = False)
    repository_ctx.template(
        "BUILD",
        repository_ctx.attr._build_file,
        substitutions = {
            "{HIGHWAY_INCLUDE}": HIGHWAY_INCLUDE,
            "{VERSION}": version,
        },
        executable = False,
    )

tensorflow_configure = repository_rule(
    implementation = _tensorflow_configure_impl,
    attrs = {"_build_file": attr.label(default = "//bazel:tensorflow.BUILD")},
    environ = ["PATH"],
    local = True,
)
