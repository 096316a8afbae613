"""The costs of computations, as plain functions of their sizes.

Multiplications, additions and exponentials are counted one by one, by these rules: a division or a
root counts as a multiplication; an exponential, logarithm, tanh or error function counts as an
exponential; comparing, moving and rounding cost nothing. With these rules, the attention formulas
are those of Hedegaard et al., "Continual Transformers" (ICLR 2023, arXiv 2201.06268), for one
head.
"""

import dataclasses
import math
from collections.abc import Iterable


@dataclasses.dataclass(frozen=True)
class Cost:
    """The cost of a layer or model for one stream, or for one window.

    Costs can be added. `cost * n` has n times as many operations, but the same bytes.

    Attributes:
        multiplications, additions, exponentials: Numbers of operations.
        state_bytes: The size of each stream's state between steps.
        read_bytes: What a step has to read: the weights, and the part of the state that it needs.
            In a regular call: the weights.
    """

    multiplications: int = 0
    additions: int = 0
    exponentials: int = 0
    state_bytes: int = 0
    read_bytes: int = 0

    @property
    def flops(self) -> int:
        """All operations: multiplications, additions and exponentials."""
        return self.multiplications + self.additions + self.exponentials

    def __add__(self, other: "Cost") -> "Cost":
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return Cost(*(one + another for one, another in pairs))

    def __mul__(self, times: int) -> "Cost":
        return dataclasses.replace(
            self,
            multiplications=self.multiplications * times,
            additions=self.additions * times,
            exponentials=self.exponentials * times,
        )


def attention_cost(queries: int, keys: int, key_dim: int, value_dim: int | None = None) -> Cost:
    """Return the cost of one head's attention, from all its queries to all its keys.

    With n queries, n keys and d features for both, it is (2n²d + 2nd) + (2n²d - nd - n) + n². The
    2nd multiplications scale the queries and divide the outputs by their sums.
    """
    value_dim = key_dim if value_dim is None else value_dim
    products = queries * keys * (key_dim + value_dim)
    return Cost(
        multiplications=products + queries * (key_dim + value_dim),
        additions=products - queries * value_dim - queries,
        exponentials=queries * keys,
    )


def single_output_attention_cost(seq_len: int, key_dim: int, value_dim: int | None = None) -> Cost:
    """Return a step's cost of single-output attention: (2nd + 2d) + (2nd - d - 1) + n."""
    return attention_cost(1, seq_len, key_dim, value_dim)


def retroactive_attention_cost(seq_len: int, key_dim: int) -> Cost:
    """Return the cost of a step of continual retroactive attention, as published.

    It is (7nd + 2n - 3d) + (6nd + 3n - 6d - 3) + (3n - 2), with n steps in the window and d
    features.
    """
    n, d = seq_len, key_dim
    return Cost(
        multiplications=7 * n * d + 2 * n - 3 * d,
        additions=6 * n * d + 3 * n - 6 * d - 3,
        exponentials=3 * n - 2,
    )


def dense_cost(rows: int, inputs: int, outputs: int, use_bias: bool = True) -> Cost:
    """Return the cost of a matrix product of `[rows, inputs]` with a kernel `[inputs, outputs]`."""
    additions = rows * (inputs - 1 + bool(use_bias)) * outputs
    return Cost(multiplications=rows * inputs * outputs, additions=additions)


def layer_norm_cost(rows: int, features: int) -> Cost:
    """Return the cost of layer normalization of these rows, with scale and offset."""
    # The mean, centring, squares, their mean, epsilon, the root, dividing by it, scale and offset.
    return Cost(multiplications=rows * (3 * features + 3), additions=rows * (4 * features - 1))


def activation_cost(name: str, elements: int) -> Cost | None:
    """Return the cost of an activation by its name in Keras; None if it is not known."""
    known = _ACTIVATIONS.get(name)
    return None if known is None else Cost(*known) * elements


def sigmoid_cost(elements: int) -> Cost:
    """Return the cost of a sigmoid, the activation of an attention's gate."""
    return Cost(*_ACTIVATIONS["sigmoid"]) * elements


def softmax_cost(rows: int, features: int) -> Cost:
    """Return the cost of a softmax of rows with this number of features."""
    return Cost(rows * features, rows * (2 * features - 1), rows * features)


# For one element: (multiplications, additions, exponentials).
_ACTIVATIONS = {
    "linear": (0, 0, 0),
    "relu": (0, 0, 0),
    "relu6": (0, 0, 0),
    "leaky_relu": (1, 0, 0),
    "elu": (1, 1, 1),
    "selu": (2, 1, 1),
    "exponential": (0, 0, 1),
    "gelu": (3, 1, 1),  # x/2 (1 + erf(x/√2))
    "sigmoid": (1, 1, 1),
    "silu": (2, 1, 1),
    "softplus": (0, 1, 2),
    "tanh": (0, 0, 1),
}


def bytes_of(shape: Iterable[int], itemsize: int) -> int:
    """Return the size of an array in bytes."""
    return math.prod(shape) * itemsize
