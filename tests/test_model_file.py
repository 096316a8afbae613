"""What `continual-transformers info` prints for model files, and for other files."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest

from continual_transformers_tf import model_file, native
from plan_files import PlanFile, attention_plan


@pytest.fixture
def plan(random):
    return attention_plan(random, features=6, heads=2, key_size=3, window=4, outputs=5)


def library_loads_models():
    try:
        return hasattr(native.core_library(), "ct_session_load")
    except ImportError:
        return False


needs_library = pytest.mark.skipif(
    not library_loads_models(), reason="the core library is not built, or has no sessions"
)


def test_read(plan, tmp_path):
    path = plan.write(tmp_path)
    file = model_file.ModelFile.read(path)
    assert file.path == str(path)
    assert file.bytes == path.stat().st_size
    assert (file.name, file.producer) == ("plan", "tests")
    assert (file.compute_dtype, file.cache_dtype, file.weights_dtype) == ("float32",) * 3
    assert (file.receptive_field, file.delay) == (4, 0)
    assert file.inputs == (model_file.Port("x", (6,), "float32"),)
    assert file.outputs == (model_file.Port("y", (5,), "float32"),)
    assert file.nodes == {"dense": 5, "attention": 1, "binary": 1}
    assert file.parameters == 4 * (6 * 6 + 6) + 6 * 5 + 5
    assert file.weights_bytes == {"float32": 4 * file.parameters}
    assert {tensor.name: tensor.shape for tensor in file.weights} == {
        name: array.shape for name, array in plan.tensors.items()
    }


def test_a_tensor_that_nodes_share_counts_once_and_others_not_at_all(plan, tmp_path):
    before = model_file.ModelFile.read(plan.write(tmp_path)).parameters
    kernels = [node["weights"] for node in plan.plan["nodes"] if node["op"] == "dense"]
    kernels[1]["kernel"] = kernels[0]["kernel"]
    plan.tensors["unused"] = np.zeros(1000, np.float32)
    assert model_file.ModelFile.read(plan.write(tmp_path)).parameters == before - 6 * 6


def test_weights_of_several_dtypes(random, tmp_path):
    plan = PlanFile("float64")
    x = plan.input("x", 3)
    weights = {"rows": random.standard_normal((7, 3)), "start": np.array(2)}
    plan.output("y", plan.node("positional", [x], plan.value(3), weights))
    file = model_file.ModelFile.read(plan.write(tmp_path))
    assert file.weights_bytes == {"float64": 7 * 3 * 8, "int64": 8}
    assert "168 bytes of float64, 8 bytes of int64" in model_file.describe(file.path)


@needs_library
def test_describe(plan, tmp_path):
    path = plan.write(tmp_path)
    loaded = model_file.load(path)
    assert model_file.describe(path).splitlines() == [
        "model            plan",
        "written by       tests",
        "input            x [6] float32",
        "output           y [5] float32",
        "receptive field  4 steps",
        "delay            0 steps",
        "dtypes           computes in float32, keeps keys and values in float32, "
        "kernels in float32",
        "nodes            7: 5 dense, 1 attention, 1 binary",
        "parameters       203 in 10 tensors",
        "weights          812 bytes of float32",
        f"file             {path.stat().st_size:,} bytes",
        f"copy of a stream {loaded.state_bytes:,} bytes",
        f"plan             fingerprint {loaded.plan_fingerprint:016x}",
        f"weights          fingerprint {loaded.weights_fingerprint:016x}",
    ]


def test_describe_without_the_library_says_why(plan, tmp_path, monkeypatch):
    monkeypatch.setattr(native, "CORE_LIBRARY_PATH", tmp_path / "none.so")
    native.core_library.cache_clear()
    try:
        text = model_file.describe(plan.write(tmp_path))
    finally:
        native.core_library.cache_clear()
    assert "parameters       203 in 10 tensors" in text
    assert "fingerprints     not computed: " in text
    assert "none.so does not exist" in text


def test_it_needs_no_tensorflow(plan, tmp_path):
    program = (
        "import sys\n"
        "from continual_transformers_tf import model_file\n"
        "print(model_file.describe(sys.argv[1]))\n"
        "assert not {'tensorflow', 'keras', 'numpy'} & set(sys.modules)\n"
    )
    command = [sys.executable, "-c", program, plan.write(tmp_path)]
    assert "7: 5 dense" in subprocess.run(command, check=True, text=True, stdout=-1).stdout


def xxh64(data, seed=0):
    """Compute XXH64 as in https://github.com/Cyan4973/xxHash/blob/dev/doc/xxhash_spec.md."""
    p1, p2, p3 = 0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9
    p4, p5, mask = 0x85EBCA77C2B2AE63, 0x27D4EB2F165667C5, (1 << 64) - 1

    def turn(x, bits):
        x &= mask
        return (x << bits | x >> (64 - bits)) & mask

    def one(lane, word):
        return turn(lane + word * p2, 31) * p1 & mask

    at, end = 0, len(data)
    if end >= 32:
        lanes = [(seed + p1 + p2) & mask, (seed + p2) & mask, seed, (seed - p1) & mask]
        while at + 32 <= end:
            for i in range(4):
                lanes[i] = one(lanes[i], int.from_bytes(data[at : at + 8], "little"))
                at += 8
        h = sum(turn(lane, bits) for lane, bits in zip(lanes, (1, 7, 12, 18), strict=True)) & mask
        for lane in lanes:
            h = ((h ^ one(0, lane)) * p1 + p4) & mask
    else:
        h = (seed + p5) & mask
    h = (h + end) & mask
    for size in (8, 4, 1):
        while at + size <= end:
            word = int.from_bytes(data[at : at + size], "little")
            at += size
            if size == 8:
                h = (turn(h ^ one(0, word), 27) * p1 + p4) & mask
            elif size == 4:
                h = (turn(h ^ (word * p1 & mask), 23) * p2 + p3) & mask
            else:
                h = turn(h ^ (word * p5 & mask), 11) * p1 & mask
    h = (h ^ h >> 33) * p2 & mask
    h = (h ^ h >> 29) * p3 & mask
    return h ^ h >> 32


