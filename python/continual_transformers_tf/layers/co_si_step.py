"""A step of `CoSiMultiHeadAttention` as one op: no Keras call, nothing rebuilt per step."""

import numpy as np
import tensorflow as tf
from tensorflow.python.eager import context, record
from tensorflow.python.framework.ops import EagerTensor

from continual_transformers_tf.layers.continual_layer import always_partial_here
from continual_transformers_tf.layers.inputs import check_features, check_same_rows, step_input
from continual_transformers_tf.ops.co_si_step import MHA_STEP, BoundVariables, co_si_step
from continual_transformers_tf.ops.direct_step import direct_step
from continual_transformers_tf.ops.library import fused_ops, has_kernel, in_xla
from continual_transformers_tf.ops.single_output import expand_key_mask, expand_mask

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
        self._features = self._attention._features[0]
        self._narrow = None
        self._attributes = {}
        self._masks = {causal: fixed_mask(self._attention, causal) for causal in (False, True)}
        self.convert_weights()

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
        if any(weight.value.device != cache.key.device for weight in weights):
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

    def convert_weights(self):
        """Takes the kernels as they are now, in the layer's `weights_dtype`."""
        attention, cache = self._attention, self._cache
        weights_dtype = attention.weights_dtype
        if weights_dtype is None:
            kernels = [kernel.value for kernel in self._kernels]
        else:
            with tf.init_scope():
                narrow = [tf.cast(kernel.value, weights_dtype) for kernel in self._kernels]
                if self._narrow is None:
                    with tf.device(cache.key.device):
                        self._narrow = [tf.Variable(kernel, trainable=False) for kernel in narrow]
                else:
                    for variable, kernel in zip(self._narrow, narrow, strict=True):
                        variable.assign(kernel)
            kernels = self._narrow
        rings = []
        if attention.delay > 0:
            rings = [cache.query, cache.query_mask]
            rings += [cache.gate] if attention._use_gate else []
        state = [cache.key, cache.value, cache.key_mask, cache.position]
        self._variables = BoundVariables(self._fused, state + rings + self._weights(kernels))
        double = self._dtype == tf.float64
        self._direct = None
        if cache.device_type == "CPU":
            attributes = self._layer_attributes()
            self._direct = direct_step(self._variables, attributes, self.encoder, double)

    def _weights(self, kernels):
        """The weights in the op's order; of dense layers these kernels."""
        weights = []
        for dense, kernel in zip(self._dense, kernels, strict=True):
            weights += [kernel] if dense.bias is None else [kernel, dense.bias.value]
        return weights

    def direct(self, query, value, key, use_causal_mask, streams, update_state):
        """An eager step's outputs, None while the window fills; NotImplemented: take it by the op.

        That is slower by what TensorFlow's runtime takes, and does all that this does not: masks,
        scores, room for more streams, and errors.
        """
        if self._direct is None or self._masks[use_causal_mask] is not None:
            return NotImplemented
        if streams.__class__ is list:
            streams = np.array(streams)
        with self._cache.lock:
            first_step = self._first_step(always_partial_here())
            return self._direct(query, value, key, streams, first_step, bool(update_state))

    def _first_step(self, partial):
        """The first step of a stream that gives an output."""
        attention = self._attention
        if partial or attention.warm_up == "partial":
            return attention.delay + 1
        return attention.seq_len

    def __call__(self, return_attention_scores, *arguments):
        """A step's outputs and scores, or (None, None) while the window fills.

        Args:
            return_attention_scores: whether to return the scores too.
            *arguments: those of `_op_arguments`.
        """
        inputs, attributes = self._op_arguments(return_attention_scores, *arguments)
        with self._cache.lock:
            result, scores = co_si_step(self._fused, MHA_STEP, inputs, attributes)
        # Of no streams at all there are no outputs either way.
        warms_up = "first_step" in attributes
        if warms_up and result.__class__ is EagerTensor and result._shape_tuple()[0] == 0:
            return None, None
        return result, scores[0] if scores else None

    def _op_arguments(
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
        """The op's inputs and attributes, for the arguments of `call_step`."""
        layer, cache = self._layer, self._cache
        eager = context.executing_eagerly()
        rows, query, value, key = self._inputs(query, value, key)
        masks = _NO_MASKS
        fixed = self._masks[use_causal_mask]
        if not (fixed is attention_mask is query_mask is value_mask is key_mask is None):
            masks = _masks(fixed, attention_mask, query_mask, value_mask, key_mask, query, cache)
        if streams is None:
            cache.ensure_streams(tf.shape(query)[0] if rows is None else rows)
        first = self._first_step(layer.active_warm_up == "partial")
        inputs = (
            query,
            _NONE if value is None else [value],
            _NONE if key is None else [key],
            self._variables.op_inputs(eager),
            _NONE if streams is None else [cache.streams_of_call(streams, rows)],
            *masks,
        )
        first = first if eager else 0
        return inputs, self._attributes_of(first, update_state, bool(return_attention_scores))

    def _layer_attributes(self):
        """The op's attributes that are the layer's own, but for those that have their defaults."""
        layer, attributes = self._layer, {}
        if not layer._use_bias:
            attributes["use_bias"] = False
        if layer._use_gate:
            attributes["use_gate"] = True
        if layer.delay > 0:
            attributes["use_delay"] = True
        return attributes

    def _attributes_of(self, first_step, update_state, num_scores=None):
        """The op's attributes of a kind of call, as a tuple that is made once."""
        kind = (first_step, bool(update_state), num_scores)
        if kind not in self._attributes:
            # Each that is given costs an eager call 0.3 us, so the op's defaults are left out.
            attributes = {} if num_scores is None else {"num_scores": int(num_scores)}
            if first_step > 1:
                attributes["first_step"] = first_step
            if not update_state:
                attributes["update_state"] = False
            attributes |= self._layer_attributes()
            self._attributes[kind] = tuple(x for pair in attributes.items() for x in pair)
        return self._attributes[kind]

    def _inputs(self, query, value, key):
        """M, and tensors that fit each other and the layer; None for what is left out."""
        if value is None and key is None and query.__class__ is EagerTensor:
            # What serving gives: seen at a glance.
            shape = query._shape_tuple()
            if len(shape) == 2 and shape[1] == self._features and query.dtype is self._dtype:
                return shape[0], query, None, None
        layer = self._layer
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
        return query.shape[0], query, tensors.get("value"), tensors.get("key")


def one_op_step(layer, training, query, kind=OneOpStep):
    """The layer's `OneOpStep`, or None where its steps are to be taken by several ops.

    Those are training, and whatever else may be differentiated; 16-bit layers, whose products
    TensorFlow rounds in its own way; layers whose weights are not what Keras makes at first; and
    many rows on a GPU.

    Args:
        layer: the layer.
        training: whether this is training.
        query: the step's input, as the user gave it.
        kind: `OneOpStep`, or a subclass of it.
    """
    if training or record.could_possibly_record() or not layer.built:
        return None
    device_type = (layer.attention if kind.encoder else layer)._stream_state.device_type
    if device_type == "GPU" and not few_rows(query):
        return None
    step = layer._one_op_step
    if step is None or not step.fits():
        step = layer._one_op_step = kind.of(layer)
    elif not context.executing_eagerly() and in_xla():  # Where the library's ops are not known.
        return None
    return step


def few_rows(x):
    """Whether a step's input, as the user gave it, is known to have few enough rows for a GPU."""
    shape = tf.TensorShape(x.shape if hasattr(x, "shape") else np.shape(x))
    return bool(shape.rank) and shape[0] is not None and shape[0] <= MOST_ROWS_ON_GPU


# Made once: a step that makes ten short-lived lists keeps Python's garbage collector busy.
_NONE = []
_NO_MASKS = (_NONE, _NONE, _NONE)


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
    return tuple([] if mask is None else [mask] for mask in (fixed, query_mask, key_mask))


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
