"""Models that cannot be converted or run on steps are refused, and the layer is named."""

import keras
import numpy as np
import pytest

import continual_transformers_tf as ct
from convert_cases import CANNOT, E, N, attention, model_of, one_block

pytestmark = pytest.mark.sampled(3, rest="slow")


def test_what_needs_more_than_the_newest_is_named():
    inputs = keras.Input((None, E))
    x = keras.layers.Conv1D(3, 3, name="wide")(attention()(inputs, inputs)[:, -1:])
    with pytest.raises(ValueError, match="wide .Conv1D. cannot run on only the newest step"):
        ct.convert(keras.Model(inputs, x), seq_len=N)


def test_what_mixes_tokens_is_refused():
    inputs = keras.Input((N,), dtype="int32")
    x = keras.layers.Dense(N, name="mixed")(keras.layers.Identity()(inputs))
    x = keras.layers.Embedding(20, E)(x)
    with pytest.raises(ValueError, match="mixed"):
        ct.convert(keras.Model(inputs, attention()(x, x)), seq_len=N)


def test_a_streaming_model_that_sees_later_steps_is_attended_to_by_none(random):
    inputs = keras.Input((N, E))
    inner = ct.convert(keras.Model(inputs, attention()(inputs, inputs)), N)
    inputs = keras.Input((N, E))
    outer = keras.Model(inputs, attention("second")(*[inner(inputs)] * 2))
    with pytest.raises(ValueError, match="second .* attends to the outputs of another attention"):
        ct.convert(outer, N)


@pytest.mark.parametrize("what", CANNOT)
def test_what_cannot_be_converted_is_named(random, what):
    function, named = CANNOT[what]
    model = model_of(function, random)
    before = model.get_weights()
    with pytest.raises(ValueError, match=rf"cannot be (converted|run on).*[\s\S]*{named}"):
        ct.convert(model, seq_len=N)
    for w, other in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(w, other)


def test_all_that_stands_in_the_way_is_named_at_once(random):
    def function(x):
        x = keras.layers.Conv1D(E, 3, padding="same", name="conv")(x)
        x = attention("first")(x, x) + x
        return keras.layers.Dense(2)(keras.layers.Flatten(name="flat")(attention("second")(x, x)))

    with pytest.raises(ValueError, match="cannot be run on the steps") as error:
        ct.convert(model_of(function, random), seq_len=N)
    lines = str(error.value).splitlines()[1:]
    assert [line.split(" (")[0] for line in lines] == ["- first", "- second", "- second", "- flat"]
    assert "conv delays by 1 steps" in lines[0]
    assert 'padding="causal"' in lines[0]


def test_other_options_of_layers_are_named(random):
    model = model_of(one_block, random)
    with pytest.raises(ValueError, match="only kind.*but got weights_dtype.*from_regular"):
        ct.convert(model, N, weights_dtype="bfloat16")


class Subclassed(keras.Model):
    def call(self, x):
        return x


def test_models_without_a_graph_and_other_things_are_refused():
    subclassed = Subclassed(name="mine")
    subclassed(np.ones((1, N, E)))
    with pytest.raises(ValueError, match="mine is neither a functional nor"):
        ct.convert(subclassed, seq_len=N)
    with pytest.raises(ValueError, match="never been called"):
        ct.convert(keras.Sequential([keras.layers.Dense(2)]), seq_len=N)
    with pytest.raises(ValueError, match=r"Expected a keras\.Model"):
        ct.convert(attention(), seq_len=N)
    inputs = keras.Input((E,))
    with pytest.raises(ValueError, match="no axis of time"):
        ct.convert(keras.Model(inputs, keras.layers.Dense(2)(inputs)), seq_len=N)
    with pytest.raises(ValueError, match="warm_up"):
        ct.StreamingModel(keras.Sequential([keras.Input((N, E))]), warm_up="cold")
