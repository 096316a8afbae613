"""Hand-made model files, for tests of sessions that need no Keras model.

They follow docs/model_file.md only, and use no code of the package.
"""

import json
import tempfile
from pathlib import Path

import numpy as np


class PlanFile:
    """A plan and its weights.

    Args:
        compute_dtype, cache_dtype, weights_dtype: As in docs/model_file.md.
        receptive_field: In steps.
    """

    def __init__(
        self, compute_dtype="float32", cache_dtype=None, weights_dtype=None, receptive_field=1
    ):
        self.compute_dtype = compute_dtype
        self.tensors = {}
        self.plan = {
            "producer": "tests",
            "name": "plan",
            "compute_dtype": compute_dtype,
            "cache_dtype": cache_dtype or compute_dtype,
            "weights_dtype": weights_dtype or compute_dtype,
            "receptive_field": receptive_field,
            "delay": 0,
            "block": 1,
            "values": [],
            "inputs": [],
            "outputs": [],
            "input_structure": 0,
            "output_structure": 0,
            "nodes": [],
            "keras_state": [],
        }

    def value(self, *shape, dtype=None):
        """Add a value, and return its number."""
        self.plan["values"].append({"shape": list(shape), "dtype": dtype or self.compute_dtype})
        return len(self.plan["values"]) - 1

    def input(self, name, *shape, dtype=None):
        number = self.value(*shape, dtype=dtype)
        self.plan["inputs"].append({"name": name, "value": number})
        return number

    def output(self, name, number):
        self.plan["outputs"].append({"name": name, "value": number})

    def node(self, op, inputs, output, weights=None, masks=None, **attributes):
        """Add a node. `weights` are arrays by the node's names for them."""
        name = f"{op}_{len(self.plan['nodes'])}"
        names = {}
        for key, array in (weights or {}).items():
            names[key] = f"{name}/{key}"
            self.tensors[names[key]] = array
        node = {"op": op, "name": name, "inputs": inputs, "outputs": [output]}
        node |= {"weights": names, "attributes": attributes}
        if masks:
            node["masks"] = masks
        self.plan["nodes"].append(node)
        return output

    def dense(self, random, x, size):
        """Add a dense node with random weights, and return its output."""
        of = self.plan["values"][x]["shape"][-1]
        weights = {
            "kernel": (random.standard_normal((of, size)) / np.sqrt(of)).astype(self.compute_dtype),
            "bias": random.standard_normal(size).astype(self.compute_dtype),
        }
        return self.node("dense", [x], self.value(size), weights)

    def to_bytes(self):
        kinds = {"float32": "F32", "float64": "F64", "int64": "I64"}
        header = {
            "__metadata__": {
                "format": "continual-transformers",
                "format_version": "1",
                "plan": json.dumps(self.plan),
            }
        }
        data = b""
        for name, array in self.tensors.items():
            header[name] = {
                "dtype": kinds[array.dtype.name],
                "shape": list(array.shape),
                "data_offsets": [len(data), len(data) + array.nbytes],
            }
            data += array.tobytes()
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text + data

    def write(self, folder, name="model.safetensors"):
        path = Path(folder) / name
        path.write_bytes(self.to_bytes())
        return path

    def session(self, **options):
        """Return a session of the plan. Its file is deleted, but stays mapped."""
        from continual_transformers_tf.session import Session

        with tempfile.TemporaryDirectory() as folder:
            return Session.load(self.write(folder), **options)


def attention_plan(random, features=6, heads=2, key_size=3, window=4, outputs=5, **options):
    """x -> dense -> attention over the window -> + dense(x) -> dense -> y."""
    plan = PlanFile(receptive_field=window, **options)
    size = heads * key_size
    x = plan.input("x", features)
    projected = [plan.dense(random, x, size) for _ in range(3)]
    attended = plan.node(
        "attention",
        projected,
        plan.value(size),
        heads=heads,
        window=window,
        first_column=0,
        end_column=window,
        query_delay=0,
        scale=key_size**-0.5,
    )
    residual = plan.node(
        "binary", [attended, plan.dense(random, x, size)], plan.value(size), function="add"
    )
    plan.output("y", plan.dense(random, residual, outputs))
    return plan


def attention_only_plan(window=4, size=4, layers=1, **options):
    """Return a plan of attention layers whose query, key and value are the input or the last y."""
    plan = PlanFile(receptive_field=layers * (window - 1) + 1, **options)
    y = plan.input("x", size)
    for _ in range(layers):
        y = plan.node(
            "attention",
            [y, y, y],
            plan.value(size),
            heads=1,
            window=window,
            first_column=0,
            end_column=window,
            query_delay=0,
            scale=0.5,
        )
    plan.output("y", y)
    return plan


