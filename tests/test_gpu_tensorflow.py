"""GPU TensorFlow in slices: that they are small and complete, and used where they are.

No test downloads TensorFlow. A small wheel stands for it.
"""

import json
import os
import shutil
import stat
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

import cuda_build
import device_code
import gpu_run
import make_tensorflow_bundle as maker
import nvcc
import tensorflow_bundle as bundle
import tensorflow_run
import tensorflow_start

ROOT = cuda_build.ROOT
MACHINE_CODE, PTX = device_code.MACHINE_CODE, device_code.PTX


def fat_binary(*entries):
    """Return a fat binary with entries (kind, compute capability, body)."""
    made = b""
    for kind, capability, body in entries:
        header = bytearray(64)
        struct.pack_into("<HHIQ", header, 0, kind, 0x101, len(header), len(body))
        struct.pack_into("<I", header, 28, capability)
        made += bytes(header) + body
    return struct.pack("<IHHQ", device_code.MAGIC, 1, 16, len(made)) + made


def elf(**sections):
    """Return an ELF file that has nothing but a header and these sections."""
    names = ["", *(f".{name}" for name in sections), ".shstrtab"]
    strings = b"".join(name.encode() + b"\0" for name in names)
    bodies = [b"", *sections.values(), strings]
    at, made, rows = 64, b"", b""
    name_at = 0
    for name, body in zip(names, bodies, strict=True):
        rows += struct.pack("<IIQQQQIIQQ", name_at, 1, 0, 0, at, len(body), 0, 0, 1, 0)
        name_at += len(name) + 1
        at, made = at + len(body), made + body
    header = b"\x7fELF\2\1\1" + bytes(9)
    header += struct.pack("<HHIQQQI", 3, 62, 1, 0, 0, at, 0)
    header += struct.pack("<HHHHHH", 64, 0, 0, 64, len(names), len(names) - 1)
    return header + made + rows


needs_xz = pytest.mark.skipif(shutil.which("xz") is None, reason="there is no xz here")
OTHERS = bytes(range(1, 255))  # Not zeros, and what no test may change.


def test_device_code_of_other_gpus_is_removed(tmp_path):
    bodies = {(kind, n): bytes([kind * 20 + n]) * 80 for kind in (PTX, MACHINE_CODE)
              for n in (60, 80, 89, 90)}  # fmt: skip
    one = fat_binary(*((*key, body) for key, body in bodies.items()))
    # The second begins after a gap, and has only PTX for newer GPUs than 8.0.
    two = fat_binary((MACHINE_CODE, 60, b"a" * 8), (PTX, 80, b"b" * 8), (PTX, 90, b"c" * 8))
    library = tmp_path / "library.so"

    def slimmed(capability):
        library.write_bytes(elf(text=OTHERS, nv_fatbin=one + bytes(24) + two, data=OTHERS))
        before = library.read_bytes()
        sizes = device_code.keep_one_capability(library, capability)
        after = library.read_bytes()
        changed = np.frombuffer(before, np.uint8) != np.frombuffer(after, np.uint8)
        assert len(after) == len(before)
        assert sizes.zeroed == changed.sum()
        assert sizes.kept + sizes.zeroed == 8 * 80 + 3 * 8
        assert after.count(OTHERS) == 2
        return {key for key, body in bodies.items() if body in after}, after

    kept, after = slimmed(90)
    assert kept == {(MACHINE_CODE, 90)}
    assert b"c" * 8 in after
    assert b"b" * 8 not in after
    kept, after = slimmed(89)
    assert kept == {(MACHINE_CODE, 89)}
    assert b"b" * 8 in after
    assert slimmed(86)[0] == {(MACHINE_CODE, 80)}  # Of the same major version.
    assert slimmed(120)[0] == {(PTX, 90)}


