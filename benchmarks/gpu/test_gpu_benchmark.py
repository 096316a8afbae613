"""Tests of the parts of the GPU benchmark that need no GPU: sizes, arithmetic, its report."""

import json
import re
import sys
import time
import types

import pytest

import cuda_build
import gpu_benchmark
import gpu_report
from cuda_calls import CudaLibrary
from gpu_sizes import (
    GOAL_SIZES,
    AttentionSize,
    LayerSize,
    RetroactiveSize,
    attention_sizes,
    copies_beyond,
    layer_sizes,
    retroactive_sizes,
    why_skipped,
    window_parts,
    window_parts_sizes,
)


def test_sizes_span_what_was_asked_for():
    sizes = attention_sizes()
    assert len(set(sizes)) == len(sizes)
    fused = [size for size in sizes if size.dtype != "float64"]
    assert {size.window for size in fused} >= {16, 512, 65536}
    assert {size.dim for size in fused} == {12, 64, 128}
    assert {size.dtype for size in fused if size.dim == 12} == {"float32", "bfloat16"}
    queries = {size.streams * size.heads for size in fused if size.window == 4096}
    assert queries >= {528, 600, 1056}
    assert tuple(sizes[:2]) == GOAL_SIZES
    assert all(size.dim == 64 and size.dtype == "bfloat16" for size in sizes[2:41])
    pairs = {size.streams * size.heads for size in fused}
    assert min(pairs) == 8
    assert max(pairs) == 32768
    assert {size.dtype for size in sizes} == {"float32", "float64", "bfloat16", "float16"}
    assert {size.features for size in layer_sizes()} == {1024}
    assert [size.streams for size in layer_sizes()][::4] == [1, 16, 17, 64, 256, 4096]
    assert [size.window for size in window_parts_sizes()] == [512, 65536]
    assert window_parts(512) == [1, 2, 4, 8, 16]
    assert {size.window for size in retroactive_sizes()} >= {64, 128, 512}


def test_bytes_and_operations():
    size = AttentionSize(streams=3, heads=2, window=10, dim=4, dtype="bfloat16")
    rows = 3 * 2 * 10
    assert size.ring_bytes == rows * 4 * 2 * 2
    # The ring; the newest key and value, at 2 bytes a number; query and output, at 4; the mask.
    assert size.bytes == size.ring_bytes + 3 * 2 * 4 * (2 * 2 + 2 * 4) + 3 * 10
    assert size.operations == rows * 4 * 2 * 2
    layer = LayerSize(streams=1, features=1024, heads=8, window=64, dtype="float32")
    assert layer.weights_bytes == 4 * 1024 * 1024 * 4 + 4 * 1024 * 4
    assert layer.attention == AttentionSize(1, 8, 64, 128, "float32")
    assert layer.operations == 8 * 1024**2 + 4 * 64 * 1024
    block = layer._replace(hidden=512)
    assert block.weights_bytes == layer.weights_bytes + 4 * (2 * 1024 * 512 + 5 * 1024 + 512)
    assert block.operations == layer.operations + 4 * 1024 * 512


def test_so_many_sets_that_none_is_in_the_cache():
    for cache in (1 << 20, 50 << 20):
        for size in (1 << 10, 1 << 16, 60 << 20, 1 << 30):
            sets = copies_beyond(cache, size)
            # Between two uses of one set, all others are read.
            assert sets == 1 or (sets - 1) * size >= 2 * cache
            assert sets > 1 or size > 2 * cache


def test_what_does_not_fit_is_said():
    large = AttentionSize(2048, 8, 65536, 128, "float32")
    assert "do not fit" in why_skipped(large, 70e9)
    assert why_skipped(AttentionSize(1, 8, 65536, 128, "float32"), 70e9) is None
    # On a GPU of 80 GB both ends of the range have sizes that fit.
    fitting = [size for size in attention_sizes() if why_skipped(size, 68e9) is None]
    assert len(fitting) > 150
    assert max(size.ring_bytes for size in fitting) > 10e9


def test_the_pages_predictions_are_these(capsys):
    page = (cuda_build.ROOT / "docs" / "gpu.md").read_text()
    assert gpu_benchmark.main(["--predict"]) == 0
    assert capsys.readouterr().out in page


def figures(median):
    return dict(median=median, least=0.9 * median, most=1.2 * median)


def entry(size, ours, sdpa):
    return dict(
        size=size._asdict(),
        bytes=size.bytes,
        operations=size.operations,
        window_parts=2,
        sets=1,
        error_against_sdpa=1e-5,
        ours=dict(
            out_of_l2=figures(ours), in_l2=figures(0.8 * ours), overlapping=figures(0.9 * ours)
        ),
        sdpa=dict(graph=figures(sdpa), eager=figures(2 * sdpa)),
    )


