"""Rotary positions."""

import math
from typing import Any

import keras
import numpy as np
import numpy.typing as npt
import tensorflow as tf

from continual_transformers_tf._keras_registration import registered
from continual_transformers_tf.layers.plain_layers import precise
from continual_transformers_tf.ops.stream_state import check_integer


@registered
class Rotary:
    """Rotary positions of queries and keys (Su et al., RoFormer, arXiv 2104.09864).

    Step p turns pair i of a head's elements by p times the pair's frequency,
    `max_wavelength ** (-2 * i / size) / scaling_factor` radians. A logit then depends only on how
    many steps lie between query and key. So a stream can use the numbers of its steps, a window the
    places of its rows, and both give the same.

    A step's angle is its number times an integer, the frequency in 2^-64 of a turn, and whole turns
    are dropped. That is exact, so the difference between the angles of two steps never depends on
    how old the stream is.

    Args:
        max_wavelength: The base of the frequencies.
        scaling_factor: What the positions are divided by.
        size: How many of a head's first elements are turned, an even number. None: all.
        interleaved: How elements are paired. False: element i with i + size / 2, as in Llama and
            KerasHub. True: element 2 i with 2 i + 1, as in GPT-J.

    Raises:
        ValueError: If a number is not positive, or `size` is not even.
    """

    def __init__(
        self,
        max_wavelength: float = 10000.0,
        scaling_factor: float = 1.0,
        size: int | None = None,
        interleaved: bool = False,
    ) -> None:
        for name, number in dict(
            max_wavelength=max_wavelength, scaling_factor=scaling_factor
        ).items():
            if not 0 < number < math.inf:
                raise ValueError(f"Expected {name} to be a positive number, but got {number!r}")
        if size is not None:
            check_integer("size", size, at_least=2)
            _check_even("size", size)
        self.max_wavelength = float(max_wavelength)
        self.scaling_factor = float(scaling_factor)
        self.size = size
        self.interleaved = bool(interleaved)

    def get_config(self) -> dict[str, Any]:
        return dict(
            max_wavelength=self.max_wavelength,
            scaling_factor=self.scaling_factor,
            size=self.size,
            interleaved=self.interleaved,
        )

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "Rotary":
        return cls(**config)

    def __repr__(self) -> str:
        return f"Rotary({', '.join(f'{k}={x!r}' for k, x in self.get_config().items())})"

    def turns(self, key_dim: int) -> npt.NDArray[np.int64]:
        """Return how far a step turns each pair, in 2^-64 of a turn: int64 `[size / 2]`.

        Args:
            key_dim: D, the size of a head.

        Raises:
            ValueError: If a head is smaller than `size`, or cannot be divided into pairs.
        """
        size = key_dim if self.size is None else self.size
        if size > key_dim:
            raise ValueError(f"Expected size to be at most key_dim, {key_dim}, but got {size}")
        _check_even("key_dim", size)
        turns = []
        for i in range(size // 2):
            frequency = self.max_wavelength ** (-2 * i / size) / self.scaling_factor
            turn = round(math.modf(frequency / (2 * math.pi))[0] * 2**64) % 2**64
            turns.append(turn - 2**64 if turn >= 2**63 else turn)
        return np.array(turns, np.int64)

    def rotate(self, x: tf.Tensor, positions: tf.Tensor) -> tf.Tensor:
        """Turn the heads of steps.

        Args:
            x: `(..., T, H, D)`.
            positions: int64 `(..., T)`, the number of each step.

        Returns:
            A tensor like x.
        """
        turns = tf.constant(self.turns(x.shape[-1]))
        # Products of int64 wrap around, which drops whole turns.
        product = positions[..., tf.newaxis, tf.newaxis] * turns
        angle = tf.cast(product, tf.float64) * (2 * math.pi / 2**64)
        dtype = precise(x.dtype.name)
        cos, sin = (tf.cast(f(angle), dtype) for f in (tf.cos, tf.sin))
        size = 2 * turns.shape[0]
        turned, rest = tf.cast(x[..., :size], dtype), x[..., size:]
        if self.interleaved:
            first, second = turned[..., 0::2], turned[..., 1::2]
            turned = tf.stack([first * cos - second * sin, second * cos + first * sin], -1)
            turned = tf.reshape(turned, tf.concat([tf.shape(x)[:-1], [size]], 0))
        else:
            first, second = turned[..., : size // 2], turned[..., size // 2 :]
            turned = tf.concat([first * cos - second * sin, second * cos + first * sin], -1)
        return tf.ensure_shape(tf.concat([tf.cast(turned, x.dtype), rest], -1), x.shape)


def rotary_of(given: Any) -> Rotary | None:
    """Return a layer's argument `rotary` as a `Rotary`; None for None.

    Args:
        given: A `Rotary`, its serialized config, or None.

    Raises:
        ValueError: If it is none of these.
    """
    if isinstance(given, dict):
        given = keras.saving.deserialize_keras_object(given)
    if given is not None and not isinstance(given, Rotary):
        raise ValueError(f"Expected rotary to be a ct.Rotary or None, but got {given!r}")
    return given


def _check_even(name: str, size: int) -> None:
    if size % 2:
        raise ValueError(f"Expected {name} to be even, because elements are paired, but got {size}")
