"""Streams of a session: ids, steps in any order, reused outputs, gaps, copies, memory."""

import copy
import pickle
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from continual_transformers_tf.session import Session, UnknownStreamError
from plan_files import (
    attention_only_plan,
    attention_plan,
    many_ports_plan,
    negative_plan,
    two_ports_plan,
)

F = np.float32
FEATURES, OUTPUTS, WINDOW = 6, 5, 4
# Calls with another M may give other bits. This is the bound for float32.
CLOSE = dict(rtol=5e-6, atol=5e-6)


@pytest.fixture
def plan(random):
    return attention_plan(random, FEATURES, window=WINDOW, outputs=OUTPUTS)


@pytest.fixture
def session(plan):
    return plan.session()


@pytest.fixture
def x(random):
    """Return steps of 8 streams, (8, 20, FEATURES)."""
    return random.standard_normal((8, 20, FEATURES)).astype(F)


def replay(session, steps):
    """Return a new stream's outputs, one step at a time."""
    stream = session.open()
    outputs = [session.step(step[None], streams=stream)[0] for step in steps]
    session.close(stream)
    return np.stack(outputs)


def test_ids(session):
    a = session.open()
    assert type(a) is int
    assert a >= 0
    ids = session.open(3)
    assert ids.dtype == np.int64
    assert ids.shape == (3,)
    assert len({a, *ids.tolist()}) == 4
    assert session.open(0).shape == (0,)
    assert session.open(np.int64(2)).shape == (2,)
    assert session.open_streams == 6


def test_a_closed_id_is_refused_for_ever(session, x):
    a = session.open()
    session.step(x[:1, 0], streams=a)
    session.close(a)
    b = session.open()
    assert b != a
    calls = [
        lambda: session.step(x[:1, 0], streams=a),
        lambda: session.steps(x[:1], streams=[a]),
        lambda: session.position(a),
        lambda: session.ready([a]),
        lambda: session.get_state(a),
        lambda: session.set_state(session.get_state(b), a),
        lambda: session.clean_state(a),
        lambda: session.close(a),
    ]
    for call in calls:
        with pytest.raises(UnknownStreamError, match=str(a)):
            call()
    # The slot's new stream begins with an empty state.
    assert session.position(b) == 0
    np.testing.assert_array_equal(replay(session, x[0]), replay(session, x[0]))


def test_a_stream_in_used_room_has_seen_nothing(session, x):
    fresh = replay(session, x[1, :3])
    for _ in range(3):
        a = session.open()
        session.steps(x[:1], streams=a)
        session.close(a)
        np.testing.assert_array_equal(replay(session, x[1, :3]), fresh)
        a = session.open()
        session.steps(x[:1], streams=a)
        session.clean_state(a)
        assert session.position(a) == 0
        outputs = [session.step(x[1:2, t], streams=a)[0] for t in range(3)]
        np.testing.assert_array_equal(np.stack(outputs), fresh)
        session.close(a)


@pytest.mark.parametrize(
    "ids",
    [
        lambda ids: ids,
        lambda ids: ids.tolist(),
        lambda ids: tuple(ids.tolist()),
        lambda ids: list(ids),
        lambda ids: np.repeat(ids, 2)[::2],
        lambda ids: ids[::-1].copy()[::-1],
        lambda ids: np.frombuffer(b"x" + ids.tobytes(), np.uint8)[1:].view(np.int64),
        lambda ids: ids.astype(">i8"),
        lambda ids: ids.astype(np.longlong),
    ],
    ids=["array", "list", "tuple", "scalars", "strided", "reversed", "unaligned", "swapped", "ll"],
)
def test_ids_may_be_given_as(session, x, ids):
    # Use generations beyond 0, so that ids have more than 32 bits.
    session.close(session.open(3))
    opened = session.open(3)
    assert (opened > 2**32).all()
    y = session.step(x[:3, 0], streams=ids(opened))
    assert session.position(ids(opened)).tolist() == [1, 1, 1]
    expected = [replay(session, x[i, :1])[0] for i in range(3)]
    np.testing.assert_allclose(y, expected, **CLOSE)


