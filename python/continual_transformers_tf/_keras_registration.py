"""Registration of the layers with Keras, whether Keras is imported before this package or after it.

`keras.models.load_model` finds only registered classes, and `tf.saved_model.load` only registered
ops. Neither imports the package that has them. This package is imported lazily, and a program that
imports it only to load a saved model may never use one of its names.
"""

import importlib
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, TypeVar

Class = TypeVar("Class", bound=type)


def registered(layer_class: Class) -> Class:
    """Register a class with Keras, and return it: a decorator.

    Keras saves the registered name, such as "import continual_transformers_tf>CoDelay". If nobody
    has imported this package, Keras' error shows that name, for files of every format. So the name
    says what to do.
    """
    import keras

    # Files of 0.1.0 have the first name. Keras saves the one that is registered last.
    for package in ("continual_transformers_tf", "import continual_transformers_tf"):
        keras.saving.register_keras_serializable(package)(layer_class)
    return layer_class


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
        library: Any = importlib.import_module("continual_transformers_tf.ops.library")
        library.load_early()


def begin() -> None:
    """Import the layers now if Keras has been imported, otherwise as soon as it is.

    `import tensorflow` imports Keras.
    """
    if sys.modules.get("keras") is not None:
        _register(sys.modules["keras"])
    else:
        sys.meta_path.insert(0, _OnImportOfKeras())
