"""SavedModels that take steps of streams, served without Keras, or without Python."""

import os
import tempfile
import uuid
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from continual_transformers_tf.layers.continual_layer import ContinualLayer
from continual_transformers_tf.layers.model_streams import convert_weights, hold_streams
from continual_transformers_tf.models.lowering import Lowered, lower
from continual_transformers_tf.models.saved_streams import SavedStreams
from continual_transformers_tf.native import backend
from continual_transformers_tf.ops.library import fused_ops
from continual_transformers_tf.ops.stream_state import check_integer

Signature = dict[str, tf.TensorSpec]  # The inputs of a step, by name.

# Names of the SavedModel's assets.
MODEL_FILE = "model.safetensors"
STATES_FILE = "streams.states"


def export(
    model: keras.layers.Layer,
    path: str | os.PathLike[str],
    streams: int | None = None,
    inputs: Sequence[str] | None = None,
    *,
    states: bool = True,
) -> None:
    """Write a SavedModel whose signatures take steps of streams.

    The step is one op on a `Session`, and the session's model file is one of the SavedModel's
    assets. A program that loads the SavedModel must first load the op library, in Python by `import
    continual_transformers_tf` and in C by `TF_LoadLibrary`. It needs neither this package nor
    Keras: `tf.load_op_library` also takes a copy of `ct.ops.LIBRARY_PATH`. Every loaded SavedModel
    has its own streams. The model file is mapped into memory: do not change it in place while a
    process has it loaded. (`ct.export` to the same folder writes a new file.)

    A model that a `Session` cannot run is written as a graph of TensorFlow's ops with the same
    signatures, and a warning says why. The same holds for a model whose streams' state is on a GPU;
    its steps then run there. With CONTINUAL_TRANSFORMERS_BACKEND=tensorflow every model is written
    as such a graph, which does not need the op library.

    The signatures, with M any number of streams:

    - `step`: the inputs, float `(M, E)`, "x" or each by its name, and "streams", int32 `(M,)`: the
      stream of each row, each stream once. Outputs: "y" `(M, ...)`, for retroactive layers
      `(M, N, ...)`, or several outputs by name; and "ready", bool `(M,)`: which streams have a full
      receptive field. Before that, y is the output of `warm_up="partial"`.
    - `clean`: "streams", int32 `(M,)`: resets these streams. Output "position", int64 `(M,)`:
      zeros.
    - `ensure_streams`: "count", an int32 scalar: makes room for streams 0, ..., count - 1. Output
      "count": how many streams there are after the call.

    The object that `tf.saved_model.load` returns has two more functions: `get_state(streams)`
    returns copies of streams' states, a string tensor `(M,)`, and `set_state(streams, states)` puts
    them back. The copies are the same as those of `Session.get_state` and `Session.set_state`. A
    graph of TensorFlow's ops does not have these functions.

    Args:
        model: A built continual layer (`CoSiMultiHeadAttention`, `CoReMultiHeadAttention`,
            `CoSiTransformerEncoder`, `CoReTransformerEncoder`, `TransformerEncoder`,
            `CircularPositionalEncoding`, `CoDelay`, `CoResidual`) or a `StreamingModel`.
        path: The folder to write.
        streams: Make room for at least this many streams; None: as many as the model has now.
        inputs: The names of a layer's inputs, the first of "query", "value" and "key"; None: its
            one input, "x", or all of them if they have different sizes.
        states: Whether the streams of the SavedModel continue from their current states. False:
            they start empty. Streams that have taken no step take no room on disk.

    Raises:
        ValueError: If the model is not a built continual layer or `StreamingModel`, `inputs` does
            not fit it, or an input or output has a name that the signature needs.
        ImportError: With CONTINUAL_TRANSFORMERS_BACKEND=fused, if the op library cannot be loaded.
    """
    is_continual = isinstance(model, ContinualLayer)
    if not is_continual:
        raise ValueError(
            f"Expected a continual layer or a StreamingModel, but got {model!r}. Wrap "
            "a model with continual layers in ct.StreamingModel, and give a model that has only "
            "Keras' layers to ct.convert"
        )
    if not model.built:
        raise ValueError(
            f"Expected a built layer, but {model.name} has never been called: call it once"
        )
    if streams is not None:
        check_integer("streams", streams, at_least=1)
    signature = _input_signature(model, inputs)
    path = str(path)
    ops, lowered = _on_a_session(model, inputs)
    if lowered is None:
        _export_graph(model, path, streams, signature, states)
    else:
        _export_session(ops, lowered, model, path, streams, signature, states)


