"""One step of a whole attention layer, or of an encoder with it, as one fused op."""

from collections.abc import Sequence
from typing import Any

import tensorflow as tf
from tensorflow.python.ops import resource_variable_ops

MHA_STEP = "ContinualTransformers>CoSiMultiHeadAttentionStep"
ENCODER_STEP = "ContinualTransformers>CoSiTransformerEncoderStep"


def handles(variables: Sequence[tf.Variable]) -> list[tf.Tensor]:
    """Return the handles of the variables that the op reads and changes."""
    if tf.executing_eagerly():
        # No tape records this call: `FusedStepLayer._step_as_one_op` has checked that.
        return [variable.handle for variable in variables]
    for variable in variables:
        # As reading it would: a graph that is saved must know its variables.
        resource_variable_ops.variable_accessed(variable)
    return [variable.handle for variable in variables]


def layer_step(fused: Any, op: str, *inputs: Any, **attributes: Any) -> tuple[Any, ...]:
    """Call one of the two ops. `cc/tensorflow` documents them.

    Args:
        fused: The module with the fused ops.
        op: The name of the op, MHA_STEP or ENCODER_STEP.
        *inputs: The inputs, in order; an empty list for an input that is left out.
        **attributes: The attributes.

    Returns:
        A tuple of the op's outputs. MHA_STEP: (result, [attention_scores] or []). ENCODER_STEP:
        (result,).

    Raises:
        tf.errors.InvalidArgumentError: If anything does not fit. The state then stays as it was.
    """
    if op == MHA_STEP:
        step = fused.continual_transformers_co_si_multi_head_attention_step
        return tuple(step(*inputs, **attributes))
    return (fused.continual_transformers_co_si_transformer_encoder_step(*inputs, **attributes),)


def _gradient(op: tf.Operation, *_: Any) -> list[tf.Tensor | None]:
    # Fail when the gradient runs, not here: TensorFlow also builds gradients that no one asks for,
    # for example when it saves a graph.
    message = (
        "Expected a step that is differentiated to be taken with training=True: a graph does not "
        "see a tape outside it, and takes its step for serving, by an op without a gradient"
    )
    with tf.control_dependencies([tf.debugging.Assert(False, [message])]):
        of_query = tf.identity(tf.zeros_like(op.inputs[0]))
    return [of_query] + [None] * (len(op.inputs) - 1)


for _op in (MHA_STEP, ENCODER_STEP):
    tf.RegisterGradient(_op)(_gradient)
