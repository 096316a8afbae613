"""Tests of `continual-transformers pack` and `info`: what they write, print, and refuse."""

import json
import os
import re
import subprocess
import sys

import keras
import numpy as np
import pytest
from click.testing import CliRunner

import continual_transformers_tf as ct
from continual_transformers_tf import cli, native

N, E = 5, 6


def run(*arguments, status=0):
    result = CliRunner().invoke(cli.main, [str(argument) for argument in arguments])
    assert result.exit_code == status, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result.output


def plain_model(length):
    """Return a Keras model that cannot stream by itself."""
    x = keras.Input((length, E), name="sensor")
    h = keras.layers.Dense(8)(x)
    h = h + keras.layers.MultiHeadAttention(2, 4)(h, h)
    return keras.Model(x, keras.layers.Dense(3)(h[:, -1]), name="watch")


@pytest.fixture
def saved(random, tmp_path):
    """Return the path of a saved Keras model whose time axis has no fixed length."""
    plain_model(None).save(tmp_path / "watch.keras")
    return tmp_path / "watch.keras"


def largest_difference(said):
    return float(re.search(r"largest difference (\S+) where outputs go up to", said)[1])


@pytest.mark.parametrize("shape", [(12,), (3, 12)], ids=["one stream", "three"])
def test_pack_and_check(saved, random, tmp_path, shape):
    np.save(tmp_path / "x.npy", random.standard_normal((*shape, E)))
    output = tmp_path / "watch.safetensors"
    said = run("pack", saved, output, "--seq-len", N, "--check", tmp_path / "x.npy")
    assert f"written: {output}, {output.stat().st_size:,} bytes" in said
    model = ct.convert(keras.saving.load_model(saved), N)
    assert f"{ct.cost(model).multiplications:,} multiplications" in said
    session = ct.Session.load(output)
    assert f"a stream: {session.state_bytes:,} bytes; receptive field {N} steps, delay 0" in said
    assert f"checked: {shape[0] if len(shape) == 2 else 1} streams of 12 steps" in said
    assert largest_difference(said) < 1e-5
    x = random.standard_normal((2, N, E)).astype("float32")
    expected = keras.saving.load_model(saved)(x)
    np.testing.assert_allclose(session.steps(x)[:, -1], expected, rtol=1e-4, atol=1e-5)


def test_the_check_finds_a_difference(saved, random, tmp_path):
    """bfloat16 weights change the outputs by more than float32's bound, but not much."""
    np.save(tmp_path / "x.npy", random.standard_normal((12, E)).astype("float32"))
    output = tmp_path / "watch.safetensors"
    options = ("--seq-len", N, "--weights-dtype", "bfloat16", "--cache-dtype", "float16")
    said = run("pack", saved, output, *options, "--check", tmp_path / "x.npy")
    difference = largest_difference(said)
    assert 1e-4 < difference < 0.1
    check = ("--check", tmp_path / "x.npy", "--tolerance")
    run("pack", saved, output, *options, *check, 2 * difference)
    said = run("pack", saved, output, *options, *check, difference / 2, status=1)
    assert "largest difference is" in said
    assert "--tolerance needs --check" in run("pack", saved, output, "--tolerance", 1, status=2)
    session = ct.Session.load(output)
    assert (session.weights_dtype, session.cache_dtype) == ("bfloat16", "float16")


def test_several_inputs_are_checked_by_name(random, tmp_path):
    inputs = {name: keras.Input((N, size), name=name) for name, size in (("a", 3), ("b", 4))}
    h = keras.layers.Concatenate()([inputs["b"], inputs["a"]])
    h = keras.layers.PReLU(shared_axes=[1])(h)  # ct.cost does not know this layer.
    h = ct.CoSiMultiHeadAttention(N, 2, 4)(h, h)
    keras.Model(inputs, {"y": h[:, -1], "z": h[:, -1, :2]}).save(tmp_path / "two.keras")
    arrays = {name: random.standard_normal((2, 9, x.shape[-1])) for name, x in inputs.items()}
    np.savez(tmp_path / "x.npz", **arrays)
    files = tmp_path / "two.keras", tmp_path / "two.safetensors"
    said = run("pack", *files, "--check", tmp_path / "x.npz")
    assert "its operations are not counted. Expected a layer whose cost is known" in said
    assert "checked: 2 streams of 9 steps" in said
    assert largest_difference(said) < 1e-5
    np.savez(tmp_path / "x.npz", a=arrays["a"])
    said = run("pack", *files, "--check", tmp_path / "x.npz", status=1)
    assert "an array for each of the model's inputs, ['a', 'b'], but got ['a']" in said
    np.savez(tmp_path / "x.npz", a=arrays["a"][:1], b=arrays["b"])
    said = run("pack", *files, "--check", tmp_path / "x.npz", status=1)
    assert "Expected the same streams and steps in every input" in said


@pytest.mark.parametrize(
    ("array", "why"),
    [
        (np.zeros((12, E + 1)), r"of shape \(T, 6\) or \(streams, T, 6\), but got \(12, 7\)"),
        (np.zeros(12), r"but got \(12,\)"),
        (np.zeros((12, E), complex), "to be float32 and not empty, but got complex128"),
        (np.zeros((0, E)), r"not empty, but got float64 of shape \(0, 6\)"),
    ],
)
def test_recordings_that_do_not_fit_are_refused(saved, tmp_path, array, why):
    np.save(tmp_path / "x.npy", array)
    files = saved, tmp_path / "watch.safetensors"
    said = run("pack", *files, "--seq-len", N, "--check", tmp_path / "x.npy", status=1)
    assert re.search(why, said)
    assert not files[1].exists()


def test_what_cannot_be_packed_is_said_and_nothing_is_written(saved, tmp_path):
    output = tmp_path / "watch.safetensors"
    packed = tmp_path / "packed.safetensors"
    packed.touch()
    assert "is already a model file" in run("pack", packed, output, status=1)
    assert "Expected seq_len" in run("pack", saved, output, status=1)
    x = keras.Input((N, E))
    convolution = keras.layers.Conv1D(4, 3, name="convolution")
    keras.Model(x, convolution(x)).save(tmp_path / "model.keras")
    assert "convolution" in run("pack", tmp_path / "model.keras", output, status=1)
    (tmp_path / "model.keras").write_text("no model")
    assert "Error: " in run("pack", tmp_path / "model.keras", output, status=1)
    run("pack", tmp_path / "none.keras", output, status=2)
    assert not output.exists()


def test_info_of_a_model_file(saved, tmp_path):
    output = tmp_path / "watch.safetensors"
    run("pack", saved, output, "--seq-len", N)
    said = run("info", output)
    assert "watch" in said
    assert "attention" in said
    saved.write_text(json.dumps({}))
    assert "Error: " in run("info", saved, status=1)


def test_info_of_the_installation():
    said = run("info")
    assert f"core library {native.CORE_LIBRARY_PATH}\n" in said
    assert "ct.Session: steps run on the CPU" in said
    assert run("info", "--cmake-dir").strip() == str(native.PACKAGE / "cmake")
    assert run("info", "--pkg-config-dir").strip() == str(native.PACKAGE / "pkgconfig")


def test_tensorflow_s_log_is_left_out():
    """In a process of its own: TensorFlow writes these lines while it is imported."""
    environment = {k: x for k, x in os.environ.items() if k != "TF_CPP_MIN_LOG_LEVEL"}
    command = [sys.executable, "-m", "continual_transformers_tf.cli", "info"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert "TensorFlow " in done.stdout
    assert done.stderr == ""
