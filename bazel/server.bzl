"""What the server is built with, as tools/server_packages.py finds it: an external repository."""

_BUILD = """
# {VERSION}, as tools/server_packages.py found it. Made by //bazel:server.bzl.

cc_library(
    name = "packages",
    linkopts = {LINK},
    visibility = ["//visibility:public"],
)

exports_files({BESIDE})
"""

_PACKAGES = """
SERVER_IS_BUILT = {IS_BUILT}
SERVER_OPTIONS = {COMPILE}
SERVER_BESIDE = {BESIDE}
"""

def _server_configure_impl(repository_ctx):
    python = repository_ctx.which("python3")
    if python == None:
        fail("found no python3 on PATH, expected one to run tools/server_packages.py")
    script = repository_ctx.path(repository_ctx.attr._script)
    result = repository_ctx.execute([python, script, "describe"])
    if result.return_code != 0:
        # buildifier: disable=print
        print("The server is not built: " + result.stderr)
        found = {"beside": {}, "compile": [], "link": [], "version": "nothing"}
    else:
        found = json.decode(result.stdout)
    for name, path in found["beside"].items():
        repository_ctx.symlink(path, name)
    beside = sorted(found["beside"].keys())
    repository_ctx.file("BUILD", _BUILD.format(
        BESIDE = beside,
        LINK = found["link"],
        VERSION = found["version"],
    ))
    repository_ctx.file("packages.bzl", _PACKAGES.format(
        BESIDE = beside,
        COMPILE = found["compile"],
        IS_BUILT = result.return_code == 0,
    ))

server_configure = repository_rule(
    implementation = _server_configure_impl,
    attrs = {
        "_lists": attr.label(default = "//cc:library.bzl"),
        "_names": attr.label(default = "//tools:server_packages.txt"),
        "_script": attr.label(default = "//tools:server_packages.py"),
    },
    environ = ["PATH"],
    local = True,
)