def test_a_library_that_does_not_fit_is_left_as_it_was(tmp_path):
    library = tmp_path / "library.so"
    library.write_bytes(elf(nv_fatbin=fat_binary((MACHINE_CODE, 90, b"x" * 8))))
    before = library.read_bytes()
    with pytest.raises(ValueError, match="for compute capabilities 90, and none that runs on 80"):
        device_code.keep_one_capability(library, 80)
    assert library.read_bytes() == before
    broken = bytearray(fat_binary((MACHINE_CODE, 90, b"x" * 8)))
    struct.pack_into("<I", broken, 16 + 4, 0)  # A header of no bytes: the walk would never end.
    library.write_bytes(elf(nv_fatbin=bytes(broken)))
    with pytest.raises(ValueError, match="Expected device code at byte"):
        device_code.keep_one_capability(library, 90)
    library.write_bytes(elf(text=OTHERS))
    assert device_code.keep_one_capability(library, 90) == (0, 0)


def test_what_nvcc_makes(tmp_path):
    try:
        compiler = nvcc.find_nvcc()
    except nvcc.Unusable as why:
        pytest.skip(str(why))
    source = tmp_path / "kernel.cu"
    source.write_text("__global__ void Twice(float* x) { x[threadIdx.x] *= 2; }\n")
    library = tmp_path / "library.so"
    codes = [f"-gencode=arch=compute_{n},code=[sm_{n},compute_{n}]" for n in (80, 90)]
    command = [compiler, "-shared", "-Xcompiler=-fPIC", *codes, "-o", library, source]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"nvcc cannot link here: {done.stderr.strip()[-200:]}")
    with open(library, "r+b") as file, device_code.mmap.mmap(file.fileno(), 0) as data:
        entries = [
            entry
            for section in device_code.sections(data)
            for entries in device_code.fat_binaries(data, *section)
            for entry in entries
        ]
        bodies = {entry: data[entry.begin : entry.end] for entry in entries}
    kinds = {(entry.kind, entry.capability) for entry in entries}
    assert {(kind, n) for kind in (PTX, MACHINE_CODE) for n in (80, 90)} <= kinds
    sizes = device_code.keep_one_capability(library, 90)
    after = library.read_bytes()
    for entry, body in bodies.items():
        kept = (entry.kind, entry.capability) == (MACHINE_CODE, 90)
        assert after[entry.begin : entry.end] == (body if kept else bytes(len(body)))
    assert sizes.kept > 0


def made_slices(folder, most_bytes=3000):
    """Write a small tree as slices; return the tree. Its package and its TensorFlow do nothing."""
    tree = bundle.Tree(folder.parent / "source")
    random = np.random.default_rng(3)
    for path in (tree.site / "tensorflow/__init__.py", tree.site / "tensorflow/a/b.so",
                 tree.package / "continual_transformers_tf/__init__.py"):  # fmt: skip
        path.parent.mkdir(parents=True)
        path.write_bytes(random.bytes(5000))
    (tree.site / "tensorflow/a/b.so").chmod(0o755)
    (tree.site / "tensorflow/empty").touch()
    folder.mkdir()
    with_package = shutil.copytree(tree.package, folder.parent / "only/package")
    tensorflow = folder.parent / "tensorflow"
    shutil.copytree(tree.site, tensorflow / "site")
    files = maker.cut(tensorflow, folder, bundle.TENSORFLOW, most_bytes)
    package = folder / bundle.PACKAGE
    with open(package, "wb") as file:
        maker.pack(with_package.parent, file.write)
    files[package.name] = bundle.describe_file(package)
    about = dict(python=bundle.this_python(), capability="90", functions={}, files=files)
    maker.write_about(folder, about)
    return tree


def what_is_in(folder):
    return {
        str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mode & stat.S_IXUSR)
        for path in folder.rglob("*")
        if path.is_file()
    }


