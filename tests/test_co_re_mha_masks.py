"""Masks, scores and gates in steps of retroactive attention, against the reference and Keras."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import continual_transformers_tf as ct
import reference
from co_re_mha_cases import D, E, H, N, all_of_windows, pair
from continual_transformers_tf.ops import retroactive_attention
from retroactive_cases import cache_at, steps_of
from traced import traced

pytestmark = pytest.mark.sampled(9)

SHAPES = {"[N, N]": (), "[M, N, N]": (3,), "[M, H, N, N]": (3, 2), "[M, H, T, N, N]": (3, 2, None)}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("t", [1, 4, 300])
def test_masks_and_scores_of_every_row(backend, random, t, dtype, shape):
    """Calls with masks and scores alternate with calls without, on streams of all ages."""
    m, h, n, d, dv = 3, 2, 7, 5, 4
    cache, streams = cache_at([0, 3, 17], h, n, d, dv, dtype, random)
    lead = tuple(t if axis is None else axis for axis in SHAPES[shape])
    for round_ in range(4):
        inputs = steps_of(m, t, h, d, dv, dtype=dtype, random=random)
        key_mask = random.random((m, t)) < 0.8
        mask = None
        if round_ % 2:
            mask = random.random((*lead, n, n)) < 0.6
            mask[..., 4, :] = False  # This row attends to nothing.
        outputs, scores = retroactive_attention(
            *inputs,
            cache,
            attention_mask=mask,
            key_mask=key_mask,
            return_attention_scores=True,
            update_state=round_ < 3,
        )
        assert (outputs.dtype, scores.dtype) == (dtype, dtype)
        every = np.ones((m, h, t, n, n), bool)
        if mask is not None:
            every &= mask.reshape(*mask.shape[:-2], *[1] * (3 - len(lead)), n, n)
        newest = range(max(0, t - 9), t)
        for i, stream in enumerate(streams):
            for step in range(t):
                expected = stream.step(
                    *(x[i, step] for x in inputs),
                    has_key=key_mask[i, step],
                    compute=step in newest,
                    mask=every[i, :, step],
                )
                if expected is not None:
                    error = reference.relative_error(outputs[i, step], expected)
                    assert error < reference.BOUNDS[dtype]
                    error = reference.relative_error(scores[i, :, step], stream.scores)
                    assert error < reference.BOUNDS[dtype]
        steps = steps_of(m, 1, h, d, dv, dtype=dtype, random=random)
        if round_ < 3:
            outputs = retroactive_attention(*steps, cache)
            expected = [s.step(*(x[i, 0] for x in steps)) for i, s in enumerate(streams)]
            error = reference.relative_error(outputs[:, 0], np.stack(expected))
            assert error < reference.BOUNDS[dtype]


# Every query also sees its own step.
EVERY_OTHER = (np.add.outer(range(N), range(N)) % 2 == 0)[None]
CALLS = {
    "causal": dict(use_causal_mask=True),
    "scores": dict(return_attention_scores=True),
    "causal, scores": dict(use_causal_mask=True, return_attention_scores=True),
    "mask": dict(attention_mask=EVERY_OTHER),
    "mask, causal": dict(attention_mask=EVERY_OTHER, use_causal_mask=True),
}


@pytest.mark.parametrize("what", CALLS)
@pytest.mark.parametrize("options", [{}, dict(sliding_window=3), dict(use_gate=True)], ids=str)
def test_calls_of_steps_are_keras_on_sliding_windows(backend, random, what, options):
    layer, regular = pair(random=random, **options)
    x = random.normal(size=(2, N + 4, E)).astype("float32")
    windows = np.concatenate([x[:, i : i + N] for i in range(5)])  # All in one call: it is faster.
    together = keras.tree.flatten(regular(windows, windows, **CALLS[what]))
    expected = list(zip(*(tf.split(y, 5) for y in together), strict=True))
    got = keras.tree.flatten(layer.call_steps(x, **CALLS[what]))
    assert reference.relative_error(got[0], np.stack([e[0] for e in expected], 1)) < 5e-6
    layer.clean_state()
    for i in range(N + 4):
        step = keras.tree.flatten(layer.call_step(x[:, i], **CALLS[what]))
        if i >= N - 1:
            for mine, theirs in zip(step, expected[i - N + 1], strict=True):
                assert reference.relative_error(mine, theirs.numpy()) < 5e-6
    if len(got) == 2:
        assert got[1].shape == (2, H, 5, N, N)
        assert reference.relative_error(got[1], np.stack([e[1] for e in expected], 2)) < 5e-6
    with ct.call_mode("steps"):
        shapes = layer.compute_output_spec(keras.KerasTensor((2, 5, E)), **CALLS[what])
    assert [x.shape for x in keras.tree.flatten(shapes)] == [x.shape for x in got]


def test_while_the_window_fills_there_are_no_scores(backend, random):
    layer, _ = pair(random=random)
    x = random.normal(size=(2, N, E)).astype("float32")
    assert layer.call_step(x[:, 0], return_attention_scores=True) == (None, None)
    assert layer.call_steps(x[:, 1 : N - 1], return_attention_scores=True) == (None, None)
    with ct.call_mode("step"):
        output, scores = layer(x[:, -1], return_attention_scores=True)
    assert (output.shape, scores.shape) == ((2, N, E), (2, H, N, N))


@pytest.mark.parametrize("lengths", [[1] * 20, [3, 9, 1, 7], [20]])
def test_each_row_keeps_its_gate(backend, random, lengths):
    """Streams have different ages. Peeking does not change the gates."""
    layer, regular = pair(random=random, use_gate=True, layer_options=dict(warm_up="partial"))
    layer.ensure_streams(3)
    layer.call_steps(random.normal(size=(1, 4, E)), streams=[2])
    layer.call_steps(random.normal(size=(1, N + 3, E)), streams=[1])
    layer.clean_state(streams=[1])
    x = random.normal(size=(2, sum(lengths), E)).astype("float32")
    outputs, first = [], 0
    for length in lengths:
        steps = x[:, first : first + length]
        peeked = layer.call_steps(steps, streams=[1, 0], update_state=False)
        outputs.append(layer.call_steps(steps, streams=[1, 0]))
        np.testing.assert_array_equal(peeked, outputs[-1])
        first += length
    outputs = np.concatenate(outputs, 1)
    full = all_of_windows(regular, x, N)
    assert reference.relative_error(outputs[:, N - 1 :], full) < 5e-6
    for t in range(N - 1):
        expected = regular(x[:, : t + 1], x[:, : t + 1]).numpy()
        assert reference.relative_error(outputs[:, t, N - t - 1 :], expected) < 5e-6
        assert (outputs[:, t, : N - t - 1] == 0).all()


def test_gradients_pass_the_gates_of_steps_that_were_never_taken(backend, random):
    layer, _ = pair(random=random, use_gate=True, layer_options=dict(warm_up="partial"))
    layer.ensure_streams(2)
    state = layer.get_state()
    state["gate"][:] = np.nan
    layer.set_state(state)
    x = tf.constant(random.normal(size=(2, 3, E)).astype("float32"))
    with tf.GradientTape() as tape:
        tape.watch(x)
        loss = tf.reduce_sum(layer.call_steps(x, training=True) ** 2)
    for gradient in tape.gradient(loss, [x, *layer.trainable_weights]):
        assert np.isfinite(gradient).all()


def test_masks_scores_and_gates_in_graphs(backend, random):
    """One graph takes any number of streams and steps. A failed check changes nothing."""
    layer, _ = pair(random=random, use_gate=True, layer_options=dict(warm_up="partial"))
    other, _ = pair(random=random, use_gate=True, layer_options=dict(warm_up="partial"))
    other.set_weights(layer.get_weights())

    @traced(
        input_signature=[
            tf.TensorSpec([None, None, E]), tf.TensorSpec([None, None, None, N, N], tf.bool)
        ]
    )  # fmt: skip
    def steps(x, mask):
        return layer.call_steps(x, attention_mask=mask, return_attention_scores=True)

    x = random.normal(size=(2, 9, E)).astype("float32")
    mask = random.random((2, H, 9, N, N)) < 0.7
    expected = other.call_steps(x, attention_mask=mask, return_attention_scores=True)
    for got, wanted in zip(steps(x, mask), expected, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)
    before = layer.get_state()
    with pytest.raises(tf.errors.InvalidArgumentError, match="Expected attention_mask"):
        steps(x, mask[:, :2])
    for name, array in layer.get_state().items():
        np.testing.assert_array_equal(array, before[name])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "mixed_float16", "mixed_bfloat16"])
def test_layers_of_half_precision_attend_in_float32(backend, random, dtype):
    options = dict(use_gate=True, sliding_window=4)
    layer, _ = pair(random=random, dtype=dtype, **options)
    exact = keras.layers.MultiHeadAttention(H, D, dtype="float64", **options)
    exact.build((None, N, E), (None, N, E))
    exact.set_weights([np.float64(w) for w in layer.get_weights()])
    x = random.normal(size=(2, N + 2, E)).astype("float32")
    outputs, scores = layer.call_steps(x, return_attention_scores=True)
    assert outputs.dtype == scores.dtype == layer.compute_dtype
    assert layer.get_state()["keys"].dtype == np.float32
    expected = all_of_windows(exact, x.astype("float64"), N)
    bound = 0.03 if "bfloat" in dtype else 4e-3
    assert reference.relative_error(tf.cast(outputs, "float64"), expected) < bound


def test_what_a_step_refuses_says_why(random):
    layer, _ = pair(random=random)
    x = np.ones((2, E), np.float32)
    with pytest.raises(ValueError, match="no query_mask in a step.*Leave its row"):
        layer.call_step(x, query_mask=np.ones(2, bool))
    with pytest.raises(ValueError, match=r"\[N, N\], \[M, N, N\], \[M, H, N, N\] or"):
        layer.call_step(x, attention_mask=np.ones(N, bool))
    with pytest.raises(ValueError, match=r"shape \[M, N, N\], with M = 2"):
        layer.call_step(x, attention_mask=np.ones((3, N, N), bool))
    with pytest.raises(ValueError, match="no cache_dtype.*sums"):
        ct.CoReMultiHeadAttention(N, H, D, cache_dtype="bfloat16")
