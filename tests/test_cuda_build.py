"""The build with CUDA, without a GPU: finding nvcc, refusals, output, the kernels' resources."""

import ctypes
import os
import re
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from tensorflow.python.framework import kernels as kernel_registry

import continual_transformers_tf as ct
import nvcc
import resources

ROOT = Path(__file__).parent.parent
OPS = ("SingleOutputAttention", "CoSiMultiHeadAttentionStep", "CoSiTransformerEncoderStep")

with_cuda = pytest.mark.skipif(
    not (ct.ops.load_error() is None and ct.ops.cuda_build()),
    reason="the op library here was built without CUDA",
)


@pytest.fixture
def unset(monkeypatch, tmp_path):
    """Hide every nvcc, and unset all options."""
    for name in (nvcc.CUDA, nvcc.ARCHITECTURES, "CUDA_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    monkeypatch.setattr(nvcc, "USUAL_HOME", str(tmp_path / "nothing"))


@pytest.fixture
def toolkit_says(unset, monkeypatch, tmp_path):
    """Return a function that makes an nvcc of a version, with a shell script for its behaviour."""

    def make(version, script="exit 0"):
        program = tmp_path / "bin" / "nvcc"
        program.parent.mkdir(exist_ok=True)
        program.write_text(
            "#!/bin/sh\n"
            f'case "$1" in --version) echo "Cuda compilation tools, release {version}, V0"; exit;; '
            f"esac\n{script}\n"
        )
        program.chmod(0o755)
        monkeypatch.setenv("CUDA_HOME", str(tmp_path))
        monkeypatch.setenv("PATH", "/usr/bin:/bin")

    return make


def test_without_nvcc_the_library_is_built_without_cuda_and_one_line_says_so(unset, capfd):
    assert nvcc.chosen() is None
    said = capfd.readouterr().err
    assert said.count("\n") == 1
    assert "No CUDA kernels are built, for there is no nvcc on PATH. Install CUDA" in said


def test_cuda_that_is_asked_for_must_be_there(unset, monkeypatch):
    monkeypatch.setenv(nvcc.CUDA, "1")
    with pytest.raises(SystemExit, match="CUDA=1, but there is no nvcc on PATH. Install CUDA"):
        nvcc.chosen()
    monkeypatch.setenv("CUDA_HOME", "/nowhere")
    with pytest.raises(SystemExit, match="there is no bin/nvcc in CUDA_HOME, /nowhere. Install"):
        nvcc.chosen()


def test_cuda_can_be_declined(toolkit_says, monkeypatch, capfd):
    toolkit_says("13.0")
    monkeypatch.setenv(nvcc.CUDA, "0")
    assert nvcc.chosen() is None
    assert capfd.readouterr().err == ""


def test_what_may_be_chosen(unset, monkeypatch):
    monkeypatch.setenv(nvcc.CUDA, "yes")
    with pytest.raises(SystemExit, match="CUDA to be 0, 1 or unset, but got 'yes'"):
        nvcc.chosen()


@pytest.mark.parametrize("asked", ["Hopper", "9", "90;sm_80", "9.0"])
def test_architectures_that_mean_nothing_are_refused(toolkit_says, monkeypatch, asked):
    toolkit_says("13.0")
    monkeypatch.setenv(nvcc.ARCHITECTURES, asked)
    with pytest.raises(SystemExit, match=re.escape(f"such as '80;90', but got {asked!r}")):
        nvcc.chosen()


@pytest.mark.parametrize("asked", ["90;80", "80, 90", " 80 90 "])
def test_architectures(unset, monkeypatch, asked):
    monkeypatch.setenv(nvcc.ARCHITECTURES, asked)
    assert nvcc.architectures() == ["80", "90"]


def test_an_architecture_that_nvcc_does_not_know_is_an_error(toolkit_says, monkeypatch):
    fatal = "nvcc fatal   : Unsupported gpu architecture 'compute_60'"
    toolkit_says("13.0", f'echo "{fatal}"; exit 1')
    monkeypatch.setenv(nvcc.ARCHITECTURES, "60")
    with pytest.raises(SystemExit, match=f"of CUDA 13.0 says {fatal}"):
        nvcc.chosen()


def test_an_architecture_that_nobody_asked_for_is_no_error(toolkit_says, capfd):
    fatal = "nvcc fatal   : Unsupported gpu architecture 'compute_75'"
    toolkit_says("14.0", f'echo "{fatal}"; exit 1')
    assert nvcc.chosen() is None
    assert fatal in capfd.readouterr().err


def test_an_nvcc_that_cannot_be_run_is_said(toolkit_says, tmp_path, capfd):
    toolkit_says("13.0")
    (tmp_path / "bin" / "nvcc").write_bytes(b"\x7fELF, but of what")
    assert nvcc.chosen() is None
    assert "nvcc cannot be run: Exec format error. Install CUDA" in capfd.readouterr().err


def test_an_old_nvcc_is_refused(toolkit_says, monkeypatch):
    toolkit_says("11.8")
    assert nvcc.chosen() is None
    monkeypatch.setenv(nvcc.CUDA, "1")
    with pytest.raises(SystemExit, match="nvcc is of CUDA 11.8. Install CUDA's toolkit, 12.0 or"):
        nvcc.chosen()


def test_a_compiler_that_nvcc_cannot_use_is_said(toolkit_says, monkeypatch):
    toolkit_says("12.4", "echo; echo '#error -- unsupported GNU version!'; echo more; exit 1")
    assert nvcc.chosen() is None
    monkeypatch.setenv(nvcc.CUDA, "1")
    with pytest.raises(SystemExit, match="kernel: #error -- unsupported GNU version!. It needs"):
        nvcc.chosen()


def test_an_nvcc_of_12_is_taken_with_its_folders(toolkit_says, tmp_path):
    (tmp_path / "include").mkdir()
    plan = f'#$ INCLUDES="-I{tmp_path}/bin/../include"  '
    toolkit_says("12.4", f"""[ "$1" = --dryrun ] && echo '{plan}' >&2; exit 0""")
    toolkit = nvcc.chosen()
    assert str(toolkit) == "12.4 for sm_75, sm_80, sm_86, sm_89, sm_90, PTX of 90"
    assert toolkit.include == [str(tmp_path / "include")]
    assert toolkit.lib == []


def test_setup_says_why_it_cannot_build(tmp_path):
    result = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "-b", tmp_path, "-t", tmp_path],
        cwd=ROOT,
        env={**os.environ, nvcc.CUDA: "1", "CUDA_HOME": "/nowhere"},
        capture_output=True,
        text=True,
    )
    assert result.returncode
    assert "there is no bin/nvcc in CUDA_HOME, /nowhere" in result.stderr