# Export with a session.


def _on_a_session(
    model: keras.layers.Layer, inputs: Sequence[str] | None
) -> tuple[Any, Lowered | None]:
    """Return (the op library's module, the `Lowered` model); (None, None) for a graph export."""
    if backend() == "tensorflow" or "GPU" in model.position.device:
        return None, None
    ops = fused_ops("CPU", "ContinualTransformers>SessionStep")
    if ops is None:
        return None, None  # fused_ops has warned.
    try:
        return ops, lower(model, inputs=inputs)
    except ValueError as error:
        warnings.warn(
            f"{model.name} is exported as a graph of TensorFlow's ops, whose steps are slower than "
            f"a session's. The reason: {'; '.join(str(error).splitlines())}",
            RuntimeWarning,
            stacklevel=3,
        )
        return None, None


class _SessionResource(tf.saved_model.experimental.TrackableResource):
    """The session of a SavedModel. The SavedModel's loader creates and initializes it.

    Args:
        ops: The op library's module.
        model_file: The path of the model file.
        stepped: The streams that do not start empty: an int array.
        states: The path of the file with their states, one after another. Without such streams
            there is no such file.
        streams: How many streams there are.
    """

    def __init__(
        self, ops: Any, model_file: str, stepped: np.ndarray, states: str, streams: int
    ) -> None:
        super().__init__()
        self._ops = ops
        self._stepped = stepped.astype(np.int32)
        self._streams = streams
        # A unique name, so that two SavedModels in one graph have two sessions.
        self._shared_name = f"continual_transformers_session_{uuid.uuid4()}"
        # TensorFlow saves only assets that are tracked.
        self._model_file = self._track_trackable(tf.saved_model.Asset(model_file), "model_file")
        if len(stepped):
            self._states = self._track_trackable(tf.saved_model.Asset(states), "states")
            self._bytes_of_states = os.path.getsize(states)

    def _create_resource(self) -> tf.Tensor:
        return self._ops.continual_transformers_session_handle(shared_name=self._shared_name)

    def _initialize(self) -> None:
        self._ops.continual_transformers_initialize_session(
            self.resource_handle,
            self._model_file.asset_path,
            "",
            streams=0 if len(self._stepped) else self._streams,
        )
        if len(self._stepped):
            # A session that was initialized before keeps its streams.
            held = self._ops.continual_transformers_session_ensure_streams(self.resource_handle, 0)
            tf.cond(held == 0, self._restore_states, lambda: held)

    def _restore_states(self) -> tf.Tensor:
        count, data = len(self._stepped), tf.io.read_file(self._states.asset_path)
        # TensorFlow's lengths are int32: those of 2 GB and more wrap.
        whole = tf.debugging.assert_equal(
            tf.strings.length(data),
            np.asarray(self._bytes_of_states).astype(np.int32),
            f"Expected assets/{STATES_FILE} to have {self._bytes_of_states} bytes, the states of "
            f"{count} streams: it was damaged. Export the model again",
        )
        size = tf.constant(self._bytes_of_states // count, tf.int64)
        offsets = size * tf.range(count, dtype=tf.int64)
        with tf.control_dependencies([whole]):
            states = tf.strings.substr(data, offsets, tf.fill([count], size))
            held = self._ops.continual_transformers_session_ensure_streams(
                self.resource_handle, self._streams
            )
            self._ops.continual_transformers_session_set_state(
                self.resource_handle, self._stepped, states
            )
        return held

    def _destroy_resource(self) -> None:
        # Functions with the handle keep the session alive: a signature may outlive the SavedModel
        # object that it was taken from.
        self._ops.continual_transformers_release_session(shared_name=self._shared_name)


def _export_session(
    ops: Any,
    lowered: Lowered,
    model: keras.layers.Layer,
    path: str,
    streams: int | None,
    signature: Signature,
    states: bool,
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        model_file, states_file = Path(folder, MODEL_FILE), Path(folder, STATES_FILE)
        model_file.write_bytes(lowered.to_bytes())
        with hold_streams(model):
            held, stepped = _held_and_stepped(model, states)
            if stepped.size:
                _write_states(model, model_file, states_file, stepped)
        # A process that loaded an earlier export maps these files, so they must not be overwritten
        # in place: remove them first.
        for name in (MODEL_FILE, STATES_FILE):
            asset = tf.io.gfile.join(path, "assets", name)
            if tf.io.gfile.exists(asset):
                tf.io.gfile.remove(asset)
        module = tf.Module()
        module.session = _SessionResource(
            ops, str(model_file), stepped, str(states_file), max(held, streams or 0)
        )
        _save(module, path, _functions_on_a_session(ops, module, lowered.plan, model, signature))


def _functions_on_a_session(
    ops: Any,
    module: tf.Module,
    plan: dict[str, Any],
    model: keras.layers.Layer,
    signature: Signature,
) -> dict[str, Any]:
    """Return the signatures' functions, and set get_state and set_state on the module."""
    session = module.session.resource_handle
    values = [plan["values"][port["value"]] for port in plan["outputs"]]
    types = [plan["values"][port["value"]]["dtype"] for port in plan["inputs"]]
    structure, output_types = None, [model.compute_dtype] * len(values)
    if isinstance(model, keras.Model):
        structure = model._graph.model.output
        output_types = [y.dtype for y in keras.tree.flatten(structure)]

    def step(streams: tf.Tensor, **steps: tf.Tensor) -> dict[str, tf.Tensor]:
        # tf.function passes them in another order.
        given = [tf.cast(steps[name], dtype) for name, dtype in zip(signature, types, strict=True)]
        results, ready = ops.continual_transformers_session_step(
            session,
            streams,
            given,
            output_types=[value["dtype"] for value in values],
            output_shapes=[value["shape"] for value in values],
        )
        y = [tf.cast(y, dtype) for y, dtype in zip(results, output_types, strict=True)]
        y = y[0] if structure is None else keras.tree.pack_sequence_as(structure, y)
        return {**_by_name(y), "ready": ready}

    def clean(streams: tf.Tensor) -> dict[str, tf.Tensor]:
        return {"position": ops.continual_transformers_session_clean(session, streams)}

    def ensure_streams(count: tf.Tensor) -> dict[str, tf.Tensor]:
        return {"count": ops.continual_transformers_session_ensure_streams(session, count)}

    numbers = tf.TensorSpec([None], tf.int32, name="streams")

    @tf.function(input_signature=[numbers])
    def get_state(streams: tf.Tensor) -> tf.Tensor:
        return ops.continual_transformers_session_get_state(session, streams)

    @tf.function(input_signature=[numbers, tf.TensorSpec([None], tf.string, name="states")])
    def set_state(streams: tf.Tensor, states: tf.Tensor) -> tf.Tensor:
        return ops.continual_transformers_session_set_state(session, streams, states)

    module.get_state, module.set_state = get_state, set_state
    return _traced(step, clean, ensure_streams, signature)


def _write_states(
    model: keras.layers.Layer, model_file: Path, path: Path, stepped: np.ndarray
) -> None:
    """Write the states of some streams, in the format of a session of the model file."""
    from continual_transformers_tf.session import Session

    session = Session.load(model_file)
    count = len(stepped)
    ids = session.open(min(count, 64))
    state = model.get_state(streams=stepped)
    with open(path, "wb") as file:
        for first in range(0, count, len(ids)):
            some = slice(first, min(first + len(ids), count))
            of_some = keras.tree.map_structure(lambda rows, some=some: rows[some], state)
            streams = ids[: some.stop - some.start]
            session.set_state(of_some, streams)
            file.writelines(session.get_state(streams))


# Export as a graph of TensorFlow's ops.


def _export_graph(
    model: keras.layers.Layer, path: str, streams: int | None, signature: Signature, states: bool
) -> None:
    convert_weights(model)  # After training, say: the SavedModel keeps the copies.

    def step(streams: tf.Tensor, **steps: tf.Tensor) -> dict[str, tf.Tensor]:
        given = [steps[name] for name in signature]  # tf.function passes them in another order.
        if isinstance(model, keras.Model):
            given = keras.tree.pack_sequence_as(model._graph.model.input, given)
            y = model.call_step(given, streams=streams)
        else:
            y = model.call_step(*given, streams=streams)
        outputs = _by_name(y)
        # This reads the position after the step: TensorFlow keeps the order of a variable's reads
        # and writes.
        ready = tf.gather(model.position, streams) >= model.receptive_field
        return {**outputs, "ready": ready}

    def clean(streams: tf.Tensor) -> dict[str, tf.Tensor]:
        model.clean_state(streams)
        return {"position": tf.gather(model.position, streams)}

    def ensure_streams(count: tf.Tensor) -> dict[str, tf.Tensor]:
        model.ensure_streams(count)
        return {"count": tf.shape(model.position)[0]}

    with model._streams.lock_of_exports() as lock:
        signatures = _traced(step, clean, ensure_streams, signature)
    module = tf.Module()
    # Keep the variables and not the model: TensorFlow would write Keras' variables twice, and
    # outside Python it would restore the copies that no function uses.
    used = {v.ref(): v for function in signatures.values() for v in function.graph.variables}
    module.kept = [*used.values(), lock]
    with hold_streams(model):
        held, stepped = _held_and_stepped(model, states)
        with model._streams.reduced_to(stepped) as variables:
            module.streams = SavedStreams(stepped, max(held, streams or 0), variables)
            _save(module, path, signatures)


# Shared by both.


def _held_and_stepped(model: keras.layers.Layer, states: bool) -> tuple[int, np.ndarray]:
    """Return how many streams there are, and which of them have a state to save: an int array."""
    position = np.asarray(model.position)
    return position.size, np.flatnonzero(position) if states else np.arange(0)


def _traced(
    step: Callable[..., Any],
    clean: Callable[..., Any],
    ensure_streams: Callable[..., Any],
    signature: Signature,
) -> dict[str, Any]:
    """Return the signatures: a dict from names to concrete functions."""
    numbers = tf.TensorSpec([None], tf.int32, name="streams")
    count = tf.TensorSpec([], tf.int32, name="count")
    return {
        "step": tf.function(step).get_concrete_function(numbers, **signature),
        "clean": tf.function(clean).get_concrete_function(numbers),
        "ensure_streams": tf.function(ensure_streams).get_concrete_function(count),
    }


def _save(module: tf.Module, path: str, signatures: dict[str, Any]) -> None:
    for name, function in signatures.items():
        setattr(module, name, function)
    tf.saved_model.save(module, path, signatures=signatures)


def _input_signature(model: keras.layers.Layer, inputs: Sequence[str] | None) -> Signature:
    """Return a dict from the name of an input to its tf.TensorSpec."""
    block = [model.block] if model.block > 1 else []
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
            name: tf.TensorSpec([None, *block, *x.shape[2:]], x.dtype, name=name)
            for name, x in zip(names, symbolic, strict=True)
        }
    features = model.input_features
    if inputs is None:
        # One input serves as query, value and key, unless these have different sizes.
        inputs = ["x"] if len(set(features.values())) == 1 else list(features)
    elif not inputs or list(inputs) != list(features)[: len(inputs)]:
        raise ValueError(f"Expected inputs to be the first of {list(features)}, but got {inputs}")
    return {
        name: tf.TensorSpec([None, *block, *np.atleast_1d(size)], model.compute_dtype, name=name)
        for name, size in zip(inputs, features.values(), strict=False)
    }


def _by_name(outputs: Any) -> dict[str, tf.Tensor]:
    flat = keras.tree.flatten(outputs)
    if len(flat) == 1:
        return {"y": flat[0]}
    if isinstance(outputs, dict):
        return {str(name): y for name, y in outputs.items()}
    return {f"y_{i}": y for i, y in enumerate(flat)}
