"""Steps of a layer that are one fused op each."""

from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras.src.backend.common.stateless_scope import in_stateless_scope
from tensorflow.python.eager import record

from continual_transformers_tf.layers.continual_layer import ContinualLayer
from continual_transformers_tf.layers.narrow_kernels import NarrowKernels
from continual_transformers_tf.ops.attention_cache import AttentionCache
from continual_transformers_tf.ops.layer_step import handles, layer_step
from continual_transformers_tf.ops.library import fused_ops, has_kernel, in_xla
from continual_transformers_tf.ops.stream_numbers import stream_tensor

PLAIN_DTYPES = ("float32", "float64")

# On a GPU, a step of more rows than this is taken by several ops. The fused op's products read the
# weights once for every four rows, from L2 after the first, and TensorFlow's matrix products are
# faster on many rows. The number is an estimate from the launches that the fused op saves, about
# ten. No GPU has measured it.
MOST_ROWS_ON_GPU = 128


class FusedStep:
    """The op that takes a layer's steps, and the variables that it reads and changes.

    Args:
        fused: The module with the fused ops.
        op: The name of the op.
        cache: The `AttentionCache` of the layer's streams.
        dense_layers: The layer's `Dense` and `EinsumDense` layers.
        state: The variables of the cache that the op uses, in its order.
        weights: The variables of weights that the op uses, in its order.
        attributes: The attributes of the op that are the same in every call.
    """

    def __init__(
        self,
        fused: Any,
        op: str,
        cache: AttentionCache,
        dense_layers: tuple[keras.layers.Layer, ...],
        state: list[tf.Variable],
        weights: list[tf.Variable],
        attributes: dict[str, Any],
    ) -> None:
        self._fused = fused
        self._op = op
        self._cache = cache
        self._dense_layers = dense_layers
        # A layer that is quantized or given a low-rank addition has another kernel than these.
        self._kernels = tuple(dense._kernel for dense in dense_layers)
        self._variables = (*state, *weights)
        self._attributes = attributes

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None  # A copied layer has variables of its own, and makes its own `FusedStep`.

    def fits(self, attributes: dict[str, Any] | None) -> bool:
        """Return whether the layer's kernels and attributes are still the ones given."""
        for dense, kernel in zip(self._dense_layers, self._kernels, strict=True):
            # A layer that is quantized to float8 keeps its kernel.
            if dense._kernel is not kernel or dense.lora_enabled or dense.quantization_mode:
                return False
        return attributes == self._attributes

    def __call__(
        self,
        layer: ContinualLayer,
        inputs: tuple[Any, ...],
        masks: tuple[Any, ...],
        first_output: int,
        streams: Any,
        update_state: bool,
        **attributes: Any,
    ) -> tuple[Any, ...]:
        """Take one step of M streams.

        Args:
            layer: The layer that takes the step.
            inputs: The op's inputs before its variables. The first is `(M, E)`.
            masks: The op's inputs after its streams.
            first_output: The first step of a stream that has an output; 0 in a graph.
            streams, update_state: As in `call_step`.
            **attributes: Other attributes of the op.

        Returns:
            The op's outputs. The first is None while the window fills.
        """
        all_streams, rows = self._cache.streams, inputs[0].shape[0]
        step = all_streams.step
        if step is not None:  # A larger layer takes the step, and has checked the streams.
            streams = step.streams
        else:
            if update_state:
                all_streams.expect_to_step(layer)
            if streams is None:
                all_streams.ensure_rows(tf.shape(inputs[0])[0] if rows is None else rows)
            else:
                streams = stream_tensor(streams)
        known = all_streams.known
        with all_streams.turn():
            if first_output > 1 and known.is_far:
                furthest = known.bounds(streams, rows).max(initial=0)
                if furthest >= first_output - 1:
                    first_output = 0  # The op need not ask, which would wait for the GPU.
            result, *others = layer_step(
                self._fused,
                self._op,
                *inputs,
                handles(self._variables),
                optional_input(streams),
                *masks,
                first_step=first_output,
                update_state=bool(update_state),
                advance_position=step is None or step.advancing(),
                sequence_first=True,
                **self._attributes,
                **attributes,
            )
            # The op returns no rows if no stream has come to its first output.
            if first_output > 1 and result.shape[0] == 0:
                result = None
            elif first_output > 1 and known.is_far:
                known.read(streams, rows)  # The next step need not ask.
        return result, *others


