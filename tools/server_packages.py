"""Finds what the server is built with: for setup.py and for Bazel.

    python3 tools/server_packages.py describe
    python3 tools/server_packages.py messages OUT
    python3 tools/server_packages.py descriptors

`describe` prints compiler and linker options as JSON, or says what is missing. `messages` has
protoc write the messages and the service of cc/server/inference.proto to the folder OUT.
`descriptors` writes them for the Python client, to a file that is part of the package: run it after
a change of inference.proto.
"""

import argparse
import json
import os
import runpy
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

# Not resolved: in Bazel's sandbox, files are links that lead out of it.
ROOT = Path(os.path.abspath(__file__)).parent.parent
LISTS = runpy.run_path(str(ROOT / "cc" / "library.bzl"))
SERVER = "CONTINUAL_TRANSFORMERS_SERVER"
CXX = shlex.split(os.environ.get("CXX", "g++"))

# Parts of the C library: every machine has its own.
OF_THE_SYSTEM = {"c", "dl", "m", "pthread", "rt"}


class Missing(Exception):
    """Something that the server needs is not installed: what, and how to install it."""


class Packages(NamedTuple):
    """The compiler and linker options, and shared objects that go beside the server."""

    compile: list[str]
    link: list[str]
    beside: dict[str, str]  # from the name by which programs look for it to its path
    version: str  # of gRPC and protobuf


def install() -> str:
    """Return the sentence that says how to install everything."""
    names = Path(__file__).with_suffix(".txt").read_text().split()
    return f"On Debian: apt install {' '.join(names)}"


def output_of(*command: str) -> str:
    """Return what a program prints. Raises Missing if it fails or does not exist."""
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise Missing(f"{command[0]} cannot be run: {error.strerror}. {install()}") from error
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines() or [command[0]]
        raise Missing(f"{lines[-1]}. {install()}")
    return done.stdout.strip()


def path_of(file: str) -> str | None:
    """Return where the linker finds a file, or None."""
    found = output_of(*CXX, f"-print-file-name={file}")
    return os.path.realpath(found) if os.path.isabs(found) else None


def link_options(words: list[str]) -> tuple[list[str], dict[str, str]]:
    """Return (linker options that prefer archives, the shared objects that have none)."""
    names = list(dict.fromkeys(word[2:] for word in words if word.startswith("-l")))
    options: list[str] = []
    beside: dict[str, str] = {}
    for name in names:
        shared = path_of(f"lib{name}.so")
        if name in OF_THE_SYSTEM:
            options.append(f"-l{name}")
        elif path_of(f"lib{name}.a"):
            options.append(f"-l:lib{name}.a")
        elif shared:
            options.append(f"-l{name}")
            beside[soname_of(shared)] = shared
        else:
            raise Missing(f"there is no library lib{name}. {install()}")
    return ["-Wl,--start-group", *options, "-Wl,--end-group", "-pthread"], beside


def soname_of(path: str) -> str:
    """Return the name by which programs look for a shared object."""
    lines = output_of("objdump", "-p", path).splitlines()
    return next(line.split()[1] for line in lines if line.split()[:1] == ["SONAME"])


def find() -> Packages:
    """Return the packages. Raises Missing, with a sentence."""
    for program in ("pkg-config", "protoc", "grpc_cpp_plugin"):
        if shutil.which(program) is None:
            raise Missing(f"there is no {program} on PATH. {install()}")
    names = LISTS["SERVER_PKG_CONFIG"]
    words = shlex.split(output_of("pkg-config", "--static", "--libs", *names))
    words += [f"-l{name}" for name in LISTS["SERVER_LIBRARIES"]]
    options = shlex.split(output_of("pkg-config", "--cflags", *names))
    link, beside = link_options(words)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "headers.cc")
        source.write_text("".join(f"#include <{name}>\n" for name in LISTS["SERVER_HEADER_ONLY"]))
        output_of(*CXX, "-std=c++17", "-fsyntax-only", *options, str(source))
    version = output_of("pkg-config", "--modversion", "grpc++")
    return Packages(options, link, beside, f"gRPC {version}, {output_of('protoc', '--version')}")


def chosen() -> Packages | None:
    """Return the packages, or None if the server is not to be built; print why."""
    choice = os.environ.get(SERVER, "")
    if choice not in ("", "0", "1"):
        raise SystemExit(f"Expected {SERVER} to be 0, 1 or unset, but got {choice!r}")
    if choice == "0":
        return None
    try:
        return find()
    except Missing as why:
        if choice == "1":
            raise SystemExit(f"{SERVER}=1, but {why}; {SERVER}=0 builds without it") from why
        print(f"The server is not built: {why}.", file=sys.stderr)
        return None


def messages(folder: Path) -> list[Path]:
    """Write the C++ sources of the messages and of the service. Return their paths."""
    proto = f"cc/{LISTS['SERVER_PROTO']}"
    sources = [folder / proto.replace(".proto", suffix) for suffix in (".pb.cc", ".grpc.pb.cc")]
    newest = max((ROOT / proto).stat().st_mtime, Path(__file__).stat().st_mtime)
    if all(path.exists() and path.stat().st_mtime > newest for path in sources):
        return sources
    folder.mkdir(parents=True, exist_ok=True)
    plugin = f"--plugin=protoc-gen-grpc={shutil.which('grpc_cpp_plugin')}"
    outputs = [f"--cpp_out={folder}", f"--grpc_out={folder}"]
    output_of("protoc", f"-I{ROOT}", *outputs, plugin, str(ROOT / proto))
    return sources


def descriptors() -> Path:
    """Write the file from which the Python client makes its messages. Return its path."""
    path = ROOT / "python" / "continual_transformers_tf" / "serving" / "inference.binpb"
    output_of("protoc", f"-I{ROOT}", f"--descriptor_set_out={path}", f"cc/{LISTS['SERVER_PROTO']}")
    return path


def copy_beside(packages: Packages, folder: Path) -> None:
    """Copy the shared objects that have no archive into the server's folder."""
    for name, path in packages.beside.items():
        shutil.copyfile(path, folder / name)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("describe", help="print the options as JSON")
    command = commands.add_parser("messages", help="write the sources of the messages")
    command.add_argument("folder", type=Path)
    commands.add_parser("descriptors", help="write the messages of the Python client")
    options = parser.parse_args()
    try:
        if options.command == "describe":
            print(json.dumps(find()._asdict()))
        elif options.command == "messages":
            messages(options.folder)
        else:
            print(descriptors())
    except Missing as why:
        raise SystemExit(str(why)) from why


if __name__ == "__main__":
    main()
