"""How a continual layer is called: on whole windows, by one step, or by several steps."""

import contextlib
import contextvars

CALL_MODES = ("regular", "step", "steps")

_override = contextvars.ContextVar("continual_transformers_call_mode", default=None)


def _check(mode):
    if mode not in CALL_MODES:
        raise ValueError(f"Expected call_mode to be one of {CALL_MODES}, but got {mode!r}")
    return mode


@contextlib.contextmanager
def call_mode(mode):
    """Within it, every continual layer is called in `mode`, whatever its own call mode is.

    ```python
    with ct.call_mode("step"):
        y = model(x)
    ```

    It holds for the thread (or the asynchronous task) that entered it. A `tf.function` keeps the
    mode that it was traced in.

    Args:
        mode: "regular", "step" or "steps".

    Raises:
        ValueError: if `mode` is none of these.
    """
    token = _override.set(_check(mode))
    try:
        yield
    finally:
        _override.reset(token)


class ContinualLayer:
    """Mixed into a Keras layer: `call` does what the call mode says.

    The layer gives `call_regular`, `call_step` and `call_steps`.
    """

    @property
    def call_mode(self):
        """What calling the layer does: "regular", "step" or "steps"; see `ct.call_mode`."""
        return self._call_mode

    @call_mode.setter
    def call_mode(self, mode):
        self._call_mode = _check(mode)

    @property
    def active_call_mode(self):
        """The call mode in force: that of `ct.call_mode` where one is entered, or the layer's."""
        return _override.get() or self._call_mode

    def get_config(self):
        return {**super().get_config(), "call_mode": self._call_mode}
