"""The benchmark in TensorFlow on small sizes, on any device: its steps agree, and all are timed."""

import pytest

import tensorflow_benchmark
from gpu_sizes import AttentionSize, LayerSize

tf = pytest.importorskip("tensorflow")
pytest.importorskip("continual_transformers_tf")

SIZES = (
    AttentionSize(3, 2, 6, 8, "bfloat16"),
    LayerSize(2, 16, 2, 5, "float32"), LayerSize(2, 16, 2, 5, "float32", hidden=8),
)  # fmt: skip


@pytest.mark.sampled(3, rest="slow")
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_a_size(size, monkeypatch):
    monkeypatch.setattr(tensorflow_benchmark, "STEPS", 3)
    kept = []
    found = tensorflow_benchmark.run([size], 1e9, kept.append, target=1e-3, repeats=1)
    assert found["failures"] == []
    (entry,) = found["entries"]
    for way in tensorflow_benchmark.WAYS:
        assert list(entry[way]) == list(tensorflow_benchmark.COLUMNS)
        assert all(figures["median"] > 0 for figures in entry[way].values())
    assert len(tensorflow_benchmark.lines(entry)) == 3
    assert len(kept) > 9  # Once for each figure.


def test_what_cannot_be_measured_is_said(monkeypatch):
    size = SIZES[0]
    found = tensorflow_benchmark.run([size], -1)
    assert found["entries"][0]["skipped"].startswith("not measured: no time left")
    monkeypatch.setitem(tensorflow_benchmark.AGREEMENT, size.dtype, -1.0)
    found = tensorflow_benchmark.run([size], 1e9)
    (failure,) = found["failures"]
    assert "fused: the outputs of a step differ from plain TensorFlow's by" in failure
    assert failure.startswith(tensorflow_benchmark.lines(found["entries"][0])[0].split("  ")[0])


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind=None: [])
    assert tensorflow_benchmark.main([]) == 1
    assert "sees no GPU here" in capsys.readouterr().err
