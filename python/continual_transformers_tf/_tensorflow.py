"""A check that modules import before TensorFlow: it says what to install if that is missing."""

import importlib.util

from continual_transformers_tf.extras import install

for package in ("tensorflow", "keras"):
    if importlib.util.find_spec(package) is None:
        raise ImportError(
            f"This part of continual_transformers_tf needs {package}, which is not installed. The "
            f"extra cpu installs it: {install('cpu')}. The extra gpu does too, with CUDA. "
            "(`ct.Session.load` needs neither.)"
        )

# TensorFlow imports Keras, and that imports the layers (`_keras_registration`). Here no module that
# they need is half imported yet.
import tensorflow  # noqa: E402, F401
