"""CoSiMultiHeadAttention refuses what does not fit, and then changes nothing."""

import numpy as np
import pytest

import continual_transformers_tf as ct
from co_si_mha_cases import D, E, H, N, pair
from errors import BAD_INPUT

pytestmark = pytest.mark.sampled(3, rest="slow")

STEP = np.ones((2, E), np.float32)


INPUTS = ("query", "value", "key")
STEP_MASKS = ("query_mask", "value_mask", "key_mask")
BAD = {
    "rank": dict(query=np.ones((2, 1, E), np.float32)),
    "features of query": dict(query=np.ones((2, E + 1), np.float32)),
    "features of value": dict(query=STEP, value=np.ones((2, E + 1), np.float32)),
    "rows of key": dict(query=STEP, value=STEP, key=np.ones((3, E), np.float32)),
    "dtype": dict(query=np.ones((2, E), np.int32)),
    "stream beyond": dict(query=STEP, streams=[0, 9]),
    "stream negative": dict(query=STEP, streams=[-1, 0]),
    "stream twice": dict(query=STEP, streams=[1, 1]),
    "streams too many": dict(query=STEP, streams=[0, 1, 2]),
    "streams not integers": dict(query=STEP, streams=["a", "b"]),
    "mask of another window": dict(query=STEP, attention_mask=np.ones((2, N + 1), bool)),
    "mask not bool": dict(query=STEP, attention_mask=np.ones((2, N), np.int32)),
    "mask of other rows": dict(query=STEP, attention_mask=np.ones((3, N), bool)),
    "mask of too many axes": dict(query=STEP, attention_mask=np.ones((1, 2, H, 1, N), bool)),
    "key mask of other rows": dict(query=STEP, key_mask=np.ones(3, bool)),
    "key mask of the window": dict(query=STEP, key_mask=np.ones((2, N), bool)),
    "key mask not bool": dict(query=STEP, key_mask=np.ones(2, np.float32)),
    "value mask of other rows": dict(query=STEP, value_mask=np.ones(1, bool)),
    "query mask of other rows": dict(query=STEP, query_mask=np.ones(3, bool)),
    "query mask not bool": dict(query=STEP, query_mask=[1, 0]),
}


@pytest.mark.parametrize(
    "options",
    [
        dict(seq_len=0),
        dict(seq_len=2.5),
        dict(seq_len=True),
        dict(num_heads=0),
        dict(key_dim=-1),
        dict(attention_axes=2),
        dict(attention_axes=(1, 2)),
        dict(warm_up="full"),
        dict(call_mode="walk"),
        dict(query_index=N),
        dict(cache_dtype="int8"),
        dict(value_dim=0),
        dict(sliding_window=0),
        dict(output_shape=2.5),
        dict(dropout=0.5, flash_attention=True),
        dict(attention_axes=2, single_output=False, call_mode="steps"),
    ],
    ids=str,
)
def test_bad_construction(options):
    with pytest.raises(ValueError, match="(?i)expected|must be|invalid|flash"):
        ct.CoSiMultiHeadAttention(**{**dict(seq_len=N, num_heads=H, key_dim=D), **options})


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_named_and_changes_nothing(backend, random, what):
    layer, _ = pair(random=random, layer_options=dict(warm_up="partial"))
    layer.call_steps(random.normal(size=(2, N - 2, E)))
    before = layer.get_state()
    with pytest.raises(BAD_INPUT, match="(?i)expected"):
        layer.call_step(**BAD[what])
    for name, array in layer.get_state().items():
        np.testing.assert_array_equal(array, before[name])
    steps = {
        name: np.asarray(x)[:, None] if name in INPUTS or name in STEP_MASKS else x
        for name, x in BAD[what].items()
    }
    with pytest.raises(BAD_INPUT, match="(?i)expected"):
        layer.call_steps(**steps)
    for name, array in layer.get_state().items():
        np.testing.assert_array_equal(array, before[name])
    assert layer.call_step(STEP).shape == (2, E)


def test_a_failing_call_holds_no_more_streams_and_builds_no_layer(backend, random):
    layer, _ = pair(random=random)
    layer.call_step(STEP)
    with pytest.raises(BAD_INPUT, match="(?i)expected"):
        layer.call_step(np.ones((5, E), np.float32), attention_mask=np.ones((4, N), bool))
    assert layer.get_state()["position"].tolist() == [1, 1]
    new = ct.CoSiMultiHeadAttention(N, H, D)
    with pytest.raises(BAD_INPUT, match="(?i)expected"):
        new.call_step(STEP, value=np.ones((3, E + 2), np.float32))
    assert not new.built
    new.call_step(STEP)


def test_regular_input_of_another_rank_is_named_and_lists_are_taken(random):
    layer, _ = pair(random=random)
    with pytest.raises(ValueError, match=r"query of shape \(B, T, E\), but got \(2, 7\)"):
        layer.call_regular(STEP)
    x = random.normal(size=(1, N, E)).astype("float32")
    assert layer.call_regular(x.tolist()).shape == (1, 1, E)


def test_no_steps_are_refused(random):
    layer, _ = pair(random=random)
    with pytest.raises(ValueError, match="at least one step"):
        layer.call_steps(np.ones((2, 0, E), np.float32))
    assert layer.get_state()["position"].size == 0


def test_a_layer_over_other_axes_is_keras_own_and_takes_no_step(random):
    layer = ct.CoSiMultiHeadAttention(N, H, D, attention_axes=(1, 2), single_output=False)
    assert layer(random.normal(size=(2, 3, 4, E))).shape == (2, 3, 4, E)
    for mode in ("step", "steps"):
        with pytest.raises(ValueError, match="attention_axes"), ct.call_mode(mode):
            layer(STEP)
    layer = ct.CoSiMultiHeadAttention(N, H, D, single_output=False)
    layer(random.normal(size=(2, 3, 4, E)))
    with pytest.raises(ValueError, match="regular calls only"):
        layer.call_step(STEP)