@pytest.mark.parametrize("one", [int, np.int64, np.uint64, np.array], ids=lambda f: f.__name__)
def test_one_id(session, x, one):
    a = session.open()
    assert session.step(x[:1, 0], streams=one(a)).shape == (1, OUTPUTS)
    assert session.steps(x[:1, :3], streams=one(a)).shape == (1, 3, OUTPUTS)
    position = session.position(one(a))
    assert type(position) is int
    assert position == 4
    assert session.ready(one(a)) is True
    states = session.get_state(one(a))
    assert len(states) == 1
    session.clean_state(one(a))
    assert session.ready(one(a)) is False
    session.set_state(states, one(a))
    session.set_state(states[0], one(a))
    assert session.position(a) == 4
    session.close(one(a))


def test_streams_step_in_any_order_and_at_any_age(session, x, random):
    expected = [replay(session, steps) for steps in x]
    ids = session.open(8)
    taken = np.zeros(8, int)
    for _ in range(60):
        chosen = random.permutation(8)[: random.integers(1, 8)]
        chosen = chosen[taken[chosen] < 20]
        y = session.step(x[chosen, taken[chosen]], streams=ids[chosen])
        for row, i in enumerate(chosen):
            np.testing.assert_allclose(y[row], expected[i][taken[i]], **CLOSE)
        taken[chosen] += 1
        np.testing.assert_array_equal(session.position(ids), taken)
        np.testing.assert_array_equal(session.ready(ids), taken >= WINDOW)
    assert taken.max() > WINDOW


@pytest.mark.parametrize("count", [1, 2, WINDOW, WINDOW + 5])
@pytest.mark.parametrize("before", [0, 1, WINDOW - 1, WINDOW, WINDOW + 1, 2 * WINDOW + 3])
def test_steps_are_as_many_single_steps(session, x, before, count):
    a, b = session.open(3), session.open(3)
    for t in range(before):
        session.step(x[:3, t], streams=a)
    if before:
        session.steps(x[:3, :before], streams=b)
    singles = [session.step(x[:3, before + t], streams=a) for t in range(count)]
    y = session.steps(x[:3, before : before + count], streams=b)
    np.testing.assert_allclose(y, np.stack(singles, axis=1), **CLOSE)
    assert session.position(a).tolist() == session.position(b).tolist() == [before + count] * 3
    for t in range(3):
        np.testing.assert_allclose(
            session.step(x[:3, t], streams=a), session.step(x[:3, t], streams=b), **CLOSE
        )


def test_no_rows_and_no_steps(session, x):
    a = session.open()
    for none in ([], (), np.zeros(0, np.int64)):
        assert session.step(x[:0, 0], streams=none).shape == (0, OUTPUTS)
        assert session.steps(x[:0], streams=none).shape == (0, 20, OUTPUTS)
        assert session.position(none).shape == (0,)
        assert session.ready(none).shape == (0,)
        assert session.get_state(none) == []
        session.set_state([], none)
        session.clean_state(none)
        session.close(none)
    assert session.step(x[:0, 0]).shape == (0, OUTPUTS)
    assert session.steps(x[:1, :0], streams=a).shape == (1, 0, OUTPUTS)
    assert session.position(a) == 0
    out = np.empty((0, OUTPUTS), F)
    assert session.step(x[:0, 0], streams=[], out=out) is out


