"""ct.cost against the formulas of the paper, its tables, and counts by hand."""

import keras
import numpy as np
import pytest

import continual_transformers_tf as ct
from co_si_mha_cases import D, E, H, N, pair
from continual_transformers_tf.models import cost_formulas as formulas

pytestmark = pytest.mark.sampled(3, rest="slow")

# The paper's models: window, features, heads, feed-forward.
STEPS, WIDTH, HEADS, HIDDEN, CLASSES = 64, 1024, 8, 1024, 22


def operations(cost):
    return cost.multiplications, cost.additions, cost.exponentials


@pytest.mark.parametrize("n", [1, 2, 16, 64, 120])
@pytest.mark.parametrize("d", [1, 12, 64, 128])
def test_the_formulas_of_the_paper(n, d):
    regular = (2 * n * n * d + 2 * n * d, 2 * n * n * d - n * d - n, n * n)
    assert operations(formulas.attention_cost(n, n, d)) == regular
    single = (2 * n * d + 2 * d, 2 * n * d - d - 1, n)
    assert operations(formulas.single_output_attention_cost(n, d)) == single
    retroactive = (7 * n * d + 2 * n - 3 * d, 6 * n * d + 3 * n - 6 * d - 3, 3 * n - 2)
    assert operations(formulas.retroactive_attention_cost(n, d)) == retroactive


def counted_attention(queries, keys, key_dim, value_dim):
    """Count the operations of one head, one by one."""
    multiplications = additions = exponentials = 0
    for _ in range(queries):
        multiplications += key_dim  # Scaling the query.
        for _ in range(keys):
            multiplications, additions = multiplications + key_dim, additions + key_dim - 1
            exponentials += 1
        additions += keys - 1  # The sum of the exponentials.
        for _ in range(value_dim):
            multiplications, additions = multiplications + keys, additions + keys - 1
            multiplications += 1  # Dividing the output by the sum.
    return multiplications, additions, exponentials


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (1, 7, 3, 5), (4, 6, 2, 9)])
def test_attention_counted_one_by_one(sizes):
    assert operations(formulas.attention_cost(*sizes)) == counted_attention(*sizes)


@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("value_dim", [None, 4])
def test_attention_is_its_projections_and_its_heads(random, use_bias, value_dim):
    layer, regular = pair(random=random, use_bias=use_bias, value_dim=value_dim)
    v, bias = value_dim or D, int(use_bias)

    def expected(queries, keys, projected=None):
        per_head = np.array(counted_attention(queries, keys, D, v))
        # A step projects only its own key; earlier steps projected theirs.
        projected = projected or keys
        into = H * (D * queries + D * projected + v * projected)
        out = E * queries
        products = E * into + H * v * out
        additions = (E - 1 + bias) * into + (H * v - 1 + bias) * out
        return tuple(H * per_head + [products, additions, 0])

    assert operations(ct.cost(layer)) == expected(1, N, projected=1)
    assert operations(ct.cost(layer, "regular")) == expected(1, N)
    assert operations(ct.cost(layer, "regular", seq_len=9)) == expected(1, 9)
    assert operations(ct.cost(regular, "regular", seq_len=9)) == expected(9, 9)
    every = ct.CoSiMultiHeadAttention.from_regular(regular, N, single_output=False)
    assert operations(ct.cost(every, "regular")) == expected(N, N)


def test_bytes_of_attention_are_those_of_its_variables(random):
    layer, _ = pair(random=random, features=16, key_dim=8)
    weights = sum(w.size for w in layer.get_weights()) * 4
    ring = 2 * H * N * 8 * 4
    # N bytes say which steps have keys; 8 bytes are the position.
    assert ct.cost(layer).state_bytes == ring + N + 8
    assert ct.cost(layer).read_bytes == ring + N + weights
    layer.ensure_streams(5)
    held = sum(array.nbytes for array in layer.get_state().values())
    assert ct.cost(layer).state_bytes * 5 == held
    half, _ = pair(
        random=random,
        features=16,
        key_dim=8,
        layer_options=dict(cache_dtype="bfloat16", weights_dtype="bfloat16"),
    )
    kernels = sum(w.size for w in half.get_weights() if w.ndim == 3) * 2
    biases = sum(w.size for w in half.get_weights() if w.ndim < 3)
    assert ct.cost(half).state_bytes == ring // 2 + N + 8
    assert ct.cost(half).read_bytes == ring // 2 + N + kernels + 4 * biases
    delayed, _ = pair(random=random, layer_options=dict(query_index=-4))
    delayed.ensure_streams(1)
    held = sum(array.nbytes for array in delayed.get_state().values())
    assert ct.cost(delayed).state_bytes == held
    assert ct.cost(layer, "regular").state_bytes == 0


