"""LiteRT files (`.tflite`) that take steps of a stream, for phones and browsers."""

import os
import tempfile
from typing import TYPE_CHECKING, Any

import keras
import tensorflow as tf

from continual_transformers_tf.models.lowering import Lowered, lower
from continual_transformers_tf.models.plan_in_tensorflow import PlanStep

if TYPE_CHECKING:
    from continual_transformers_tf.session import Session

WEIGHTS = ("float32", "float16", "int8")
STATE = "state_"  # The beginning of the names of state inputs and outputs.
SIGNATURE = "step"


def export_litert(
    model: "keras.layers.Layer | Session | str | os.PathLike[str]",
    path: str | os.PathLike[str],
    *,
    weights: str = "float32",
    seq_len: int | None = None,
    key_mask: bool = False,
) -> None:
    """Write a LiteRT file (`.tflite`) that takes one step of one stream.

    If the model takes a block of steps at once (`Session.block` is more than 1: it has strides or
    attention in chunks), a step of the file takes a block too: inputs are `[1, block, ...]`.

    It has LiteRT's built-in ops only, so it runs wherever LiteRT does: on phones, in browsers, on
    small boards. Neither this package nor TensorFlow is needed there. The stream's state is inputs
    and outputs of the step: the caller hands it on to the next step. A new stream's state is zeros.

    ```python
    ct.export_litert(model, "model.tflite")

    step = Interpreter("model.tflite").get_signature_runner("step")
    state = {
        name: np.zeros(part["shape"], part["dtype"])
        for name, part in step.get_input_details().items()
        if name.startswith("state_")
    }
    for x in samples:
        outputs = step(x=x[np.newaxis], **state)
        state = {name: outputs[name] for name in state}
    ```

    The file has one signature, "step":

    - Its inputs are those of the model, `[1, ...]`, by their names in `Session.inputs`; the state,
      in tensors whose names begin with "state_"; and with `key_mask=True`, "key_mask".
    - Its outputs are those of the model, `[1, ...]`, by their names in `Session.outputs`; "ready",
      `[1]`: 1 if the receptive field is full, otherwise 0; and the state after the step, in tensors
      with the same names, shapes and dtypes as among the inputs.

    All of them are float32, or int32 for integers and bools: browsers know no others. (If the sizes
    of a model's windows and tables have no common multiple below 2^31, "state_position" is int64.)
    Keys and values of past steps are float32 too: the model's `cache_dtype` has no effect here.
    Outputs are those of a `ct.Session` within rounding. A model of float64 is computed in float32.

    Args:
        model: What `ct.Session` takes: a functional or sequential Keras model, a `StreamingModel`,
            a layer of this package, or the path of a `.keras` file. Also a `Session`, or the path
            of a model file.
        path: The file to write. It appears whole or not at all.
        weights: The dtype of the weights in the file: "float32"; "float16", half the size; or
            "int8", about a quarter. "int8" is for the kernels of dense products, with a scale for
            each output: LiteRT also rounds what they are multiplied by, at each step. It leaves
            kernels of less than 1,024 numbers as they are.
        seq_len: The window, in steps, of every `keras.layers.MultiHeadAttention` inside, as in
            `ct.Session`.
        key_mask: Whether the step has the input "key_mask", int32 `[1]`. 0 marks a gap, as False
            does in `Session.step`.

    Raises:
        ValueError: If the model cannot run step by step, or a part of it cannot be expressed in
            LiteRT's ops: the message has a line for each. Also if an argument does not fit.
        OSError: If a file cannot be read or written.
    """
    if weights not in WEIGHTS:
        raise ValueError(f"Expected weights to be one of {WEIGHTS}, but got {weights!r}")
    lowered = _lowered(model, seq_len)
    step = PlanStep(lowered.plan, lowered.weights, gaps=key_mask)
    _check_names(step, key_mask)
    converted = _converted(_traced(step, key_mask), weights)
    _write(os.fspath(path), converted)


def _lowered(
    model: "keras.layers.Layer | Session | str | os.PathLike[str]", seq_len: int | None
) -> Lowered:
    if isinstance(model, keras.layers.Layer):
        return lower(model, seq_len)
    # Only here, because a Keras model needs no library.
    from continual_transformers_tf.models.packing import load_model
    from continual_transformers_tf.session import Session

    if isinstance(model, (str, os.PathLike)):
        if os.fspath(model).endswith(".keras"):
            return lower(load_model(model), seq_len)
        model = Session.load(model)
    if not isinstance(model, Session):
        raise TypeError(
            "Expected a Keras model, a layer of continual_transformers_tf, a Session, or the path "
            f"of a .keras file or of a model file, but got {model!r}"
        )
    if seq_len is not None:
        raise ValueError(
            "Expected no seq_len, because the windows of a Session and of a model file are fixed, "
            f"but got {seq_len}"
        )
    return Lowered.from_bytes(model._model_bytes())


def _check_names(step: PlanStep, key_mask: bool) -> None:
    """Check that the model's names are not those that the step itself has."""
    for kind, names, own in (
        ("input", step.inputs, "key_mask" if key_mask else None),
        ("output", step.outputs, "ready"),
    ):
        for name in names:
            if name == own or name.startswith(STATE):
                raise ValueError(
                    f"Expected no {kind} named {name!r}, a name that the step itself has: give the "
                    f"model's {kind} another name"
                )


def _traced(step: PlanStep, key_mask: bool) -> Any:
    """Return the step as a concrete function, with the names of the signature."""

    def call(**tensors: tf.Tensor) -> dict[str, tf.Tensor]:
        state = {name: tensors[f"{STATE}{name}"] for name in step.state}
        outputs, state, ready = step(tensors, state, tensors["key_mask"] if key_mask else None)
        named = {**outputs, "ready": ready, **{f"{STATE}{k}": x for k, x in state.items()}}
        return {name: tf.identity(x) for name, x in named.items()}

    specs = dict(step.inputs)
    specs |= {f"{STATE}{k}": spec for k, spec in step.state.items()}
    if key_mask:
        specs["key_mask"] = tf.TensorSpec([1], tf.int32)
    specs = {k: tf.TensorSpec(spec.shape, spec.dtype, k) for k, spec in specs.items()}
    return tf.function(call, autograph=False).get_concrete_function(**specs)


def _converted(function: Any, weights: str) -> bytes:
    """Return the LiteRT file of a concrete function."""
    module = tf.Module()
    with tempfile.TemporaryDirectory() as folder:
        # Through a SavedModel, because only so the file gets a signature.
        tf.saved_model.save(module, folder, signatures={SIGNATURE: function})
        converter = tf.lite.TFLiteConverter.from_saved_model(folder, signature_keys=[SIGNATURE])
        converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS]
        if weights != "float32":
            converter.optimizations = [tf.lite.Optimize.DEFAULT]
        if weights == "float16":
            converter.target_spec.supported_types = [tf.float16]
        return converter.convert()


def _write(path: str, data: bytes) -> None:
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        with open(temporary, "wb") as file:
            file.write(data)
        os.replace(temporary, path)
    except OSError:
        if os.path.exists(temporary):
            os.remove(temporary)
        raise