def test_default_streams(session, x):
    a = session.open()
    assert session.position().shape == session.ready().shape == (0,)
    assert session.get_state() == []
    y2 = session.step(x[:2, 0])
    y3 = session.steps(x[:3, 1:3])
    y1 = session.step(x[:1, 3])
    assert session.position().tolist() == [4, 3, 2]
    assert session.ready().tolist() == [True, False, False]
    assert session.position(a) == 0
    expected = [replay(session, x[0, :4]), replay(session, x[1, :3]), replay(session, x[2, 1:3])]
    np.testing.assert_allclose(y2, [expected[0][0], expected[1][0]], **CLOSE)
    np.testing.assert_allclose(y3, [expected[0][1:3], expected[1][1:3], expected[2]], **CLOSE)
    np.testing.assert_allclose(y1[0], expected[0][3], **CLOSE)

    states = session.get_state()
    assert len(states) == 3
    session.clean_state()
    assert session.position().tolist() == [0, 0, 0]
    session.set_state(states)
    assert session.position().tolist() == [4, 3, 2]
    session.close()
    assert session.open_streams == 1
    np.testing.assert_allclose(session.step(x[:2, 0]), y2, **CLOSE)
    assert session.position()[:2].tolist() == [1, 1]


def test_clean_state_of_all(session, x):
    ids = session.open(2)
    session.step(x[:2, 0], streams=ids)
    session.step(x[:3, 0])
    session.clean_state()
    assert session.position(ids).tolist() == [0, 0]
    assert session.position().tolist() == [0, 0, 0]
    np.testing.assert_array_equal(
        session.steps(x[:1], streams=ids[:1]), session.steps(x[:1], streams=ids[1:])
    )


def test_out_is_written_and_returned(session, x):
    a, b = session.open(2), session.open(2)
    out = np.full((2, OUTPUTS), np.nan, F)
    for t in range(6):
        y = session.step(x[:2, t], streams=a)
        assert session.step(x[:2, t], streams=b, out=out) is out
        np.testing.assert_array_equal(out, y)
    # A part of a larger array, and an unusual stride of axes of size 1.
    large = np.full((5, 3, OUTPUTS), np.nan, F)
    y = session.steps(x[:2, 6:9], streams=a)
    assert session.steps(x[:2, 6:9], streams=b, out=large[1:3]).base is large
    np.testing.assert_array_equal(large[1:3], y)
    assert np.isnan(large[[0, 3, 4]]).all()
    one = np.full((1, 2 * OUTPUTS), np.nan, F)[:, :OUTPUTS]
    session.step(x[:1, 9], streams=b[:1], out=one)
    np.testing.assert_array_equal(one, session.step(x[:1, 9], streams=a[:1]))


def test_inputs_that_do_not_lie_as_the_kernels_read_them(session, x):
    step = x[:3, 0]
    expected = session.step(step, streams=session.open(3))
    unaligned = np.frombuffer(b"x" + step.tobytes(), np.uint8)[1:].view(F).reshape(step.shape)
    assert not unaligned.flags.aligned
    read_only = step.copy()
    read_only.flags.writeable = False

    class Own(np.ndarray):
        pass

    for given in (
        np.asfortranarray(step),
        np.repeat(step, 2, axis=1)[:, ::2],
        np.repeat(step, 2, axis=0)[::2],
        step[::-1].copy()[::-1],
        step[:, ::-1].copy()[:, ::-1],
        step.astype(">f4"),
        unaligned,
        read_only,
        step.view(Own),
    ):
        y = session.step(given, streams=session.open(3))
        assert type(y) is np.ndarray
        np.testing.assert_array_equal(y, expected)
    row = np.broadcast_to(step[:1], (3, FEATURES))
    y = session.step(row, streams=session.open(3))
    np.testing.assert_allclose(y, expected[:1].repeat(3, 0), **CLOSE)


def test_float64(random, x):
    session = attention_plan(random, FEATURES, compute_dtype="float64").session()
    y = session.step(x[:3, 0].astype(float), streams=session.open(3))
    assert y.dtype == np.float64
    with pytest.raises(ValueError, match=r"float32.*x\.astype\(np\.float64\)"):
        session.step(x[:1, 0])


def attended(steps, keyed, scale=0.5):
    """Return the attention of the last step over all steps, in float64."""
    query, steps = steps[-1].astype(float), steps[keyed].astype(float)
    if not len(steps):
        return np.zeros_like(query)
    weights = np.exp(steps @ query * scale - (steps @ query * scale).max())
    return weights @ steps / weights.sum()


