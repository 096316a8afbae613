"""Rules that hold for every continual layer."""

import numpy as np
import pytest
import tensorflow as tf

import continual_transformers_tf as ct

pytestmark = pytest.mark.sampled(3, rest="slow")

N, E, STEPS = 6, 8, 16
ENCODER = dict(seq_len=N, embed_dim=E, num_heads=2, ff_dim=8)


def residual():
    return ct.CoResidual(ct.CoSiMultiHeadAttention(N, 2, 4))


LAYERS = {
    "CoSiMultiHeadAttention": lambda: ct.CoSiMultiHeadAttention(N, 2, 4),
    "CoSiMultiHeadAttention, modern": lambda: ct.CoSiMultiHeadAttention(
        N, 2, 4, num_key_value_heads=1, rotary=ct.Rotary(), position_bias=ct.ALiBi()
    ),
    "CoReMultiHeadAttention": lambda: ct.CoReMultiHeadAttention(N, 2, 4),
    "CoSiTransformerEncoder": lambda: ct.CoSiTransformerEncoder(**ENCODER),
    "CoReTransformerEncoder": lambda: ct.CoReTransformerEncoder(**ENCODER),
    "TransformerEncoder": lambda: ct.TransformerEncoder(2, **ENCODER),
    "TransformerEncoder, retroactive": lambda: ct.TransformerEncoder(
        2, kind="retroactive", **ENCODER
    ),
    "TransformerEncoder, norm_first": lambda: ct.TransformerEncoder(2, norm_first=True, **ENCODER),
    "CircularPositionalEncoding": lambda: ct.CircularPositionalEncoding(2 * N - 1, E),
    "RotaryEmbedding": lambda: ct.RotaryEmbedding(size=4),
    "CoDelay": lambda: ct.CoDelay(3),
    "CoResidual": residual,
    "CoWindow": lambda: ct.CoWindow(N),
}


@pytest.fixture(params=LAYERS)
def make(request):
    """Return a function that makes the layer, built and with weights of its own."""

    def build():
        layer = LAYERS[request.param]()
        layer(np.zeros((1, 2 * N - 1 if "Transformer" in request.param else N, E), np.float32))
        return layer

    return build


@pytest.fixture
def x(random):
    return random.standard_normal((4, STEPS, E)).astype(np.float32)


def held(layer):
    return int(tf.shape(layer.position)[0])


def test_a_step_of_no_streams(make, x):
    layer = make()
    for t in range(2 * N):
        before = layer.call_step(x[:2, t])
    y = layer.call_step(x[:0, 0], streams=[])
    assert y is None or y.shape == (0, *before.shape[1:])
    assert layer.position.numpy().tolist() == [2 * N, 2 * N]


def test_a_checkpoint_has_weights_and_streams(make, x, tmp_path):
    saved, restored = make(), make()
    for t in range(2 * N + 1):
        saved.call_step(x[:2, t])
    path = tf.train.Checkpoint(layer=saved).save(str(tmp_path / "checkpoint"))
    tf.train.Checkpoint(layer=restored).restore(path).assert_consumed()
    for a, b in zip(saved.get_weights(), restored.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(saved.position, restored.position)
    t = 2 * N + 1
    np.testing.assert_array_equal(saved.call_step(x[:2, t]), restored.call_step(x[:2, t]))


def test_there_is_room_again_after_a_checkpoint_of_fewer_streams(make, x, tmp_path):
    two, four = make(), make()
    for t in range(2 * N):
        two.call_step(x[:2, t])
    four.call_step(x[:, 0])
    path = tf.train.Checkpoint(layer=two).save(str(tmp_path / "checkpoint"))
    tf.train.Checkpoint(layer=four).restore(path)
    assert held(four) == 2
    four.ensure_streams(3)
    assert held(four) == 3
    four.call_step(x[:, 1])  # It makes room for itself.
    assert four.position.numpy().tolist() == [2 * N + 1, 2 * N + 1, 1, 1]
