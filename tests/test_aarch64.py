"""AArch64, on a machine of another kind: kernels and wheels from the cross compiler, under qemu.

`make test-aarch64` runs these tests, and `make test-slow` those without the mark `aarch64`. qemu
shows that results are right, and nothing about speed.
"""

import json
import re
import shlex
import subprocess
import sys
import zipfile
from pathlib import Path

import keras
import numpy as np
import pytest

import aarch64
import aarch64_programs
import continual_transformers_tf as ct
import wheels
from continual_transformers_tf.serving import program

ROOT = Path(__file__).parent.parent
CC_TESTS = sorted(path.stem for path in (ROOT / "tests" / "cc").glob("*_test.cc"))
# The C++ tests that `make test-slow` runs too.
SAMPLE = {"packed_dense_test", "ring_attention_test"}
# C++ tests of what qemu does not emulate.
NOT_UNDER_QEMU = [
    # qemu fails itself when a child of fork starts a thread.
    "*Fork*",
    "ThreadPoolTest.AChildStartsThreadsOfItsOwn",
    # qemu ignores limits of memory: the first would take all that the machine has. The second
    # measures the process's memory, and much of that is qemu's.
    "StreamStore.LimitedAddressSpace",
    "StreamStore.MemoryOfStreamsThatAreNotStepped",
]
MISSING = aarch64_programs.missing()
AARCH64 = 183  # The machine's number in the header of an ELF file.
FEATURES = 6

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(MISSING is not None, reason=str(MISSING)),
]


def run(*command, **options):
    """Run a command. Return what it prints."""
    done = subprocess.run(command, capture_output=True, text=True, **options)
    assert done.returncode == 0, (done.stdout + done.stderr)[-5000:]
    return done.stdout


@pytest.mark.parametrize(
    "test",
    [
        pytest.param(test, marks=[] if test in SAMPLE else [pytest.mark.aarch64])
        for test in CC_TESTS
    ],
)
def test_a_cc_test(test):
    """The kernels' vector code for NEON, and what sessions do with it."""
    run(aarch64.qemu(), aarch64_programs.build(test), f"--gtest_filter=-{':'.join(NOT_UNDER_QEMU)}")


@pytest.mark.aarch64
@pytest.mark.parametrize("python", wheels.supported_pythons())
def test_this_machine_s_headers_of_python_fit(python, tmp_path):
    """Only pyconfig.h depends on the machine, and the sizes in it are the same on both."""
    path = wheels.find_python(python)
    if path is None:
        pytest.skip(f"there is no CPython {python}")
    types = {"void*": "VOID_P", "long": "LONG", "size_t": "SIZE_T", "time_t": "TIME_T"}
    types |= {"wchar_t": "WCHAR_T", "long double": "LONG_DOUBLE"}
    lines = [f"static_assert(sizeof({name}) == SIZEOF_{of});" for name, of in types.items()]
    source = tmp_path / "sizes.cc"
    source.write_text("\n".join(["#include <Python.h>", "#include <ctime>", *lines]))
    headers = run(path, "-c", "import sysconfig; print(sysconfig.get_paths()['include'])").strip()
    compiler = shlex.split(aarch64.build_variables(python)["CXX"])
    run(*compiler, "-isystem", headers, "-fsyntax-only", source)


@pytest.fixture(scope="module")
def built_wheels():
    """The wheels for AArch64, by the version of Python."""
    pytest.importorskip("auditwheel", reason="`make test-aarch64` installs it")
    out = ROOT / "build" / "aarch64" / "wheels"
    run(sys.executable, ROOT / "tools" / "wheels.py", out, "--machine", aarch64.MACHINE)
    return {re.search(r"-cp3(\d+)-", path.name)[1]: path for path in out.glob("*.whl")}


@pytest.mark.aarch64
@pytest.mark.parametrize("python", wheels.supported_pythons())
def test_what_a_wheel_holds(built_wheels, python):
    if wheels.find_python(python) is None:
        pytest.skip(f"there is no CPython {python}")
    tag = f"cp{python.replace('.', '')}"
    wheel = built_wheels[python.split(".")[1]]
    assert wheel.name.endswith(f"-{tag}-{tag}-manylinux_2_35_aarch64.whl")
    lists = wheels.LISTS
    op_libraries = [lists["OP_LIBRARY"].format(MINOR=minor) for minor in lists["TENSORFLOWS"]]
    extension = f"_session.cpython-{tag.removeprefix('cp')}-aarch64-linux-gnu.so"
    expected = {lists["CORE_LIBRARY"], *op_libraries, extension, lists["SERVER_PROGRAM"]}
    with zipfile.ZipFile(wheel) as files:
        heads = {Path(name).name: files.read(name)[:20] for name in files.namelist()}
    programs = {name: head for name, head in heads.items() if head[:4] == b"\x7fELF"}
    assert expected <= set(programs)
    assert {int.from_bytes(head[18:20], "little") for head in programs.values()} == {AARCH64}


