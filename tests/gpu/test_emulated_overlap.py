"""Kernels that begin early: that the emulator notices one that does not wait as it must.

With the emulator, tests/gpu_sessions checks the kernels themselves. Here is also what nvcc makes of
them.
"""

import os
import re
import subprocess
from pathlib import Path

import pytest

import cuda_build
import nvcc

ORDERS = range(5)


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """Return what overlap.cu prints for its arguments, and its errors."""
    built = tmp_path_factory.mktemp("overlap") / "overlap"
    command = [os.environ.get("CXX", "g++"), "-std=c++17", "-O1", "-x", "c++"]
    command += [f"-I{cuda_build.ROOT / 'tools/gpu/emulator'}", f"-I{cuda_build.ROOT}"]
    command += [str(Path(__file__).with_name("overlap.cu")), "-o", str(built)]
    subprocess.run(command, check=True)

    def run(*arguments):
        done = subprocess.run([built, *map(str, arguments)], capture_output=True, text=True)
        return done.stdout.strip(), done.stderr

    return run


def wrong(program, *arguments):
    printed, errors = program(*arguments)
    return int(re.match(r"(\d+) of 20 wrong", printed or errors).group(1))


@pytest.mark.parametrize("where", ["graph", "full_edges", "stream"])
def test_kernels_that_wait_give_right_numbers(program, where):
    early = 3 * 20 if where == "graph" else 0
    nodes = 0 if where == "stream" else 4 * 20
    for order in ORDERS:
        printed, _ = program("Good", where, order)
        assert printed == f"0 of 20 wrong, {early} of {nodes} nodes early"


@pytest.mark.parametrize("kernel", ["ReadsEarly", "WritesEarly"])
def test_touching_memory_before_waiting_gives_wrong_numbers(program, kernel):
    for order in ORDERS:
        assert wrong(program, kernel, "graph", order) > 0
        assert wrong(program, kernel, "full_edges", order) == 0


@pytest.mark.parametrize("kernel", ["NeverWaits", "SomeWait"])
@pytest.mark.parametrize("where", ["graph", "stream"])
def test_every_thread_must_wait(program, kernel, where):
    printed, errors = program(kernel, where, 0)
    assert printed == ""
    assert "a thread did not wait for the kernels before it" in errors


def test_a_kernel_that_does_not_overlap_needs_no_wait(program):
    for order in ORDERS:
        assert wrong(program, "NeverWaits", "full_edges", order) == 0


def test_drivers_that_refuse(program):
    assert program("Good", "old_driver", 0)[0] == "adding: error 36"
    assert program("Good", "strict_driver", 0)[0] == "instantiating: error 801"


@pytest.mark.slow
def test_compiled_kernels_wait(tmp_path):
    """A session's kernels: a compiler may move loads and stores, and the emulator uses another."""
    try:
        compiler = nvcc.find().nvcc
    except nvcc.Unusable as why:
        pytest.skip(str(why))
    sources = nvcc.LISTS["CUDA_SESSION_KERNEL_SOURCES"] + nvcc.LISTS["CUDA_SESSION_SOURCES"]
    options = [*nvcc.LISTS["CUDA_OPTIONS"], f"-I{cuda_build.ROOT}", "-arch=sm_90", "-ptx"]
    before_waiting = {}
    for source in (cuda_build.ROOT / "cuda" / name for name in sources if name.endswith(".cu")):
        compiled = tmp_path / f"{source.stem}.ptx"
        subprocess.run([compiler, *options, source, "-o", compiled], check=True)
        for name, body in re.findall(
            r"\.entry (\w+)\(.*?\n\{(.*?)\n\}\n", compiled.read_text(), re.S
        ):
            if "PersistentKernel" in name:  # Nothing overlaps it.
                assert "griddepcontrol" not in body, name
                continue
            assert body.count("griddepcontrol.wait;") == 1, name
            before, _ = body.split("griddepcontrol.wait;")
            assert "griddepcontrol.launch_dependents;" in before, name
            before_waiting[name] = re.findall(
                r"\b(?:ld|st|atom|red|ret)\b(?!\.param)[^\n]*", before
            )
    assert len(before_waiting) > 100
    # Attention reads a position, and a block's address for keys and values. Dense layers read the
    # first part of their kernels.
    expected = {
        "RingQueryKernel": (3, r"ld\.global\.\w*64"),
        "DenseKernel": (8, r"ld\.global\.(v4\.)?\w(16|32|64)"),
    }
    for name, instructions in before_waiting.items():
        loads, kind = next((expected[kernel] for kernel in expected if kernel in name), (0, ""))
        assert len(instructions) <= loads, name
        assert all(re.fullmatch(kind, text.split()[0]) for text in instructions), name
