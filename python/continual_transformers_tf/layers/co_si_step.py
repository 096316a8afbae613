"""A step of `CoSiMultiHeadAttention` as one op."""

import numpy as np
import tensorflow as tf
from keras.src.backend.common.stateless_scope import in_stateless_scope
from tensorflow.python.eager import record

from continual_transformers_tf.layers.inputs import check_features, check_same_rows, step_input
from continual_transformers_tf.ops.co_si_step import MHA_STEP, co_si_step, handles
from continual_transformers_tf.ops.library import fused_ops, has_kernel, in_xla
from continual_transformers_tf.ops.single_output import expand_key_mask, expand_mask
from continual_transformers_tf.ops.stream_state import stream_tensor

PLAIN_DTYPES = ("float32", "float64")

# The most rows of which a step on a GPU is one op. Its products read the weights once for every
# four rows; of many rows the library's own matrix products, and the attention's op between them,
# are faster. How many that are was not measured.
MOST_ROWS_ON_GPU = 16


class OneOpStep:
    """What the op needs of a layer, gathered once.

    Args:
        layer: a built `CoSiMultiHeadAttention`.
        fused: the module with the fused ops.
    """

    op = MHA_STEP
    encoder = False  # Whether there is more of a layer than the attention.

    def __init__(self, layer, fused):
        self._layer = layer
        self._attention = layer.attention if self.encoder else layer
        self._cache = self._attention._stream_state
        self._fused = fused
        self._dtype = tf.as_dtype(layer.compute_dtype)
        self._dense = self.dense_layers(layer)
        # A layer that is quantized, or given a low-rank addition, has another kernel than here.
        self._kernels = tuple(dense._kernel for dense in self._dense)
        self._masks = {causal: fixed_mask(self._attention, causal) for causal in (False, True)}
        self._gather()

    @staticmethod
    def dense_layers(layer):
        """The layer's dense layers, in the order of the op's variables."""
        gate = [layer._gate_dense] if layer._use_gate else []
        return (
            layer._query_dense,
            layer._key_dense,
            layer._value_dense,
            *gate,
            layer._output_dense,
        )

    @classmethod
    def of(cls, layer):
        """That of a built layer, or None where the op cannot take the layer's steps."""
        plain = layer.compute_dtype in PLAIN_DTYPES and layer.variable_dtype == layer.compute_dtype
        if not plain or not cls.takes(layer):
            return None
        for dense in cls.dense_layers(layer):
            if dense.quantization_mode is not None or dense.lora_enabled:
                return None
        cache = (layer.attention if cls.encoder else layer)._stream_state
        fused = fused_ops(cache.device_type)
        # Where the op has no kernel there is still that of the attention, for several ops to call.
        if fused is None or not has_kernel(cls.op, cache.device_type):
            return None
        # Of one device: that of a layer that was made on one and built on another has two.
        weights = layer.weights
        if any(weight.value.device != cache.keys.device for weight in weights):
            return None
        return cls(layer, fused)

    @staticmethod
    def takes(layer):
        """Whether the op knows what the layer is made of."""
        return layer._no_steps is None

    def __deepcopy__(self, memo):
        return None  # Of the copy's own variables it is gathered anew.

    def fits(self):
        """Whether the layer's kernels still are those that were gathered."""
        for dense, kernel in zip(self._dense, self._kernels, strict=True):
            # One that is quantized to float8 keeps its kernel.
            if dense._kernel is not kernel or dense.lora_enabled or dense.quantization_mode:
                return False
        return True

    def _gather(self):
        """Gather the op's variables, with the kernels in the layer's `weights_dtype`."""
        attention, cache = self._attention, self._cache
        weights_dtype = attention.weights_dtype
        if weights_dtype is None:
            kernels = [kernel.value for kernel in self._kernels]
        else:
            narrow = self._layer._narrow_kernels
            kernels = narrow.of(self._dense, weights_dtype, cache.keys.device)
        rings = []
        if attention.delay > 0:
            rings = [cache.query, cache.query_mask]
            rings += [cache.gate] if attention._use_gate else []
        state = [cache.keys, cache.values, cache.key_mask, cache.position]
        self._variables = tuple(state + rings + self._weights(kernels))

    def _weights(self, kernels):
        """The weights in the op's order; of dense layers these kernels."""
        weights = []
        for dense, kernel in zip(self._dense, kernels, strict=True):
            weights += [kernel] if dense.bias is None else [kernel, dense.bias.value]
        return weights

    def _first_step(self):
        """The first step of a stream that gives an output: 0 in a graph, which always gives one."""
        attention = self._attention
        if not tf.executing_eagerly():
            return 0
        return attention.delay + 1 if attention.active_warm_up == "partial" else attention.seq_len

    def __call__(
        self,
        return_attention_scores,
        query,
        value,
        key,
        attention_mask,
        query_mask,
        value_mask,
        key_mask,
        use_causal_mask,
        streams,
        update_state,
    ):
        """A step's outputs and scores, or (None, None) while the window fills.

        Args:
            return_attention_scores: whether to return the scores too.
            query, value, ..., update_state: as `CoSiMultiHeadAttention.call_step` has them.
        """
        query, value, key = self._inputs(query, value, key)
        masks = _masks(
            self._masks[use_causal_mask], attention_mask, query_mask, value_mask, key_mask, query,
            self._cache,
        )  # fmt: skip
        result, scores = self._call_op(
            (query, _list_of(value), _list_of(key)), masks, streams, update_state,
            num_scores=int(return_attention_scores),
        )  # fmt: skip
        return (None, None) if result is None else (result, scores[0] if scores else None)

    def _call_op(self, inputs, masks, streams, update_state, **attributes):
        """The op's outputs; result is None while the window fills.

        Args:
            inputs: the op's before its variables; the first is the query.
            masks: the op's after streams.
            streams, update_state: as `call_step` has them.
            **attributes: of the op, beside those of every call.
        """
        all_streams, query = self._cache.streams, inputs[0]
        step = all_streams.step
        if step is not None:  # Of a whole, which has seen to its streams.
            streams = step.streams
        else:
            if update_state:
                all_streams.expect_to_step(self._layer)
            if streams is None:
                rows = query.shape[0]
                all_streams.ensure_rows(tf.shape(query)[0] if rows is None else rows)
            else:
                streams = stream_tensor(streams)
        first_step = self._first_step()
        attributes |= self._layer_attributes()
        with all_streams.turn():
            result, *others = co_si_step(
                self._fused, self.op, *inputs, handles(self._variables), _list_of(streams), *masks,
                first_step=first_step, update_state=bool(update_state),
                advance_position=step is None or step.advancing(), sequence_first=True,
                **attributes,
            )  # fmt: skip
        # M = 0 gives no rows at any step; where a step before the first gives none, it is None too.
        if first_step > 1 and result.shape[0] == 0:
            result = None
        return result, *others

    def _layer_attributes(self):
        """The op's attributes that are the layer's own."""
        layer = self._layer
        return dict(use_bias=layer._use_bias, use_gate=layer._use_gate, use_delay=layer.delay > 0)

    def _inputs(self, query, value, key):
        """Tensors that fit each other and the layer; None for what is left out."""
        layer = self._layer
        layer._check_policy()
        given = {"query": query, "value": value, "key": key}
        tensors = {
            name: step_input(name, x, "step", layer.compute_dtype)
            for name, x in given.items()
            if x is not None or name == "query"
        }
        check_same_rows(**tensors)
        sizes = dict(zip(given, layer._features, strict=True))
        query = tensors["query"]
        value = tensors.get("value", query)
        key = tensors.get("key", value)
        for name, x in (("query", query), ("value", value), ("key", key)):
            check_features(name, x, sizes[name])
        return query, tensors.get("value"), tensors.get("key")