class Emulated:
    """Debian's Python for AArch64 under qemu, and a folder of packages."""

    def __init__(self, folder):
        self.folder = folder
        # Debian 12's.
        self.version = "3.11"
        self.root = aarch64.sysroot()

    def install(self, *requirements):
        """Have pip install what it would install on an AArch64 machine with glibc 2.35."""
        run(
            *(sys.executable, "-m", "pip", "install", "-q", "--target", self.folder),
            *("--only-binary=:all:", "--implementation=cp", f"--python-version={self.version}"),
            *(f"--platform=manylinux{tag}_aarch64" for tag in ("2014", "_2_17", "_2_27", "_2_28")),
            *("--platform=manylinux_2_35_aarch64", *map(str, requirements)),
        )

    def command(self, path):
        """Return the command that runs a program."""
        return [aarch64.qemu(), "-L", str(self.root), str(path)]

    def python(self, source, *arguments):
        """Run a Python program with the packages. Return what it prints."""
        python = self.root / "usr" / "bin" / f"python{self.version}"
        environment = {"PYTHONPATH": str(self.folder), "TF_CPP_MIN_LOG_LEVEL": "2"}
        return run(*self.command(python), "-c", source, *map(str, arguments), env=environment)


@pytest.fixture(scope="module")
def emulated(built_wheels, tmp_path_factory):
    """The wheel, with NumPy and click and without TensorFlow."""
    found = Emulated(tmp_path_factory.mktemp("packages"))
    if "11" not in built_wheels:
        pytest.skip("there is no CPython 3.11")
    found.install(built_wheels["11"])
    return found


@pytest.fixture
def packed(tmp_path, random):
    """A session of this machine, its model file, and 40 steps of 3 streams."""
    inputs = keras.Input((16, FEATURES))
    x = ct.CoSiTransformerEncoder(seq_len=16, embed_dim=FEATURES, num_heads=2, ff_dim=16)(inputs)
    session = ct.Session(keras.Model(inputs, keras.layers.Dense(3)(x[:, -1])))
    session.save(tmp_path / "model.safetensors")
    x = random.standard_normal((40, 3, FEATURES)).astype("float32")
    return session, tmp_path / "model.safetensors", x


def assert_close(outputs, expected, bound=5e-6):
    assert np.max(np.abs(outputs - expected)) <= bound * np.max(np.abs(expected))


STEPS = """
import sys, numpy as np, continual_transformers_tf as ct
model, inputs, outputs, weights, cache = sys.argv[1:]
session = ct.Session.load(model, weights_dtype=weights, cache_dtype=cache)
np.save(outputs, [session.step(x) for x in np.load(inputs)])
print("tensorflow" in sys.modules)
"""


@pytest.mark.aarch64
@pytest.mark.parametrize(
    ("weights", "cache"),
    [("float32", "float32"), ("bfloat16", "float16"), ("bfloat16", "bfloat16")],
)
def test_a_session_s_steps_are_the_same(emulated, packed, tmp_path, weights, cache):
    _, model, x = packed
    np.save(tmp_path / "x.npy", x)
    said = emulated.python(STEPS, model, tmp_path / "x.npy", tmp_path / "y.npy", weights, cache)
    assert said == "False\n"
    session = ct.Session.load(model, weights_dtype=weights, cache_dtype=cache)
    expected = np.stack([session.step(step) for step in x])
    # A last bit that differs before it is rounded to 16 bits is a difference of 2^-8.
    assert_close(np.load(tmp_path / "y.npy"), expected, 5e-6 if cache == "float32" else 1e-2)


@pytest.mark.aarch64
def test_the_server_s_answers_are_the_same(emulated, packed, tmp_path, monkeypatch):
    session, model, x = packed
    server = emulated.folder / "continual_transformers_tf" / program.PATH.name
    script = tmp_path / "server"
    script.write_text(f'#!/bin/sh\nexec {shlex.join(emulated.command(server))} "$@"\n')
    script.chmod(0o755)
    monkeypatch.setattr(program, "PATH", script)
    with (
        program.LocalServer(model) as running,
        ct.serving.Client(running.url, timeout=60) as client,
        client.open("one") as stream,
    ):
        outputs = np.stack([stream.step(step[0]) for step in x])
    expected = np.stack([session.step(step[:1])[0] for step in x])
    assert_close(outputs, expected)


LAYERS = """
import json, numpy as np, continual_transformers_tf as ct
layer = ct.CoSiMultiHeadAttention(4, 2, 3)
steps = np.random.default_rng(1).standard_normal((5, 1, 5)).astype("float32")
answer = [layer.call_step(x) for x in steps][-1]
session = ct.Session(layer)
of_session = [session.step(x) for x in steps][-1]
print(json.dumps(dict(
    difference=float(np.max(np.abs(of_session - answer))),
    kernels=sorted(ct.ops.kernels()),
    targets=ct.ops.cpu_targets(),
    error=ct.ops.load_error(),
)))
"""


@pytest.mark.aarch64
def test_layers_with_tensorflow(emulated, built_wheels, tmp_path):
    """The op library loads into TensorFlow's wheel for AArch64, and its kernels are used."""
    with_tensorflow = Emulated(tmp_path)
    minor = wheels.LISTS["TENSORFLOWS"][-1]
    with_tensorflow.install(built_wheels["11"], f"tensorflow=={minor}.*", "keras>=3.15")
    facts = json.loads(with_tensorflow.python(LAYERS).splitlines()[-1])
    assert facts["error"] is None
    assert facts["kernels"] == ["CPU"]
    assert facts["targets"] == [["NEON"], "NEON"]
    assert facts["difference"] < 1e-5
