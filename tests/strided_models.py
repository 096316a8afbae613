"""Comparison of a model with strides, on the steps of streams, with Keras on whole sequences."""

import numpy as np

import continual_transformers_tf as ct
import reference


def streamed(streaming, x, splits):
    """Return a StreamingModel's outputs for the steps x, in calls of these numbers of steps."""
    parts, first = [], 0
    for count in splits:
        y = streaming.call_steps(x[:, first : first + count])
        parts.append(np.asarray(y))
        first += count
    return np.concatenate(parts, 1)


def check(model, random, blocks=12, first=None, bound=5e-6, seq_len=None, **options):
    """Compare steps of two streams with Keras on the whole sequence, in Keras and in a Session."""
    streaming = ct.convert(model, seq_len, warm_up="partial", **options)
    block, features = streaming.block, model.inputs[0].shape[2:]
    x = random.normal(size=(2, blocks * block, *features)).astype("float32")
    delay = streaming._graph.outputs[0].delay
    lag = streaming._graph.outputs[0].lag
    first = max(0, lag) if first is None else first
    expected = np.stack([np.asarray(model(x[i : i + 1]))[0] for i in range(2)])
    # Row n of the sequence comes at step n + lag.
    rows = blocks * block // streaming._graph.outputs[0].stride
    got = streamed(streaming, x, [block, 3 * block, (blocks - 4) * block])
    assert got.shape[1] == rows
    got, lag_rows = got[:, first:], first - lag
    want = expected[:, lag_rows : lag_rows + got.shape[1]]
    assert want.shape == got.shape, (want.shape, got.shape)
    assert expected.shape[1] - delay == rows - lag
    assert reference.relative_error(got, want) < bound
    session = ct.Session(streaming)
    assert session.block == block
    ids = session.open(2)
    now = x[:, : 4 * block]
    if block > 1:  # The block may also have an axis of its own.
        now = now.reshape(2, 4, block, *features)
    parts = [session.steps(now, streams=ids)]
    for step in range(4, blocks):
        now = x[:, step * block : (step + 1) * block]
        parts.append(session.step(now if block > 1 else now[:, 0], streams=ids)[:, np.newaxis])
    y = np.concatenate(parts, 1)
    y = y.reshape(2, rows, *y.shape[y.ndim - (got.ndim - 2) :])[:, first:]
    assert reference.relative_error(y, want) < bound
    # The state of the Keras model continues in the session, also where it begins.
    for taken in (block, 2 * block, blocks // 2 * block):
        streaming.clean_state()
        streaming.call_steps(x[:, :taken])
        session.set_state(streaming.get_state(), ids)
        y = session.steps(x[:, taken:], streams=ids)
        y = y.reshape(2, -1, *want.shape[2:])
        after = max(0, first - (rows - y.shape[1]))
        rest = want[:, want.shape[1] - y.shape[1] + after :]
        assert reference.relative_error(y[:, after:], rest) < bound
    return streaming