@needs_xz
def test_slices_are_put_together_to_the_same_tree(tmp_path):
    folder = tmp_path / "slices"
    source = made_slices(folder)
    slices = sorted(path.name for path in folder.iterdir())
    assert slices == [
        bundle.ABOUT,
        bundle.PACKAGE,
        *(f"{bundle.TENSORFLOW}.0{i}" for i in range(4)),
    ]
    assert max(path.stat().st_size for path in folder.glob(f"{bundle.TENSORFLOW}.*")) == 3000
    assert bundle.why_unusable(folder) is None
    tree = bundle.unpack(folder)
    assert what_is_in(tree.site) == what_is_in(source.site)
    assert what_is_in(tree.package) == what_is_in(source.package)
    # A second call leaves it, and one after new slices does not.
    (tree.site / "mark").touch()
    assert (bundle.unpack(folder).site / "mark").exists()
    about = bundle.read_about(folder)
    maker.write_about(folder, {**about, "functions": {"a": ["b"]}})
    assert not (bundle.unpack(folder).site / "mark").exists()


@needs_xz
def test_slices_that_are_missing_or_damaged_are_named(tmp_path):
    folder = tmp_path / "slices"
    assert "make gpu-tensorflow-bundle" in bundle.why_unusable(folder)
    made_slices(folder)
    second = folder / f"{bundle.TENSORFLOW}.01"
    whole = second.read_bytes()
    second.write_bytes(whole[:-1] + b"?")
    with pytest.raises(bundle.Damaged, match=r"xz\.01 has 3,000 bytes .* carry it here again"):
        bundle.unpack(folder)
    assert not bundle.tree_of(folder).folder.exists()
    second.unlink()
    assert bundle.why_unusable(folder) == f"1 of 5 slices are not here: {second.name}"
    with pytest.raises(bundle.Damaged, match=f"{second.name} is not here"):
        bundle.unpack(folder)
    about = bundle.read_about(folder)
    (folder / second.name).write_bytes(whole)
    fitting = {c: bundle.why_unusable(folder, c) is None for c in ("80", "89", "90", "91", "100")}
    assert [c for c, fits in fitting.items() if fits] == ["90", "91"]
    assert "for compute capability 90, and this GPU has 80" in bundle.why_unusable(folder, "80")
    maker.write_about(folder, {**about, "python": "3.1"})
    why = bundle.why_unusable(folder)
    assert why.startswith(f"the slices in {folder} hold TensorFlow for Python 3.1, and this is ")


