"""The stream server: its program, its client, and the load test.

Names are imported when they are first used: only the client needs gRPC.
"""

import importlib
from typing import TYPE_CHECKING, Any

from continual_transformers_tf.extras import install

if TYPE_CHECKING:
    from continual_transformers_tf.serving.client import Client, ServingError, Stream

__all__ = ["Client", "ServingError", "Stream"]


def _get(name: str) -> Any:
    """Import the value of a public name."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        value = getattr(importlib.import_module(f"{__name__}.client"), name)
    except ModuleNotFoundError as missing:
        raise ImportError(
            f"ct.serving.{name} needs {missing.name}, which is not installed. The extra client "
            f"installs it: {install('client')}"
        ) from missing
    globals()[name] = value
    return value


if not TYPE_CHECKING:  # Type checkers read the imports above, and so find misspelled names.
    __getattr__ = _get


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
