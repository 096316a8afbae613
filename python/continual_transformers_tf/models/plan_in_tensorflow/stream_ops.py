"""The ops of a plan that depend on the stream's past."""

import math

import numpy as np
import tensorflow as tf

from continual_transformers_tf.models.plan_in_tensorflow.activations import ACTIVATIONS
from continual_transformers_tf.models.plan_in_tensorflow.op_table import (
    Array,
    Node,
    State,
    Step,
    op,
)
from continual_transformers_tf.models.plan_in_tensorflow.row_ops import where

# Added to the logits of keys that a query may not attend to. With infinity, a query without any key
# would give NaN.
NO_WEIGHT = float(np.finfo(np.float32).min) / 2


@op("positional", rows=lambda node: len(node.weights["rows"]))
def _positional(node: Node, step: Step, x: tf.Tensor) -> tf.Tensor:
    rows = node.weights["rows"]
    # The first step of a stream adds the row `start`, so that one comes first here.
    rows = np.roll(rows, -(int(node.weights["start"]) % len(rows)), axis=0)
    if len(node.shape) == 1:
        return x + tf.gather(tf.constant(rows), step.row(len(rows)))
    each = node.shape[0]
    number = step.row(len(rows)) * each + tf.range(each, dtype=step.position.dtype)
    return x + tf.gather(tf.constant(rows), tf.math.floormod(number, len(rows)))


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


@op("zero_untaken", beginning=lambda node: node.shape[0])
def _zero_untaken(node: Node, step: Step, x: tf.Tensor) -> tf.Tensor:
    return where(step.are_taken(node.shape[0]), x)


