"""Why a model, or a layer in it, cannot run on the steps of streams."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import keras

from continual_transformers_tf.layers.wrapping_layer import WrappingLayer


class Problem(NamedTuple):
    """One reason why a model cannot run on the steps of streams.

    Attributes:
        why: What is wrong, and what to do: the end of a sentence that begins with the layer, or a
            whole sentence if there is no layer.
        layer: The layer or operation in the way; None: the model as a whole.
    """

    why: str
    layer: keras.Operation | None = None

    def __str__(self) -> str:
        if self.layer is None:
            return self.why
        return f"{self.layer.name} ({self._kind}) {self.why}"

    @property
    def _kind(self) -> str:
        """The kind of layer that the user knows: that within one that `ct.convert` put there."""
        layer: Any = self.layer
        return type(layer.layer if isinstance(layer, WrappingLayer) else layer).__name__


class CannotStream(ValueError):
    """The error of a model that cannot run on the steps of streams.

    Args:
        problems: The reasons. One that comes twice is told once.
        what: The first line of the message, without its colon; None: only the reasons.

    Attributes:
        problems: The reasons: a list of `Problem`.
    """

    def __init__(self, problems: Iterable[Problem], what: str | None = None) -> None:
        self.problems = list({str(problem): problem for problem in problems}.values())
        lines = [str(problem) for problem in self.problems]
        super().__init__("\n- ".join([f"{what}:", *lines] if what else lines))
