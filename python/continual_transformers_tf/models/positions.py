"""Tables of positions: the parts of a model that add row i of a table to step i of a window.

A stream cannot do this exactly, because a step has another place in the window at every step. A
`CircularPositionalEncoding` with the rows of the table takes its place.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import numpy.typing as npt

from continual_transformers_tf.layers.circular_positional_encoding import CircularPositionalEncoding
from continual_transformers_tf.layers.continual_layer import ContinualLayer
from continual_transformers_tf.models.row_wise import name_of_op

Array = npt.NDArray[Any]

RECYCLE = (
    "so it cannot stream exactly: ct.convert(model, seq_len, positions='recycle') puts a "
    "ct.CircularPositionalEncoding with these rows in its place, to be fine-tuned"
)


@dataclasses.dataclass(frozen=True)
class Table:
    """A table of positions in a model's graph.

    Attributes:
        rows: Its rows `[R, E]`.
        window: The index of the tensor that they are added to, among the node's inputs; None: the
            node returns only the rows, for its first input.
        graph: The graph of a layer's call in which they are added; None: the node itself adds them.
    """

    rows: Array
    window: int | None = 0
    graph: keras.Function | None = None

    @property
    def why(self) -> str:
        """Why it does not stream, and what to do."""
        return (
            f"adds row i of a table of {len(self.rows):,} rows to step i of a window, but the "
            f"place of a step in the window changes at every step, {RECYCLE}"
        )


def table_of(node: Any) -> Table | None:
    """Return the table of positions that a node of Keras' graph adds to windows, if it does."""
    op = node.operation
    if name_of_op(op) == "Add":
        return _table_of_add(node)
    module = type(op).__module__
    if module.startswith(("keras_hub.", "keras_nlp.")):
        return _table_of_keras_hub(op, node)
    if isinstance(op, keras.layers.Layer) and not isinstance(op, (keras.Model, ContinualLayer)):
        return None if module.startswith("keras.") else _table_of_layer(op, node)
    return None


def _table_of_add(node: Any) -> Table | None:
    args = [*node.arguments.args, *node.arguments.kwargs.values()]
    windows = [x for x in args if isinstance(x, keras.KerasTensor)]
    fixed = [x for x in args if hasattr(x, "shape") and not isinstance(x, keras.KerasTensor)]
    if len(windows) != 1 or len(fixed) != 1 or len(windows[0].shape) != 3:
        return None
    _, length, features = windows[0].shape
    shape = tuple(fixed[0].shape)
    if not 2 <= len(shape) <= 3 or shape[:-2] not in ((), (1,)) or features is None:
        return None
    rows, columns = shape[-2:]
    if rows == 1 or rows not in (length, None if length else rows) or columns not in (1, features):
        return None
    fixed_array = np.asarray(getattr(fixed[0], "value", fixed[0])).reshape(rows, columns)
    return Table(np.broadcast_to(fixed_array, (rows, features)))


def _table_of_keras_hub(layer: Any, node: Any) -> Table | None:
    """Return the table of a layer of KerasHub that returns the rows, by the name of its class."""
    name, shape = type(layer).__name__, node.input_tensors[0].shape
    if name == "PositionEmbedding":
        return Table(np.asarray(layer.position_embeddings), window=None)
    if name == "SinePositionEncoding" and None not in shape[1:]:
        rows = np.asarray(layer(np.zeros((1, *shape[1:]), "float32")))[0]
        return Table(rows, window=None)
    return None


def _table_of_layer(layer: keras.layers.Layer, node: Any) -> Table | None:
    """Return the table of a layer of the user's own, whose call is traced."""
    if len(node.input_tensors) != 1 or not layer.built:
        return None
    x = keras.KerasTensor(node.input_tensors[0].shape, node.input_tensors[0].dtype)
    try:
        graph = keras.Function(x, layer.call(x))
    except Exception:  # Whatever a user's layer raises if it computes by other means.
        return None
    tables = [t for n in _nodes(graph) if (t := table_of(n)) is not None]
    return Table(tables[0].rows, graph=graph) if len(tables) == 1 else None


def _nodes(graph: keras.Function) -> list[Any]:
    """Return the nodes of a graph without its inputs, in the order in which they run."""
    depths = sorted(graph._nodes_by_depth, reverse=True)
    return [n for depth in depths for n in graph._nodes_by_depth[depth] if not n.is_input]


def tables_within(model: keras.Model) -> dict[int, Table]:
    """Return the tables of a model and those within it, by the ids of their operations."""
    graph = model._functional if isinstance(model, keras.Sequential) else model
    if not hasattr(graph, "_nodes_by_depth"):
        return {}
    tables: dict[int, Table] = {}
    for node in _nodes(graph):
        if isinstance(node.operation, keras.Model):
            tables |= tables_within(node.operation)
        elif (table := table_of(node)) is not None:
            tables[id(node.operation)] = table
    return tables


class Recycled:
    """Circular encodings in the place of tables, while a model is copied.

    Args:
        copy: A function that copies a layer or operation of the model.
    """

    def __init__(self, copy: Callable[[Any], Any]) -> None:
        self._copy = copy
        self._made: list[tuple[CircularPositionalEncoding, Array]] = []
        self._copies: dict[int, Any] = {}  # Id of a layer within a user's layer -> its copy.

    def call(self, op: Any, table: Table, *args: Any, **kwargs: Any) -> Any:
        """Call what takes the place of an operation that adds a table, with its arguments."""
        if table.graph is not None:
            return self._call_graph(table.graph, args[0])
        windows = [x for x in (*args, *kwargs.values()) if isinstance(x, keras.KerasTensor)]
        x = windows[0] if table.window is not None else keras.ops.zeros_like(windows[0])
        encoding = CircularPositionalEncoding(*table.rows.shape, name=f"{op.name}_recycled")
        self._made.append((encoding, table.rows))
        return encoding(x)

    def _call_graph(self, graph: keras.Function, x: keras.KerasTensor) -> Any:
        """Call the operations of a user's layer one by one."""
        values = {id(graph.inputs[0]): x}
        for node in _nodes(graph):
            args, kwargs = node.arguments.fill_in(values)
            table = table_of(node)
            if table is not None:
                outputs = self.call(node.operation, table, *args, **kwargs)
            else:
                outputs = self._copied(node.operation)(*args, **kwargs)
            flat = keras.tree.flatten(outputs)
            values.update((id(y), z) for y, z in zip(node.outputs, flat, strict=True))
        outputs = [values[id(y)] for y in graph.outputs]
        return keras.tree.pack_sequence_as(graph._outputs_struct, outputs)

    def _copied(self, op: Any) -> Any:
        if id(op) not in self._copies:
            self._copies[id(op)] = self._copy(op)
        return self._copies[id(op)]

    def assign_rows(self) -> None:
        """Give the encodings the rows of the tables."""
        for encoding, rows in self._made:
            encoding.embeddings.assign(rows)