class FusedStepLayer(ContinualLayer):
    """A `ContinualLayer` whose step can be one fused op.

    A subclass defines `_fused_op` and the methods `_dense_layers`, `_fused_weights` and
    `_fused_attributes`.
    """

    _fused_op: str  # The name of the op.
    _fused_step: FusedStep | None = None  # Made at the first step that can use it.
    _narrow_kernels: NarrowKernels

    @property
    def weights_dtype(self) -> str | None:
        """The dtype of the kernels that a fused step reads: "bfloat16", or None for the layer's."""
        raise NotImplementedError

    def _dense_layers(self) -> tuple[keras.layers.Layer, ...]:
        """Return the layer's dense layers, in the order of the op's variables."""
        raise NotImplementedError

    def _fused_weights(self, dense_weights: list[tf.Variable]) -> list[tf.Variable]:
        """Return all weights in the op's order, given those of the dense layers."""
        return dense_weights

    def _fused_state(self) -> list[tf.Variable]:
        """Return the variables of the streams' state that the op uses, in its order."""
        state = self._stream_state
        return [state.keys, state.values, state.key_mask, state.position]

    def _fused_attributes(self) -> dict[str, Any] | None:
        """Return the op's attributes; None if the op cannot compute what the layer does."""
        raise NotImplementedError

    def _step_as_one_op(self, training: bool | None, x: Any) -> FusedStep | None:
        """Return the op of a step, or None if the step has to be taken by several ops.

        Several ops are needed in training, or if a gradient may be asked for; in layers of 16-bit
        dtypes, whose products TensorFlow rounds in its own way; if the layer's weights are not what
        Keras makes at first; within `keras.StatelessScope`, which gives weights that are not the
        layer's variables; and for many rows on a GPU.

        Args:
            training: Whether this is training.
            x: The step's input, as the user gave it.
        """
        if training or record.could_possibly_record() or not self.built or in_stateless_scope():
            return None
        state = self._stream_state
        if state.streams.step is not None and state.streams.step.rows_of_input.lag > 0:
            return None  # The op has no mask for rows that are not of the sequence.
        if state.streams.step is not None and self.delay > 0:
            # The op overwrites queries that wait. If a later layer of the model fails, a second
            # attempt needs them.
            return None
        if state.device_type == "GPU" and not has_few_rows(x):
            return None
        step = self._fused_step
        if step is None or not step.fits(self._fused_attributes()):
            step = self._fused_step = self._make_fused_step()
        elif not tf.executing_eagerly() and in_xla():  # XLA does not know the library's ops.
            return None
        return step

    def _make_fused_step(self) -> FusedStep | None:
        attributes, cache = self._fused_attributes(), self._stream_state
        plain = self.compute_dtype in PLAIN_DTYPES and self.variable_dtype == self.compute_dtype
        if attributes is None or not plain:
            return None
        dense_layers = self._dense_layers()
        if any(dense.quantization_mode or dense.lora_enabled for dense in dense_layers):
            return None
        fused = fused_ops(cache.device_type)
        if fused is None or not has_kernel(self._fused_op, cache.device_type):
            return None
        # A layer that was made on one device and built on another has variables on two.
        if any(weight.value.device != cache.keys.device for weight in self.weights):
            return None
        kernels = [dense._kernel.value for dense in dense_layers]
        if self.weights_dtype is not None:
            kernels = self._narrow_kernels.of(dense_layers, self.weights_dtype, cache.keys.device)
        weights = []
        for dense, kernel in zip(dense_layers, kernels, strict=True):
            weights += [kernel] if dense.bias is None else [kernel, dense.bias.value]
        return FusedStep(
            fused,
            self._fused_op,
            cache,
            dense_layers,
            self._fused_state(),
            self._fused_weights(weights),
            attributes,
        )

    def convert_weights(self) -> None:
        """Convert the kernels as they are now for steps in `weights_dtype`.

        `ct.convert_weights` says when to call it.
        """
        if self.built:
            self._narrow_kernels.convert(self._dense_layers())


def has_few_rows(x: Any) -> bool:
    """Return whether a step's input is known to have at most `MOST_ROWS_ON_GPU` rows."""
    shape = tf.TensorShape(x.shape if hasattr(x, "shape") else np.shape(x))
    return bool(shape.rank) and shape[0] is not None and shape[0] <= MOST_ROWS_ON_GPU


def optional_input(x: Any) -> list[Any]:
    """Return an op's optional input, which is a list of at most one tensor."""
    return [] if x is None else [x]
