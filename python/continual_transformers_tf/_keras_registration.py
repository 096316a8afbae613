"""Registration of the layers with Keras, whether Keras is imported before this package or after it.

`keras.models.load_model` finds only registered classes. This package is imported lazily, and a
program that imports it only to load a saved model may never use one of its names.
"""

import importlib
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


class _OnImportOfKeras(importlib.abc.MetaPathFinder):
    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != "keras":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            sys.meta_path.remove(self)
            _register(module)

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def _register(keras: Any) -> None:
    # The layers need TensorFlow: they do not work with another Keras backend.
    if keras.config.backend() == "tensorflow":
        importlib.import_module("continual_transformers_tf.models")


def begin() -> None:
    """Import the layers now if Keras has been imported, otherwise as soon as it is."""
    if sys.modules.get("keras") is not None:
        _register(sys.modules["keras"])
    else:
        sys.meta_path.insert(0, _OnImportOfKeras())