@pytest.mark.parametrize("several", [False, True])
def test_key_mask_marks_gaps(random, several):
    session = attention_only_plan(window=5, size=4).session()
    ids = session.open(3)
    x = random.standard_normal((3, 17, 4)).astype(F)
    mask = random.random((3, 17)) < 0.6
    mask[1] = False
    mask[2] = True
    if several:
        y = session.steps(x, streams=ids, key_mask=mask)
    else:
        y = [session.step(x[:, t], streams=ids, key_mask=mask[:, t]) for t in range(17)]
        y = np.stack(y, axis=1)
    for i in range(3):
        for t in range(17):
            since = max(0, t - 4)
            expected = attended(x[i, since : t + 1], mask[i, since : t + 1])
            np.testing.assert_allclose(y[i, t], expected, **CLOSE)
    assert not y[1].any()
    # None and a mask of True are the same. A mask need not be contiguous.
    a, b = session.open(3), session.open(3)
    np.testing.assert_array_equal(
        session.steps(x, streams=a, key_mask=None),
        session.steps(x, streams=b, key_mask=np.ones((17, 3), bool).T),
    )


@pytest.mark.parametrize(
    "given",
    [list, tuple, lambda mask: [np.bool_(x) for x in mask], lambda mask: mask[::-1][::-1]],
    ids=["list", "tuple", "NumPy's bools", "not contiguous"],
)
@pytest.mark.parametrize("count", [0, 1, 3])
def test_key_mask_may_be_given_as(random, given, count):
    session = attention_only_plan(window=3, size=4).session()
    a, b = session.open(count), session.open(count)
    x = random.standard_normal((count, 5, 4)).astype(F)
    mask = random.random((count, 5)) < 0.5
    for t in range(5):
        y = session.step(x[:, t], a, key_mask=given(mask[:, t]))
        np.testing.assert_array_equal(y, session.step(x[:, t], b, key_mask=mask[:, t]))
    rows = [given(row) for row in mask] if count else np.zeros((0, 5), bool)
    np.testing.assert_array_equal(
        session.steps(x, a, key_mask=rows), session.steps(x, b, key_mask=mask)
    )


def test_a_list_of_inputs_may_be_a_dict_by_their_names(random):
    session = two_ports_plan(random).session()
    a, b = session.open(2), session.open(2)
    prices = random.standard_normal((2, 4, 3)).astype(F)
    calendar = random.standard_normal((2, 4, 2)).astype(F)
    for given in (
        {"prices": prices, "calendar": calendar},
        {"calendar": calendar, "prices": prices},
    ):
        expected = session.steps([prices, calendar], a)
        y = session.steps(given, b)
        assert type(y) is list
        np.testing.assert_array_equal(y, expected)
        out = {"late": np.empty((2, 3), F), "sum": None}
        expected = session.step((prices[:, 0], calendar[:, 0]), a)
        y = session.step({name: x[:, 0] for name, x in given.items()}, b, out=out)
        np.testing.assert_array_equal(y, expected)
        assert y[1] is out["late"]


def test_a_list_within_a_structure_may_be_a_dict(random):
    session = negative_plan(["a", "b", "c"], {"left": 0, "right": [1, 2]}).session()
    a, b, c = random.standard_normal((3, 1, 2)).astype(F)
    y = session.step({"left": a, "right": {"c": c, "b": b}})
    np.testing.assert_array_equal(y["left"], -a)
    np.testing.assert_array_equal(y["right"], [-b, -c])


