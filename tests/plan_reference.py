"""A float64 reference of plans, step by step, written only from docs/model_file.md.

It imports nothing of the package under test. It has no rings, only each stream's whole history.

    stream = plan_reference.Stream(plan, weights)
    outputs = stream.step([x])      # Arrays without axes of streams and steps.
"""

import math

import numpy as np


class Stream:
    """One stream of a plan.

    Args:
        plan: The plan, a dict as in docs/model_file.md.
        weights: Arrays by name.
    """

    def __init__(self, plan, weights):
        self.plan = plan
        self.weights = {
            name: w.astype(np.int64 if w.dtype.kind == "i" else np.float64)
            for name, w in weights.items()
        }
        self.position = 0
        self.history = [[] for _ in plan["nodes"]]  # For nodes with a state: all inputs so far.

    def step(self, inputs, has_key=True):
        """Take a step.

        Args:
            inputs: An array for each of the plan's inputs.
            has_key: False: the caller marks the step as a gap.

        Returns:
            An array for each of the plan's outputs.
        """
        values = {}
        for port, x in zip(self.plan["inputs"], inputs, strict=True):
            values[port["value"]] = self._checked(port["value"], x)
        for i, node in enumerate(self.plan["nodes"]):
            arguments = [values[x] for x in node["inputs"]]
            masks = {name: bool(values[x][0]) for name, x in node.get("masks", {}).items()}
            weights = {name: self.weights[w] for name, w in node["weights"].items()}
            context = Context(self, self.history[i], masks, has_key, node)
            with np.errstate(all="ignore"):
                y = OPS[node["op"]](context, weights, *arguments, **node["attributes"])
            (out,) = node["outputs"]
            values[out] = self._checked(out, y)
        self.position += 1
        return [values[port["value"]] for port in self.plan["outputs"]]

    def _checked(self, place, x):
        """Return an array, checked against the plan's shape and dtype."""
        value = self.plan["values"][place]
        kinds = {"bool": bool, "int32": np.int64, "int64": np.int64}
        x = np.asarray(x)
        assert list(x.shape) == value["shape"], (x.shape, value)
        expected = kinds.get(value["dtype"], np.float64)
        assert (x.dtype == bool) == (expected is bool), (x.dtype, value)
        return x.astype(expected)


class Context:
    """What an op gets besides a node's inputs: its history, masks, attributes and weights."""

    def __init__(self, stream, history, masks, has_key, node):
        self.position = stream.position
        self.history = history
        self.masks = masks
        self.has_key = has_key and masks.get("key", True)
        self.shape = stream.plan["values"][node["outputs"][0]]["shape"]
        self.dtype = stream.plan["values"][node["outputs"][0]]["dtype"]

    def remember(self, x):
        self.history.append(x)
        return self.history


OPS = {}


def op(function):
    OPS[function.__name__.strip("_")] = function
    return function


@op
def dense(context, weights, x):
    return x @ weights["kernel"] + weights.get("bias", 0)


@op
def matmul(context, weights, x, y):
    return np.einsum("bij,bjk->bik", x, y)