def test_what_keras_attention_does_not_have():
    options = dict(num_key_value_heads=2, rotary=ct.Rotary(size=6), use_sinks=True)
    plain, layer = (ct.CoSiMultiHeadAttention(N, 4, 8, **more) for more in ({}, options))
    for each in (plain, layer):
        each.build((None, N, E))
    # Two heads of keys and two of values less, 6 of 8 elements turned in 4 + 2 heads, and 4 sinks.
    products = -2 * 2 * 8 * E
    expected = np.array([products + 2 * 6 * 6, products + 6 * 6 + 4, 4])
    difference = np.subtract(operations(ct.cost(layer)), operations(ct.cost(plain)))
    assert difference.tolist() == expected.tolist()
    assert ct.cost(layer).state_bytes == 2 * 2 * N * 8 * 4 + N + 8
    terms = dict(logit_soft_cap=2.0, position_bias=ct.ALiBi(), query_key_norm=True)
    other = ct.CoSiMultiHeadAttention(N, 4, 8, **terms)
    other.build((None, N, E))
    for mode, rows in (("step", 1), ("regular", N)):
        heads, logits = 4 * (1 + rows), 4 * N
        expected = [heads * 25 + 2 * logits, heads * 8 + logits, logits]
        difference = np.subtract(operations(ct.cost(other, mode)), operations(ct.cost(plain, mode)))
        assert difference.tolist() == expected


def test_the_encoder_is_its_parts():
    layer = ct.CoSiTransformerEncoder(N, E, H, 9)
    layer.build((None, N, E))
    dense = formulas.dense_cost(1, E, 9) + formulas.dense_cost(1, 9, E)
    rest = dense + formulas.layer_norm_cost(2, E) + formulas.activation_cost("gelu", 9)
    for mode in ("step", "regular"):
        expected = ct.cost(layer.attention, mode) + rest + formulas.Cost(additions=2 * E)
        assert operations(ct.cost(layer, mode)) == operations(expected)
    assert ct.cost(layer).state_bytes == ct.cost(layer.attention).state_bytes
    weights = sum(w.size for w in layer.get_weights()) * 4
    assert ct.cost(layer, "regular").read_bytes == weights


@pytest.mark.parametrize("use_gate", [True, False])
@pytest.mark.parametrize("sliding_window", [None, 3, N])
def test_retroactive_attention_is_its_projections_and_its_heads(use_gate, sliding_window):
    layer = ct.CoReMultiHeadAttention(
        N, H, D, use_gate=use_gate, sliding_window=sliding_window
    )  # fmt: skip
    layer.build((None, N, E))
    heads = formulas.retroactive_attention_cost(N, D)
    if sliding_window == 3:  # All rows are computed again.
        heads = formulas.attention_cost(N, N, D)
    into = formulas.dense_cost(1, E, H * D)
    expected = heads * H + into * 3 + formulas.dense_cost(N, H * D, E)
    if use_gate:
        expected += into + formulas.activation_cost("sigmoid", H * D) + formulas.Cost(N * H * D)
    assert operations(ct.cost(layer)) == operations(expected)
    layer.ensure_streams(2)
    held = sum(array.nbytes for array in layer.get_state().values())
    assert ct.cost(layer).state_bytes * 2 == held
    regular = keras.layers.MultiHeadAttention(H, D, use_gate=use_gate)
    regular.build((None, N, E), (None, N, E))
    assert ct.cost(layer, "regular") == ct.cost(regular, "regular", seq_len=N)


