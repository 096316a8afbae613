"""The order of the ops in a graph under construction: which ops end it, and which change state.

The graph is one that TensorFlow is tracing. Ops are told apart by the moment at which they were
added: `first` is the number of ops that the graph had then.
"""

import tensorflow as tf
from tensorflow.python.framework.func_graph import FuncGraph

# Ops on a variable that do not change it.
READS = ("ReadVariableOp", "ResourceGather", "ResourceGatherNd", "VariableShape")


def last_ops(graph: tf.Graph, first: int) -> list[tf.Operation]:
    """Return the ops from the first-th on that no other op waits for.

    Whoever waits for them waits for all ops from the first-th on.
    """
    return [
        op
        for op in graph.get_operations()[first:]
        if not op._control_outputs and not any(output.consumers() for output in op.outputs)
    ]


def writing_ops(graph: tf.Graph, first: int) -> list[tf.Operation]:
    """Return the ops from the first-th on that may change a variable."""
    return [
        op
        for op in graph.get_operations()[first:]
        if op.type not in READS and any(x.dtype == tf.resource for x in op.inputs)
    ]


def stateful_ops(graph: tf.Graph, first: int, handles: list[tf.Tensor]) -> list[tf.Operation]:
    """Return the ops from the first-th on that have to do with state.

    Left out are ops that only compute, and reads of variables that nothing here changes, such as
    weights. Reads of the variables with these handles are never left out.
    """
    ops = graph.get_operations()[first:]
    ours = {id(handle) for handle in handles}
    captured: dict[int, dict[int, tf.Tensor]] = {}
    resources = {op: [x for x in op.inputs if x.dtype == tf.resource] for op in ops}
    changed = {id(x) for op, inputs in resources.items() if op.type not in READS for x in inputs}

    def matters(op: tf.Operation) -> bool:
        if op.type not in READS:
            return op._is_stateful or bool(resources[op])
        handle = resources[op][0]
        origin = _origin(handle, captured)
        return id(handle) in changed or origin is None or id(origin) in ours

    return [op for op in ops if op.type not in ("Const", "Placeholder") and matters(op)]


def wait_for(op: tf.Operation, other: tf.Operation) -> None:
    """Have an op wait for another op, which must not itself wait for it."""
    op._add_control_input(other)


def _origin(tensor: tf.Tensor, captured: dict[int, dict[int, tf.Tensor]]) -> tf.Tensor | None:
    """Return the eager tensor that a function's tensor was captured from; None: there is none.

    Args:
        tensor: A tensor of a graph.
        captured: What was captured, by the ids of graphs and then of tensors; filled here.
    """
    while tf.is_symbolic_tensor(tensor):
        graph = tensor.graph
        if not isinstance(graph, FuncGraph):
            return None
        if id(graph) not in captured:
            captured[id(graph)] = {id(inner): outer for outer, inner in graph.captures}
        tensor = captured[id(graph)].get(id(tensor))
    return tensor
