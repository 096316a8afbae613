"""Random models of convolutions, strides, pooling, recurrence and causal attention, in steps."""

import keras
import numpy as np
import pytest
from keras import layers as kl
from keras import ops

import continual_transformers_tf as ct
import reference

E = 6


class Maker:
    """Draws a model's layers.

    Args:
        random: A NumPy generator.
        strides: The strides that its layers still have to have, in this order.
        window: The window of its attention.
    """

    def __init__(self, random, strides, window):
        self.random = random
        self.strides = strides
        self.window = window

    def pick(self, *choices):
        return choices[self.random.integers(len(choices))]

    def layer(self, x):
        kinds = [self.row_wise, self.convolution, self.recurrence, self.attention]
        kinds += [self.strided if self.strides else self.attention] * 2
        return self.pick(*kinds)(x)

    def row_wise(self, x):
        return self.pick(
            kl.Dense(E, self.pick("tanh", "gelu", "relu")),
            kl.LayerNormalization(),
            kl.Activation("sigmoid"),
            lambda y: ops.multiply(y, 0.5),
        )(x)

    def convolution(self, x):
        size, dilation = (int(n) for n in self.random.integers(1, 4, 2))
        layer = self.pick(
            kl.Conv1D(E, size, padding="causal", dilation_rate=dilation, activation="tanh"),
            kl.SeparableConv1D(E, size, padding="valid", dilation_rate=dilation),
            kl.DepthwiseConv1D(size, padding="same"),
            kl.AveragePooling1D(size, 1, "same"),
            kl.MaxPooling1D(size, 1, "valid"),
        )
        return layer(x)

    def strided(self, x):
        stride = self.strides.pop(0)
        size = int(self.random.integers(1, 6))
        return self.pick(
            kl.Conv1D(E, size, stride, padding=self.pick("causal", "same", "valid")),
            kl.AveragePooling1D(max(size, stride), stride, self.pick("same", "valid")),
            kl.MaxPooling1D(size, stride, "valid"),
        )(x)

    def recurrence(self, x):
        return self.pick(kl.GRU, kl.LSTM, kl.SimpleRNN)(E, return_sequences=True)(x)

    def attention(self, x):
        layer = kl.MultiHeadAttention(2, 3, sliding_window=self.window)
        return kl.LayerNormalization()(x + layer(x, x, use_causal_mask=True))


def model_of(random):
    """Return a random model, and the window of its attention."""
    strides = [int(n) for n in random.choice([2, 2, 3, 4], random.integers(0, 3))]
    while np.prod(strides) > 8:
        strides.pop()
    maker = Maker(random, strides, window=int(random.integers(1, 9)))
    inputs = [keras.Input((None, E)) for _ in range(random.integers(1, 3))]
    x = inputs[0] if len(inputs) == 1 else ops.add(*(kl.Dense(E)(x) for x in inputs))
    for _ in range(random.integers(1, 7)):
        x = maker.layer(x)
    while maker.strides:
        x = maker.strided(x)
    model = keras.Model(inputs, kl.Dense(3)(x))
    for weight in model.weights:
        if weight.path.endswith("bias"):
            weight.assign(random.normal(size=weight.shape))
    return model, maker.window


@pytest.mark.sampled(6, rest="slow")
@pytest.mark.parametrize("seed", range(24))
def test_a_random_model(seed):
    random = np.random.default_rng(seed)
    keras.utils.set_random_seed(seed)
    model, window = model_of(random)
    streaming = ct.convert(model, window, warm_up="partial")
    output, block = streaming._graph.outputs[0], streaming.block
    steps = max(1, int(random.integers(20, 200)) // block)
    data = [random.normal(size=(2, steps * block, E)).astype("float32") for _ in model.inputs]
    expected = np.asarray(model(data if len(data) > 1 else data[0]))
    whole = streaming.call_steps(data)
    got = np.asarray(whole)
    first = max(0, output.lag)
    # Row n of the sequence comes at position n + lag.
    rows = expected[:, first - output.lag :][:, : got.shape[1] - first]
    assert rows.shape[1] == got.shape[1] - first == expected.shape[1] - output.delay
    if not rows.size:
        return
    # Depth and recurrence amplify rounding.
    assert reference.relative_error(got[:, first:], rows) < 5e-5
    session = ct.Session(streaming)
    half = steps // 2 * block
    parts = [[x[:, :half] for x in data], [x[:, half:] for x in data]]
    y = [session.steps(part if len(part) > 1 else part[0]) for part in parts]
    y = np.concatenate(y, 1).reshape(got.shape)
    assert reference.relative_error(y[:, first:], rows) < 5e-5
