import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
import pytest
import tensorflow as tf

import continual_transformers_tf as ct

# One thread for each worker of pytest-xdist would be enough; two hide no race between them.
tf.config.threading.set_intra_op_parallelism_threads(2)
tf.config.threading.set_inter_op_parallelism_threads(2)


@pytest.fixture(params=["fused", "tensorflow"])
def backend(request, monkeypatch):
    """Runs a test twice: with the fused kernels, and in plain TensorFlow."""
    monkeypatch.setenv("CONTINUAL_TRANSFORMERS_BACKEND", request.param)
    if request.param == "fused":
        assert ct.ops.load_error() is None
    return request.param


@pytest.fixture
def random():
    """Random numbers; Keras' and TensorFlow's are seeded too."""
    keras.utils.set_random_seed(20260611)
    return np.random.default_rng(20260611)


@pytest.fixture
def executed_ops():
    """A list to which the type of every op that runs eagerly is appended."""
    from tensorflow.python.framework import op_callbacks

    types = []

    def record(op_type, inputs, attrs, outputs, op_name=None, graph=None):
        types.append(op_type.decode() if isinstance(op_type, bytes) else op_type)

    op_callbacks.add_op_callback(record)
    yield types
    op_callbacks.remove_op_callback(record)
