"""Warm-up: what a step returns while a stream's receptive field fills."""

import contextlib
import contextvars
from collections.abc import Iterator

WARM_UPS = ("none", "partial")

_always_partial = contextvars.ContextVar("continual_transformers_always_partial", default=False)


def check_warm_up(warm_up: str) -> str:
    """Return `warm_up`.

    Raises:
        ValueError: If it is none of `WARM_UPS`.
    """
    if warm_up not in WARM_UPS:
        raise ValueError(f"Expected warm_up to be one of {WARM_UPS}, but got {warm_up!r}")
    return warm_up


@contextlib.contextmanager
def always_partial() -> Iterator[None]:
    """Make layers return every output within this context, as in a graph.

    A model made of several layers enters it for its layers, and applies its own warm-up to their
    outputs.
    """
    token = _always_partial.set(True)
    try:
        yield
    finally:
        _always_partial.reset(token)


def is_always_partial() -> bool:
    """Return whether `always_partial` is entered."""
    return _always_partial.get()