def test_several_inputs_and_outputs(random):
    plan, table = many_ports_plan(random)
    session = plan.session()
    ids = session.open(2)
    sounds = random.standard_normal((2, 6, 3)).astype(F)
    words = random.integers(0, len(table), (2, 6)).astype(np.int32)
    sums = sounds + table[words]
    late = np.concatenate([np.zeros((2, 2, 3), F), sums[:, :-2]], axis=1)
    for t in range(6):
        y = session.step({"word": words[:, t], "sound": sounds[:, t]}, streams=ids)
        assert list(y) == ["sum", "late"]
        assert type(y["late"]) is list
        np.testing.assert_array_equal(y["sum"], sums[:, t])
        np.testing.assert_array_equal(y["late"][0], late[:, t])
    others = session.open(2)
    out = {"late": (np.full((2, 6, 3), np.nan, F),), "sum": None}
    y = session.steps({"word": words, "sound": sounds}, streams=others, out=out)
    assert y["late"][0] is out["late"][0]
    np.testing.assert_array_equal(y["sum"], sums)
    np.testing.assert_array_equal(out["late"][0], late)
    assert [spec.name for spec in session.inputs] == ["sound", "word"]
    assert [spec.shape for spec in session.inputs] == [(3,), ()]
    assert [spec.dtype for spec in session.inputs] == [np.dtype("float32"), np.dtype("int32")]
    assert [spec.name for spec in session.outputs] == ["sum", "late"]


def test_more_inputs_than_are_few(random):
    """More than 8 inputs and outputs: the module keeps only up to 8 on the stack."""
    session = negative_plan([f"x{i}" for i in range(20)], list(range(20))).session()
    inputs = [random.standard_normal((100, 2)).astype(F) for _ in range(20)]
    outputs = session.step(tuple(inputs), streams=session.open(100))
    assert type(outputs) is list
    for x, y in zip(inputs, outputs, strict=True):
        np.testing.assert_array_equal(y, -x)


@pytest.mark.parametrize("steps", [0, 1, WINDOW - 1, WINDOW, WINDOW + 1, 2 * WINDOW + 3])
def test_a_copy_goes_on_as_its_stream(session, plan, x, steps):
    a = session.open()
    if steps:
        session.steps(x[:1, :steps], streams=a)
    (state,) = session.get_state(a)
    assert type(state) is bytes
    assert len(state) == session.state_bytes
    other = plan.session()
    other.open(3)
    elsewhere = other.open(2)
    other.steps(x[2:4], streams=elsewhere)
    other.set_state([state], [elsewhere[1]])
    here = session.open()
    session.set_state([bytearray(state)], [here])
    assert session.get_state(here) == other.get_state(elsewhere[1]) == [state]
    assert other.position(elsewhere).tolist() == [20, steps]
    # The same M on the same machine gives the same bits.
    for t in range(8):
        y = session.step(x[:1, t], streams=a)
        np.testing.assert_array_equal(session.step(x[:1, t], streams=here), y)
        np.testing.assert_array_equal(other.step(x[:1, t], streams=elsewhere[1:]), y)
    assert session.get_state(a) == session.get_state(here)


def test_copies_of_several(session, x, random):
    ids = session.open(8)
    for i in range(8):
        if i:
            session.steps(x[i : i + 1, :i], streams=ids[i : i + 1])
    states = session.get_state(ids)
    order = random.permutation(8)
    others = session.open(8)
    session.set_state([states[i] for i in order], others)
    assert session.position(others).tolist() == order.tolist()
    assert session.get_state(others) == [states[i] for i in order]
    session.set_state(tuple(memoryview(states[i]) for i in order), others)
    assert session.get_state(others) == [states[i] for i in order]


def test_a_state_does_not_depend_on_what_was_in_its_room(session, x):
    used = session.open()
    session.steps(x[:1], streams=used)
    session.close(used)
    a = session.open()
    session.step(x[1:2, 0], streams=a)
    fresh = session.open()
    session.step(x[1:2, 0], streams=fresh)
    assert session.get_state(a) == session.get_state(fresh)


def test_a_model_file_is_not_named_as_a_keras_model(session, tmp_path):
    path = tmp_path / "model.keras"
    path.write_text("a Keras model")
    with pytest.raises(ValueError, match="ending of a Keras model"):
        session.save(path)
    assert path.read_text() == "a Keras model"


