"""Learned queries, which belong to no step."""

from typing import Any

import keras

from continual_transformers_tf._keras_registration import registered
from continual_transformers_tf.ops.stream_state import check_integer


@registered
class LearnedQueries(keras.layers.Layer):
    """Learned rows, the same for every sample: queries for attention to a window.

    `keras.layers.MultiHeadAttention(...)(queries, x)` then attends from them to all steps of the
    window x, as a decoder of OadTR (Wang et al., arXiv 2106.11149) or LSTR (Xu et al., arXiv
    2107.03377) does. In steps, they attend to the newest steps at every step.

    Args:
        count: Q, how many queries.
        features: E, the size of each.
        **kwargs: `name` and other arguments of `keras.layers.Layer`.

    Call arguments:
        x: Any tensor `(B, ...)`, for the number of samples.

    Returns:
        `(B, Q, E)`.

    Raises:
        ValueError: At construction, if a size is not a positive integer.
    """

    def __init__(self, count: int, features: int, **kwargs: Any) -> None:
        check_integer("count", count, at_least=1)
        check_integer("features", features, at_least=1)
        super().__init__(**kwargs)
        self._count, self._query_features = int(count), int(features)

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        shape = (self._count, self._query_features)
        self.queries = self.add_weight(shape=shape, initializer="glorot_uniform", name="queries")

    def call(self, x: Any) -> Any:
        shape = (keras.ops.shape(x)[0], self._count, self._query_features)
        return keras.ops.broadcast_to(self.queries, shape)

    def compute_output_shape(self, input_shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
        return (input_shape[0], self._count, self._query_features)

    def compute_output_spec(self, x: Any) -> keras.KerasTensor:
        return keras.KerasTensor(self.compute_output_shape(x.shape), dtype=self.compute_dtype)

    def get_config(self) -> dict[str, Any]:
        sizes = {"count": self._count, "features": self._query_features}
        return {**super().get_config(), **sizes}