def test_what_has_not_changed_is_not_compiled_again(toolkit_says, tmp_path, monkeypatch):
    calls = tmp_path / "calls"
    toolkit_says(
        "13.0",
        f"""while [ $# -gt 0 ]; do case "$1" in
        -o) made=$2;; -MF) listed=$2;; *.cu) source=$1;; esac; shift; done
        [ -z "$listed" ] && exit 0
        echo called >>{calls}; echo made >"$made"
        printf 'a.o : %s \\\\\\n  {tmp_path}/header.h\\n' "$source" >"$listed\"""",
    )
    source, header, target = (tmp_path / name for name in ("a.cu", "header.h", "objects/a.o"))
    source.touch()
    header.touch()

    def compiled(toolkit):
        before = calls.read_text().count("called") if calls.exists() else 0
        toolkit.compile(source, target)
        assert target.read_text() == "made\n"
        return calls.read_text().count("called") - before

    def change(path):
        later = target.stat().st_mtime + 1
        os.utime(path, (later, later))

    toolkit = nvcc.find()
    assert compiled(toolkit)
    assert not compiled(toolkit)
    for changed in (source, header):
        change(changed)
        assert compiled(toolkit)
        os.utime(changed, (0, 0))
        assert not compiled(toolkit)
    monkeypatch.setenv("NVCC_APPEND_FLAGS", "-lineinfo")
    assert compiled(toolkit)
    monkeypatch.setenv(nvcc.ARCHITECTURES, "90")
    assert compiled(nvcc.find())
    header.unlink()
    assert compiled(nvcc.find())


LOG = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z4TakeIfEvPT_i' for 'sm_75'
ptxas info    : Function properties for _Z4TakeIfEvPT_i
    24 bytes stack frame, 0 bytes spill stores, 64 bytes spill loads
ptxas info    : Used 80 registers, used 1 barriers, 4132 bytes smem, 364 bytes cmem[0]
ptxas info    : Compile time = 6.150 ms
ptxas info    : Function properties for _Z6CalledPf
    0 bytes stack frame, 28 bytes spill stores, 12 bytes spill loads