def test_save_and_load(session, plan, x, tmp_path):
    path = tmp_path / "saved.safetensors"
    session.save(path)
    assert path.read_bytes() == plan.to_bytes()
    for given in (path, str(path), bytes(path)):
        loaded = Session.load(given, streams=7, threads=2)
        assert (loaded.streams, loaded.threads) == (7, 2)
        np.testing.assert_array_equal(replay(loaded, x[0]), replay(session, x[0]))
    assert session.streams is None
    a, b = session.open(), loaded.open()
    session.steps(x[:1], streams=a)
    loaded.set_state(session.get_state(a), b)
    session.save(path)  # This replaces the file while it is mapped.
    np.testing.assert_array_equal(
        loaded.step(x[:1, 0], streams=b), session.step(x[:1, 0], streams=a)
    )


def test_load_weights(session, random, x, tmp_path):
    other = attention_plan(random, FEATURES, window=WINDOW, outputs=OUTPUTS)
    a, b = session.open(2)
    before = session.steps(x[:1], streams=a)
    session.load_weights(other.write(tmp_path))
    after = session.steps(x[:1], streams=b)
    assert np.abs(after - before).max() > 0.1
    reference = other.session()
    np.testing.assert_array_equal(after, reference.steps(x[:1], streams=reference.open()))
    assert session.position([a, b]).tolist() == [20, 20]
    path = tmp_path / "saved.safetensors"
    session.save(path)
    assert path.read_bytes() == other.to_bytes()


@pytest.mark.parametrize("how", [copy.copy, copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))])
def test_a_copy_of_a_session_has_its_model_and_no_streams(plan, x, how):
    session = plan.session(streams=9, threads=2, cache_dtype="bfloat16", weights_dtype="bfloat16")
    session.release_gil = True
    a = session.open()
    session.step(x[:1, 0], streams=a)
    other = how(session)
    assert type(other) is Session
    assert other.open_streams == 0
    for name in ("streams", "threads", "cache_dtype", "weights_dtype", "release_gil", "name"):
        assert getattr(other, name) == getattr(session, name)
    np.testing.assert_array_equal(replay(other, x[0]), replay(session, x[0]))
    # Copies of the other session's streams fit.
    b = other.open()
    other.set_state(session.get_state(a), b)
    assert other.position(b) == 1
    assert session.position(a) == 1


def test_a_subclass_keeps_its_class_and_attributes(plan, tmp_path):
    path = plan.write(tmp_path)

    loaded = Mine.load(path)
    loaded.note = ["mine"]
    assert type(loaded) is Mine
    other = copy.deepcopy(loaded)
    assert type(other) is Mine
    assert other.note == ["mine"]
    assert other.note is not loaded.note


class Mine(Session):
    pass


def test_options_and_facts(plan, session):
    assert session.name == "plan"
    assert session.device == "cpu"
    assert (session.receptive_field, session.delay, session.block) == (WINDOW, 0, 1)
    assert (session.streams, session.threads) == (None, 1)
    assert (session.cache_dtype, session.weights_dtype) == ("float32", "float32")
    assert session.inputs[0] == ("x", (FEATURES,), np.dtype("float32"))
    assert str(session.outputs[0]) == "y (5,) float32"
    assert session.release_gil is None
    other = plan.session(cache_dtype=np.float16, weights_dtype="bfloat16", streams=np.int64(5))
    assert (other.cache_dtype, other.weights_dtype, other.streams) == ("float16", "bfloat16", 5)
    other.open(2)
    for text in ("'plan'", "x (6,) float32", "y (5,) float32", "2 of 5 streams", "float16"):
        assert text in repr(other)
    assert "0 streams open" in repr(session)


def test_memory(session, x):
    before = session.memory()
    assert before.weights > 0
    assert before.model_file > 0
    assert before.total == sum(before)
    ids = session.open(1000)
    session.step(x[:1, 0].repeat(1000, 0), streams=ids)
    during = session.memory()
    assert during.streams >= 1000 * (session.state_bytes - 4096)
    assert during.streams > before.streams
    assert "streams_overhead" in str(during)
    assert str(during).splitlines()[-1].split()[0] == "total"
    session.close(ids)
    assert session.memory().streams <= during.streams  # The store keeps one slab of only a few KB.


