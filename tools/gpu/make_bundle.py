"""`make gpu-bundle`: collect what a machine with only a GPU, CUDA and PyTorch lacks (bundle.py).

    .venv/bin/python tools/gpu/make_bundle.py [--output DIRECTORY] [--cases NAME ...]

It needs this package and Keras. It prints the bundle's size.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable
from importlib import metadata, util
from pathlib import Path
from typing import Any

import bundle
import cuda_build

ROOT = cuda_build.ROOT
sys.path[:0] = [str(ROOT / part) for part in ("tests", "benchmarks/gpu", "tools")]
import session_sizes  # noqa: E402  In a folder that was just added.
import tensorflow_headers  # noqa: E402

# setup.py imports setuptools and tqdm, and includes the headers of the others.
PACKAGES = ("nlohmann-json", "pybind11", "setuptools", "tqdm")
MOST_BYTES = 60 << 20


class TooLarge(Exception):
    """The bundle has more bytes than may travel."""


def copy_packages(target: Path) -> None:
    """Copy Python packages, with the metadata that their versions are in.

    Raises:
        SystemExit: If one is not installed.
    """
    for distribution in PACKAGES:
        spec = util.find_spec(distribution.replace("-", "_"))
        if spec is None or not spec.submodule_search_locations:
            raise SystemExit(f"{distribution} is not installed here: pip install {distribution}")
        (folder,) = spec.submodule_search_locations
        about = Path(folder).parent / (
            f"{distribution.replace('-', '_')}-{metadata.version(distribution)}.dist-info"
        )
        for source in (Path(folder), about):
            shutil.copytree(
                source, target / source.name, ignore=shutil.ignore_patterns("__pycache__", "tests")
            )


def copy_highway(target: Path) -> None:
    """Copy Google Highway's headers to where tensorflow_headers.py looks for a fetched wheel's."""
    tensorflow = tensorflow_headers.with_highway(tensorflow_headers.wanted())
    inside = tensorflow_headers.LISTS["HIGHWAY_INCLUDE"]
    version = target / tensorflow_headers.MACHINE / tensorflow.version
    shutil.copytree(
        tensorflow.folder / inside,
        version / inside,
        ignore=lambda folder, names: [
            name
            for name in names
            if not Path(folder, name).is_dir() and Path(name).suffix not in (".h", ".inc")
        ],
    )


def pack_cases(target: Path, names: Iterable[str] | None = None) -> None:
    """Pack the tests' models that a session on a GPU takes, and list them in cases.json.

    Args:
        target: A folder.
        names: Those of the models; None: all.
    """
    from continual_transformers_tf.session import Session
    from model_case import BOUNDS
    from model_cases import CASES

    target.mkdir()
    listed = {}
    for name in CASES if names is None else names:
        case = CASES[name]
        session = Session(case.build(), seq_len=case.seq_len)
        if json.loads(session._plan_json)["compute_dtype"] == "float64":
            continue  # It has no kernels.
        session.save(target / f"{name}.safetensors")
        bound = BOUNDS[case.dtype]
        listed[name] = bundle.Case(case.window, case.high, case.gaps, bound)._asdict()
    (target / "cases.json").write_text(json.dumps(listed, indent=1))


def pack_plans(target: Path) -> None:
    """Write the headers of the benchmark's model files."""
    from continual_transformers_tf.session import Session

    target.mkdir()
    for size in session_sizes.SIZES:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "model.safetensors")
            Session(benchmark_model(size)).save(path)
            (target / f"{size.name}.plan").write_bytes(bundle.beginning(path.read_bytes()))


def benchmark_model(size: session_sizes.SessionSize) -> Any:
    """Return the Keras model or layer of a size."""
    import continual_transformers_tf as ct

    if size.kind == "co_oad_tr":
        return ct.co_oad_tr(
            size.layers, features=size.inputs, classes=size.outputs, seq_len=size.window,
            embed_dim=size.features, num_heads=size.heads, ff_dim=size.hidden,
        )  # fmt: skip
    if size.kind == "retroactive":
        layer = ct.CoReMultiHeadAttention(size.window, size.heads, size.features // size.heads)
    else:
        layer = ct.TransformerEncoder(
            size.layers, size.window, size.features, size.heads, size.hidden,
            key_dim=size.features // size.heads,
        )  # fmt: skip
    layer.build((None, size.window, size.features))
    return layer


def make(
    folder: Path, names: Iterable[str] | None = None, most_bytes: int = MOST_BYTES
) -> dict[str, int]:
    """Make the bundle, in place of an older one, and return the bytes of each part.

    Args:
        folder: Where it is put.
        names: As in `pack_cases`.
        most_bytes: The limit.

    Raises:
        TooLarge: If it is larger. Then an older bundle stays.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix="gpu-bundle.") as temporary:
        made = Path(temporary, "made")
        copy_packages(made / "packages")
        copy_highway(made / "tensorflow")
        pack_cases(made / "cases", names)
        pack_plans(made / "plans")
        sizes = dict(bundle.sizes_by_part(made))
        total = sum(sizes.values())
        if total > most_bytes:
            parts = ", ".join(f"{part} {count:,}" for part, count in sizes.items())
            raise TooLarge(
                f"The bundle has {total:,} bytes ({parts}), expected at most {most_bytes:,}: leave "
                "out cases (--cases)"
            )
        if folder.exists():
            shutil.rmtree(folder)
        made.rename(folder)
    return sizes


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--output", type=Path, default=bundle.FOLDER)
    parser.add_argument(
        "--cases", nargs="+", metavar="NAME", help="only these of the tests' models"
    )
    chosen = parser.parse_args(arguments)
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # TensorFlow is to leave a GPU alone.
    try:
        sizes = make(chosen.output, chosen.cases)
    except TooLarge as error:
        print(error, file=sys.stderr)
        return 1
    for part, count in sizes.items():
        print(f"{part:12} {count:>12,} bytes")
    cases = len(bundle.read_cases(chosen.output))
    print(f"{chosen.output}: {sum(sizes.values()):,} bytes, {cases} models for the tests")
    return 0


if __name__ == "__main__":
    sys.exit(main())
