"""The layer's step in ONNX Runtime: a graph with the rings as inputs and outputs."""

from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from continual_transformers_tf.bench.rivals import Array, Contestant, Weights, rings_of
from continual_transformers_tf.bench.sizes import Size


def _graph(size: Size, weights: Weights) -> onnx.ModelProto:
    rows, heads, head = size.streams, size.heads, size.head
    constants: dict[str, onnx.TensorProto] = {}
    nodes: list[onnx.NodeProto] = []

    def constant(name: str, value: Array) -> str:
        constants[name] = numpy_helper.from_array(value, name)
        return name

    def node(op: str, inputs: list[str], output: str, **attributes: Any) -> str:
        nodes.append(helper.make_node(op, inputs, [output], **attributes))
        return output

    def dense(x: str, i: int, output: str) -> str:
        kernel, bias = constant(f"w{i}", weights[i][0]), constant(f"b{i}", weights[i][1])
        return node("Add", [node("MatMul", [x, kernel], f"product{i}"), bias], output)

    split = constant("split", np.array([rows, heads, 1, head], np.int64))
    first, last = (constant(f"at{i}", np.array([i], np.int64)) for i in (1, size.seq_len))
    axis = constant("axis", np.array([2], np.int64))
    q, k, v = (node("Reshape", [dense("x", i, f"y{i}"), split], f"h{i}") for i in range(3))
    rings = []
    for name, new in (("key", k), ("value", v)):
        kept = node("Slice", [name, first, last, axis], f"{name}_kept")
        rings.append(node("Concat", [kept, new], f"{name}_out", axis=2))
    turned = node("Transpose", [rings[0]], "turned", perm=[0, 1, 3, 2])
    scale = constant("scale", np.array(head**-0.5, np.float32))
    logits = node("MatMul", [node("Mul", [q, scale], "scaled"), turned], "logits")
    scores = node("Softmax", [logits], "scores", axis=-1)
    merged = constant("merged_shape", np.array([rows, size.features], np.int64))
    attended = node("Reshape", [node("MatMul", [scores, rings[1]], "attended"), merged], "merged")
    dense(attended, 3, "y")

    def value(name: str, *shape: int) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)

    ring = (rows, heads, size.seq_len, head)
    graph = helper.make_graph(
        nodes,
        "step",
        [value("x", rows, size.features), value("key", *ring), value("value", *ring)],
        [value("y", rows, size.features), value("key_out", *ring), value("value_out", *ring)],
        list(constants.values()),
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def _onnxruntime(size: Size, weights: Weights, threads: int) -> Contestant:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(
        _graph(size, weights).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    ortvalue = onnxruntime.OrtValue.ortvalue_from_numpy
    rings = rings_of(size, weights)
    x = ortvalue(np.zeros((size.streams, size.features), np.float32))
    y = ortvalue(np.zeros((size.streams, size.features), np.float32))
    # Two sets of rings, because the outputs of a step are the inputs of the next.
    sets = [[ortvalue(ring) for ring in rings], [ortvalue(np.zeros_like(ring)) for ring in rings]]
    bindings = []
    for source, target in ((0, 1), (1, 0)):
        binding = session.io_binding()
        binding.bind_ortvalue_input("x", x)
        binding.bind_ortvalue_output("y", y)
        for i, name in enumerate(("key", "value")):
            binding.bind_ortvalue_input(name, sets[source][i])
            binding.bind_ortvalue_output(f"{name}_out", sets[target][i])
        bindings.append(binding)
    turn = 0

    def step(inputs: Array) -> onnxruntime.OrtValue:
        nonlocal turn
        x.update_inplace(inputs)
        session.run_with_iobinding(bindings[turn])
        turn = 1 - turn
        return y

    return step, lambda array: array


RIVALS = {"onnxruntime": _onnxruntime}