def test_small_layers():
    position = ct.CircularPositionalEncoding(9, E)
    position.build((None, N, E))
    assert ct.cost(position) == formulas.Cost(0, E, 0, 16, 16 + 4 * E)
    assert ct.cost(position, "regular", seq_len=5) == formulas.Cost(0, 5 * E, 0, 0, 20 * E)
    delay = ct.CoDelay(3)
    delay.build((None, N, E))
    assert ct.cost(delay) == formulas.Cost(state_bytes=12 * E + 8, read_bytes=4 * E + 8)
    assert ct.cost(delay, "regular", seq_len=4) == formulas.Cost()
    around = ct.CoResidual(delay)
    around.build((None, N, E))
    twice = 2 * (12 * E + 8)
    assert ct.cost(around) == formulas.Cost(0, E, 0, twice, 2 * (4 * E + 8))
    attention = ct.CoResidual(ct.CoSiMultiHeadAttention(N, H, D))
    attention.build((None, N, E))
    for mode in ("step", "regular"):
        within = ct.cost(attention.layer, mode)
        assert ct.cost(attention, mode) == within + formulas.Cost(additions=E)
    dense = keras.layers.Dense(4, activation="sigmoid")
    dense.build((None, E))
    assert ct.cost(dense) == formulas.Cost(4 * E + 4, 4 * E + 4, 4, 0, 4 * 4 * (E + 1))
    einsum = keras.layers.EinsumDense("abc,cde->abde", (None, 2, 3))
    einsum.build((None, N, E))
    assert operations(ct.cost(einsum, "regular", seq_len=5)) == (30 * E, 30 * (E - 1), 0)


def test_models_are_their_layers_on_the_rows_they_are_run_on():
    inputs = keras.Input((N, E))
    x = ct.CircularPositionalEncoding(2 * N, E)(keras.layers.Dense(E, activation="relu")(inputs))
    x = x + keras.layers.MultiHeadAttention(H, D)(x, x)
    x = keras.layers.Add()([x, keras.layers.Dropout(0.5)(x)])
    x = keras.layers.Activation("softmax")(x)[:, -1]
    regular = keras.Model(inputs, keras.layers.Dense(2)(keras.layers.Flatten()(x)))
    streaming = ct.convert(regular, N)

    def expected(rows, attention):
        every = formulas.dense_cost(1, E, E) + formulas.softmax_cost(1, E)
        every += formulas.Cost(additions=3 * E)
        return every * rows + attention + formulas.dense_cost(1, E, 2)

    attention = next(x for x in regular.layers if "attention" in x.name)
    whole = operations(expected(N, ct.cost(attention, "regular", seq_len=N)))
    assert operations(ct.cost(regular, "regular")) == whole
    assert operations(ct.cost(streaming, "regular")) == whole
    step = expected(1, ct.cost(streaming.model.get_layer(attention.name)))
    assert operations(ct.cost(streaming)) == operations(step)
    assert operations(ct.cost(streaming.model)) == operations(step)
    streaming.ensure_streams(1)
    kept = sum(a.nbytes for s in streaming.get_state().values() for a in s.values())
    assert ct.cost(streaming).state_bytes == kept
    nested = keras.Sequential([keras.Input((N, E)), regular])
    assert operations(ct.cost(nested, "regular")) == whole
    with pytest.raises(ValueError, match="MultiHeadAttention"):
        ct.cost(regular)


def test_windows_of_open_length_and_tokens():
    tokens = keras.Input((None,), dtype="int32")
    x = keras.layers.Embedding(10, E)(tokens)
    x = ct.CoSiMultiHeadAttention(N, H, D)(keras.layers.LayerNormalization()(x))
    model = keras.Model(tokens, x)
    with pytest.raises(ValueError, match="Expected seq_len"):
        ct.cost(model, "regular")
    attention, norm = model.layers[-1], formulas.layer_norm_cost(1, E)
    step = operations(ct.cost(attention) + norm)
    assert operations(ct.cost(model)) == step
    whole = operations(ct.cost(attention, "regular", seq_len=9) + norm * 9)
    assert operations(ct.cost(model, "regular", seq_len=9)) == whole


def paper_block(x, attention):
    x = keras.layers.LayerNormalization()(attention(x))
    hidden = keras.layers.Dense(HIDDEN, activation="relu")(x)
    return keras.layers.LayerNormalization()(x + keras.layers.Dense(WIDTH)(hidden))