@pytest.fixture
def found():
    """Return what a run records, in its format, for a GPU that does not exist."""
    small, middle, large = (
        AttentionSize(1, 8, 64, 64, "bfloat16"),
        AttentionSize(1, 8, 512, 64, "bfloat16"),
        AttentionSize(2048, 8, 1024, 64, "bfloat16"),
    )
    copy = 4e12
    layer = LayerSize(1, 1024, 8, 64, "float32")
    return dict(
        machine=dict(
            gpu="a sample", capability="9.0", memory_bytes=80 << 30, driver="0", cuda="13.0",
            multiprocessors=132, l2_bytes=50 << 20, torch="2",
        ),
        pool_bytes=60 << 30,
        copy=dict(bytes=8 << 30, bytes_per_second=copy, microseconds=figures(2147)),
        copy_again=dict(bytes=8 << 30, bytes_per_second=copy, microseconds=figures(2147)),
        empty_kernel=figures(1.5),
        attention=[
            entry(small, 3.0, 9.0),
            entry(middle, 4.0, 6.0),
            entry(large, large.bytes / (0.95 * copy) * 1e6, 1.1 * large.bytes / copy * 1e6),
            dict(size=large._replace(window=65536)._asdict(), skipped="too large"),
        ],
        layer=[
            dict(
                size=layer._asdict(), weights_bytes=layer.weights_bytes, bytes=layer.bytes,
                operations=layer.operations, sets=8, error_against_torch=1e-6,
                ours=dict(out_of_l2=figures(8.0), in_l2=figures(6.0), apart=figures(9.0)),
                torch=dict(graph=figures(20.0), eager=figures(80.0)),
            )
        ],
        window_parts=[
            dict(
                size=middle._asdict(), planned=4,
                tried=[dict(parts=parts, out_of_l2=figures(20 / parts)) for parts in (2, 4)],
            ),
            dict(size=large._asdict(), skipped="too large"),
        ],
        retroactive=[
            dict(
                size=RetroactiveSize(1, 8, 512, 64)._asdict(), bytes=1, error_against_sdpa={},
                update=figures(4.0), recompute=figures(5.0), sdpa=figures(20.0),
            ),
            dict(size=RetroactiveSize(64, 8, 512, 64)._asdict(), skipped="too late"),
        ],
        failures=[],
    )  # fmt: skip


def test_goals(found):
    copy, latency, published, sdpa, of_one = gpu_report.goals(found)
    assert copy["worst"] == pytest.approx(0.95)
    assert copy["reached"]
    assert (latency["worst"], latency["reached"], latency["of"]) == (4.0, True, 2)
    assert published["reached"] is None
    assert sdpa["worst"] == pytest.approx(1.1 * 0.95)
    assert sdpa["reached"]
    assert of_one["worst"] == pytest.approx(1.5)
    assert not of_one["reached"]
    assert "N=512" in of_one["where"]
    lines = gpu_report.goal_lines(found)
    assert sum("NOT REACHED" in line for line in lines) == 1
    found["attention"] = [found["attention"][0], *(entry(size, 5.1, 9) for size in GOAL_SIZES)]
    copy, _, published, *_ = gpu_report.goals(found)
    assert copy["reached"] is None
    assert (published["worst"], published["reached"], published["of"]) == (5.1, False, 2)
    assert "not measured" in gpu_report.goal_lines(found)[0]


def test_the_faster_of_torchs_ways_is_the_rival(found):
    rival = found["attention"][0]
    rival["sdpa"]["eager"] = figures(6.0)
    assert gpu_report.times_sdpa(rival) == 2


def test_tables_as_text(found):
    text = gpu_report.plain(found)
    for part in ("a sample", "4.000 TB/s", "N=512", "95%", "too large", "M=1 E=1024"):
        assert part in text
    assert "bfloat16  2      10.00\n" in text
    assert "bfloat16  4      5.00   yes\n" in text
    assert re.search(r"N=512 D=64 retroactive +4\.00 +5\.00 +\S+ +20\.00 +5\.00\n", text)
    assert "too late" in text
    found["attention"][0]["flashinfer"] = figures(7.7)
    found["attention"][1]["flashinfer_failed"] = "ImportError: it broke"
    text = gpu_report.plain(found)
    assert re.search(r" 3\.00 +7\.70 +2\n", text)
    assert re.search(r" 1\.50 +failed +2\n", text)
    titles = [title for title, _, _ in gpu_report.table_cells(found)]
    assert all(title in text for title in titles)


