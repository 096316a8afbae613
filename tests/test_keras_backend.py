"""With another backend of Keras than TensorFlow, the layers say so when they are imported."""

import os
import subprocess
import sys

import pytest

USES = [
    "ct.CoSiMultiHeadAttention",
    "ct.convert",
    "from continual_transformers_tf.layers import CoDelay",
    "import continual_transformers_tf.models",
]
# A process for each use would import TensorFlow each time.
PROGRAM = f"""
import continual_transformers_tf as ct
ct.Session.load
for use in {USES}:
    try:
        exec(use)
    except ImportError as error:
        print("said:", error)
"""


def said(program, **environment):
    result = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_a_backend_named_in_the_environment():
    """The message is the same whether that backend is installed or not."""
    output = said(PROGRAM, KERAS_BACKEND="torch").splitlines()
    assert len(output) == len(USES)
    for line in output:
        assert "need Keras' TensorFlow backend, but KERAS_BACKEND is 'torch'" in line
        assert "KERAS_BACKEND=tensorflow" in line


@pytest.mark.slow
def test_keras_imported_with_another_backend():
    program = "import keras\nkeras.config.backend = lambda: 'jax'\n"
    output = said(program + PROGRAM, KERAS_BACKEND="tensorflow")
    # The package registers its layers as soon as it finds Keras on TensorFlow.
    assert "need Keras' TensorFlow backend, but Keras runs on 'jax'" in output


@pytest.mark.slow
def test_a_backend_named_in_the_configuration_that_is_not_installed(tmp_path):
    (tmp_path / "keras.json").write_text('{"backend": "jax"}')
    environment = {k: v for k, v in os.environ.items() if k != "KERAS_BACKEND"}
    program = "import sys\nsys.modules['jax'] = None\n" + PROGRAM
    result = subprocess.run(
        [sys.executable, "-c", program],
        env={**environment, "KERAS_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert "need Keras' TensorFlow backend, but Keras cannot be imported" in result.stdout


@pytest.mark.slow
def test_tensorflow_is_fine():
    assert said(PROGRAM, KERAS_BACKEND="tensorflow") == ""
