"""The one-op step, called without TensorFlow's eager runtime (`cc/tensorflow/direct_step.cc`).

An eager op of this size costs five times as long to call as to compute. What the direct call cannot
do it declines, and the caller then takes the step by the op: other inputs than eager tensors on the
CPU and NumPy arrays, and every error.
"""

import ctypes
import functools

from tensorflow.python import _pywrap_tensorflow_internal
from tensorflow.python.eager import context, record

from continual_transformers_tf.ops import library

# Those that the op has, in the order of `Activation` in cc/attention/co_si_encoder_step.h.
ACTIVATIONS = ("linear", "gelu", "relu")


class DirectStep:
    """Calls the op `CoSiMultiHeadAttentionStep` or `CoSiTransformerEncoderStep` directly.

    Args:
        bound: a `BoundVariables`.
        attributes: a dict of the op's attributes; those that are left out have their defaults.
        encoder: whether the op is that of the encoder.
        double: whether it computes in float64.
    """

    def __init__(self, bound, attributes, encoder, double):
        self._take = _function()
        self._bound = bound.tensor
        options = (
            attributes.get("use_bias", True)
            | attributes.get("use_gate", False) << 1
            | attributes.get("use_delay", False) << 2
            | encoder << 4
            | attributes.get("norm_first", False) << 5
            | double << 6
            | ACTIVATIONS.index(attributes.get("activation", "linear")) << 7
        )
        self._epsilon = attributes.get("epsilon", 0.0) + attributes.get("epsilon_low", 0.0)
        self._options = {False: options, True: options | 1 << 3}  # By update_state.
        self._eager = context.context()
        # Of its own, and not ctypes.pythonapi's, whose types everybody shares.
        prototype = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)
        pointer_of = prototype(("PyCapsule_GetPointer", ctypes.pythonapi))
        self._eager_handle = pointer_of(self._eager._handle, None)

    def __call__(self, query, value, key, streams, first_step, update_state):
        """Takes a step.

        Args:
            query, value, key, streams: inputs of the op, eager tensors or NumPy arrays; None where
                they are left out.
            first_step, update_state: attributes of the op.

        Returns:
            The result, an eager tensor; None, before the first step that has one; or
            NotImplemented: no step was taken.
        """
        if context.context() is not self._eager:  # It was reset, and the pointer to it dangles.
            return NotImplemented
        thread = self._eager._thread_local_data
        # A tape has to see the op, and so does a debugger.
        if not thread.is_eager or thread.op_callbacks or record.could_possibly_record():
            return NotImplemented
        return self._take(
            self._eager_handle, self._bound, query, value, key, streams, first_step,
            self._options[update_state], self._epsilon,
        )  # fmt: skip


def direct_step(bound, attributes, encoder=False, double=False):
    """A `DirectStep`, or None where this TensorFlow lacks something of what it calls."""
    if _function() is None:
        return None
    try:
        return DirectStep(bound, attributes, encoder, double)
    except (AttributeError, ValueError):
        return None


@functools.cache
def _function():
    try:
        # Python's lock is held: the function gives it up while it computes.
        native = ctypes.PyDLL(str(library.LIBRARY_PATH))
        find = native.continual_transformers_find_runtime
        find.restype, find.argtypes = ctypes.c_char_p, [ctypes.c_char_p]
        if find(_pywrap_tensorflow_internal.__file__.encode()):
            return None
    except (AttributeError, OSError):
        return None
    take = native.continual_transformers_co_si_step
    take.restype = ctypes.py_object
    take.argtypes = [
        ctypes.c_void_p, *[ctypes.py_object] * 5, ctypes.c_int64, ctypes.c_int, ctypes.c_double
    ]  # fmt: skip
    return take
