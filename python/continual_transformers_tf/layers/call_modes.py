"""Call modes: a continual layer is called on windows, on one step or on several steps."""

import contextlib
import contextvars
from collections.abc import Iterator

CALL_MODES = ("regular", "step", "steps")

_entered_mode: contextvars.ContextVar[str | None] = contextvars.ContextVar(
    "continual_transformers_call_mode", default=None
)


def check_call_mode(mode: str) -> str:
    """Return `mode`.

    Raises:
        ValueError: If it is none of `CALL_MODES`.
    """
    if mode not in CALL_MODES:
        raise ValueError(f"Expected call_mode to be one of {CALL_MODES}, but got {mode!r}")
    return mode


@contextlib.contextmanager
def call_mode(mode: str) -> Iterator[None]:
    """Call every continual layer in `mode` within this context, instead of in its own call mode.

    ```python
    with ct.call_mode("step"):
        y = model(x)
    ```

    The context holds for the thread, or the asynchronous task, that entered it. A `tf.function`
    keeps the mode in which it was traced. So does `model.predict`, which traces a function when it
    is first called.

    Args:
        mode: "regular", "step" or "steps".

    Raises:
        ValueError: If `mode` is none of these.
    """
    token = _entered_mode.set(check_call_mode(mode))
    try:
        yield
    finally:
        _entered_mode.reset(token)


def entered_call_mode() -> str | None:
    """Return the mode of the innermost `call_mode` that is entered, or None."""
    return _entered_mode.get()
