"""The state of a Keras model's streams, put into a session of the model."""

import json
from pathlib import Path

import keras
import numpy as np
import pytest

import continual_transformers_tf as ct
import reference
from continual_transformers_tf.models.keras_state import blocks_from_keras_state
from continual_transformers_tf.models.lowering import lower
from model_case import BOUNDS
from model_cases import CASES
from old_states import new_state, old_keras_state, old_state

pytestmark = pytest.mark.sampled(6)

DATA = Path(__file__).parent / "data"

# Together, these cases have every kind of state.
NAMES = [
    "co_si_window_1", "co_si_window_3", "co_si_gate", "co_si_first_query", "co_si_second_query",
    "co_si_multi_query_gate", "co_si_everything", "co_re_window_1", "co_re_window_3", "co_re_gate",
    "co_re_sliding_window_gate",
    "co_si_encoder_plain", "co_re_encoder_norm_first", "stack_single_output_3",
    "stack_retroactive_3", "positions_learned", "positions_sinusoidal", "delay_matrix",
    "delay_bool", "delay_at_once", "residual_delayed", "residual_of_residual", "demo",
    "late_answers", "masked_query_that_waits", "models_within_models",
    "streaming_model_inside_another", "convert_causal_then_full", "float64", "narrow_cache",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("taken", [1, "more"])
def test_a_session_goes_on_from_the_state_of_the_keras_model(random, name, taken):
    case = CASES[name]
    streaming = case.streaming(case.build())
    taken = 2 * case.window + 3 if taken == "more" else taken
    inputs = case.inputs(streaming, random, (2, taken + case.window + 2))
    streaming.ensure_streams(3)
    case.steps(streaming, [x[:, :taken] for x in inputs])
    state = streaming.get_state([1, 0])
    session = ct.Session(streaming)
    ids = session.open(2)
    session.set_state(state, ids)
    np.testing.assert_array_equal(session.position(ids), [taken, taken])
    expected = case.steps(streaming, [x[:, taken:] for x in inputs])
    got = session_steps(session, [x[::-1, taken:] for x in inputs], ids)
    for y, x in zip(got, expected, strict=True):
        if x.dtype == bool:
            np.testing.assert_array_equal(y[::-1], x)
        else:
            assert reference.relative_error(y[::-1], x.astype("float64")) < 2 * BOUNDS[case.dtype]


def session_steps(session, inputs, streams):
    """Take T steps, and return arrays (M, T, ...), in Keras' order of the outputs."""
    plan = json.loads(session._plan_json)
    outputs = []
    for t in range(inputs[0].shape[1]):
        arrays = [
            np.ascontiguousarray(x[:, t], plan["values"][port["value"]]["dtype"])
            for x, port in zip(inputs, plan["inputs"], strict=True)
        ]
        x = keras.tree.map_structure(arrays.__getitem__, plan["input_structure"])
        outputs.append(keras.tree.flatten(session.step(x, streams=streams)))
    return [np.stack(rows, 1) for rows in zip(*outputs, strict=True)]


def test_streams_of_different_ages(random):
    case = CASES["stack_retroactive_2"]
    layer = case.build()
    x = random.normal(size=(3, 12, 6)).astype("float32")
    layer.ensure_streams(3)
    for streams, first, last in (([0], 0, 1), ([2], 0, 5), ([0, 2], 5, 7), ([1], 0, 0)):
        for t in range(first, last):
            layer.call_step(x[streams, t], streams=streams)
    session = ct.Session(layer)
    ids = session.open(3)
    session.set_state(layer.get_state(), ids)
    assert session.position(ids).tolist() == [3, 0, 7]
    for t in range(7, 12):
        expected = layer.call_step(x[:, t])
        assert reference.relative_error(session.step(x[:, t], streams=ids), expected.numpy()) < 1e-5


@pytest.mark.parametrize(
    "name", ["co_si_gate", "co_si_first_query", "co_re_gate", "co_re_sliding_window_gate",
             "stack_single_output_3", "stack_retroactive_3", "demo"],
)  # fmt: skip
def test_plans_and_states_of_either_age_fit_each_other(random, name):
    case = CASES[name]
    streaming = case.streaming(case.build())
    inputs = case.inputs(streaming, random, (2, case.window + 2))
    case.steps(streaming, inputs)
    state = streaming.get_state()
    session = ct.Session(streaming)
    plan, layout = json.loads(session._plan_json), session._state_entries()
    assert "heads_first" not in session._plan_json
    expected = blocks_from_keras_state(plan, layout, state)
    old_plan = {**plan, "keras_state": old_keras_state(plan["keras_state"])}
    assert "heads_first" in json.dumps(old_plan)
    assert blocks_from_keras_state(plan, layout, old_state(state)) == expected
    assert blocks_from_keras_state(old_plan, layout, state) == expected
    assert blocks_from_keras_state(old_plan, layout, old_state(state)) == expected
    streaming.clean_state()
    streaming.set_state(old_state(state))
    for part, array in zip(
        keras.tree.flatten(streaming.get_state()), keras.tree.flatten(state), strict=True
    ):
        np.testing.assert_array_equal(part, array)


def test_a_kept_file_of_rings_heads_first_takes_states_of_either_age():
    """tests/data/heads_first.py made these files when rings were heads first."""
    session = ct.Session.load(DATA / "heads_first.safetensors")
    kept = np.load(DATA / "heads_first.npz")
    assert "heads_first" in session._plan_json
    old = {}
    for name in kept.files:
        kind, *path = name.split("/")
        if kind == "state":
            old.setdefault(path[0], {})[path[1]] = kept[name]
    assert {"query", "key", "value"} < set(old["1"])
    for state in (old, new_state(old)):
        ids = session.open(2)
        session.set_state(state, ids)
        for x, y in zip(kept["x"], kept["y"], strict=True):
            assert reference.relative_error(session.step(x, streams=ids), y) < 1e-5


def test_states_that_do_not_fit_are_refused(random):
    model = CASES["demo"].build()
    streaming = CASES["demo"].streaming(model)
    x = random.normal(size=(2, 3, 6)).astype("float32")
    streaming.call_steps(x)
    session = ct.Session(streaming)
    ids = session.open(2)
    session.step(x[:, 0], streams=ids)
    before = session.get_state(ids)
    state = streaming.get_state()
    attention = state["1"]
    bad = {
        "Expected the state to have": {"0": state["0"]},
        "Expected '1' of the state to have": {**state, "1": {}},
        "all layers have taken the same steps": {
            **state, "0": {**state["0"], "position": state["0"]["position"] + 1}
        },
        "Expected 'keys' of '1' of the state to be": {
            **state, "1": {**attention, "keys": attention["keys"][:, :2]}
        },
        "Expected 'key_mask' of '1' of the state of bool": {
            **state, "1": {**attention, "key_mask": attention["key_mask"].astype("float32")}
        },
        "to have 2 streams": {**state, "1": {**attention, "values": attention["values"][:1]}},
    }  # fmt: skip
    for message, broken in bad.items():
        with pytest.raises(ValueError, match=message):
            session.set_state(broken, ids)
    assert session.get_state(ids) == before


def test_a_masked_query_that_the_plan_does_not_keep_is_refused(random):
    layer = CASES["co_si_first_query"].build()
    x = random.normal(size=(1, 6)).astype("float32")
    layer.call_step(x, query_mask=np.array([False]))
    session = ct.Session(layer)
    with pytest.raises(ValueError, match="a step that was masked"):
        session.set_state(layer.get_state(), [session.open()])
    layer.clean_state()
    for _ in range(9):  # Nothing of the masked step is left.
        layer.call_step(x)
    session.set_state(layer.get_state(), [session.open()])


def test_bfloat16_as_numpy_reads_it_from_a_file(random):
    """NumPy reads bfloat16 without its type. Rounding equals TensorFlow's."""
    streaming = CASES["narrow_cache"].streaming(CASES["narrow_cache"].build())
    streaming.call_steps(random.normal(size=(2, 6, 6)).astype("float32"))
    state = streaming.get_state()
    session = ct.Session(streaming)
    plan, layout = json.loads(session._plan_json), session._state_entries()
    expected = blocks_from_keras_state(plan, layout, state)
    part = state["0"]
    raw = {k: x.view("V2") if x.dtype.name == "bfloat16" else x for k, x in part.items()}
    wide = {k: x.astype("float32") if x.dtype.name == "bfloat16" else x for k, x in part.items()}
    assert raw["keys"].dtype == "V2"
    for other in (raw, wide):
        assert blocks_from_keras_state(plan, layout, {"0": other}) == expected


def test_a_narrower_cache_rounds_what_it_is_given(random):
    layer = CASES["co_si_window_3"].build()
    x = random.normal(size=(2, 5, 6)).astype("float32")
    for t in range(4):
        layer.call_step(x[:, t])
    for dtype in ("bfloat16", "float16"):
        session = ct.Session(layer, cache_dtype=dtype)
        ids = session.open(2)
        session.set_state(layer.get_state(), ids)
        got = session.step(x[:, 4], streams=ids)
        expected = layer.call_step(x[:, 4], update_state=False).numpy()
        assert 0 < reference.relative_error(got, expected) < BOUNDS[dtype]


def test_a_cache_of_int8_rounds_what_it_is_given_as_a_step_does(random):
    layer = CASES["co_si_window_3"].build()
    x = random.normal(size=(3, 5, 6)).astype("float32")
    x[1, 2] = np.nan
    for t in range(4):
        layer.call_step(x[:, t])
    session = ct.Session(layer, cache_dtype="int8")
    ids = session.open(3)
    session.set_state(layer.get_state(), ids)
    others = session.open(3)
    session.steps(x[:, :4], others)
    got = session.step(x[:, 4], ids)
    np.testing.assert_allclose(got, session.step(x[:, 4], others), rtol=1e-2, atol=1e-2)
    expected = layer.call_step(x[:, 4], update_state=False).numpy()
    assert np.isnan(got[1]).all()
    assert 0 < reference.relative_error(got[[0, 2]], expected[[0, 2]]) < 2e-2


def test_a_plan_without_streams_has_no_state():
    plan = lower(CASES["arithmetic"].build()).plan
    assert plan["keras_state"] == {}
    with pytest.raises(ValueError, match="remembers nothing"):
        blocks_from_keras_state(plan, [], {})
