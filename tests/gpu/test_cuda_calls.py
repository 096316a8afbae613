"""The structs of cuda/c_api.h as ctypes has them, and how the kernels are built."""

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
    # No field is left out: what lies between two is only alignment.
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
            with pytest.raises(AssertionError, match="not to be"):
                arena.results()
            arena.held[place] = before


def test_built_once_for_the_same_sources(monkeypatch, tmp_path):
    """By a compiler of its own, which only notes what it is asked for."""
    calls = tmp_path / "calls"
    compiler = tmp_path / "compiler"
    compiler.write_text(f'#!/bin/sh\necho "$@" >> {calls}\nfor last; do :; done\necho > "$last"\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setattr(cuda_build, "sources", lambda: [cuda_build.ROOT / "cuda" / "a.cu"])
    first = cuda_build.build(tmp_path / "out", emulated=True)
    assert first.exists()
    asked = calls.read_text()
    assert len(asked.splitlines()) == 2  # Compiled, and linked.
    assert "tests/gpu/emulator" in asked
    cuda_build.build(tmp_path / "out", emulated=True)
    assert calls.read_text() == asked
    read = cuda_build.what_is_read()
    (tmp_path / "new.h").write_text("")
    monkeypatch.setattr(cuda_build, "what_is_read", lambda: [*read, tmp_path / "new.h"])
    cuda_build.build(tmp_path / "out", emulated=True)
    assert calls.read_text() == asked * 2
    (tmp_path / "new.h").write_text("// changed")
    compiler.write_text("#!/bin/sh\necho a fault\nexit 1\n")
    with pytest.raises(RuntimeError, match="a fault"):
        cuda_build.build(tmp_path / "out", emulated=True)


def test_without_nvcc_it_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(cuda_build, "find_nvcc", lambda: None)
    monkeypatch.setattr(cuda_build, "sources", lambda: [cuda_build.ROOT / "cuda" / "a.cu"])
    with pytest.raises(RuntimeError, match="no nvcc"):
        cuda_build.build(tmp_path, capability="90")


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(cuda_build, "find_capability", lambda: None)
    assert cuda_build.main([]) == 1
    assert "no GPU" in capsys.readouterr().err