ptxas info    : Compiling entry function '_Z4TakeIfEvPT_i' for 'sm_90'
ptxas info    : Function properties for _Z4TakeIfEvPT_i
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 22 registers, 364 bytes cmem[0], 88 bytes cmem[2]
"""


def test_ptxas_reports_are_read():
    old, new = resources.Resources(80, 28, 64, 24, 4132), resources.Resources(22, 0, 0, 0, 0)
    assert resources.parse(LOG) == {
        ("_Z4TakeIfEvPT_i", "sm_75"): old,
        ("_Z4TakeIfEvPT_i", "sm_90"): new,
    }
    assert resources.excesses("_Z4TakeIfEvPT_i", old) == ["spill_stores", "spill_loads", "stack"]
    assert resources.excesses("_Z4TakeIfEvPT_i", new) == []
    many = new._replace(registers=130)
    assert resources.excesses("_Z4TakeIfEvPT_i", many) == ["registers"]
    assert resources.excesses("_Z10TakeKernelIdEvPT_i", many) == []
    with pytest.raises(ValueError, match="Expected ptxas' report"):
        resources.parse(LOG.replace("Used 80", "Uses 80"))


@pytest.fixture(scope="module")
def toolkit():
    try:
        return nvcc.find()
    except nvcc.Unusable as why:
        pytest.skip(str(why))


# This takes minutes, unless the objects that `make` built are up to date.
@pytest.mark.slow
def test_no_kernel_takes_more_than_its_limits(toolkit):
    found = resources.measure(toolkit)
    assert {architecture for _, architecture in found} == {
        f"sm_{name}" for name in toolkit.architectures
    }
    over = {key: each for key, each in found.items() if resources.excesses(key[0], each)}
    assert not over, "python3 cuda/resources.py shows them all"


@pytest.mark.slow
def test_the_library_of_the_c_interface_loads_without_a_driver(toolkit):
    path = nvcc.OBJECTS / "libcontinual_transformers_kernels.so"
    toolkit.library(path)
    declared = re.findall(
        r"\b(continual_transformers_cuda_\w+)\(", (ROOT / "cuda" / "c_api.h").read_text()
    )
    assert declared
    library = ctypes.CDLL(str(path))
    assert all(hasattr(library, name) for name in declared)
    assert set(declared) == functions_of(path)
    assert code_in(path) == code_for(toolkit)


def functions_of(library):
    """Return the functions that a library exports."""
    said = subprocess.run(
        ["nm", "-D", "--defined-only", library], check=True, capture_output=True, text=True
    ).stdout
    return {line.split()[2] for line in said.splitlines() if line.split()[1] == "T"}


def code_in(library):
    """Return which GPUs a library has code for: {("machine code" or "PTX", capability)}.

    Each source has a container of CUDA's: a header, and entries with their own headers.
    """
    data, found = Path(library).read_bytes(), []
    for container in re.finditer(re.escape(struct.pack("<IH", 0xBA55ED50, 1)), data):
        header, size = struct.unpack_from("<HQ", data, container.start() + 6)
        at, kinds = container.start() + header, set()
        end = at + size
        while at < end:
            kind, _, entry_header, entry_size = struct.unpack_from("<HHIQ", data, at)
            (capability,) = struct.unpack_from("<I", data, at + 28)
            kinds.add(({1: "PTX", 2: "machine code"}[kind], capability))
            at += entry_header + entry_size
        found.append(kinds)
    assert found
    (of_each,) = {frozenset(kinds) for kinds in found}
    return set(of_each)


def code_for(toolkit):
    """Return the expected result of `code_in`."""
    capabilities = [int(name.rstrip("af")) for name in toolkit.architectures]
    return {("machine code", each) for each in capabilities} | {("PTX", capabilities[-1])}


@with_cuda
@pytest.mark.parametrize("op", OPS)
def test_kernels_for_gpus_are_registered_where_there_is_none(op):
    registered = kernel_registry.get_registered_kernels_for_op(f"ContinualTransformers>{op}")
    assert {kernel.device_type for kernel in registered.kernel} == {"CPU", "GPU"}


@with_cuda
def test_the_op_library_has_code_for_what_it_says():
    said = re.fullmatch(r"\d+\.\d+ for ((?:sm_\w+, )+)PTX of (\w+)", ct.ops.cuda_build())
    names = re.findall(r"sm_(\w+)", said[1])
    assert said[2] == names[-1]
    assert code_in(ct.ops.LIBRARY_PATH) == code_for(nvcc.Toolkit("", "", names, [], []))


@with_cuda
def test_the_op_library_keeps_the_cuda_runtime_to_itself():
    """TensorFlow has functions with the same names, from another version of CUDA."""
    ours = {name for name in functions_of(ct.ops.LIBRARY_PATH) if "cuda" in name.lower()}
    assert ours == {"continual_transformers_cuda_build"}
