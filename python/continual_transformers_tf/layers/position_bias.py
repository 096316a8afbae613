"""Biases of attention by the distance between query and key."""

import abc
import math
from typing import Any

import keras
import tensorflow as tf

from continual_transformers_tf._keras_registration import registered
from continual_transformers_tf.layers.plain_layers import precise
from continual_transformers_tf.ops.stream_state import check_integer


class PositionBias(keras.layers.Layer, abc.ABC):
    """A number that is added to each logit of attention, by head and by distance.

    The distance is the number of steps from the key to the query: positive for earlier keys.

    A subclass defines `_bias`. Attention builds it with the shape of its scores, `(B, H, T, S)`.
    """

    num_heads: int

    def build(self, scores_shape: Any) -> None:
        self.num_heads = int(scores_shape[1])
        self.built = True

    def call(self, distance: Any) -> tf.Tensor:
        """Return the biases of all heads.

        Args:
            distance: Integers, of any shape.

        Returns:
            `(H, *distance.shape)`, float64 if that is the compute dtype, otherwise float32.
        """
        bias = self._bias(tf.convert_to_tensor(distance, tf.int64))
        return tf.cast(bias, precise(self.compute_dtype))

    @abc.abstractmethod
    def _bias(self, distance: tf.Tensor) -> tf.Tensor:
        """Return the biases `(H, *distance.shape)` of any floating dtype."""


@registered
class ALiBi(PositionBias):
    """Linear biases (Press et al., ALiBi, arXiv 2108.12409): less weight for distant steps.

    Head h, counted from 1, adds -2^(-8 h / H) times the distance. If H is not a power of two, the
    heads beyond the power P below it take every second slope of 2 P heads, as in the authors' code.
    Later steps are as far away as earlier ones.

    Args:
        **kwargs: `name`, `dtype` and other arguments of `keras.layers.Layer`.
    """

    @property
    def slopes(self) -> list[float]:
        """The slopes of the heads."""
        power = 2 ** int(math.log2(self.num_heads))
        slopes = [2.0 ** (-8 * h / power) for h in range(1, power + 1)]
        between = [2.0 ** (-4 * h / power) for h in range(1, 2 * power, 2)]
        return slopes + between[: self.num_heads - power]

    def _bias(self, distance: tf.Tensor) -> tf.Tensor:
        slopes = tf.reshape(
            tf.constant(self.slopes, tf.float64), [-1] + [1] * (distance.shape.rank or 0)
        )
        return -slopes * tf.cast(tf.abs(distance), tf.float64)


@registered
class RelativePositionBias(PositionBias):
    """Learned biases of buckets of distances (Raffel et al., T5, arXiv 1910.10683).

    Half of the buckets hold one distance each. The others grow by a constant factor up to
    `max_distance`. The last has all distances beyond.

    Args:
        num_buckets: The number of buckets.
        max_distance: About where the last bucket begins.
        bidirectional: Whether later keys have half of the buckets. If False, they are in the bucket
            of distance 0.
        initializer: The initializer of the table.
        **kwargs: `name`, `dtype` and other arguments of `keras.layers.Layer`.

    Attributes:
        table: The weight, `[num_buckets, H]`.

    Raises:
        ValueError: If there are too few buckets, or `max_distance` is not beyond those of one
            distance each.
    """

    def __init__(
        self,
        num_buckets: int = 32,
        max_distance: int = 128,
        bidirectional: bool = False,
        initializer: Any = "zeros",
        **kwargs: Any,
    ) -> None:
        check_integer("num_buckets", num_buckets, at_least=4 if bidirectional else 2)
        of_one_side = num_buckets // 2 if bidirectional else num_buckets
        check_integer("max_distance", max_distance, at_least=of_one_side // 2 + 1)
        super().__init__(**kwargs)
        self.num_buckets = int(num_buckets)
        self.max_distance = int(max_distance)
        self.bidirectional = bool(bidirectional)
        self.initializer = keras.initializers.get(initializer)

    def build(self, scores_shape: Any) -> None:
        super().build(scores_shape)
        self.table = self.add_weight(
            shape=(self.num_buckets, self.num_heads), initializer=self.initializer, name="table"
        )

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "num_buckets": self.num_buckets,
            "max_distance": self.max_distance,
            "bidirectional": self.bidirectional,
            "initializer": keras.initializers.serialize(self.initializer),
        }

    def buckets(self, distance: tf.Tensor) -> tf.Tensor:
        """Return the bucket of each distance: int64, of the same shape."""
        buckets, first = self.num_buckets, tf.zeros_like(distance)
        if self.bidirectional:
            buckets //= 2
            first = tf.where(distance < 0, tf.constant(buckets, tf.int64), first)
            distance = tf.abs(distance)
        else:
            distance = tf.maximum(distance, 0)
        exact = buckets // 2
        # In float32, as T5 computes it. In float64 some distances would be in the next bucket.
        far = tf.cast(tf.maximum(distance, 1), tf.float32) / exact
        growth = tf.math.log(far) / math.log(self.max_distance / exact) * (buckets - exact)
        far = tf.minimum(exact + tf.cast(growth, tf.int64), buckets - 1)
        return first + tf.where(distance < exact, distance, far)

    def _bias(self, distance: tf.Tensor) -> tf.Tensor:
        rows = tf.gather(tf.convert_to_tensor(self.table), self.buckets(distance))
        return tf.transpose(rows, [rows.shape.rank - 1, *range(rows.shape.rank - 1)])


def position_bias_of(given: Any) -> PositionBias | None:
    """Return a layer's argument `position_bias` as a layer; None for None.

    Args:
        given: A `PositionBias`, its serialized config, or None.

    Raises:
        ValueError: If it is none of these.
    """
    if isinstance(given, dict):
        given = keras.saving.deserialize_keras_object(given)
    if given is not None and not isinstance(given, PositionBias):
        raise ValueError(
            "Expected position_bias to be a ct.ALiBi, a ct.RelativePositionBias or None, but got "
            f"{given!r}"
        )
    return given