def wheel(folder, name, version, requires=(), **files):
    """Write a wheel of a package with these files, for any Python."""
    about = f"{name}-{version}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: {version}\n"
    metadata += "".join(f"Requires-Dist: {line}\n" for line in requires)
    files = {
        **files,
        f"{about}/METADATA": metadata,
        f"{about}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    files[f"{about}/RECORD"] = "".join(f"{path},,\n" for path in [*files, f"{about}/RECORD"])
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as archive:
        for path, content in files.items():
            archive.writestr(path, content)


@pytest.fixture
def small_wheels(tmp_path, monkeypatch):
    """Have pip find a small TensorFlow with one header, of the version that is installed."""
    here = maker.tensorflow_headers.wanted()[0]
    folder = tmp_path / "wheels"
    folder.mkdir()
    library = elf(
        nv_fatbin=fat_binary(*((MACHINE_CODE, n, bytes([n]) * 400) for n in (80, 90))),
        rodata=b"\0cublasCreate_v2\0a cublasSgemm of\0cublasLtMatmul\0cudnnGetVersion\0",
    )
    wheel(folder, "tensorflow", here.version, ["absl-py", "nvidia-cuda-runtime-cu12<13"], **{
        "tensorflow/__init__.py": "", "tensorflow/include/a.h": "// a header\n",
        maker.EMPTY.replace(".py", ".so"): "a library",
        **dict.fromkeys(maker.TENSORFLOW_LIBRARIES, library),
    })  # fmt: skip
    wheel(folder, "keras", maker.metadata.version("keras"), **{"keras/__init__.py": ""})
    wheel(folder, "absl_py", "2.0", **{"absl/__init__.py": "", "bin/a": ""})
    runtime = {"nvidia/cuda_runtime/lib/libcudart.so.12": "a library"}
    wheel(folder, "nvidia_cuda_runtime_cu12", "12.5", **runtime)
    for name, value in dict(NO_INDEX="1", FIND_LINKS=folder, CONFIG_FILE=os.devnull).items():
        monkeypatch.setenv(f"PIP_{name}", str(value))
    headers = tmp_path / "headers"
    (headers / "include").mkdir(parents=True)
    (headers / "include/a.h").write_text("// a header\n")
    (headers / "include/b.h").write_text("// a header of the CPU's\n")
    fake = here._replace(folder=headers)
    monkeypatch.setattr(maker.tensorflow_headers, "wanted", lambda: [fake])
    monkeypatch.setattr(maker, "headers_read", lambda version: ["a.h"])

    def build(target, capability):
        (target / bundle.PACKAGE).write_bytes(b"a package")
        return {bundle.PACKAGE: bundle.describe_file(target / bundle.PACKAGE)}

    monkeypatch.setattr(maker, "make_package", build)
    return headers


@needs_xz
def test_a_wheel_becomes_slices(small_wheels, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "slices"
    options = ["--output", str(folder), "--python", bundle.this_python(), "--slice-bytes", "1000"]
    assert maker.main(options) == 0
    said = capsys.readouterr().out
    assert "kept 800 bytes of device code for compute capability 90, and removed 800" in said
    about = bundle.read_about(folder)
    total = sum(file["bytes"] for file in about["files"].values())
    assert f"{total:,} bytes for Python" in said
    assert about["functions"]["libcublas.so.12"] == ["cublasCreate_v2"]
    assert about["functions"]["libcublasLt.so.12"] == ["cublasLtMatmul"]
    slices = [folder / name for name in about["files"] if name != bundle.PACKAGE]
    with bundle.tarfile.open(fileobj=bundle.io.BufferedReader(bundle.Joined(slices)),
                             mode="r|xz") as tar:  # fmt: skip
        tar.extractall(tmp_path / "tree", filter="data")
    site = tmp_path / "tree/site"
    there = what_is_in(site)
    assert {"keras/__init__.py", "absl/__init__.py", "nvidia/cuda_runtime/lib/libcudart.so.12",
            "tensorflow/__init__.py"} <= set(there)  # fmt: skip
    assert not [name for name in there if name.startswith(maker.DROPPED)]
    assert there[maker.EMPTY][0] == b""
    for name in maker.TENSORFLOW_LIBRARIES:
        library = there[name][0]
        assert (bytes([90]) * 400 in library, bytes([80]) * 400 in library) == (True, False)
    # Another time only the package is built again.
    monkeypatch.setattr(maker, "pip_install", None)
    assert maker.main(options) == 0
    assert "kept the slices of TensorFlow" in capsys.readouterr().out
    assert bundle.read_about(folder) == about
    # The op library now reads a header that TensorFlow for GPUs does not have.
    monkeypatch.setattr(maker, "headers_read", lambda version: ["a.h", "b.h"])
    with pytest.raises(SystemExit, match=r"headers that .* does not have so: b\.h"):
        maker.main(options)


@needs_xz
def test_a_tensorflow_that_does_not_fit_is_refused(small_wheels, tmp_path):
    options = ["--output", str(tmp_path / "slices"), "--python", bundle.this_python()]
    with pytest.raises(SystemExit, match="device code for .* 80, 90, and none that runs on 75"):
        maker.main([*options, "--capability", "75"])
    (small_wheels / "include/a.h").write_text("// another header\n")
    with pytest.raises(SystemExit, match=r"headers that .* does not have so: a\.h"):
        maker.main(options)
    shutil.rmtree(tmp_path / "wheels")
    with pytest.raises(SystemExit, match="pip could not install tensorflow=="):
        maker.main(options)
    assert "make gpu-tensorflow-bundle" in bundle.why_unusable(tmp_path / "slices")


def test_cuda_libraries_are_linked_and_what_they_lack_is_said(tmp_path):
    tree = bundle.Tree(tmp_path / "tree")
    runtime, machine = tree.site / "nvidia/cuda_runtime/lib", tmp_path / "machine"
    for folder in (runtime, machine):
        folder.mkdir(parents=True)
    (runtime / "libcudart.so.12").write_bytes(b"no library")
    source = "int cublasCreate_v2() { return 0; }"
    compiler = os.environ.get("CXX", "g++").split()
    command = [*compiler, "-x", "c", "-shared", "-fPIC", "-", "-o", machine / "libcublas.so.13"]
    subprocess.run(command, input=source, text=True, check=True)
    found = bundle.answers(tree, [machine])
    assert found["libcudart.so.12"] == runtime / "libcudart.so.12"
    assert found["libcublas.so.12"] == machine / "libcublas.so.13"
    assert found["libcudnn.so.9"] is None
    bundle.link_libraries(tree, found)
    linked = sorted(path.name for path in tree.links.iterdir())
    assert linked == ["libcublas.so.12", "libcudart.so.12"]
    variables = bundle.environment(tree, found)
    assert variables["LD_LIBRARY_PATH"].split(":")[:3] == list(
        map(str, [tree.links, runtime, machine])
    )
    assert variables["PYTHONPATH"].split(":")[:2] == list(map(str, [tree.package, tree.site]))

    def lacks(wanted, *functions):
        return bundle.what_lacks(wanted, found[wanted], functions, variables)

    assert lacks("libcublas.so.12", "cublasCreate_v2", "cublasGone") == (None, ["cublasGone"])
    error, _ = lacks("libcudart.so.12")
    assert error.startswith(f"{runtime / 'libcudart.so.12'} cannot be opened: ")
    assert lacks("libcudnn.so.9") == ("found no libcudnn.so.9 here", [])


@needs_xz
def test_unpacking_on_a_machine_without_cuda(tmp_path, monkeypatch, capsys):
    """The program puts the slices together, and says which libraries are missing."""
    monkeypatch.setattr(bundle, "library_folders", lambda: [])
    folder = tmp_path / "slices"
    assert bundle.main(folder) == 1
    assert capsys.readouterr().out.startswith("Found no slices of TensorFlow in ")
    made_slices(folder)
    assert bundle.main(folder) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:-1]] == list(bundle.LIBRARIES)
    assert "but uses no GPU without libcudart.so.12, libcublas.so.12, " in lines[-1]
    assert what_is_in(bundle.tree_of(folder).site)