def test_profile(session):
    profile = session.profile(streams=2, repeat=10)
    assert (profile.streams, profile.repeat) == (2, 10)
    assert all(row.seconds >= 0 for row in profile)
    assert profile.seconds > 0
    names = " + ".join(row.name for row in profile)
    assert "attention_3" in names
    assert "attention" in " + ".join(row.op for row in profile)
    text = str(profile)
    assert text.startswith("a step of 2 streams: ")
    assert len(text.splitlines()) == 2 + len(profile)
    assert session.open_streams == 0
    assert pickle.loads(pickle.dumps(profile)).repeat == 10


@pytest.mark.parametrize("rows", [1, 3])
def test_no_drift(random, rows):
    """After 100,000 steps the outputs still equal attention over the window."""
    session = attention_only_plan(window=16, size=8).session()
    ids = session.open(rows)
    for _ in range(100):
        x = random.standard_normal((rows, 1000, 8)).astype(F)
        y = session.steps(x, streams=ids)
    assert session.position(ids).tolist() == [100_000] * rows
    for i in range(rows):
        for t in range(980, 1000):
            expected = attended(x[i, t - 15 : t + 1], np.ones(16, bool))
            np.testing.assert_allclose(y[i, t], expected, **CLOSE)


def run(code, *arguments):
    """Run Python code in a new process, which imports neither Keras nor TensorFlow here."""
    code = textwrap.dedent(code)
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=Path(__file__).parent,
    )


RSS = """
    import sys
    import numpy as np
    from continual_transformers_tf.session import Session

    def rss():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * 4096
"""


def test_memory_of_streams_that_never_step(random, tmp_path):
    """100,000 such streams take less than 50 MB, and opening one takes constant time."""
    path = attention_plan(random, 64, heads=4, key_size=16, window=64).write(tmp_path)
    done = run(
        RSS
        + """
    session = Session.load(sys.argv[1])
    before = rss()
    ids = session.open(50_000).tolist() + [session.open() for _ in range(50_000)]
    assert len(set(ids)) == 100_000
    print(rss() - before)
    """,
        path,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 50e6


def test_memory_of_streams_in_use(random, tmp_path):
    """2,000 streams take the computed memory, and closing them gives it back."""
    path = attention_plan(random, 64, heads=4, key_size=16, window=64).write(tmp_path)
    done = run(
        RSS
        + """
    session = Session.load(sys.argv[1])
    x = np.ones((100, 64), np.float32)
    ids = session.open(100)
    for _ in range(70):
        session.step(x, streams=ids)
    session.close(ids)
    before = rss()
    ids = session.open(2_000)
    for t in range(70):
        for i in range(20):
            session.step(x, streams=ids[100 * i : 100 * (i + 1)])
    during = rss()
    session.close(ids)
    print(during - before, rss() - before)
    """,
        path,
    )
    assert done.returncode == 0, done.stderr
    taken, left = map(int, done.stdout.split())
    block = 2 * 64 * 64 * 4 + 64  # Keys and values, and the flags of which steps have a key.
    # The memory of the 100 earlier streams may or may not be mapped still.
    assert 1900 * block <= taken <= 1.02 * 2000 * block + 2e6
    assert left < 0.1 * taken


def test_close_and_get_state_open_no_default_streams(session, tmp_path):
    session.save(tmp_path / "model.safetensors")
    session = Session.load(tmp_path / "model.safetensors", streams=2)
    session.step(np.zeros((2, *session.inputs[0].shape), session.inputs[0].dtype))
    session.close()
    assert session.open_streams == 0
    assert session.get_state() == []
    ids = session.open(2)
    session.close()  # There is no room for a default stream, but this call needs none.
    assert session.open_streams == 2
    session.close(ids)
