"""Pack the libraries that Bazel built into a wheel: `bazel run //bazel:wheel -- FOLDER`.

setup.py provides the metadata, as for pip, but it compiles nothing.
"""

import os
import runpy
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

RUNFILES = Path(__file__).parent.parent
PACKAGE = RUNFILES / "python" / "continual_transformers_tf"
LISTS = runpy.run_path(str(RUNFILES / "cc" / "library.bzl"))


def main(folder):
    # Relative to where `bazel run` was typed, not to where Bazel runs this.
    folder = Path(os.environ.get("BUILD_WORKING_DIRECTORY", "."), folder)
    with tempfile.TemporaryDirectory() as tree:
        prebuilt = Path(tree, "prebuilt")
        prebuilt.mkdir()
        for pattern in ("*.so", "*.so.*", LISTS["SERVER_PROGRAM"]):
            for built in PACKAGE.glob(pattern):
                shutil.copy(built, prebuilt)
        for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
            shutil.copy(RUNFILES / name, tree)
        for name in ("cc", "cuda", "python", "tools"):
            shutil.copytree(
                RUNFILES / name,
                Path(tree, name),
                ignore=shutil.ignore_patterns(
                    "*.so", "*.so.*", LISTS["SERVER_PROGRAM"], "__pycache__"
                ),
            )
        subprocess.run(
            [
                *(sys.executable, "-m", "pip", "wheel", tree),
                *("--no-deps", "--no-build-isolation", "--wheel-dir", str(folder)),
            ],
            env={**os.environ, "CONTINUAL_TRANSFORMERS_PREBUILT": str(prebuilt)},
            check=True,
        )


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "dist")