def test_without_a_gpu_one_sentence_and_a_status(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(cuda_build, "find_capability", lambda: None)
    assert tensorflow_run.main(["--out", str(tmp_path / "out")]) == 1
    assert capsys.readouterr().out.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_tensorflow_that_sees_no_gpu(monkeypatch, capsys):
    """As on a GPU machine whose libraries TensorFlow cannot open."""
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind=None: [])
    assert tensorflow_start.main([]) == 1
    assert "sees no GPU here" in capsys.readouterr().out.splitlines()[-1]


def test_why_the_op_cannot_run_on_a_gpu():
    found = dict(tensorflow="2.21.0", gpus=[{}], kernels=["CPU", "GPU"], kernels_error=None)
    assert tensorflow_start.why_not(found) is None
    assert "sees no GPU" in tensorflow_start.why_not({**found, "gpus": []})
    assert "without GPU kernels" in tensorflow_start.why_not({**found, "kernels": ["CPU"]})
    assert "it is gone" in tensorflow_start.why_not({**found, "kernels_error": "it is gone"})


def test_the_parts(monkeypatch, tmp_path):
    monkeypatch.setattr(bundle, "read_about", lambda: dict(files={}))
    parts = {part.name: part for part in tensorflow_run.parts(tmp_path)}
    assert list(parts) == [
        "unpack", "start", "product", "op", "layer", "encoder", "retroactive", "benchmark"
    ]  # fmt: skip
    assert tensorflow_run.ALL_SECONDS < 8 * 60
    for part in parts.values():
        assert set(part.needs) < set(parts)
        for word in part.command:
            if word.startswith(("tests/", "tools/", "benchmarks/")):
                assert (ROOT / word).exists()
    assert parts["op"].environment["PYTHONPATH"].startswith(str(bundle.tree_of().package))
    # Every test of the ops and their layers is in one part.
    listed = [name for part in tensorflow_run.TESTS for name in tensorflow_run.tests_of(part)]
    globs = (
        "test_single_output*.py",
        "test_co_si_*.py",
        "test_retroactive*.py",
        "test_co_re_mha.py",
    )
    there_are = (path for glob in globs for path in ROOT.glob(f"tests/{glob}"))
    assert sorted(listed) == sorted(str(path.relative_to(ROOT)) for path in there_are)
    monkeypatch.setattr(bundle, "read_about", lambda: None)
    parts = {part.name: part for part in tensorflow_run.parts(tmp_path)}
    assert "unpack" not in parts
    assert parts["start"].needs == ()


