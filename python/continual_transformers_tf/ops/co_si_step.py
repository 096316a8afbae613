"""One step of a whole attention layer, or of an encoder round it, as one fused op."""

import tensorflow as tf
from tensorflow.python import pywrap_tfe
from tensorflow.python.eager import context, core
from tensorflow.python.framework import ops
from tensorflow.python.ops import resource_variable_ops

MHA_STEP = "ContinualTransformers>CoSiMultiHeadAttentionStep"
ENCODER_STEP = "ContinualTransformers>CoSiTransformerEncoderStep"


class BoundVariables:
    """The variables of a layer's steps, in the order in which the op takes them.

    An eager op spends 0.7 us on every input, so that the step of a small layer with its twelve
    variables takes 25 us; with one resource that binds them, 19.

    Args:
        fused: the module with the fused ops.
        variables: `tf.Variable`s.
    """

    def __init__(self, fused, variables):
        self._variables = tuple(variables)
        with tf.init_scope():
            bound = fused.continual_transformers_bind_variables(
                variables=[variable.handle for variable in self._variables]
            )
        self._bound = [bound]

    @property
    def tensor(self):
        """The resource that binds them, an eager tensor."""
        return self._bound[0]

    def op_inputs(self, eager):
        """What the op takes: eagerly one resource; in a graph, which may be saved, them all."""
        if eager:
            return self._bound
        for variable in self._variables:
            # As reading it would: a graph that is saved has to know what it is made of.
            resource_variable_ops.variable_accessed(variable)
        return [variable.handle for variable in self._variables]


def co_si_step(fused, op, inputs, attributes):
    """Calls one of the ops; see their documentation, in `cc/tensorflow/ops.cc`.

    Args:
        fused: the module with the fused ops.
        op: its name, MHA_STEP or ENCODER_STEP.
        inputs: the op's inputs, in order; of lists those that are left out are empty.
        attributes: the op's, as a tuple (name, value, name, value, ...); of MHA_STEP `num_scores`
            among them.

    Returns:
        MHA_STEP: [result, [attention_scores] or []]. ENCODER_STEP: the result.

    Raises:
        tf.errors.InvalidArgumentError: if anything does not fit; the state then stays as it was.
    """
    ctx = context.context()
    if not ctx.executing_eagerly():
        return _in_graph(fused, op, inputs, attributes)
    # What the generated function does, without the 8 us that it takes for looking at every argument
    # and setting every attribute to its default.
    try:
        return pywrap_tfe.TFE_Py_FastPathExecute(ctx, op, None, *inputs, *attributes)
    except core._NotOkStatusException as error:
        ops.raise_from_not_ok_status(error, None)


def _in_graph(fused, op, inputs, attributes):
    attributes = dict(zip(attributes[::2], attributes[1::2], strict=True))
    if op == MHA_STEP:
        return fused.continual_transformers_co_si_multi_head_attention_step(*inputs, **attributes)
    return fused.continual_transformers_co_si_transformer_encoder_step(*inputs, **attributes)


def _gradient(op, *_):
    # None where TensorFlow only prepares for gradients, as it does when it saves a graph.
    message = (
        "Expected a step that is differentiated to be taken with training=True: a graph does not "
        "see a tape outside it, and takes its step for serving, by an op without a gradient"
    )
    with tf.control_dependencies([tf.debugging.Assert(False, [message])]):
        of_query = tf.identity(tf.zeros_like(op.inputs[0]))
    return [of_query] + [None] * (len(op.inputs) - 1)


for _op in (MHA_STEP, ENCODER_STEP):
    tf.RegisterGradient(_op)(_gradient)
