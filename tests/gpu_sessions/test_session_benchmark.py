"""The benchmark of sessions, on the emulator: that everything runs, and not how fast."""

import ctypes
import json

import numpy as np
import pytest

import bundle
import session_benchmark
import session_report
import session_sizes
from on_gpu import library, to_gpu
from plan_files import attention_plan
from session_sizes import SessionSize
from test_gpu_benchmark import EmulatedGpu

QUICK = dict(target=1e-6, repeats=2)
SMALL = SessionSize("small", "encoder", 2, 4, 6, 2, hidden=5)


class EmulatedArrays:
    """The emulator in place of session_benchmark.TorchArrays, with PyTorch on the CPU."""

    device = "cuda:0"

    def __init__(self):
        self.torch, self.gpu = pytest.importorskip("torch"), EmulatedGpu()

    def array(self, host):
        return to_gpu(host)[0]

    def free_bytes(self):
        return 1 << 30

    def copy_rate(self):
        return 1e12


@pytest.fixture
def machine(device, request):
    return EmulatedArrays() if "emulated" in request.node.name else session_benchmark.TorchArrays()


@pytest.fixture
def folder(random, tmp_path):
    """Return a bundle with one plan."""
    (tmp_path / "plans").mkdir()
    model = attention_plan(random, 6, window=4).to_bytes()
    bundle.plan_file("small", tmp_path).write_bytes(bundle.beginning(model))
    return tmp_path


def test_what_it_measures(machine, folder, capsys):
    saved = []
    jobs = [(SMALL, 1), (SMALL, 3)]
    found = session_benchmark.run(
        machine, folder, 100, lambda found: saved.append(json.dumps(found)), jobs, **QUICK
    )
    assert found["failures"] == []
    for entry in found["entries"]:
        assert entry["error_against_cpu"] < 1e-5
        for name in session_report.COLUMNS[1:]:
            figures = entry[name]
            assert 0 < figures["least"] <= figures["median"] <= figures["most"]
    weights, state = 4 * (4 * (6 * 6 + 6) + 6 * 5 + 5), 4 * 2 * 4 * 6
    one, three = (entry["bytes"] for entry in found["entries"])
    assert one >= weights + state + 4 * (6 + 5)
    assert three - one == pytest.approx(2 * (one - weights), rel=0.01)
    assert found["entries"][0]["bound"] == pytest.approx(one / 1e12 * 1e6)
    # Every figure is written when it is there, and a table can be printed of what there is.
    tables = [session_report.table(json.loads(text)) for text in saved]
    assert [sum(line.count(" -") for line in table) for table in tables][:4] == [4, 3, 2, 1]
    assert capsys.readouterr().out.splitlines() == tables[-1]


def test_persistent_kernels(machine, folder, request, capsys):
    found = session_benchmark.run_persistent(machine, folder, sizes=[SMALL], **QUICK)
    assert found["failures"] == []
    (entry,) = found["entries"]
    assert entry["error_against_cpu"] < 1e-5
    assert "in persistent kernels" in capsys.readouterr().out
    if "emulated" in request.node.name:
        emulator = ctypes.CDLL(str(library("emulated")))
        try:
            emulator.cuda_emulator_set_refuses_together(1)
            found = session_benchmark.run_persistent(machine, folder, sizes=[SMALL], **QUICK)
        finally:
            emulator.cuda_emulator_set_refuses_together(0)
        assert found["failures"] == ["small: the GPU's driver refuses persistent kernels"]


@pytest.mark.slow
def test_a_compiled_rival_and_the_goals(machine, tmp_path, random, capsys):
    """PyTorch compiles for the CPU here."""
    (tmp_path / "plans").mkdir()
    model = attention_plan(random, 6, window=4).to_bytes()
    sizes = [SMALL._replace(name="three_layers"), SMALL._replace(name="r", kind="retroactive")]
    for size in sizes:
        bundle.plan_file(size.name, tmp_path).write_bytes(bundle.beginning(model))
    jobs = [(size, streams) for size in sizes for streams in (1, 2)]
    found = session_benchmark.run(machine, tmp_path, 100, jobs=jobs, **QUICK)
    assert found["failures"] == []
    compiled = ["torch_compiled" in entry for entry in found["entries"]]
    assert compiled == [True, False, False, False]
    by_compile, of_layers, of_retroactive = capsys.readouterr().out.splitlines()[-3:]
    assert by_compile.startswith("three_layers M=1: ")
    assert "goal ≤ 15" in of_layers
    assert "goal ≥ 5" in of_retroactive


