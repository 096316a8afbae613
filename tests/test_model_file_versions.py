"""Model files and copies of streams from earlier versions are still read, with the same meaning.

`data/model_version_1.safetensors` has format version 1 and every op of the version that made it. It
is the result of `EveryOp` in tests/cc/model_file_case.h. `data/model_version_1.npz` has inputs of a
stream, the outputs of tests/plan_reference.py for them, and the copy of the stream that
`Session.get_state` returned half-way. These files are never made again: a later format version gets
its own files, by `python tests/test_model_file_versions.py PATH`.
"""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

import plan_reference
from continual_transformers_tf.session import Session

DATA = Path(__file__).parent / "data"
MODELS = sorted(DATA.glob("model_version_*.safetensors"))
STEPS = 12  # Three windows.


@pytest.fixture(params=MODELS, ids=lambda path: path.stem)
def model(request):
    return request.param


@pytest.fixture
def kept(model):
    return np.load(model.with_suffix(".npz"))


def take_steps(session, kept, first, last, stream):
    """Take steps first, ..., last - 1 and compare their outputs with the kept ones."""
    for t in range(first, last):
        inputs = [kept[f"in/{spec.name}"][t][None] for spec in session.inputs]
        outputs = session.step(inputs, streams=[stream])
        for spec, y in zip(session.outputs, outputs, strict=True):
            expected = kept[f"out/{spec.name}"][t]
            assert y.shape == (1, *expected.shape)
            if y.dtype.kind == "f":
                assert np.abs(y[0] - expected).max() <= 5e-6 * max(np.abs(expected).max(), 1e-3)
            else:
                np.testing.assert_array_equal(y[0], expected)


def test_there_is_one_for_each_format_version():
    versions = [int(path.stem.removeprefix("model_version_")) for path in MODELS]
    assert versions == list(range(1, len(versions) + 1))
    assert versions


def test_a_kept_file_gives_what_it_gave(model, kept):
    session = Session.load(model)
    take_steps(session, kept, 0, STEPS, session.open())


def test_a_kept_stream_goes_on(model, kept):
    session = Session.load(model)
    stream = session.open()
    session.set_state([kept["state"].tobytes()], [stream])
    assert session.position(stream) == STEPS // 2
    take_steps(session, kept, STEPS // 2, STEPS, stream)


def test_a_stream_is_copied_as_it_was(model, kept):
    session = Session.load(model)
    stream = session.open()
    take_steps(session, kept, 0, STEPS // 2, stream)
    (state,) = session.get_state([stream])
    # Compare the header, with both fingerprints and the position. The rest are floats, which
    # machines round differently.
    assert len(state) == len(kept["state"])
    assert state[:64] == kept["state"].tobytes()[:64]


def test_a_kept_file_is_saved_as_it_was(model, tmp_path):
    Session.load(model).save(tmp_path / "model.safetensors")
    assert (tmp_path / "model.safetensors").read_bytes() == model.read_bytes()


def make(model):
    """Write this version's outputs for a model file beside it."""
    data = model.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    plan = json.loads(header.pop("__metadata__")["plan"])
    dtypes = {"F32": np.float32, "F64": np.float64, "I64": np.int64}
    weights = {}
    for name, entry in header.items():
        begin, end = (8 + length + x for x in entry["data_offsets"])
        array = np.frombuffer(data[begin:end], dtypes[entry["dtype"]])
        weights[name] = array.reshape(entry["shape"])
    random = np.random.default_rng(1)
    kept = {}
    for port in plan["inputs"]:
        value = plan["values"][port["value"]]
        shape = (STEPS, *value["shape"])
        if value["dtype"].startswith("int"):
            x = random.integers(0, 3, shape).astype(value["dtype"])
        else:
            x = random.standard_normal(shape).astype(value["dtype"])
        kept[f"in/{port['name']}"] = x
    reference = plan_reference.Stream(plan, weights)
    session = Session.load(model)
    stream = session.open()
    outputs = []
    for t in range(STEPS):
        if t == STEPS // 2:
            kept["state"] = np.frombuffer(session.get_state(stream)[0], np.uint8)
        inputs = [kept[f"in/{port['name']}"][t] for port in plan["inputs"]]
        outputs.append(reference.step(inputs))
        session.step([x[None] for x in inputs], streams=[stream])
    for port, ys in zip(plan["outputs"], zip(*outputs, strict=True), strict=True):
        kept[f"out/{port['name']}"] = np.stack(ys)
    np.savez_compressed(model.with_suffix(".npz"), **kept)


if __name__ == "__main__":
    make(Path(sys.argv[1]))
