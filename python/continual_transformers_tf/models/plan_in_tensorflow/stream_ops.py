"""The ops of a plan that depend on the stream's past."""

import numpy as np
import tensorflow as tf

from continual_transformers_tf.models.plan_in_tensorflow.op_table import Node, State, Step, op
from continual_transformers_tf.models.plan_in_tensorflow.row_ops import where

# Added to the logits of keys that a query may not attend to. With infinity, a query without any key
# would give NaN.
NO_WEIGHT = float(np.finfo(np.float32).min) / 2


@op("positional", rows=lambda node: len(node.weights["rows"]))
def _positional(node: Node, step: Step, x: tf.Tensor) -> tf.Tensor:
    rows = node.weights["rows"]
    # The first step of a stream adds the row `start`, so that one comes first here.
    rows = np.roll(rows, -(int(node.weights["start"]) % len(rows)), axis=0)
    return x + tf.gather(tf.constant(rows), step.row(len(rows)))


def _delayed(node: Node) -> State:
    return {"ring": ((node.attributes["steps"], *node.shape), node.dtype)}


@op("delay", state=_delayed, rows=lambda node: node.attributes["steps"])
def _delay(node: Node, step: Step, x: tf.Tensor) -> tf.Tensor:
    steps = node.attributes["steps"]
    if steps == 1:
        step.new_state["ring"] = x
        return step.state["ring"]
    y = tf.gather(step.state["ring"], step.row(steps))
    step.put("ring", x)
    return y


def _steps_before(node: Node) -> State:
    n = node.attributes["window"] - 1
    # Oldest first, and not a ring: the output is in this order too.
    return {"steps": ((n, *node.shape[1:]), node.dtype)} if n else {}


@op("window", state=_steps_before)
def _window(node: Node, step: Step, x: tf.Tensor) -> tf.Tensor:
    if not step.state:
        return tf.reshape(x, [1, *node.shape])
    y = tf.concat([step.state["steps"], x], 0)
    step.new_state["steps"] = y[1:]
    return y[tf.newaxis]


@op("zero_untaken", rows=lambda node: node.shape[0])
def _zero_untaken(node: Node, step: Step, x: tf.Tensor) -> tf.Tensor:
    return where(_taken(step, node.shape[0]), x)


def _taken(step: Step, n: int) -> tf.Tensor:
    """Return which rows of the window, oldest first, are steps that were taken: bool `[N]`."""
    return tf.constant(np.arange(n - 1, -1, -1), step.position.dtype) <= step.position


# Attention. Rings are [N, H, D], as in a stream block.