def test_the_switch_of_what_overlaps(device, request, random):
    if "emulated" not in request.node.name:
        pytest.skip("a GPU's graphs do not say how they run")
    emulator = ctypes.CDLL(str(library("emulated")))
    emulator.cuda_emulator_early_nodes.restype = ctypes.c_int64
    session = attention_plan(random, 6, window=4).session(device=device)

    def early_nodes(streams):
        before = emulator.cuda_emulator_early_nodes()
        session.step(np.zeros((streams, 6), np.float32))
        return emulator.cuda_emulator_early_nodes() - before

    with session_benchmark.launches(overlap=False):
        assert early_nodes(1) == 0
    assert early_nodes(1) == 0  # The graph stays.
    assert early_nodes(2) > 0


def test_late_models_are_skipped_and_failures_said(machine, folder, monkeypatch):
    found = session_benchmark.run(machine, folder, -1, jobs=[(SMALL, 1)], **QUICK)
    assert found["entries"][0]["skipped"] == "no time left of -1 s"
    assert "no time left" in session_report.table(found)[-1]
    monkeypatch.setattr(session_benchmark, "ROOM", 1 << 40)
    found = session_benchmark.run(machine, folder, 100, jobs=[(SMALL, 1)], **QUICK)
    assert found["failures"] == []
    assert "do not fit into the GPU's memory" in session_report.table(found)[-1]
    monkeypatch.setattr(session_benchmark, "ROOM", 1)
    monkeypatch.setattr(session_benchmark, "AGREEMENT", 0)
    found = session_benchmark.run(machine, folder, 100, jobs=[(SMALL, 1)], **QUICK)
    assert "the CPU's output differs by" in found["failures"][0]
    assert "failed: the CPU's output" in session_report.table(found)[-1]


@pytest.mark.parametrize("size", [*session_sizes.SIZES, SMALL], ids=lambda size: size.name)
def test_the_rival_computes_what_the_model_does(size):
    """Its attention, from a ring that is read in NumPy, and its outputs' sizes."""
    torch = pytest.importorskip("torch")
    rival = session_benchmark.TorchRival(torch, size, 2, "cpu")
    y = rival.step()
    rows = 2 * (size.window if size.kind == "retroactive" else 1)
    assert y.shape == (rows, size.outputs or size.features)
    assert torch.isfinite(y).all()
    layer = rival.layers[0]
    x = torch.randn(2, size.features)
    given = rival.attention(layer, x).numpy()
    parts = (x @ layer["projections"]).numpy().reshape(2, 3, size.heads, 1, -1)
    rings = [ring.numpy() for ring in layer["rings"]]
    for i, ring in enumerate(rings[-2:]):  # The step has written its row.
        np.testing.assert_array_equal(ring[:, :, :1], parts[:, i + 1])
    query, key, value = [parts[:, 0], *rings][-3:]
    logits = query @ key.swapaxes(2, 3) * query.shape[-1] ** -0.5
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    attended = (weights / weights.sum(-1, keepdims=True)) @ value
    attended = attended.swapaxes(1, 2).reshape(-1, size.features)
    expected = attended @ layer["output"].numpy() + layer["bias"].numpy()
    np.testing.assert_allclose(given, expected, rtol=1e-3, atol=1e-4)


def test_the_most_telling_come_first():
    jobs = session_sizes.jobs()
    assert len(jobs) == len(set(jobs))
    for size in session_sizes.SIZES:
        most = 17 if size.name == "long_window" else 4096
        expected = [streams for streams in session_sizes.STREAMS if streams <= most]
        assert [streams for of, streams in jobs if of == size] == expected
    assert {streams for _, streams in jobs[: len(session_sizes.SIZES)]} == {1}
