"""Attention with what today's models have, and its float64 reference.

The reference has no ring and no step numbers: it turns a key by its distance from the query.
"""

import math

import numpy as np

import continual_transformers_tf as ct
from reference import softmax

N, H, D, E = 6, 4, 8, 10

# The options of CoSiMultiHeadAttention.
KINDS = {
    "grouped": dict(num_key_value_heads=2),
    "grouped_gate": dict(num_key_value_heads=2, use_gate=True, value_dim=3, use_bias=False),
    "multi_query": dict(num_key_value_heads=1),
    "rotary": dict(rotary=dict()),
    "rotary_interleaved": dict(rotary=dict(interleaved=True, max_wavelength=500.0)),
    "rotary_part": dict(rotary=dict(size=4, scaling_factor=2.5)),
    "rotary_older_query": dict(rotary=dict(), query_index=-3),
    "alibi": dict(position_bias=ct.ALiBi),
    "buckets": dict(position_bias=lambda: ct.RelativePositionBias(4, 5)),
    "buckets_both_sides": dict(
        position_bias=lambda: ct.RelativePositionBias(8, 6, bidirectional=True), query_index=-3
    ),
    "sinks": dict(use_sinks=True),
    "soft_cap": dict(logit_soft_cap=1.5),
    "norms": dict(query_key_norm=True),
    "sliding_window": dict(num_key_value_heads=2, sliding_window=3),
    "everything": dict(
        num_key_value_heads=2,
        rotary=dict(size=6),
        query_key_norm=True,
        logit_soft_cap=2.0,
        position_bias=lambda: ct.RelativePositionBias(4, 5, bidirectional=True),
        use_sinks=True,
        use_gate=True,
        query_index=-2,
        value_dim=5,
    ),
}  # fmt: skip


def build(kind, random, seq_len=N, **options):
    """Return a built layer of a kind, with random weights."""
    given = {**KINDS[kind], **options}
    if isinstance(given.get("rotary"), dict):
        given["rotary"] = ct.Rotary(**given["rotary"])
    if callable(given.get("position_bias")):
        given["position_bias"] = given["position_bias"]()
    layer = ct.CoSiMultiHeadAttention(seq_len, H, D, warm_up="partial", **given)
    layer.build((None, seq_len, E))
    randomize(layer, random)
    return layer


def randomize(layer, random):
    """Give a layer weights of order one."""
    layer.set_weights([
        random.normal(size=w.shape) * (0.4 if len(w.shape) > 1 else 1.0) for w in layer.weights
    ])  # fmt: skip


class Reference:
    """What a layer computes, in float64.

    Args:
        layer: The layer.
        kind: The name of its options.
        options: Those that were given beside.
    """

    def __init__(self, layer, kind, **options):
        self.options = {"query_index": -1, **KINDS[kind], **options}
        self.weights = {
            "/".join(w.path.split("/")[-2:]): np.asarray(w.numpy(), np.float64)
            for w in layer.weights
        }
        self.layer_name = layer.name

    def _weight(self, name):
        own = f"{self.layer_name}/{name}"
        return self.weights.get(own, self.weights.get(name))

    def _project(self, name, x):
        y = np.einsum("te,ehd->thd", x, self._weight(f"{name}/kernel"))
        bias = self._weight(f"{name}/bias")
        return y if bias is None else y + bias

    def _norm(self, name, x):
        if not self.options.get("query_key_norm"):
            return x
        scale = self._weight(f"{name}_norm/scale")
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * scale

    def _turned(self, key, distance):
        """Turn keys [S, H, D] back by their distances [S] from the query."""
        rotary = self.options.get("rotary")
        if rotary is None:
            return key
        rotary = {"size": D, "max_wavelength": 1e4, "scaling_factor": 1.0, **rotary}
        size, key = rotary["size"], key.copy()
        for i in range(size // 2):
            angle = -distance * rotary["max_wavelength"] ** (-2 * i / size)
            angle = (angle / rotary["scaling_factor"])[:, None]
            pair = (2 * i, 2 * i + 1) if rotary.get("interleaved") else (i, i + size // 2)
            a, b = key[..., pair[0]].copy(), key[..., pair[1]].copy()
            key[..., pair[0]] = a * np.cos(angle) - b * np.sin(angle)
            key[..., pair[1]] = b * np.cos(angle) + a * np.sin(angle)
        return key

    def _bias(self, distance):
        """Return the bias of each head and distance: [H, S]."""
        bias = self.options.get("position_bias")
        if bias is None:
            return 0
        if bias is ct.ALiBi:
            slopes = 2.0 ** (-8 * np.arange(1, H + 1) / H)
            return -slopes[:, None] * np.abs(distance)
        bias = bias()
        (table,) = (w for name, w in self.weights.items() if name.endswith("/table"))
        return np.stack([table[bucket(bias, d)] for d in distance], 1)

    def row(self, x, at, attended=None):
        """Return the output of the query of one step.

        Args:
            x: [S, E], the steps that it sees.
            at: The place of its own step in x.
            attended: bool [S]: which of them; None: all.

        Returns:
            (output [E], scores [H, S]).
        """
        x = np.asarray(x, np.float64)
        distance = at - np.arange(len(x))
        query = self._norm("query", self._project("query", x[at : at + 1]))[0]
        key = self._turned(self._norm("key", self._project("key", x)), distance)
        value = self._project("value", x)
        group = H // key.shape[1]
        key, value = (np.repeat(y, group, axis=1) for y in (key, value))
        logits = np.einsum("hd,shd->hs", query, key) / math.sqrt(D)
        cap = self.options.get("logit_soft_cap")
        if cap is not None:
            logits = cap * np.tanh(logits / cap)
        logits = logits + self._bias(distance)
        near = self.options.get("sliding_window")
        allowed = np.ones(len(x), bool) if attended is None else attended
        if near is not None:
            allowed = allowed & (np.abs(distance) < near)
        logits = np.where(allowed, logits, -np.inf)
        if self.options.get("use_sinks"):
            logits = np.concatenate([logits, self._weight("sinks")[:, None]], 1)
        scores = softmax(logits)[:, : len(x)]
        output = np.einsum("hs,shd->hd", scores, value)
        if self.options.get("use_gate"):
            output *= 1 / (1 + np.exp(-self._project("gate", x[at : at + 1])[0]))
        y = np.einsum("hd,hde->e", output, self._weight("attention_output/kernel"))
        bias = self._weight("attention_output/bias")
        return (y if bias is None else y + bias), scores

    def steps(self, x, seq_len=N, has_key=None):
        """Return the outputs of all steps of a stream that have a query: [T - delay, E]."""
        delay = -1 - self.options["query_index"]
        rows = []
        for t in range(delay, len(x)):
            first = max(0, t + 1 - seq_len)
            seen = None if has_key is None else has_key[first : t + 1]
            rows.append(self.row(x[first : t + 1], t - delay - first, seen)[0])
        return np.stack(rows)


def bucket(bias, distance):
    """Return the bucket of a distance, as T5's code says it."""
    buckets, first = bias.num_buckets, 0
    if bias.bidirectional:
        buckets //= 2
        first = buckets if distance < 0 else 0
        distance = abs(distance)
    distance = max(0, distance)
    exact = buckets // 2
    if distance < exact:
        return first + distance
    far = math.log(distance / exact) / math.log(bias.max_distance / exact) * (buckets - exact)
    return first + min(exact + int(far), buckets - 1)
