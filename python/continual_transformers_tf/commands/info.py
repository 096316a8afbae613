"""`continual-transformers info`: what is installed, or what is in a model file."""

import importlib.util
from pathlib import Path
from typing import Any

import click

import continual_transformers_tf as ct
from continual_transformers_tf import native
from continual_transformers_tf.commands import common


@click.command(
    short_help="What is installed, or what is in a model file.",
    epilog=common.example("info model.safetensors"),
)
@click.argument("model", type=common.FILE, required=False)
@click.option("--cmake-dir", is_flag=True, help="Print the folder for CMake's find_package.")
@click.option("--pkg-config-dir", is_flag=True, help="Print the folder for PKG_CONFIG_PATH.")
@common.as_json
def info(model: Path | None, cmake_dir: bool, pkg_config_dir: bool, as_json: bool) -> None:
    """Print what is installed, or what is in the model file MODEL.

    Without a MODEL, the exit status is 1 if CONTINUAL_TRANSFORMERS_BACKEND=fused asks for kernels
    in TensorFlow and there are none.
    """
    folders = {"--cmake-dir": cmake_dir, "--pkg-config-dir": pkg_config_dir}
    for option, asked in folders.items():
        if asked and (model or as_json):
            raise click.UsageError(f"{option} prints only a folder: leave out MODEL and --json")
    if cmake_dir or pkg_config_dir:
        if cmake_dir:
            click.echo(native.PACKAGE / "cmake")
        if pkg_config_dir:
            click.echo(native.PACKAGE / "pkgconfig")
    elif model:
        from continual_transformers_tf import model_file

        with common.sentences():
            if as_json:
                common.print_json(model_file.as_dict(model))
            else:
                click.echo(model_file.describe(model))
    else:
        found = {**about_sessions(), **about_tensorflow()}
        if as_json:
            common.print_json(found)
        else:
            for line in lines_of(found):
                click.echo(line)
        if found["load_error"] and native.backend() == "fused":
            raise SystemExit(1)


def about_sessions() -> dict[str, Any]:
    """Return what there is without TensorFlow: the core library, the server and the folders."""
    from continual_transformers_tf.serving import program

    with common.sentences():
        try:
            targets, in_use = native.cpu_targets()
            reason = None
        except ImportError as error:
            targets, in_use, reason = [], None, str(error)
    return {
        "version": ct.__version__,
        "core_library": str(native.CORE_LIBRARY_PATH),
        "instructions": in_use,
        "instructions_available": targets,
        "session_error": reason,
        "cuda_library": native.cuda_session_library(),
        "server": str(program.PATH) if program.PATH.exists() else None,
        "cmake_dir": str(native.PACKAGE / "cmake"),
        "pkg_config_dir": str(native.PACKAGE / "pkgconfig"),
        "op_libraries": list(native.op_libraries()),
    }


def about_tensorflow() -> dict[str, Any]:
    """Return the versions, the op library and its kernels."""
    found: dict[str, Any] = {
        "tensorflow": None,
        "keras": None,
        "op_library": None,
        "kernels": [],
        "cuda": None,
        "load_error": None,
    }
    missing = [name for name in ("tensorflow", "keras") if not importlib.util.find_spec(name)]
    if missing:
        return {**found, "missing": missing}
    common.need("cpu")
    import keras
    import tensorflow as tf

    return {
        "tensorflow": tf.__version__,
        "keras": keras.__version__,
        "op_library": str(ct.ops.LIBRARY_PATH),
        "kernels": sorted(ct.ops.kernels()),
        "cuda": (ct.ops.cuda_build() or None) if ct.ops.kernels() else None,
        "load_error": ct.ops.load_error(),
        "missing": [],
    }


def lines_of(found: dict[str, Any]) -> list[str]:
    """Return what is installed as lines of text."""
    lines = [f"core library {found['core_library']}"]
    if found["session_error"]:
        lines.append(f"ct.Session: none. The reason: {found['session_error']}")
    else:
        available = ", ".join(found["instructions_available"])
        lines.append(f"CPU instructions: {found['instructions']} of {available}")
        library = found["cuda_library"]
        lines.append(
            f"ct.Session: steps run on the CPU, and on GPUs by {library}"
            if library
            else "ct.Session: steps run on the CPU"
        )
    lines.append(f"server: {found['server'] or 'none'}")
    if found["missing"]:
        names = [{"tensorflow": "TensorFlow", "keras": "Keras"}[name] for name in found["missing"]]
        lines.append(f"{' and '.join(names)} {'are' if len(names) > 1 else 'is'} not installed")
        lines.append(f"op libraries for TensorFlow: {', '.join(found['op_libraries']) or 'none'}")
        return lines
    lines.append(f"TensorFlow {found['tensorflow']}, Keras {found['keras']}")
    lines.append(f"op library {found['op_library']}")
    lines.append(f"fused kernels: {', '.join(found['kernels']) or 'none'}")
    if found["kernels"]:
        cuda = found["cuda"]
        lines.append(f"CUDA: built with {cuda}" if cuda else "built without CUDA")
    if found["load_error"]:
        lines.append(f"the reason: {found['load_error']}")
    return lines