def attention_ports_plan(
    random, heads=4, key_heads=2, key_size=8, value_size=12, window=150, rows=None, *, bias=False,
    sink=False, **attributes
):  # fmt: skip
    """[query, key, value, has_key, asks] -> attention over the window, with both masks.

    Args:
        random: For the weights `bias` and `sink`.
        rows: Of each step, on an axis of its own; None: there is no such axis.
        **attributes: Of the node, in place of all columns and no delay, cap or scale.
    """
    plan = PlanFile(receptive_field=window)
    axis = [] if rows is None else [rows]
    sizes = (heads * key_size, key_heads * key_size, key_heads * value_size)
    ports = [
        plan.input(name, *axis, size)
        for name, size in zip(("query", "key", "value"), sizes, strict=True)
    ]
    masks = {
        name: plan.input(port, rows or 1, dtype="bool")
        for name, port in (("key", "has_key"), ("query", "asks"))
    }
    weights = {"bias": (heads, window)} if bias else {}
    weights |= {"sink": (heads,)} if sink else {}
    weights = {name: random.standard_normal(shape).astype("f4") for name, shape in weights.items()}
    attributes = {
        "first_column": 0, "end_column": window, "query_delay": 0, "scale": 1.0, **attributes
    }  # fmt: skip
    y = plan.node(
        "attention", ports, plan.value(*axis, heads * value_size), weights, masks, heads=heads,
        key_heads=key_heads, window=window, **attributes,
    )  # fmt: skip
    plan.output("y", y)
    plan.plan["input_structure"] = list(range(5))
    return plan


def normalized_plan(random, features=37, size=9, **options):
    """n = norm(x); x -> [dense(n), dense(n) + n, sigmoid(dense(n)), n]."""
    plan = PlanFile(**options)
    x = plan.input("x", features)
    weights = {
        name: random.standard_normal(features).astype(plan.compute_dtype)
        for name in ("gamma", "beta")
    }
    normalized = plan.node(
        "norm", [x], plan.value(features), weights, function="layer", epsilon=1e-3
    )
    plan.output("first", plan.dense(random, normalized, size))
    second = plan.dense(random, normalized, features)
    plan.output(
        "second",
        plan.node("binary", [second, normalized], plan.value(features), function="add"),
    )
    third = plan.dense(random, normalized, size)
    plan.output("third", plan.node("activation", [third], plan.value(size), function="sigmoid"))
    plan.output("normalized", normalized)
    plan.plan["output_structure"] = {port["name"]: i for i, port in enumerate(plan.plan["outputs"])}
    return plan


def many_ports_plan(random, rows=7, size=3):
    """{"sound": (3,), "word": ()} -> {"sum": sound + row of word, "late": [its delay]}.

    "word" is int32; "late" is the sum of 2 steps before.
    """
    plan = PlanFile(receptive_field=3)
    sound = plan.input("sound", size)
    word = plan.input("word", dtype="int32")
    table = random.standard_normal((rows, size)).astype("float32")
    row = plan.node("embedding", [word], plan.value(size), {"table": table})
    total = plan.node("binary", [sound, row], plan.value(size), function="add")
    late = plan.node("delay", [total], plan.value(size), steps=2)
    plan.output("sum", total)
    plan.output("late", late)
    plan.plan["input_structure"] = {"sound": 0, "word": 1}
    plan.plan["output_structure"] = {"sum": 0, "late": [1]}
    return plan, table


def two_ports_plan(random, size=3, columns=2):
    """[prices (3,), calendar (2,)] -> [prices + dense(calendar), that sum one step later]."""
    plan = PlanFile(receptive_field=2)
    prices, calendar = plan.input("prices", size), plan.input("calendar", columns)
    total = plan.node(
        "binary", [prices, plan.dense(random, calendar, size)], plan.value(size), function="add"
    )
    plan.output("sum", total)
    plan.output("late", plan.node("delay", [total], plan.value(size), steps=1))
    plan.plan["input_structure"] = plan.plan["output_structure"] = [0, 1]
    return plan


def negative_plan(names, structure, size=2):
    """Return a plan of inputs with these names, in this structure; outputs are -1 times inputs."""
    plan = PlanFile()
    for i, x in enumerate([plan.input(name, size) for name in names]):
        plan.output(f"y{i}", plan.node("activation", [x], plan.value(size), function="negative"))
    plan.plan["input_structure"] = plan.plan["output_structure"] = structure
    return plan
