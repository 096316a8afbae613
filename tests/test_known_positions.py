"""Eager steps with warm_up="none" on a GPU, which wait for it only while a window fills."""

import ctypes
import itertools

import numpy as np
import pytest
import tensorflow as tf

import continual_transformers_tf as ct
from continual_transformers_tf.ops.known_positions import KnownPositions

pytestmark = pytest.mark.sampled(3, rest="slow")

FEATURES, WINDOW = 8, 4


def co_si_mha():
    return ct.CoSiMultiHeadAttention(WINDOW, 2, 4)


def encoder():
    return ct.CoSiTransformerEncoder(WINDOW, FEATURES, 2, 16)


def delayed():
    return ct.CoSiMultiHeadAttention(WINDOW, 2, 4, query_index=-3)


def co_re_mha():
    return ct.CoReMultiHeadAttention(WINDOW, 2, 4)


LAYERS = [co_si_mha, encoder, delayed, co_re_mha, lambda: ct.CoDelay(3)]


@pytest.fixture
def reads(monkeypatch):
    """Return a list that grows with every wait for the GPU."""
    found = []
    read = KnownPositions.read
    monkeypatch.setattr(
        KnownPositions, "read", lambda self, *args: found.append(1) or read(self, *args)
    )
    return found


def as_if_on_a_gpu(layer):
    layer._streams.known.is_far = True


def x(rows):
    return np.ones((rows, FEATURES), "float32")


def pair(make):
    """Return two equal layers. The host waits to read the positions of the first."""
    far, near = make(), make()
    for layer in (far, near):
        layer.call_step(x(5))
        layer.clean_state()
    far.set_weights(near.get_weights())
    as_if_on_a_gpu(far)
    return far, near


def check_step(far, near, streams, **arguments):
    rows = 5 if streams is None else len(streams)
    y, expected = (layer.call_step(x(rows), streams=streams, **arguments) for layer in (far, near))
    assert (y is None) == (expected is None)
    if y is not None:
        np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)
    return y


@pytest.mark.parametrize("make", LAYERS)
def test_outputs_are_the_same(make, tmp_path):
    far, near = pair(make)
    checkpoints = [tf.train.Checkpoint(layer=layer) for layer in (far, near)]
    saved = [c.write(str(tmp_path / str(i))) for i, c in enumerate(checkpoints)]
    fresh = [layer.get_state() for layer in (far, near)]
    random = np.random.default_rng(0)
    for _ in range(6):
        for _ in range(10):
            streams = random.permutation(5)[: random.integers(1, 6)].tolist()
            check_step(far, near, None if len(streams) == 5 else streams)
        how = random.integers(4)
        for layer, checkpoint, path, state in zip(
            (far, near), checkpoints, saved, fresh, strict=True
        ):
            if how == 0:
                layer.clean_state()
            elif how == 1:
                layer.clean_state([0, 3])
            elif how == 2:
                layer.set_state(state)
            else:
                checkpoint.read(path)


@pytest.mark.parametrize("make", LAYERS)
def test_a_full_window_is_known(make, reads):
    far, near = pair(make)
    for _ in range(WINDOW + 1):
        check_step(far, near, [3])
    assert reads
    reads.clear()
    for streams, update_state in itertools.product(([3], [0, 3], [3]), (True, False)):
        assert check_step(far, near, streams, update_state=update_state) is not None
    assert len(reads) <= (2 if make is co_re_mha else 0)  # Its rows of stream 0 are not taken yet.


def test_every_way_to_begin_again(tmp_path):
    far, near = pair(co_si_mha)
    checkpoints = [tf.train.Checkpoint(layer=layer) for layer in (far, near)]
    paths = [c.write(str(tmp_path / str(i))) for i, c in enumerate(checkpoints)]
    fresh = [layer.get_state([1, 2]) for layer in (far, near)]
    both = (far, near)
    for begin_again in (
        lambda: [layer.clean_state() for layer in both],
        lambda: [layer.clean_state([1, 2]) for layer in both],
        lambda: [layer.set_state(state, [2, 1]) for layer, state in zip(both, fresh, strict=True)],
        lambda: [c.read(path) for c, path in zip(checkpoints, paths, strict=True)],
    ):
        for _ in range(WINDOW - 1):
            check_step(far, near, [1, 2])
        assert check_step(far, near, [1, 2]) is not None
        begin_again()
        assert check_step(far, near, [1, 2]) is None


def test_a_graph_that_begins_again():
    """The host does not see when it runs."""
    far, near = pair(co_si_mha)
    clean = [tf.function(layer.clean_state).get_concrete_function() for layer in (far, near)]
    for _ in range(2):
        for _ in range(WINDOW - 1):
            assert check_step(far, near, [1]) is None
        assert check_step(far, near, [1]) is not None
        for function in clean:
            function()


def test_streams_that_are_not_held():
    far, _ = pair(co_si_mha)
    for streams in ([5], [-1], [2**31 - 1]):
        with pytest.raises((ValueError, tf.errors.InvalidArgumentError)):
            far.call_step(x(1), streams=streams)


@pytest.fixture
def emulator():
    """Return the op library of tests/gpu/emulated_ops.py."""
    path = ct.ops.LIBRARY_PATH
    library = ctypes.CDLL(str(path)) if path is not None else None
    if not hasattr(library, "cuda_emulator_waits"):
        pytest.skip("needs the op library of tests/gpu/emulated_ops.py")
    return library


@pytest.mark.parametrize("make", [co_si_mha, encoder, delayed])
@pytest.mark.parametrize("streams", [None, [4, 1]])
def test_what_a_step_asks_of_a_gpu(make, streams, emulator):
    """With a full window, it neither waits for the GPU nor sets memory to zero."""
    layer = make()
    layer.call_step(x(5))
    layer.clean_state()
    as_if_on_a_gpu(layer)
    rows = 5 if streams is None else len(streams)
    for _ in range(WINDOW):
        before = emulator.cuda_emulator_waits()
        y = layer.call_step(x(rows), streams=streams)
        assert emulator.cuda_emulator_waits() > before
    assert y is not None
    layer.call_step(x(rows), streams=streams)
    before = emulator.cuda_emulator_waits(), emulator.cuda_emulator_memsets()
    for _ in range(3):
        assert layer.call_step(x(rows), streams=streams) is not None
    assert (emulator.cuda_emulator_waits(), emulator.cuda_emulator_memsets()) == before