def test_recorded_results_are_shown_again(found, tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib", reason="the picture is matplotlib's")
    recorded, picture = tmp_path / "found.json", tmp_path / "picture.png"
    recorded.write_text(json.dumps(found))
    command = ["--from", str(recorded), "--picture", str(picture), "--json", str(tmp_path / "a")]
    assert gpu_benchmark.main(command) == 0
    assert picture.stat().st_size > 10_000
    assert json.loads((tmp_path / "a").read_text()) == found
    assert "NOT REACHED" in capsys.readouterr().out
    # Without rich, the plain report has the same contents.
    monkeypatch.setitem(sys.modules, "rich.console", None)
    found["failures"] = ["N=64: it broke"]
    recorded.write_text(json.dumps(found))
    assert gpu_benchmark.main(["--from", str(recorded)]) == 1
    printed = capsys.readouterr()
    assert "NOT REACHED" in printed.out
    assert "it broke" in printed.err


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(cuda_build, "find_capability", lambda: None)
    assert gpu_benchmark.main([]) == 1
    assert "no GPU" in capsys.readouterr().err


class EmulatedGpu:
    """The emulator in place of gpu_benchmark.Gpu, on PyTorch tensors in host memory."""

    device = "cpu"
    multiprocessors = 4
    l2_bytes = 1 << 12

    def __init__(self):
        self.facts = dict(
            gpu="the emulator", capability="0", memory_bytes=1 << 20, driver="none", cuda="none"
        )

    def stream(self):
        return None

    def synchronize(self):
        pass

    def capture(self, work):
        return work

    def seconds(self, work):
        begin = time.perf_counter()
        work()
        return time.perf_counter() - begin


def test_measured_by_the_emulator(monkeypatch):
    """This does not measure speed: it checks that everything runs, and agrees with PyTorch."""
    torch = pytest.importorskip("torch", reason="the benchmark is PyTorch's")
    path = cuda_build.build(cuda_build.default_directory(True), emulated=True)
    bench = gpu_benchmark.Bench(
        EmulatedGpu(), CudaLibrary(path), memory_bytes=1 << 20, target=1e-6, repeats=2
    )
    attention = [
        AttentionSize(1, 2, 16, 16, "float32"),
        AttentionSize(2, 2, 150, 8, "bfloat16"),
        AttentionSize(1, 1, 16, 16, "float16"),
        AttentionSize(1, 1, 16, 16, "float64"),
        AttentionSize(1000, 8, 64, 64, "float32"),
    ]
    layer = [
        LayerSize(streams, 32, 2, 8, dtype, hidden)
        for streams, dtype in ((1, "float32"), (2, "bfloat16"))
        for hidden in (0, 24)
    ]
    saved = []
    many = layer + 20 * layer[:1]
    found = gpu_benchmark.run(
        bench, attention, many, 100, lambda found: saved.append(dict(found)), attention[1:2],
        [RetroactiveSize(2, 2, 9, 8), RetroactiveSize(1, 1, 20, 12)],
    )  # fmt: skip
    assert len(saved) == 1
    (parts,) = found["window_parts"]
    assert [one["parts"] for one in parts["tried"]] == [1, 2, 4]
    assert gpu_report.plain(saved[0])  # A report of an incomplete run works too.
    assert found["failures"] == []
    *measured, skipped = found["attention"]
    assert "do not fit" in skipped["skipped"]
    for entry, size in zip(measured, attention, strict=False):
        assert entry["error_against_sdpa"] < gpu_benchmark.AGREEMENT[size.dtype]
        assert entry["sets"] * size.ring_bytes > 2 * bench.gpu.l2_bytes
        for figures in (*entry["ours"].values(), *entry["sdpa"].values()):
            assert 0 < figures["least"] <= figures["median"] <= figures["most"]
    for entry in found["retroactive"]:
        for name in ("update", "recompute"):
            assert entry["error_against_sdpa"][name] < 1e-5
            assert entry[name]["median"] > 0
    for entry in found["layer"]:
        assert entry["error_against_torch"] < 4e-2
    assert "the emulator" in gpu_report.plain(found)
    json.dumps(found)
    # A kernel with wrong results is a failure, and sets the exit status.
    size = AttentionSize(1, 2, 16, 16, "float32")
    rings = gpu_benchmark.AttentionRings(bench, size, 1)
    rings.calls[0].scale = 3.0
    with pytest.raises(RuntimeError, match="differs"):
        rings.check()
    assert torch.isfinite(rings.output).all()
    # FlashInfer is a rival where it is installed. If it fails, that is no failure of ours.
    monkeypatch.setitem(sys.modules, "flashinfer", None)
    assert gpu_benchmark.measure_flashinfer(bench, rings, 1) == {}
    monkeypatch.setitem(sys.modules, "flashinfer", types.ModuleType("of another version"))
    failed = gpu_benchmark.measure_flashinfer(bench, rings, 1)
    assert "BatchDecodeWithPagedKVCacheWrapper" in failed["flashinfer_failed"]
    late = gpu_benchmark.run(bench, attention[:1], layer[:1], seconds=0)
    assert [entry["skipped"] for entry in late["attention"]] == ["no time left of 0 s"]
