import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
import pytest
import tensorflow as tf

import continual_transformers_tf as ct
from sampling import MARKERS, choose_samples

# One thread for each worker of pytest-xdist would be enough, but two can show races between them.
tf.config.threading.set_intra_op_parallelism_threads(2)
tf.config.threading.set_inter_op_parallelism_threads(2)


def pytest_addoption(parser):
    parser.addoption(
        "--device",
        metavar="DEVICE",
        help="place every test's variables and ops on it: GPU:0, or CPU:0 where there is a GPU",
    )


def pytest_configure(config):
    # TensorFloat-32 products have 10 bits of mantissa, but the bounds are those of float32.
    tf.config.experimental.enable_tensor_float_32_execution(False)


def pytest_collection_modifyitems(config, items):
    choose_samples(items)
    config.stash[MARKERS] = [
        (item.nodeid.partition("[")[0], {marker.name for marker in item.iter_markers()})
        for item in items
    ]


def default_device(config):
    """Return the type of the device that tests run on: `--device`, or TensorFlow's choice."""
    chosen = config.getoption("--device")
    if chosen:
        return tf.DeviceSpec.from_string(f"/device:{chosen}").device_type
    return "GPU" if tf.config.list_physical_devices("GPU") else "CPU"


@pytest.fixture(autouse=True)
def device(request):
    """Place a test on the device of `--device`; skip a test that is for another device."""
    device_type = default_device(request.config)
    cpu_only = request.node.get_closest_marker("cpu_only")
    if cpu_only and device_type != "CPU":
        pytest.skip(f"on a {device_type}: {cpu_only.args[0]}")
    chosen = request.config.getoption("--device")
    if not chosen:
        yield
        return
    there_are = [device.name for device in tf.config.list_logical_devices()]
    if f"/device:{chosen}" not in there_are:
        pytest.skip(f"there is no {chosen} here; TensorFlow sees {', '.join(there_are)}")
    with tf.device(chosen):
        yield


@pytest.fixture(params=["fused", "tensorflow"])
def backend(request, monkeypatch):
    """Run a test twice: with the fused kernels, and in plain TensorFlow."""
    monkeypatch.setenv("CONTINUAL_TRANSFORMERS_BACKEND", request.param)
    if request.param == "fused":
        assert ct.ops.load_error() is None
    return request.param


@pytest.fixture
def random():
    """Return random numbers; also seed those of Keras and TensorFlow."""
    keras.utils.set_random_seed(20260611)
    return np.random.default_rng(20260611)


@pytest.fixture
def executed_ops():
    """Return a list to which the type of every op that runs eagerly is appended."""
    from tensorflow.python.framework import op_callbacks

    types = []

    def record(op_type, inputs, attrs, outputs, op_name=None, graph=None):
        types.append(op_type.decode() if isinstance(op_type, bytes) else op_type)

    op_callbacks.add_op_callback(record)
    yield types
    op_callbacks.remove_op_callback(record)
