"""A check that the layers import first: Keras must run on TensorFlow."""

import os
import sys
from typing import NoReturn

import continual_transformers_tf._tensorflow  # noqa: F401  First: it says what is not installed.


def _refuse(found: str) -> NoReturn:
    raise ImportError(
        "The layers and models of continual_transformers_tf need Keras' TensorFlow backend, but "
        f"{found}. Set KERAS_BACKEND=tensorflow in the environment before the first import of "
        "keras. (`ct.Session.load` needs neither TensorFlow nor Keras.)"
    )


# Keras imports its backend, which may not be installed: ask the environment before it does. With
# PyTorch as its backend, and installed, Keras may have been imported by TensorFlow.
_named = os.environ.get("KERAS_BACKEND") or "tensorflow"
_imported = sys.modules.get("keras")
if _named != "tensorflow" and (_imported is None or _imported.config.backend() == _named):
    _refuse(f"KERAS_BACKEND is {_named!r}")

try:
    import keras
except ImportError as error:  # The backend that its configuration file names.
    _refuse(f"Keras cannot be imported: {error}")

if keras.config.backend() != "tensorflow":
    _refuse(f"Keras runs on {keras.config.backend()!r}")
