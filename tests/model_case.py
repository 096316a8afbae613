"""A Keras model or layer of the tests: how it is made, given inputs, and run on steps in Keras."""

import dataclasses
import functools
from collections.abc import Callable

import keras
import numpy as np
import tensorflow as tf
from keras import layers as kl

import continual_transformers_tf as ct
import reference
from continual_transformers_tf.models.convert import is_converted, layers_of
from continual_transformers_tf.models.step_graph import StepGraph
from continual_transformers_tf.models.step_run import StepRun

N = 4  # The window of most models.
BOUNDS = reference.BOUNDS


@dataclasses.dataclass(frozen=True)
class Case:
    """A model or layer.

    Attributes:
        make: A function without arguments that makes it.
        seq_len: The window of plain Keras attention in it; None: it has none, or its input has the
            length.
        window: How many steps fill every window in it.
        high: Integers among the inputs are below this.
        gaps: Whether a fifth of the inputs' rows are zeros, for masks.
        dtype: Its bound is `BOUNDS[dtype]`.
        taken_only: Whether rows of steps that were never taken have no meaning in its outputs.
        first: How many of a stream's first outputs have no meaning.
    """

    make: Callable
    seq_len: int | None = None
    window: int = N
    high: int = 5
    gaps: bool = False
    dtype: str = "float32"
    taken_only: bool = False
    first: int = 0

    def build(self):
        keras.utils.set_random_seed(11)
        model = self.make()
        random = np.random.default_rng(11)
        for w in model.weights:
            name = w.path.rsplit("/", 1)[-1]
            if name in ("kernel", "embeddings", "count"):
                continue
            if "variance" in name:
                w.assign(random.uniform(0.5, 2, w.shape))
            else:
                w.assign((name in ("gamma", "scale")) + 0.3 * random.normal(size=w.shape))
        for layer in model._flatten_layers():
            if isinstance(layer, kl.Normalization):
                layer.finalize_state()
        return model

    def streaming(self, model):
        """Return the object that takes the steps in Keras: StreamingModel, layer or StepGraph."""
        if not isinstance(model, keras.Model) or isinstance(model, ct.StreamingModel):
            return model
        if any(map(is_converted, layers_of(model))):
            return ct.convert(model, self.seq_len or model.inputs[0].shape[1], warm_up="partial")
        graph = StepGraph(model)
        return ct.StreamingModel(model, warm_up="partial") if graph.layers else graph

    def inputs(self, model, random, lead):
        """Return arrays `(*lead, ...)` for the model's inputs, in Keras' order."""
        if isinstance(model, keras.Model):
            functional = model.model if isinstance(model, ct.StreamingModel) else model
            specs = [(x.shape[2:], x.dtype) for x in functional.inputs]
        else:
            sizes = model.input_features
            dtype = getattr(model, "layer", model).compute_dtype
            sizes = list(sizes.values())[: 1 if len(set(sizes.values())) == 1 else 3]
            specs = [(size if isinstance(size, tuple) else (size,), dtype) for size in sizes]
        return [self._array(random, (*lead, *shape), dtype) for shape, dtype in specs]

    def _array(self, random, shape, dtype):
        if "int" in dtype:
            return random.integers(0, self.high, shape).astype(dtype)
        if dtype == "bool":
            return random.random(shape) < 0.5
        x = random.normal(size=shape)
        if self.gaps:
            x[random.random(shape[:2]) < 0.2] = 0
        return x.astype("float64" if dtype == "float64" else "float32")

    def steps(self, model, inputs, ages=(0,), traced=True):
        """Return Keras' outputs for T steps of M streams: a list of arrays (M, T, ...).

        Args:
            model: The result of `build`.
            inputs: Arrays (M, T, ...).
            ages: For each stream, how many steps it takes in a separate call before the others.
                The last age is also that of all further streams.
            traced: Whether a layer takes its steps one by one, in a graph. If not, a layer without
                a delay takes them in one eager call, which is faster.
        """
        streaming = self.streaming(model)
        m, t = inputs[0].shape[:2]
        ages = [min(t, ages[min(i, len(ages) - 1)]) for i in range(m)]
        parts = [[] for _ in range(m)]  # For each stream, the outputs of its calls.
        for i, age in enumerate(ages):
            if age:
                y = _steps(streaming, [x[i : i + 1, :age] for x in inputs], [i], m, traced)
                parts[i].append([array[0] for array in y])
        for age in sorted(set(ages) - {t}):  # The remaining steps, for all streams of the same age.
            same = [i for i in range(m) if ages[i] == age]
            y = _steps(streaming, [x[same, age:] for x in inputs], same, m, traced)
            for row, i in enumerate(same):
                parts[i].append([array[row] for array in y])
        rows = [[np.concatenate(z) for z in zip(*part, strict=True)] for part in parts]
        return [np.stack(z) for z in zip(*rows, strict=True)]


def _steps(streaming, inputs, streams, held, traced):
    """Take T steps of streams, and return arrays (M, T, ...)."""
    streams = [int(i) for i in streams]
    if isinstance(streaming, StepGraph):
        tensors = [tf.cast(x, y.dtype) for x, y in zip(inputs, streaming.model.inputs, strict=True)]
        outputs = StepRun(streaming, step=None, training=False).outputs(tensors)  # No streams.
    elif isinstance(streaming, keras.Model):
        streaming.ensure_streams(held)
        structure = streaming._graph.model._inputs_struct
        given = keras.tree.pack_sequence_as(structure, inputs)
        if isinstance(structure, (list, tuple)) and len(inputs) == 1:
            given = inputs[0]
        outputs = streaming.call_steps(given, streams=streams)
    elif not traced and not streaming.delay and streaming.get_config().get("temporal_dim", 1) == 1:
        streaming.ensure_streams(held)
        outputs = streaming.call_steps(*inputs, streams=streams)
    else:
        streaming.ensure_streams(held)
        call = _graph_step(streaming)
        steps = [
            call(*(x[:, t] for x in inputs), streams=tf.constant(streams))
            for t in range(inputs[0].shape[1])
        ]
        outputs = tf.stack(steps, 1)
    return [np.asarray(y) for y in keras.tree.flatten(outputs)]


@functools.lru_cache(maxsize=4)
def _graph_step(layer):
    """Return a layer's step as a graph, which gives an output at every step.

    With AutoGraph, tracing the layers here would take twice as long.
    """
    return tf.function(lambda *x, streams: layer.call_step(*x, streams=streams), autograph=False)
