"""The structs of cuda/c_api.h in ctypes, and how the kernels are built."""

import os
import re
import subprocess

import pytest

import cuda_build
import cuda_calls
from arena import Arena, HostMemory


@pytest.mark.parametrize("struct", cuda_calls.STRUCTS)
def test_fields_are_those_of_the_header(tmp_path, struct):
    kind = cuda_calls.STRUCTS[struct]
    names = [name for name, *_ in kind._fields_]
    prints = "".join(f'printf("%zu ", offsetof({struct}, {name}));' for name in names)
    program = f"""
        #include <cstddef>
        #include <cstdio>
        #include "cuda/c_api.h"
        int main() {{ {prints} printf("%zu", sizeof({struct})); }}
    """
    (tmp_path / "probe.cc").write_text(program)
    compiler = os.environ.get("CXX", "g++")
    command = [compiler, f"-I{cuda_build.ROOT}", "probe.cc", "-o", "probe"]
    subprocess.run(command, cwd=tmp_path, check=True)
    printed = subprocess.run([tmp_path / "probe"], capture_output=True, text=True, check=True)
    *offsets, size = map(int, printed.stdout.split())
    assert offsets == [getattr(kind, name).offset for name in names]
    # No field is missing at the end: at most 8 bytes follow the last one's offset.
    assert size - offsets[-1] <= 8
    header = (cuda_build.ROOT / "cuda" / "c_api.h").read_text()
    body = re.search(rf"typedef struct {{(?:(?!typedef).)*?}} {struct};", header, re.S).group()
    body = re.sub(r"//[^\n]*", "", body)
    declared = re.findall(r"(\w+)\s*[,;]", body.split("{", 1)[1].rsplit("}", 1)[0])
    assert declared == names


def test_functions_are_those_of_the_header():
    header = (cuda_build.ROOT / "cuda" / "c_api.h").read_text()
    declared = re.findall(r"continual_transformers_cuda_(\w+)\(", header)
    assert sorted(declared) == sorted(cuda_calls.FUNCTIONS)


def test_a_guard_notices():
    import numpy as np

    for misaligned in (False, True):
        arena = Arena(HostMemory(), misaligned)
        arena.add("kept", np.arange(5, dtype=np.float32))
        arena.output("written", (3,), np.int64)
        arena.place()
        assert arena.address("written") % 16 == (8 if misaligned else 0)
        start, end = arena.places["written"]
        arena.held[start:end] = 0
        np.testing.assert_array_equal(arena.results()["written"], 0)
        for place in (start - 1, end, *arena.places["kept"], 0, len(arena.held) - 1):
            before = arena.held[place]
            arena.held[place] ^= 1
            with pytest.raises(AssertionError, match="must not write"):
                arena.results()
            arena.held[place] = before


def test_built_once_for_the_same_sources(monkeypatch, tmp_path):
    """The second build calls no compiler. A fake compiler records its calls."""
    calls = tmp_path / "calls"
    compiler = tmp_path / "compiler"
    compiler.write_text(f'#!/bin/sh\necho "$@" >> {calls}\nfor last; do :; done\necho > "$last"\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    first = cuda_build.build(tmp_path / "out", emulated=True)
    assert first.exists()
    asked = len(calls.read_text().splitlines())
    assert asked > 2
    assert "tools/gpu/emulator" in calls.read_text()
    cuda_build.build(tmp_path / "out", emulated=True)
    assert len(calls.read_text().splitlines()) == asked
    read = cuda_build.what_is_read()
    (tmp_path / "new.h").write_text("")
    monkeypatch.setattr(cuda_build, "what_is_read", lambda: [*read, tmp_path / "new.h"])
    cuda_build.build(tmp_path / "out", emulated=True)
    assert len(calls.read_text().splitlines()) == 2 * asked
    (tmp_path / "new.h").write_text("// changed")
    compiler.write_text("#!/bin/sh\necho a fault\nexit 1\n")
    with pytest.raises(RuntimeError, match="a fault"):
        cuda_build.build(tmp_path / "out", emulated=True)


def test_without_nvcc_it_says_so(monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(RuntimeError, match="no bin/nvcc"):
        cuda_build.build(tmp_path / "out", capability="90")


@pytest.mark.slow
def test_built_by_nvcc_it_loads_without_a_driver():
    directory = cuda_build.default_directory(emulated=False, capability="90")
    try:
        path = cuda_build.build(directory, capability="90")
    except RuntimeError as error:
        if "there is no nvcc" in str(error):
            pytest.skip("there is no nvcc here")
        raise
    library = cuda_calls.CudaLibrary(path)
    assert library.plan_window_parts(8, 65536, 132) > 1
    if cuda_build.why_no_driver() is not None:
        with pytest.raises(cuda_calls.Refused, match="(?i)driver"):
            library.nothing(None)


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(cuda_build, "find_capability", lambda: None)
    assert cuda_build.main([]) == 1
    assert "no GPU" in capsys.readouterr().err
