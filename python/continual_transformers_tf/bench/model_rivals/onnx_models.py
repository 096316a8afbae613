"""The step in ONNX Runtime: a graph with rings and position as inputs and outputs."""

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from continual_transformers_tf.bench.model_rivals import EPSILON, Contestant, Pair, Weights
from continual_transformers_tf.bench.sizes import MODEL_OUTPUTS, ModelSize


class _Graph:
    """The nodes and constants of a graph, with their names."""

    def __init__(self) -> None:
        self.constants: dict[str, onnx.TensorProto] = {}
        self.nodes: list[onnx.NodeProto] = []

    def constant(self, value: npt.ArrayLike, dtype: type = np.float32) -> str:
        name = f"constant_{len(self.constants)}"
        self.constants[name] = numpy_helper.from_array(np.asarray(value, dtype), name)
        return name

    def node(self, op: str, *inputs: str, output: str | None = None, **attributes: Any) -> str:
        output = output or f"node_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, list(inputs), [output], **attributes))
        return output

    def dense(self, x: str, layer: Pair, output: str | None = None) -> str:
        product = self.node("MatMul", x, self.constant(layer[0]))
        return self.node("Add", product, self.constant(layer[1]), output=output)

    def norm(self, x: str, layer: Pair) -> str:
        scale, offset = (self.constant(array) for array in layer)
        return self.node("LayerNormalization", x, scale, offset, axis=-1, epsilon=EPSILON)


def _model(size: ModelSize, weights: Weights) -> onnx.ModelProto:
    graph = _Graph()
    node, constant = graph.node, graph.constant
    rows, heads, head = size.streams, size.heads, size.head
    split = constant([rows, heads, 1, head], np.int64)
    merged = constant([rows, size.embed_dim], np.int64)
    first, last, axis = (constant([i], np.int64) for i in (1, size.seq_len, 2))
    scale = constant(head**-0.5)
    position = node("Gather", constant(weights.positions), "position", axis=0)
    node(
        "Mod",
        node("Add", "position", constant([1], np.int64)),
        constant([size.position_rows], np.int64),
        output="position_out",
    )
    x = node("Add", graph.dense("x", weights.embedding), position)
    for i, block in enumerate(weights.blocks):
        query, key, value = (node("Reshape", graph.dense(x, layer), split) for layer in block[:3])
        rings = []
        for name, new in ((f"key_{i}", key), (f"value_{i}", value)):
            kept = node("Slice", name, first, last, axis)
            rings.append(node("Concat", kept, new, output=f"{name}_out", axis=2))
        turned = node("Transpose", rings[0], perm=[0, 1, 3, 2])
        logits = node("MatMul", node("Mul", query, scale), turned)
        attended = node("MatMul", node("Softmax", logits, axis=-1), rings[1])
        attended = graph.dense(node("Reshape", attended, merged), block.output)
        x = graph.norm(node("Add", x, attended), block.attention_norm)
        hidden = node("Gelu", graph.dense(x, block.feed_forward), approximate="none")
        fed = graph.dense(hidden, block.feed_forward_output)
        x = graph.norm(node("Add", x, fed), block.output_norm)
    graph.dense(x, weights.classifier, output="y")

    def info(name: str, *shape: int, dtype: int = TensorProto.FLOAT) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, dtype, shape)

    ring = (rows, heads, size.seq_len, head)
    names = [f"{name}_{i}" for i in range(size.layers) for name in ("key", "value")]
    return helper.make_model(
        helper.make_graph(
            graph.nodes,
            "step",
            [
                info("x", rows, size.features),
                info("position", 1, dtype=TensorProto.INT64),
                *(info(name, *ring) for name in names),
            ],
            [
                info("y", rows, MODEL_OUTPUTS),
                info("position_out", 1, dtype=TensorProto.INT64),
                *(info(f"{name}_out", *ring) for name in names),
            ],
            list(graph.constants.values()),
        ),
        opset_imports=[helper.make_opsetid("", 20)],
        ir_version=9,
    )


def _onnxruntime(size: ModelSize, weights: Weights, threads: int) -> Contestant:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(
        _model(size, weights).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    ortvalue = onnxruntime.OrtValue.ortvalue_from_numpy
    x = ortvalue(np.zeros((size.streams, size.features), np.float32))
    y = ortvalue(np.zeros((size.streams, MODEL_OUTPUTS), np.float32))
    states = {
        state.name: np.zeros(state.shape, np.int64 if state.name == "position" else np.float32)
        for state in session.get_inputs()[1:]
    }
    # Two sets, because the outputs of a step are the inputs of the next.
    sets = [{name: ortvalue(zeros) for name, zeros in states.items()} for _ in range(2)]
    bindings = []
    for source, target in ((0, 1), (1, 0)):
        binding = session.io_binding()
        binding.bind_ortvalue_input("x", x)
        binding.bind_ortvalue_output("y", y)
        for name in states:
            binding.bind_ortvalue_input(name, sets[source][name])
            binding.bind_ortvalue_output(f"{name}_out", sets[target][name])
        bindings.append(binding)
    turn = 0

    def step(inputs: npt.NDArray[np.float32]) -> onnxruntime.OrtValue:
        nonlocal turn
        x.update_inplace(inputs)
        session.run_with_iobinding(bindings[turn])
        turn = 1 - turn
        return y

    return Contestant(step, output=lambda y: y.numpy())


RIVALS = {"onnxruntime": _onnxruntime}
