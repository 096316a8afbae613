"""The bound of a step of any model file: its dense products and attentions, as parts of `bound.h`.

Each instruction of a session is one part or several, or none: a norm or an activation must do
nothing that the bound counts. An instruction that a session runs in place of several nodes of the
plan counts as what it runs.
"""

import json
import math
from pathlib import Path
from typing import NamedTuple

FLOAT = 4  # The bytes of a number of float32.
DOUBLE = 8


class Part(NamedTuple):
    """The work of one part of a step, for one stream.

    Attributes:
        weight_bytes: The bytes of weights that it reads.
        stream_bytes: The bytes of the stream's window that it reads.
        multiply_adds: Its multiply-adds.
    """

    weight_bytes: int
    stream_bytes: int
    multiply_adds: int


def read_plan(path):
    """Return the plan of a model file."""
    with Path(path).open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return json.loads(header["__metadata__"]["plan"])


def parts_of(plan, instructions):
    """Return a list of parts for each instruction.

    Args:
        plan: The plan of a model file.
        instructions: The names of the nodes that each instruction runs, joined by " + ": the names
            of the rows of `ct.Session.profile()`.

    Raises:
        ValueError: If an attention or product of the plan is in no instruction.
    """
    nodes = {node["name"]: node for node in plan["nodes"]}
    found = []
    for name in instructions:
        run = [nodes.pop(part) for part in name.split(" + ")]
        found.append(_parts_of_instruction(plan, run))
    left = [name for name, node in nodes.items() if node["op"] in _PARTS]
    if left:
        raise ValueError(f"Expected instructions that run all nodes, but none runs {left}")
    return found


def _parts_of_instruction(plan, run):
    last = run[-1]
    if last["op"] == "window_attention" and len(run) > 1:
        projections = [node for node in run if node["op"] == "dense"]
        return _few_queries(plan, *projections, last)
    return [_PARTS[node["op"]](plan, node) for node in run if node["op"] in _PARTS]


def _shapes(plan, node):
    """Return the shapes of a node's inputs, and then of its outputs."""
    return [plan["values"][i]["shape"] for i in (*node["inputs"], *node["outputs"])]


def _product(rows, inputs, outputs):
    return Part(FLOAT * inputs * outputs, 0, rows * inputs * outputs)


def _dense(plan, node):
    x, y = _shapes(plan, node)
    return _product(math.prod(x[:-1]), x[-1], y[-1])


def _recurrent(plan, node):
    """The product with the state: a row after the other, with one kernel."""
    x, y = _shapes(plan, node)
    return _product(math.prod(x[:-1]), y[-1], x[-1])


def _attention(plan, node):
    (query,), (key,), (value,), (output,) = _shapes(plan, node)[-4:]
    attributes = node["attributes"]
    columns = attributes["end_column"] - attributes["first_column"]
    return Part(0, FLOAT * columns * (key + value), columns * (query + output))


def _retroactive_attention(plan, node):
    """As `PartsOfRetroactiveLayer` of layer_benchmark.cc counts it, for values of any size."""
    (query,), _, (value,), (rows, _) = _shapes(plan, node)[:4]
    bytes_of_row = FLOAT * query + DOUBLE * value
    return Part(0, rows * bytes_of_row, 2 * rows * (query + value))


def _window_attention(plan, node):
    (queries, query), (rows, key), (_, value), (_, output) = _shapes(plan, node)
    pairs = _pairs(queries, rows, node["attributes"])
    return Part(0, FLOAT * rows * (key + value), pairs * (query + output))


def _pairs(queries, rows, attributes):
    """Return how many keys all queries attend to, in a full window."""
    first, band = rows - queries, attributes["band"]
    return sum(
        (j <= i or not attributes["causal"]) and (not band or abs(i - j) < band)
        for i in range(first, rows)
        for j in range(rows)
    )


def _few_queries(plan, key, value, attention):
    """The parts of `few_queries_instruction.h`, which multiplies queries by the keys' kernel."""
    heads = attention["attributes"]["heads"]
    queries = _shapes(plan, attention)[0][0]
    (rows, key_inputs), (_, key_outputs) = _shapes(plan, key)
    (_, value_inputs), (_, value_outputs) = _shapes(plan, value)
    read = key_inputs if key["inputs"] == value["inputs"] else key_inputs + value_inputs
    among = queries * heads * rows * (key_inputs + value_inputs)
    return [
        _product(queries, key_outputs, key_inputs),
        Part(0, FLOAT * rows * read, among),
        _product(queries, value_inputs, value_outputs),
    ]


_PARTS = {
    "dense": _dense,
    "recurrent": _recurrent,
    "attention": _attention,
    "retroactive_attention": _retroactive_attention,
    "window_attention": _window_attention,
}