def regular_block(x):
    attention = keras.layers.MultiHeadAttention(HEADS, WIDTH // HEADS)
    return paper_block(x, lambda x: x + attention(x, x))


def single_output_block(x):
    attention = ct.CoSiMultiHeadAttention(STEPS, HEADS, WIDTH // HEADS)
    return paper_block(x, ct.CoResidual(attention))


def paper_model(features, *blocks):
    """Return (Co)OadTR for windows [64, features]."""
    inputs = keras.Input((STEPS, features))
    x = keras.layers.Dense(WIDTH)(inputs)
    x = ct.CircularPositionalEncoding(2 * STEPS - 1, WIDTH, encoding="sinusoidal")(x)
    for block in blocks:
        x = block(x)
    return keras.Model(inputs, keras.layers.Dense(CLASSES)(x[:, -1:]))


# Published MFLOPs a prediction, for models whose input has 3072 or 4096 features.
@pytest.mark.parametrize(("features", "regular", "ours"), [(3072, 605.7, 9.6), (4096, 673.0, 10.6)])
def test_the_papers_63_times_for_one_block(features, regular, ours):
    step = ct.cost(paper_model(features, single_output_block)).multiplications
    window = ct.cost(paper_model(features, regular_block), "regular").multiplications
    assert step / 1e6 == pytest.approx(ours, abs=0.05)
    # The paper counts fewer products of regular attention than its own formula gives.
    assert window / 1e6 == pytest.approx(regular, rel=0.015)
    assert window / step == pytest.approx(63, rel=0.02)


@pytest.mark.parametrize(
    ("features", "regular", "ours"), [(3072, 1008.1, 410.8), (4096, 1075.7, 411.9)]
)
def test_the_papers_2_6_times_for_two_blocks(features, regular, ours):
    """The formulas for a retroactive block, then a block that computes only one row."""
    two = ct.cost(paper_model(features, regular_block, regular_block), "regular").multiplications
    assert two / 1e6 == pytest.approx(regular, rel=0.02)
    size, after = WIDTH // HEADS, formulas.dense_cost(1, WIDTH, WIDTH) * 3
    heads = formulas.retroactive_attention_cost(STEPS, size) * HEADS
    once = formulas.dense_cost(1, WIDTH, WIDTH) * 3 + heads
    retroactive = once + after * STEPS  # The rest of the block runs on all rows.
    last = formulas.single_output_attention_cost(STEPS, size) * HEADS + after
    into_heads = formulas.dense_cost(STEPS, WIDTH, WIDTH)
    embedded = formulas.dense_cost(1, features, WIDTH) + formulas.dense_cost(1, WIDTH, CLASSES)
    # The paper projects the queries of all steps, but uses only one.
    published = (embedded + retroactive + into_heads * 3 + last).multiplications
    assert published / 1e6 == pytest.approx(ours, rel=0.006)
    assert two / published == pytest.approx({3072: 2.48, 4096: 2.64}[features], abs=0.01)
    newest = formulas.dense_cost(1, WIDTH, WIDTH)
    needed = (embedded + retroactive + into_heads * 2 + newest + last).multiplications
    assert two / needed == pytest.approx({3072: 2.96, 4096: 3.14}[features], abs=0.01)


def test_other_layers_can_be_made_known():
    class Doubled(keras.layers.Layer):
        def call(self, x):
            return x * 2

    layer = Doubled()
    layer.build((None, E))
    with pytest.raises(ValueError, match="Expected a layer whose cost is known, but got doubled"):
        ct.cost(layer)

    @ct.cost.register
    def _(layer: Doubled, rows):
        return formulas.Cost(multiplications=rows.numbers(layer))

    inputs = keras.Input((N, E))
    model = keras.Model(inputs, layer(inputs))
    assert ct.cost(model, "regular").multiplications == N * E
    assert ct.cost(model, "regular").flops == N * E


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(mode="fast"), "Expected mode to be one of"),
        (dict(mode="regular", seq_len=0), "Expected seq_len to be an integer >= 1"),
        (dict(mode="regular"), "Expected seq_len, the steps"),
        (dict(layer_or_model="layer"), "Expected a layer or model, but got 'layer'"),
        (dict(layer_or_model=keras.layers.Dense(2)), "Expected a built layer"),
    ],
    ids=str,
)
def test_bad_input(arguments, message):
    dense = keras.layers.Dense(2)
    dense.build((None, E))
    with pytest.raises(ValueError, match=message):
        ct.cost(**{"layer_or_model": dense, **arguments})