@op
def depthwise(context, weights, x, stride, dilation):
    kernel = weights["kernel"]
    taps, made = kernel.shape
    x = np.repeat(x, made // x.shape[1], axis=1)
    return np.stack(
        [
            sum(kernel[i] * x[o * stride + i * dilation] for i in range(taps))
            + weights.get("bias", 0)
            for o in range(context.shape[0])
        ]
    )


@op
def activation(context, weights, x, function, **numbers):
    of_number = np.vectorize(ACTIVATIONS[function], otypes=[np.float64])
    y = of_number(x, *weights.values(), **numbers)
    return y if function == "threshold" else np.where(np.isnan(x), np.nan, y)


@op
def softmax(context, weights, x, function, axis):
    def of_one(row):
        if function == "sparsemax":
            return sparsemax(row)
        shifted = row - row.max()
        logs = shifted - np.log(np.exp(shifted).sum())
        return logs if function == "log_softmax" else np.exp(logs)

    return np.apply_along_axis(of_one, axis, x)


def sparsemax(row):
    """Compute sparsemax as Keras 3.15 does. The paper's threshold has one cumulative sum only."""
    ordered = np.sort(row)[::-1]
    sums = np.cumsum(ordered)
    support = 1 + np.arange(1, len(row) + 1) * ordered > sums
    return np.maximum(row - (sums[support].sum() - 1) / support.sum(), 0)


@op
def binary(context, weights, x, y, function):
    assert x.shape == y.shape
    return getattr(np, function)(x, y).astype(np.float64)


@op
def where(context, weights, condition, x, y):
    assert condition.shape == x.shape == y.shape
    return np.where(condition, x, y)


@op
def constant(context, weights):
    value = weights["value"]
    return value != 0 if context.dtype == "bool" else value


@op
def affine(context, weights, x):
    return x * weights["scale"] + weights["offset"]


@op
def batch_norm(context, weights, x, epsilon):
    y = (x - weights["mean"]) / np.sqrt(weights["variance"] + epsilon)
    return y * weights.get("gamma", 1) + weights.get("beta", 0)


@op
def norm(context, weights, x, function, epsilon):
    if function == "layer":
        x = x - x.mean(-1, keepdims=True)
    squares = np.square(x)
    if function == "unit":
        y = x / np.sqrt(np.maximum(squares.sum(-1, keepdims=True), epsilon))
    else:
        y = x / np.sqrt(squares.mean(-1, keepdims=True) + epsilon)
    return y * weights.get("gamma", 1) + weights.get("beta", 0)


@op
def concat(context, weights, *xs, axis):
    return np.concatenate(xs, axis)


@op
def strided(context, weights, x, offset, strides):
    y = np.empty(context.shape, x.dtype)
    flat = x.reshape(-1)
    for place in np.ndindex(*context.shape):
        element = offset + sum(i * s for i, s in zip(place, strides, strict=True))
        assert 0 <= element < flat.size
        y[place] = flat[element]
    return y


@op
def reshape(context, weights, x):
    return x.reshape(context.shape)


@op
def reduce(context, weights, x, function, axis):
    return getattr(x, {"product": "prod"}.get(function, function))(axis=axis).astype(np.float64)


@op
def cumulative(context, weights, x, function, axis):
    return {"sum": np.cumsum, "product": np.cumprod}[function](x, axis)


@op
def sort(context, weights, x, function, axis, descending):
    sign = -1 if descending else 1  # A stable order: equal elements stay as they were.
    order = np.argsort(sign * x, axis, kind="stable")
    return order.astype(np.float64) if function == "indices" else np.take_along_axis(x, order, axis)


@op
def cast(context, weights, x):
    if context.dtype == "bool":
        return x != 0
    return np.trunc(x) if context.dtype.startswith("int") else x.astype(np.float64)


@op
def embedding(context, weights, x):
    assert x.size == 0 or 0 <= x.min() <= x.max() < len(weights["table"])
    return weights["table"][x]


@op
def not_equal(context, weights, x, value, any):
    different = x != value
    return np.array([different.any() if any else different.all()])


@op
def masked(context, weights, x, mask):
    return x if mask[0] else np.zeros_like(x)


@op
def mask_and(context, weights, x, y):
    return x & y


@op
def positional(context, weights, x):
    # A fresh stream's offset is 0.
    rows = weights["rows"]
    return x + rows[(int(weights["start"]) + context.position) % len(rows)]


@op
def delay(context, weights, x, steps):
    taken = context.remember(x)
    return taken[-1 - steps] if len(taken) > steps else np.zeros_like(x)


def newest(taken, n):
    """Return the n newest of a stream's steps, oldest first, with zeros for steps never taken."""
    return np.stack([np.zeros_like(taken[0])] * max(0, n - len(taken)) + taken[-n:])


@op
def window(context, weights, x, window):
    return newest(context.remember(x), window)


@op
def zero_untaken(context, weights, x):
    y = x.copy()
    y[: max(0, len(x) - 1 - context.position)] = 0
    return y


@op
def present(context, weights, rows, first):
    numbers = context.position * rows + first + np.arange(context.shape[0])
    return (numbers >= 0).astype(np.float64)


@op
def recurrent(context, weights, x, function, activation, gate, goes_on, first):
    functions = {"tanh": np.tanh, "sigmoid": np.vectorize(_sigmoid), "linear": lambda v: v}
    activation, gate = functions[activation], functions[gate]
    kernel, units = weights["kernel"], weights["kernel"].shape[0]
    bias = weights.get("bias", 0)
    rows = x.reshape(-1, x.shape[-1])
    state = context.history[-1] if goes_on and context.history else np.zeros((2, units))
    (h, c), outputs = state, []
    for r, row in enumerate(rows):
        number = (
            context.position * len(rows) + first + r
            if goes_on
            else context.position - (len(rows) - 1 - r)
        )
        if number >= 0 and context.masks.get("step", True):
            parts = np.split(row, len(row) // units)
            again = np.split(h @ kernel + bias, len(row) // units)
            if function == "simple":
                h = activation(parts[0] + again[0])
            elif function == "lstm":
                i, f, o = (gate(parts[k] + again[k]) for k in (0, 1, 3))
                c = f * c + i * activation(parts[2] + again[2])
                h = o * activation(c)
            else:
                z, reset = (gate(parts[k] + again[k]) for k in (0, 1))
                if function == "gru":
                    new = activation(parts[2] + reset * again[2])
                else:
                    new = activation(parts[2] + (reset * h) @ kernel[:, 2 * units :])
                h = z * h + (1 - z) * new
        outputs.append(h)
    if goes_on:
        context.remember((h, c))
    return np.array(outputs).reshape(context.shape)


def attend(
    query, keys, values, allowed, heads, scale, key_heads=None, soft_cap=None, bias=None, sink=None
):
    """Attend: query [H * D], keys [n, Hk * D], values [n, Hk * Dv], allowed bool [n] -> [H * Dv].

    The bias is [H, n], the sink [H].
    """
    key_heads = key_heads or heads
    if not allowed.any():
        return np.zeros(values.shape[1] // key_heads * heads)
    keys, values = keys[allowed], values[allowed]
    outputs = []
    for h in range(heads):
        q = np.split(query, heads)[h]
        k, v = (np.split(x, key_heads, axis=-1)[h * key_heads // heads] for x in (keys, values))
        logits = scale * (k @ q)
        if soft_cap is not None:
            logits = soft_cap * np.tanh(logits / soft_cap)
        if bias is not None:
            logits = logits + bias[h, allowed]
        highest = logits.max() if sink is None else max(logits.max(), sink[h])
        weights = np.exp(logits - highest)
        total = weights.sum() + (0 if sink is None else np.exp(sink[h] - highest))
        outputs.append(weights @ v / total)
    return np.concatenate(outputs)


@op
def rotary_angles(context, weights):
    # Python's integers have no limit.
    turns = [context.position * int(t) % 2**64 / 2**64 for t in weights["turns"]]
    angles = 2 * np.pi * np.array(turns)
    return np.stack([np.cos(angles), np.sin(angles)])


@op
def rotary(context, weights, x, angles, interleaved):
    y, pairs = x.copy(), angles.shape[1]
    for i in range(pairs):
        a, b = (2 * i, 2 * i + 1) if interleaved else (i, i + pairs)
        cos, sin = angles[:, i]
        y[..., a] = x[..., a] * cos - x[..., b] * sin
        y[..., b] = x[..., b] * cos + x[..., a] * sin
    return y


@op
def attention(
    context, weights, query, key, value, heads, window, first_column, end_column, query_delay,
    scale, key_heads=None, soft_cap=None,
):  # fmt: skip
    taken = context.remember((key, value, context.has_key))
    nothing = np.zeros(len(value) // (key_heads or heads) * heads)
    if context.position < query_delay or not context.masks.get("query", True):
        return nothing
    # Column c of the window is the step taken window - 1 - c steps ago.
    seen = [(c, len(taken) - window + c) for c in range(first_column, end_column)]
    columns = [c for c, i in seen if i >= 0]
    seen = [taken[i] for c, i in seen if i >= 0]
    if not seen:
        return nothing
    keys, values, allowed = (np.stack([s[i] for s in seen]) for i in range(3))
    bias = weights["bias"][:, columns] if "bias" in weights else None
    return attend(
        query, keys, values, allowed, heads, scale, key_heads, soft_cap, bias, weights.get("sink")
    )


@op
def retroactive_attention(context, weights, query, key, value, heads, window, scale, algorithm):
    assert algorithm in ("auto", "update", "recompute")
    taken = context.remember((query, key, value, context.has_key))[-window:]
    queries, keys, values, allowed = (np.stack([s[i] for s in taken]) for i in range(4))
    rows = [attend(q, keys, values, allowed, heads, scale) for q in queries]
    return newest(rows, window)


@op
def window_attention(
    context, weights, query, key, value, heads, scale, band, causal, rows=1, first=None
):
    n, outputs = len(key), []
    column = np.arange(n)
    taken = context.position * rows + (1 - n if first is None else first) + column >= 0
    for i, q in enumerate(query):
        row = i + n - len(query)
        allowed = taken.copy()
        if causal:
            allowed &= column <= row
        if band > 0:
            allowed &= np.abs(column - row) < band
        outputs.append(attend(q, key, value, allowed, heads, scale))
    return np.stack(outputs)


# Functions of single numbers, following the descriptions in keras.activations.


def _sigmoid(x):
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def _softplus(x):
    return max(x, 0) + math.log1p(math.exp(-abs(x)))


def _relu(x, negative_slope=0.0, max_value=None, threshold=0.0):
    y = x if x > threshold else negative_slope * (x - threshold)
    return y if max_value is None else min(y, max_value)


def _elu(x, alpha):
    return x if x > 0 else alpha * math.expm1(x)


SELU_ALPHA, SELU_SCALE = 1.6732632423543772, 1.0507009873554805


def _exact(function):
    """Return a function of `math` that gives infinity and NaN instead of errors."""

    def of_number(x):
        try:
            return function(x)
        except OverflowError:
            return math.inf
        except ValueError:
            return -math.inf if x == 0 else math.nan

    return of_number


ACTIVATIONS = {
    "celu": lambda x, alpha: x if x > 0 else alpha * math.expm1(x / alpha),
    "elu": _elu,
    "exponential": _exact(math.exp),
    "gelu": lambda x: 0.5 * x * math.erfc(-x / math.sqrt(2)),
    "gelu_tanh": lambda x: (
        0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    ),
    "hard_shrink": lambda x, threshold: x if abs(x) > threshold else 0.0,
    "hard_sigmoid": lambda x: min(max(x / 6 + 0.5, 0), 1),
    "hard_silu": lambda x: x * min(max(x / 6 + 0.5, 0), 1),
    "hard_tanh": lambda x: min(max(x, -1), 1),
    "leaky_relu": lambda x, negative_slope: x if x > 0 else negative_slope * x,
    "linear": lambda x: x,
    "log_sigmoid": lambda x: -_softplus(-x),
    "mish": lambda x: x * math.tanh(_softplus(x)),
    "prelu": lambda x, alpha: x if x > 0 else alpha * x,
    "relu": _relu,
    "relu6": lambda x: min(max(x, 0), 6),
    "selu": lambda x: SELU_SCALE * _elu(x, SELU_ALPHA),
    "sigmoid": np.vectorize(_sigmoid),
    "silu": lambda x: x * _sigmoid(x),
    "soft_shrink": lambda x, threshold: math.copysign(max(abs(x) - threshold, 0), x),
    "softplus": _softplus,
    "softsign": lambda x: x / (1 + abs(x)),
    "sparse_plus": lambda x: 0.0 if x <= -1 else x if x >= 1 else (x + 1) ** 2 / 4,
    "sparse_sigmoid": lambda x: min(max((x + 1) / 2, 0), 1),
    "squareplus": lambda x, b: (x + math.sqrt(x * x + b)) / 2,
    "tanh": math.tanh,
    "tanh_shrink": lambda x: x - math.tanh(x),
    "threshold": lambda x, threshold, value: x if x > threshold else value,
    "absolute": abs,
    "arccos": _exact(math.acos),
    "arccosh": _exact(math.acosh),
    "arcsin": _exact(math.asin),
    "arcsinh": math.asinh,
    "arctan": math.atan,
    "arctanh": _exact(math.atanh),
    "cbrt": np.cbrt,
    "ceil": np.ceil,
    "cos": math.cos,
    "cosh": _exact(math.cosh),
    "erf": math.erf,
    "erfc": math.erfc,
    "expm1": _exact(math.expm1),
    "floor": np.floor,
    "log": _exact(math.log),
    "log1p": _exact(math.log1p),
    "negative": lambda x: -x,
    "reciprocal": lambda x: 1 / x if x else math.copysign(math.inf, x),
    "round": np.rint,
    "rsqrt": lambda x: _exact(math.sqrt)(x) ** -1 if x else math.inf,
    "sign": lambda x: float(np.sign(x)),
    "sin": math.sin,
    "sinc": np.sinc,
    "sinh": math.sinh,
    "sqrt": lambda x: math.sqrt(x) if x >= 0 else math.nan,
    "square": lambda x: x * x,
    "tan": math.tan,
    "trunc": np.trunc,
}