def test_xxh64_is_the_one_that_others_have():
    assert xxh64(b"") == 0xEF46DB3751D8E999
    assert xxh64(b"abc") == 0x44BC2CF5AD770999
    data = bytes((37 * i + 11) % 256 for i in range(200))
    assert xxh64(data, 12345678901234567890) == 0x49BC5B00B8A413B2


class Entries:
    """The data that a fingerprint hashes, as defined in docs/model_file.md."""

    def __init__(self):
        self.data = b""

    def add(self, *entries):
        for x in entries:
            if isinstance(x, list):
                self.add(len(x), *x)
            elif isinstance(x, str):
                self.add(len(x.encode()))
                self.data += x.encode()
            elif isinstance(x, float):
                self.data += np.float64(x + 0.0).tobytes()
            else:
                self.data += int(x).to_bytes(8, "little", signed=True)


# Attributes that may have a fraction.
NUMBERS = {
    "alpha", "b", "epsilon", "max_value", "negative_slope", "scale", "soft_cap", "threshold",
    "value",
}  # fmt: skip


def fingerprints(plan, tensors):
    """Return the fingerprints of the plan and the weights, as defined in docs/model_file.md."""
    entries = Entries()
    entries.add(plan["compute_dtype"], plan["receptive_field"], plan["delay"], plan["block"])
    entries.add(len(plan["values"]))
    for value in plan["values"]:
        entries.add(value["dtype"], value["shape"])
    for ports in ("inputs", "outputs"):
        entries.add([port["value"] for port in plan[ports]])
    entries.add(len(plan["nodes"]))
    weights = Entries()
    for node in plan["nodes"]:
        entries.add(node["op"], node["inputs"], node["outputs"])
        masks = node.get("masks", {})
        entries.add(len(masks), *(x for name in sorted(masks) for x in (name, masks[name])))
        entries.add(len(node["weights"]))
        for name in sorted(node["weights"]):
            tensor = tensors[node["weights"][name]]
            entries.add(name, list(tensor.shape))
            weights.data += xxh64(tensor.tobytes()).to_bytes(8, "little")
        entries.add(len(node["attributes"]))
        for name in sorted(node["attributes"]):
            x = node["attributes"][name]
            if name in NUMBERS and x is not None:
                entries.add(name, 3, float(x))
            else:
                kinds = [(type(None), 0), (bool, 1), (int, 2), (str, 4), (list, 5)]
                entries.add(name, next(k for kind, k in kinds if isinstance(x, kind)))
                entries.add(*([] if x is None else [x]))
    cache = Entries()
    cache.add(plan["cache_dtype"])
    return xxh64(cache.data, xxh64(entries.data)), xxh64(weights.data)