@pytest.mark.parametrize("good", [True, False])
def test_results_are_written_after_each_part(monkeypatch, tmp_path, capsys, good):
    monkeypatch.setattr(cuda_build, "find_capability", lambda: "90")
    monkeypatch.setattr(gpu_run, "why_no_tensorflow", lambda: None)
    out = tmp_path / "out"
    results = out / "tensorflow.json"
    # The second part reads what was written after the first one.
    program = f"print(open({str(results)!r}).read())\nraise SystemExit({0 if good else 3})"
    monkeypatch.setattr(tensorflow_run, "parts", lambda out: [
        gpu_run.Step("start", [sys.executable, "-c", "print('begun')"], 20),
        gpu_run.Step("op", [sys.executable, "-c", program], 20),
        gpu_run.Step("benchmark", [sys.executable, "-c", "print('a table')"], 20, ("op",)),
    ])  # fmt: skip
    assert tensorflow_run.main(["--out", str(out)]) == (0 if good else 1)
    assert list(json.loads((out / "op.txt").read_text())["parts"]) == ["start"]
    found = json.loads(results.read_text())
    assert list(found["parts"]) == ["start", "op", "benchmark"]
    assert found["wrong"] is not good
    printed = capsys.readouterr().out
    assert ("SOMETHING WAS WRONG" in printed) is not good
    assert ("op: failed" in printed) is not good
    assert (printed.count("a table") == 2) is good  # As the last line, and as a whole.


def test_make_gpu_uses_the_slices_that_are_here(monkeypatch, tmp_path):
    about = dict(python=bundle.this_python(), files={"tensorflow.tar.xz.00": {}})
    monkeypatch.setattr(bundle, "read_about", lambda folder=None: about)
    monkeypatch.setattr(bundle, "why_unusable", lambda **_: "1 of 1 slices are not here")
    assert gpu_run.why_no_tensorflow() == "1 of 1 slices are not here"
    monkeypatch.setattr(bundle, "why_unusable", lambda **_: None)
    assert gpu_run.why_no_tensorflow() is None
    step = gpu_run.steps(tmp_path, "90")[-1]
    assert (step.name, step.reason) == ("tensorflow", None)
    assert (ROOT / step.command[1]).name == "tensorflow_run.py"


def test_git_ignores_the_slices():
    if not (ROOT / ".git").exists():
        pytest.skip("this is no checkout")
    asked = ["git", "check-ignore", "-q", "build/gpu-tensorflow"]
    assert subprocess.run(asked, cwd=ROOT).returncode == 0
    assert maker.SLICE_BYTES + Path(ROOT, "setup.py").stat().st_size < 60 << 20
