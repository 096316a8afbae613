"""SavedModels that take steps of streams: served with no Keras, and with no Python."""

import keras
import numpy as np
import tensorflow as tf

from continual_transformers_tf.layers.continual_layer import ContinualLayer
from continual_transformers_tf.ops.stream_state import check_integer


def export(model, path, streams=None, inputs=None):
    """Writes a SavedModel whose signatures take steps of streams.

    It holds the streams' state as it is, and goes on from there wherever it is loaded: the state is
    variables and no constants. What loads it must first load the op library, in Python by
    `tf.load_op_library(ct.ops.LIBRARY_PATH)` and in C by `TF_LoadLibrary`; it needs neither this
    package nor Keras. With CONTINUAL_TRANSFORMERS_BACKEND=tensorflow at export it needs no op
    library either.

    The signatures, M being any number of streams:

    - `step`: the inputs, float `(M, E)`, "x" or each by its name, and "streams", int32 `(M,)`:
      which stream each row belongs to, each once. Outputs "y" `(M, ...)`, of retroactive layers
      `(M, N, ...)`, or of several each by its name, and "ready", bool `(M,)`: whose receptive field
      is full. Before, y is that of `warm_up="partial"`.
    - `clean`: "streams", int32 `(M,)`: these begin again. Output "position", int64 `(M,)`: zeros.
    - `ensure_streams`: "count", an int32 scalar: makes room for streams 0, ..., count - 1. Output
      "count": how many are held then.

    Args:
        model: a built continual layer (`CoSiMultiHeadAttention`, `CoReMultiHeadAttention`,
            `CoSiTransformerEncoder`, `CoReTransformerEncoder`, `TransformerEncoder`,
            `CircularPositionalEncoding`, `CoDelay`, `CoResidual`) or a `StreamingModel`.
        path: the folder to write.
        streams: make room for so many; None: those that are held.
        inputs: the names of what a layer is called with, of "query", "value" and "key"; None: its
            one input, "x".

    Raises:
        ValueError: if the model is not a built continual layer or `StreamingModel`, `inputs` has
            no meaning, or an input or output has a name that the signature needs.
    """
    if not isinstance(model, ContinualLayer):
        raise ValueError(
            f"Expected a continual layer or a StreamingModel, but got {model!r}. (ct.convert makes "
            "one of a Keras model.)"
        )
    if not model.built:
        raise ValueError(f"Expected a built layer, but {model.name} has never been called")
    if streams is not None:
        check_integer("streams", streams, at_least=1)
        model.ensure_streams(streams)
    signature = _input_signature(model, inputs)

    def step(streams, **steps):
        given = [steps[name] for name in signature]  # tf.function has them in its own order.
        if isinstance(model, keras.Model):
            given = keras.tree.pack_sequence_as(model._graph.model.input, given)
            y = model.call_step(given, streams=streams)
        else:
            y = model.call_step(*given, streams=streams)
        outputs = _by_name(y)
        # After the step: TensorFlow keeps the order of what reads and writes a variable.
        ready = tf.gather(model.position, streams) >= model.receptive_field
        return {**outputs, "ready": ready}

    def clean(streams):
        model.clean_state(streams)
        return {"position": tf.gather(model.position, streams)}

    def ensure_streams(count):
        model.ensure_streams(count)
        return {"count": tf.shape(model.position)[0]}

    numbers = tf.TensorSpec([None], tf.int32, name="streams")
    count = tf.TensorSpec([], tf.int32, name="count")
    signatures = {
        "step": tf.function(step).get_concrete_function(numbers, **signature),
        "clean": tf.function(clean).get_concrete_function(numbers),
        "ensure_streams": tf.function(ensure_streams).get_concrete_function(count),
    }
    module = tf.Module()
    # Not the model: TensorFlow would write Keras' variables twice, and outside Python restore the
    # copies that no function uses.
    used = {v.ref(): v for function in signatures.values() for v in function.graph.variables}
    module.kept = list(used.values())
    for name, function in signatures.items():
        setattr(module, name, function)
    tf.saved_model.save(module, str(path), signatures=signatures)


def _input_signature(model, inputs):
    """A dict from the name of an input to its tf.TensorSpec."""
    if isinstance(model, keras.Model):
        if inputs is not None:
            raise ValueError(f"Expected no inputs, which a model names itself, but got {inputs}")
        symbolic = model.model.inputs
        names = ["x"] if len(symbolic) == 1 else [x.name for x in symbolic]
        if "streams" in names:
            raise ValueError(f"Expected no input by the name of 'streams', but got {names}")
        outputs = model._graph.model.output
        if isinstance(outputs, dict) and "ready" in outputs:
            raise ValueError(
                f"Expected no output by the name of 'ready', but got {sorted(outputs)}"
            )
        return {
            name: tf.TensorSpec([None, *x.shape[2:]], x.dtype, name=name)
            for name, x in zip(names, symbolic, strict=True)
        }
    features = model.input_features
    if inputs is None:
        # One input serves as all, unless they are of different sizes.
        inputs = ["x"] if len(set(features.values())) == 1 else list(features)
    elif not inputs or list(inputs) != list(features)[: len(inputs)]:
        raise ValueError(f"Expected inputs to be the first of {list(features)}, but got {inputs}")
    return {
        name: tf.TensorSpec([None, *np.atleast_1d(size)], model.compute_dtype, name=name)
        for name, size in zip(inputs, features.values(), strict=False)
    }


def _by_name(outputs):
    flat = keras.tree.flatten(outputs)
    if len(flat) == 1:
        return {"y": flat[0]}
    if isinstance(outputs, dict):
        return {str(name): y for name, y in outputs.items()}
    return {f"y_{i}": y for i, y in enumerate(flat)}