@needs_library
def test_fingerprints_are_those_of_the_document(random, plan, tmp_path):
    loaded = model_file.load(plan.write(tmp_path))
    expected = fingerprints(plan.plan, plan.tensors)
    assert (loaded.plan_fingerprint, loaded.weights_fingerprint) == expected

    masked = PlanFile(cache_dtype="bfloat16", receptive_field=5)
    x, m = masked.input("x", 4), masked.input("m", 1, dtype="bool")
    masked.plan["input_structure"] = {"x": 0, "m": 1}
    late = masked.node("delay", [m], masked.value(1, dtype="bool"), steps=1)
    masked.output("y", masked.node(
        "attention", [x, x, x], masked.value(4), masks={"key": m, "query": late},
        heads=2, window=5, first_column=1, end_column=4, query_delay=1, scale=1,
    ))  # fmt: skip
    masked.output("grouped", masked.node(
        "attention", [masked.node("concat", [x, x], masked.value(8), axis=0), x, x],
        masked.value(8), {"bias": random.standard_normal((4, 3)).astype("float32")},
        heads=4, key_heads=2, soft_cap=3, window=3, first_column=0, end_column=3, query_delay=0,
        scale=1,
    ))  # fmt: skip
    weights = {"gamma": random.standard_normal(4).astype("float32")}
    masked.output("z", masked.node(
        "norm", [x], masked.value(4), weights, function="rms", epsilon=1e-6
    ))  # fmt: skip
    masked.output("flat", masked.node(
        "strided", [x], masked.value(2, 2), offset=3, strides=[-2, -1]
    ))  # fmt: skip
    masked.plan["output_structure"] = [0, 1, [2], 3]
    loaded = model_file.load(masked.write(tmp_path))
    expected = fingerprints(masked.plan, masked.tensors)
    assert (loaded.plan_fingerprint, loaded.weights_fingerprint) == expected


def edited(plan, change):
    """Return the file with a change to its header."""
    data = plan.to_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


def with_plan(plan, change):
    def change_header(header):
        content = json.loads(header["__metadata__"]["plan"])
        change(content)
        header["__metadata__"]["plan"] = json.dumps(content)

    return edited(plan, change_header)


REFUSED = {
    "empty": (lambda p: b"", "not a safetensors file"),
    "text": (lambda p: b"This is no model file.", "not a safetensors file"),
    "keras": (lambda p: b"PK\x03\x04" + bytes(100), "continual-transformers pack"),
    "header cut off": (lambda p: p.to_bytes()[:100], "truncated"),
    "tensors cut off": (lambda p: p.to_bytes()[:-1], "truncated: tensor 'dense_6/bias'"),
    "not JSON": (lambda p: (2).to_bytes(8, "little") + b"{]", "not JSON"),
    "a list": (lambda p: (2).to_bytes(8, "little") + b"[]", "not a JSON object"),
    "deep": (lambda p: (1 << 20).to_bytes(8, "little") + b"[" * (1 << 20), "not JSON"),
    "another's": (
        lambda p: edited(p, lambda h: h.pop("__metadata__")),
        "not a model file: its metadata",
    ),
    "of PyTorch": (
        lambda p: edited(p, lambda h: h["__metadata__"].update(format="pt")),
        "not a model file: its metadata",
    ),
    "newer": (
        lambda p: edited(p, lambda h: h["__metadata__"].update(format_version="2")),
        "A newer continual-transformers-tf wrote it: upgrade",
    ),
    "no plan": (lambda p: edited(p, lambda h: h["__metadata__"].pop("plan")), "KeyError: 'plan'"),
    "metadata are a list": (lambda p: edited(p, lambda h: h.update(__metadata__=[])), "damaged"),
    "a tensor is a number": (lambda p: edited(p, lambda h: h.update(x=1)), "TypeError"),
    "a tensor lies nowhere": (
        lambda p: edited(p, lambda h: h["dense_6/bias"].update(data_offsets=[8, 4])),
        "tensor 'dense_6/bias' lies at 8 to 4",
    ),
    "no nodes": (lambda p: with_plan(p, lambda c: c.pop("nodes")), "KeyError: 'nodes'"),
    "no such value": (
        lambda p: with_plan(p, lambda c: c["inputs"][0].update(value=100)),
        "IndexError",
    ),
    "no such tensor": (
        lambda p: with_plan(p, lambda c: c["nodes"][0]["weights"].update(kernel="none")),
        "KeyError: 'none'",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses(case, plan, tmp_path):
    make, part = REFUSED[case]
    path = tmp_path / "model.safetensors"
    path.write_bytes(make(plan))
    with pytest.raises(ValueError, match=re.escape(part)) as refused:
        model_file.describe(path)
    assert str(path) in str(refused.value)


@needs_library
@pytest.mark.parametrize(
    ("change", "part"),
    [
        (lambda c: c["nodes"][0].update(op="new"), 'has the op "new", which this version'),
        (lambda c: c.update(sampling=1), 'the plan has "sampling"'),
        (lambda c: c["nodes"][3]["attributes"].update(heads=4), "do not divide"),
    ],
)
def test_what_only_the_library_checks_is_refused_too(change, part, plan, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(with_plan(plan, change))
    with pytest.raises(ValueError, match=re.escape(part)) as refused:
        model_file.describe(path)
    assert str(path) in str(refused.value)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError):
        model_file.describe(tmp_path / "none")


def test_names_cannot_control_the_terminal(plan, tmp_path):
    plan.plan["name"] = "\x1b[31mred\nline"
    assert "model            ?[31mred?line\n" in model_file.describe(plan.write(tmp_path))