def _rings(node: Node) -> State:
    heads, window = node.attributes["heads"], node.attributes["window"]
    names = ("query", "key", "value") if node.op == "retroactive_attention" else ("key", "value")
    shapes = node.input_shapes[-len(names) :]
    state: State = {
        name: ((window, heads, size // heads), node.dtype)
        for name, (size,) in zip(names, shapes, strict=True)
    }
    if node.has_gaps:
        state["key_mask"] = ((window,), "bool")
    return state


def _put_heads(step: Step, entry: str, x: tf.Tensor, heads: int) -> tf.Tensor:
    """Write a step's vectors `[1, H * D]` into a ring, and return the ring `[N, H, D]`."""
    return step.put(entry, tf.reshape(x, [1, heads, -1]))


def _bias(allowed: tf.Tensor) -> tf.Tensor:
    """Return what is added to logits: 0 where a key may be attended to."""
    return tf.where(allowed, tf.constant(0.0), tf.constant(NO_WEIGHT))


def _without(ring: tf.Tensor, rows: tf.Tensor) -> tf.Tensor:
    """Return a ring `[N, H, D]` with zeros in the rows where a bool tensor `[N]` is false."""
    return where(rows, ring[tf.newaxis])[0]


@op("attention", state=_rings, rows=lambda node: node.attributes["window"])
def _attention(
    node: Node, step: Step, query: tf.Tensor, key: tf.Tensor, value: tf.Tensor
) -> tf.Tensor:
    heads, window = node.attributes["heads"], node.attributes["window"]
    first, end = node.attributes["first_column"], node.attributes["end_column"]
    query_delay = node.attributes["query_delay"]
    key = _put_heads(step, "key", key, heads)
    value = _put_heads(step, "value", value, heads)
    ages = step.ages(window)
    allowed = ages <= step.position
    some_are_left_out = node.has_gaps or (first, end) != (0, window)
    if some_are_left_out:
        allowed &= (ages >= window - end) & (ages < window - first)
        if node.has_gaps:
            allowed &= _key_mask(step)
        # Rows that are left out may hold a NaN.
        key, value = _without(key, allowed), _without(value, allowed)
    query = tf.reshape(query * node.attributes["scale"], [1, heads, -1])
    # Two products and sums. Products of matrices, for which LiteRT first copies a ring into another
    # order, took up to 1.5 times as long (AVX-512, windows of 64 to 512 steps).
    logits = tf.transpose(tf.reduce_sum(key * query, -1))
    weights = tf.transpose(tf.nn.softmax(logits + _bias(allowed)))
    y = tf.reduce_sum(value * weights[..., tf.newaxis], 0)
    y = tf.reshape(y, [1, *node.shape])
    if some_are_left_out:
        y = where(tf.reduce_any(allowed, keepdims=True), y)
    if query_delay:
        y = where(step.position >= query_delay, y)
    return where(step.masks["query"], y) if "query" in step.masks else y


def _key_mask(step: Step) -> tf.Tensor:
    """Write whether this step has a key, and return which rows of the ring do: bool `[N]`."""
    return step.put("key_mask", tf.reshape(step.has_key, [1]))


def _attend(
    query: tf.Tensor, key: tf.Tensor, value: tf.Tensor, bias: tf.Tensor, scale: float
) -> tf.Tensor:
    """Return attention `[Nq, H * Dv]` of query `[Nq, H, D]` to key and value `[N, H, ...]`."""
    query, key, value = (tf.transpose(x, [1, 0, 2]) for x in (query, key, value))
    logits = tf.matmul(query * scale, key, transpose_b=True)
    y = tf.transpose(tf.matmul(tf.nn.softmax(logits + bias), value), [1, 0, 2])
    return tf.reshape(y, [y.shape[0], -1])


@op("retroactive_attention", state=_rings, rows=lambda node: node.attributes["window"])
def _retroactive_attention(
    node: Node, step: Step, query: tf.Tensor, key: tf.Tensor, value: tf.Tensor
) -> tf.Tensor:
    heads, window = node.attributes["heads"], node.attributes["window"]
    query, key, value = (
        _put_heads(step, name, x, heads)
        for name, x in (("query", query), ("key", key), ("value", value))
    )
    allowed = step.ages(window) <= step.position
    if node.has_gaps:
        allowed &= _key_mask(step)
        key, value = _without(key, allowed), _without(value, allowed)
    # All rows are computed again: LiteRT has no float64, which the sums of an update need.
    y = _attend(query, key, value, _bias(allowed), node.attributes["scale"])
    # From the ring's order to the oldest first: the oldest is in the row after the newest.
    rows = tf.range(1, window + 1, dtype=step.position.dtype)
    y = tf.gather(y, tf.math.floormod(step.position + rows, window))
    y = where(_taken(step, window), y[tf.newaxis])
    return where(tf.reduce_any(allowed, keepdims=True), y) if node.has_gaps else y


@op("window_attention", rows=lambda node: node.input_shapes[1][0])
def _window_attention(
    node: Node, step: Step, query: tf.Tensor, key: tf.Tensor, value: tf.Tensor
) -> tf.Tensor:
    heads, band = node.attributes["heads"], node.attributes["band"]
    queries, n = query.shape[1], key.shape[1]
    taken = _taken(step, n)
    key, value = where(taken, key), where(taken, value)
    rows, columns = np.arange(n - queries, n)[:, np.newaxis], np.arange(n)
    seen = np.ones([queries, n], bool)
    if node.attributes["causal"]:
        seen &= columns <= rows
    if band:
        seen &= np.abs(columns - rows) < band
    allowed = taken[tf.newaxis]
    if not seen.all():
        allowed &= seen
    query, key, value = (tf.reshape(x, [x.shape[1], heads, -1]) for x in (query, key, value))
    y = _attend(query, key, value, _bias(allowed), node.attributes["scale"])[tf.newaxis]
    return y if seen.all() else where(tf.reduce_any(allowed, -1), y)
