"""CoReMultiHeadAttention refuses what does not fit, and then changes nothing."""

import numpy as np
import pytest

import continual_transformers_tf as ct
from co_re_mha_cases import D, E, H, N, pair
from errors import BAD_INPUT

pytestmark = pytest.mark.sampled(3, rest="slow")

STEP = np.ones((2, E), np.float32)

BAD = {
    "rank": dict(query=np.ones((2, 1, E), np.float32)),
    "features of query": dict(query=np.ones((2, E + 1), np.float32)),
    "rows of key": dict(query=STEP, value=STEP, key=np.ones((3, E), np.float32)),
    "dtype": dict(query=np.ones((2, E), np.int32)),
    "stream beyond": dict(query=STEP, streams=[0, 9]),
    "stream twice": dict(query=STEP, streams=[1, 1]),
    "streams too many": dict(query=STEP, streams=[0, 1, 2]),
    "key mask of other rows": dict(query=STEP, key_mask=np.ones(3, bool)),
    "value mask not bool": dict(query=STEP, value_mask=np.ones(2, np.float32)),
    "mask of one row": dict(query=STEP, attention_mask=np.ones(N, bool)),
    "mask of another window": dict(query=STEP, attention_mask=np.ones((N, N + 1), bool)),
    "mask of other rows": dict(query=STEP, attention_mask=np.ones((3, N, N), bool)),
    "mask not bool": dict(query=STEP, attention_mask=np.ones((N, N))),
    "query mask": dict(query=STEP, query_mask=np.ones(2, bool)),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_of_a_retroactive_layer_changes_nothing(backend, random, what):
    layer, _ = pair(random=random, layer_options=dict(warm_up="partial"))
    layer.call_steps(random.normal(size=(2, N - 2, E)))
    before = layer.get_state()
    with pytest.raises(BAD_INPUT, match="(?i)expected"):
        layer.call_step(**BAD[what])
    for name, array in layer.get_state().items():
        np.testing.assert_array_equal(array, before[name])
    with pytest.raises(BAD_INPUT, match="(?i)expected"), ct.call_mode("step"):
        layer(**BAD[what])
    assert layer.call_step(STEP).shape == (2, N, E)


@pytest.mark.parametrize(
    "options",
    [
        dict(seq_len=0),
        dict(seq_len=2.5),
        dict(num_heads=0),
        dict(warm_up="full"),
        dict(algorithm="published"),
        dict(call_mode="walk"),
        dict(attention_axes=2, call_mode="step"),
        dict(cache_dtype="bfloat16"),
    ],
    ids=str,
)
def test_bad_construction_of_a_retroactive_layer(options):
    with pytest.raises(ValueError, match="(?i)expected|must be|invalid"):
        ct.CoReMultiHeadAttention(**{**dict(seq_len=N, num_heads=H, key_dim=D), **options})


def test_what_has_no_steps_is_keras_own(random):
    layer = ct.CoReMultiHeadAttention(N, H, D, attention_axes=2)
    layer(random.normal(size=(2, N, E)).astype("float32"))
    with pytest.raises(ValueError, match="regular calls only"):
        layer.call_step(STEP)
