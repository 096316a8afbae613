"""An eager step of many ops as one `tf.function`: by itself each op costs Python some 100 µs."""

import numpy as np
import tensorflow as tf
from tensorflow.python.eager import record

from continual_transformers_tf.layers.co_si_encoder_step import OneOpEncoderStep
from continual_transformers_tf.ops.library import fused_ops


class GraphedStep:
    """A whole's step, traced when it is first taken: a second or two, and then 20 times as fast.

    Args:
        layer: built, with `_take_step(x, training, streams, update_state)`, which takes a step of M
            streams by ops and always gives outputs, as graphs do.
        blocks: the list of the encoder blocks that it is made of, the first of which has the state
            of the streams.
    """

    def __init__(self, layer, blocks):
        self._layer, self._blocks = layer, blocks
        self._state = blocks[0].attention._stream_state
        self._features = blocks[0].input_features["x"]
        self._functions = {}  # Of update_state.
        self._made_of = None

    def __deepcopy__(self, memo):
        return None  # The copy traces its own.

    def __call__(self, x, streams, update_state):
        """The outputs of x `(M, E)`, of the layer's dtype; they are never None.

        Raises:
            ValueError: if x or the streams do not fit; nothing has then changed.
        """
        state, rows = self._state, x.shape[0]
        if x.shape[1] != self._features:
            raise ValueError(f"Expected x of shape (M, {self._features}), but got {x.shape}")
        with state.lock:
            if streams is not None:
                streams = state.checked(streams, rows)
            else:
                streams = state.streams_of_call(None, rows)
            return self._function(bool(update_state))(x, streams)

    def _function(self, update_state):
        made_of = self._parts()
        old = self._made_of
        if old is None or any(a is not b for a, b in zip(made_of, old, strict=True)):
            self._made_of, self._functions = made_of, {}
        if update_state not in self._functions:
            layer = self._layer

            def take(x, streams):
                return layer._take_step(x, None, streams, update_state)

            signature = [
                tf.TensorSpec([None, self._features], layer.compute_dtype),
                tf.TensorSpec([None], tf.int32),
            ]
            self._functions[update_state] = tf.function(take, signature, autograph=False)
        return self._functions[update_state]

    def _parts(self):
        """What was traced, and would not be noticed to have changed; compared by identity."""
        found = [fused_ops(self._state.device_type)]
        for block in self._blocks:
            for dense in OneOpEncoderStep.dense_layers(block):
                # One that is quantized, or given a low-rank addition, has another kernel.
                found += [dense._kernel, dense.quantization_mode, dense.lora_enabled]
            found += [block.feed_forward.activation]
            found += [norm.epsilon for norm in (block.attention_norm, block.output_norm)]
        return found


def graphed_step(layer, blocks, training):
    """The layer's `GraphedStep`, or None where its step is to be taken by single ops.

    That is in a graph, in training, and whatever else may be differentiated.
    """
    if training or not tf.executing_eagerly() or record.could_possibly_record():
        return None
    if layer._graphed_step is None:
        layer._graphed_step = GraphedStep(layer, blocks)
    return layer._graphed_step


def furthest(layer, rows, streams):
    """The most steps that a stream of an eager call has taken."""
    # One op, and then NumPy: variables' own methods take several, and five times as long.
    handle = layer.position.handle
    taken = tf.raw_ops.ReadVariableOp(resource=handle, dtype=tf.int64).numpy()
    taken = taken[:rows] if streams is None else taken[np.asarray(streams)]
    return int(taken.max(initial=0))