def _steps_before_all_rows(node: Node) -> int:
    """Return how many steps pass before all rows of a window are of steps that were taken."""
    n = node.input_shapes[1][0] if node.op == "window_attention" else 0
    return -(node.attributes.get("first", 1 - n) // node.attributes.get("rows", 1))


@op("present", beginning=_steps_before_all_rows)
def _present(node: Node, step: Step) -> tf.Tensor:
    (size,) = node.shape
    taken = step.are_taken(size, node.attributes["rows"], node.attributes["first"])
    return tf.cast(taken, node.dtype)[tf.newaxis]


# Attention. Rings are [N, H, D], as in a stream block.


def _rings(node: Node) -> State:
    heads, window = _key_heads(node), node.attributes["window"]
    names = ("query", "key", "value") if node.op == "retroactive_attention" else ("key", "value")
    shapes = node.input_shapes[-len(names) :]
    state: State = {
        name: ((window, heads, shape[-1] // heads), node.dtype)
        for name, shape in zip(names, shapes, strict=True)
    }
    if node.has_gaps:
        state["key_mask"] = ((window,), "bool")
    return state


def _key_heads(node: Node) -> int:
    return node.attributes.get("key_heads", node.attributes["heads"])


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
    if len(node.shape) == 1:
        return _attention_of_row(node, step, query, key, value)
    each, outputs = node.shape[0], []
    for i in range(each):  # One after the other: each row attends to those before it.
        row = step.of_row(i, each, node.attributes["window"])
        outputs.append(_attention_of_row(node, row, query[:, i], key[:, i], value[:, i]))
        step.new_state |= row.new_state
    return tf.stack(outputs, 1)


def _attention_of_row(
    node: Node, step: Step, query: tf.Tensor, key: tf.Tensor, value: tf.Tensor
) -> tf.Tensor:
    heads, window = node.attributes["heads"], node.attributes["window"]
    first, end = node.attributes["first_column"], node.attributes["end_column"]
    query_delay = node.attributes["query_delay"]
    key_heads, cap = _key_heads(node), node.attributes.get("soft_cap", 0)
    key = _put_heads(step, "key", key, key_heads)
    value = _put_heads(step, "value", value, key_heads)
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
    if key_heads != heads:
        key, value = (_for_queries(ring, heads // key_heads) for ring in (key, value))
    # Two products and sums. Products of matrices, for which LiteRT first copies a ring into another
    # order, took up to 1.5 times as long (AVX-512, windows of 64 to 512 steps).
    logits = tf.reduce_sum(key * query, -1)
    if cap:
        logits = cap * tf.tanh(logits / cap)
    if "bias" in node.weights:
        by_age = np.ascontiguousarray(node.weights["bias"].T[::-1])
        logits += tf.gather(tf.constant(by_age), ages)
    logits = tf.transpose(logits) + _bias(allowed)
    if "sink" in node.weights:
        sink = tf.constant(node.weights["sink"][:, np.newaxis])
        weights = tf.transpose(tf.nn.softmax(tf.concat([logits, sink], 1))[:, :window])
    else:
        weights = tf.transpose(tf.nn.softmax(logits))
    y = tf.reduce_sum(value * weights[..., tf.newaxis], 0)
    y = tf.reshape(y, [1, -1])
    if some_are_left_out:
        y = where(tf.reduce_any(allowed, keepdims=True), y)
    if query_delay:
        y = where(step.position >= query_delay, y)
    return where(step.masks["query"], y) if "query" in step.masks else y


def _for_queries(ring: tf.Tensor, queries: int) -> tf.Tensor:
    """Return a ring `[N, Hk, D]` with each head as often as it has heads of queries."""
    n, heads, size = ring.shape
    repeated = tf.tile(ring[:, :, tf.newaxis], [1, 1, queries, 1])
    return tf.reshape(repeated, [n, heads * queries, size])


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
    y = where(step.are_taken(window), y[tf.newaxis])
    return where(tf.reduce_any(allowed, keepdims=True), y) if node.has_gaps else y


@op("window_attention", beginning=_steps_before_all_rows)
def _window_attention(
    node: Node, step: Step, query: tf.Tensor, key: tf.Tensor, value: tf.Tensor
) -> tf.Tensor:
    heads, band = node.attributes["heads"], node.attributes["band"]
    queries, n = query.shape[1], key.shape[1]
    first = node.attributes.get("first", 1 - n)
    taken = step.are_taken(n, node.attributes.get("rows", 1), first)
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
    # If every query may attend to all rows, and one of them is of the first step.
    always = seen.all() and first + n > 0
    return y if always else where(tf.reduce_any(allowed, -1), y)


# Rotary positions.

LIMBS, LIMB = 4, 2**16  # A number of 64 bits in four int32.


@op(
    "rotary_angles",
    state=lambda node: {"angles": ((LIMBS, len(node.weights["turns"])), "int32")},
)
def _rotary_angles(node: Node, step: Step) -> tf.Tensor:
    """Return the cosines and sines of the angles, which are the node's state.

    Each step adds the turns modulo 2^64. So the angles are those of a session however many steps
    the stream took, without an int64, and without a sum that an int32 cannot hold.
    """
    turns = node.weights["turns"].astype(np.uint64)
    angles = step.state["angles"]
    each = node.shape[0] if len(node.shape) == 3 else 1
    step.new_state["angles"] = _plus_turns(angles, turns * np.uint64(each))
    rows = [
        _cos_sin(_plus_turns(angles, turns * np.uint64(i)) if i else angles) for i in range(each)
    ]
    return tf.reshape(tf.stack(rows), [1, *node.shape])


def _plus_turns(angles: tf.Tensor, turns: Array) -> tf.Tensor:
    """Return the sums of angles `[LIMBS, pairs]` and turns, uint64 `[pairs]`, modulo 2^64."""
    limbs, carry = [], 0
    for i in range(LIMBS):
        limb = (turns >> np.uint64(16 * i)).astype(np.int64) % LIMB
        total = angles[i] + limb.astype(np.int32) + carry
        carry = total // LIMB
        limbs.append(total - carry * LIMB)
    return tf.stack(limbs)


def _cos_sin(angles: tf.Tensor) -> tf.Tensor:
    """Return the cosines and the sines `[2, pairs]` of angles `[LIMBS, pairs]`."""
    # The nearest quarter of a turn, and the rest: at most an eighth of a turn, so that a float32
    # has it within 3e-8.
    highest = angles[LIMBS - 1]
    quarter = (highest + LIMB // 8) // (LIMB // 4)
    rest = tf.cast(highest - quarter * (LIMB // 4), tf.float32)
    rest += tf.cast(angles[LIMBS - 2], tf.float32) / LIMB
    cos, sin = tf.cos(rest * (2 * np.pi / LIMB)), tf.sin(rest * (2 * np.pi / LIMB))
    cos_at = tf.gather(tf.constant([1.0, 0.0, -1.0, 0.0, 1.0]), quarter)
    sin_at = tf.gather(tf.constant([0.0, 1.0, 0.0, -1.0, 0.0]), quarter)
    return tf.stack([cos_at * cos - sin_at * sin, sin_at * cos + cos_at * sin])


# Recurrent cells.

GATES = {"simple": 1, "gru": 3, "gru_reset_before": 3, "lstm": 4}


def _recurrent_state(node: Node) -> State:
    if not node.attributes["goes_on"]:
        return {}
    names = ("state", "memory") if node.function == "lstm" else ("state",)
    return dict.fromkeys(names, ((node.shape[-1],), node.dtype))


def _first_rows(node: Node) -> tuple[int, int, int]:
    """Return the arguments of `Step.are_taken` for the rows of a recurrent node."""
    n = math.prod(node.shape[:-1])
    return (n, n, node.attributes["first"]) if node.attributes["goes_on"] else (n, 1, 1 - n)


def _steps_before_all_recurrent_rows(node: Node) -> int:
    _, rows, first = _first_rows(node)
    return -(first // rows)


@op(
    "recurrent",
    state=_recurrent_state,
    beginning=_steps_before_all_recurrent_rows,
    functions=GATES,
)
def _recurrent(node: Node, step: Step, x: tf.Tensor) -> tf.Tensor:
    n, rows, first = _first_rows(node)
    units = node.shape[-1]
    x = tf.reshape(x, [n, -1])
    zeros = tf.zeros([1, units])
    h, c = (
        tf.reshape(step.state[name], [1, units]) if name in step.state else zeros
        for name in ("state", "memory")
    )
    taken = step.are_taken(n, rows, first)
    outputs = []
    for r in range(n):
        new_h, new_c = _cell(node, x[r : r + 1], h, c)
        changes = []
        if first + r < 0:
            changes.append(taken[r : r + 1, tf.newaxis])
        if "step" in step.masks:
            changes.append(step.masks["step"][:, r : r + 1])
        for change in changes:
            new_h, new_c = tf.where(change, new_h, h), tf.where(change, new_c, c)
        h, c = new_h, new_c
        outputs.append(h)
    for name, new in (("state", h), ("memory", c)):
        if name in step.state:
            step.new_state[name] = tf.reshape(new, [units])
    return tf.reshape(tf.concat(outputs, 0), [1, *node.shape])


def _cell(node: Node, x: tf.Tensor, h: tf.Tensor, c: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Return the new (h, c) of a cell, `[1, U]` each, for its input's products `[1, G * U]`."""
    activation, gate = (ACTIVATIONS[node.attributes[key]] for key in ("activation", "gate"))
    kernel, units = node.weights["kernel"], h.shape[-1]
    x = tf.split(x, GATES[str(node.function)], -1)
    if node.function == "gru_reset_before":
        s = tf.split(tf.matmul(h, tf.constant(kernel[:, : 2 * units])), 2, -1)
        z, r = gate(x[0] + s[0]), gate(x[1] + s[1])
        new = activation(x[2] + tf.matmul(r * h, tf.constant(kernel[:, 2 * units :])))
        return z * h + (1 - z) * new, c
    s = tf.matmul(h, tf.constant(kernel))
    if "bias" in node.weights:
        s += node.weights["bias"]
    s = tf.split(s, len(x), -1)
    if node.function == "simple":
        return activation(x[0] + s[0]), c
    if node.function == "gru":
        z, r = gate(x[0] + s[0]), gate(x[1] + s[1])
        return z * h + (1 - z) * activation(x[2] + r * s[2]), c
    i, f, o = (gate(x[k] + s[k]) for k in (0, 1, 3))
    c = f * c + i * activation(x[2] + s[2])
    return o * activation(c), c
