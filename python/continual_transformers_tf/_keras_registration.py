"""Registers the layers with Keras once Keras is imported, be it before this package or after it.

`keras.models.load_model` finds only classes that are registered. The package is imported lazily,
and a program that imports it for a saved model's sake may never ask it for a layer.
"""

import importlib
import importlib.abc
import importlib.machinery
import sys


class _OnImportOfKeras(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "keras":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_register(module):
            execute(module)
            sys.meta_path.remove(self)
            _register(module)

        spec.loader.exec_module = execute_and_register
        return spec


def _register(keras):
    # The layers are TensorFlow's: a program with another backend of Keras has no use for them.
    if keras.config.backend() == "tensorflow":
        importlib.import_module("continual_transformers_tf.models")


def begin():
    """Import the layers now if Keras is imported, otherwise as soon as it is."""
    if sys.modules.get("keras") is not None:
        _register(sys.modules["keras"])
    else:
        sys.meta_path.insert(0, _OnImportOfKeras())
