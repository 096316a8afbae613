"""Headers that pip installed for the python3 on PATH, as an external repository."""

_FACTS = """
import importlib.util, os, sysconfig
def folder(package, *within):
    spec = importlib.util.find_spec(package)
    if spec is None:
        raise SystemExit("it has no package " + package)
    return os.path.join(spec.submodule_search_locations[0], *within)
import numpy
print("python", sysconfig.get_paths()["include"])
print("numpy", numpy.get_include())
print("pybind11", folder("pybind11", "include"))
print("nlohmann_json", folder("nlohmann_json", "include"))
"""

def _python_configure_impl(repository_ctx):
    python = repository_ctx.which("python3")
    if python == None:
        fail("found no python3 on PATH, expected one with numpy, nlohmann-json and pybind11")
    result = repository_ctx.execute([python, "-c", _FACTS])
    if result.return_code != 0:
        fail("%s lacks packages that the extension is built with: " % python +
             "pip install numpy nlohmann-json pybind11. Its error: " + result.stderr)
    for line in result.stdout.strip().split("\n"):
        name, folder = line.split(" ", 1)
        repository_ctx.symlink(folder, name)
    repository_ctx.symlink(repository_ctx.attr._build_file, "BUILD")

python_configure = repository_rule(
    implementation = _python_configure_impl,
    attrs = {"_build_file": attr.label(default = "//bazel:python.BUILD")},
    environ = ["PATH"],
    local = True,
)