def one_op_step(layer, training, query, kind=OneOpStep):
    """The layer's `OneOpStep`, or None where its steps are to be taken by several ops.

    Those are training, and whatever else may be differentiated; 16-bit layers, whose products
    TensorFlow rounds in its own way; layers whose weights are not what Keras makes at first; steps
    within `keras.StatelessScope`, whose weights are given and not the layer's variables; and many
    rows on a GPU.

    Args:
        layer: the layer.
        training: whether this is training.
        query: the step's input, as the user gave it.
        kind: `OneOpStep`, or a subclass of it.
    """
    if training or record.could_possibly_record() or not layer.built or in_stateless_scope():
        return None
    state = (layer.attention if kind.encoder else layer)._stream_state
    if state.streams.step is not None and layer.delay > 0:
        # The op overwrites the queries that wait, which a second attempt would need if a later
        # layer of the whole fails.
        return None
    device_type = state.device_type
    if device_type == "GPU" and not few_rows(query):
        return None
    step = layer._one_op_step
    if step is None or not step.fits():
        step = layer._one_op_step = kind.of(layer)
    elif not tf.executing_eagerly() and in_xla():  # Where the library's ops are not known.
        return None
    return step


def few_rows(x):
    """Whether a step's input, as the user gave it, is known to have few enough rows for a GPU."""
    shape = tf.TensorShape(x.shape if hasattr(x, "shape") else np.shape(x))
    return bool(shape.rank) and shape[0] is not None and shape[0] <= MOST_ROWS_ON_GPU


def _list_of(x):
    """What the op takes of an input that may be left out."""
    return [] if x is None else [x]


def _masks(fixed, attention_mask, query_mask, value_mask, key_mask, query, cache):
    """What the op takes of the user's masks and the layer's own."""
    if attention_mask is not None:
        given = expand_mask(attention_mask, query.shape[0], 1, cache)
        fixed = given if fixed is None else fixed & given
    query_mask, value_mask, key_mask = (
        None if mask is None else expand_key_mask(name, mask, query, True)[:, 0]
        for name, mask in (
            ("query_mask", query_mask),
            ("value_mask", value_mask),
            ("key_mask", key_mask),
        )
    )
    if key_mask is None or value_mask is None:
        key_mask = value_mask if key_mask is None else key_mask
    else:
        key_mask &= value_mask
    return tuple(_list_of(mask) for mask in (fixed, query_mask, key_mask))


def fixed_mask(layer, use_causal_mask):
    """What the layer does not let the query of its window attend to: `[1, 1, 1, N]`, or None."""
    columns = np.arange(layer.seq_len)
    at = layer.seq_len - 1 - layer.delay  # The query's own column.
    allowed = np.full(layer.seq_len, True)
    if layer._sliding_window is not None:
        allowed &= np.abs(columns - at) < layer._sliding_window
    if use_causal_mask:
        allowed &= columns <= at
    if allowed.all():
        return None
    with tf.init_scope():
        return tf.constant(allowed[None, None, None])
