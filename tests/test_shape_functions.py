"""The shape function of every op: what a graph knows of an op's outputs before it runs.

A case gives the axes of each tensor as letters. Axes with the same letter have the same size, and
sizes differ from letter to letter. A digit is the size itself. The shape function does not check an
axis with a lower-case letter.
"""

import dataclasses
import re

import pytest
import tensorflow as tf

from continual_transformers_tf.ops.library import fused_ops

pytestmark = pytest.mark.cpu_only("the shapes of a graph are the same on every device")

SIZES = {letter: 20 + i for i, letter in enumerate("MTHDVSNEFGOWXab")}
SIZES["B"] = SIZES["N"] - 1
DTYPES = dict(streams=tf.int32, scale=tf.float64, count=tf.int32, states=tf.string)


@dataclasses.dataclass
class Case:
    """A call of an op: name -> axes, or a list of axes for a list of tensors."""

    op: str
    inputs: dict
    outputs: dict
    variables: dict = dataclasses.field(default_factory=dict)
    options: dict = dataclasses.field(default_factory=dict)

    def places(self):
        """Return (name, place in a list or None, axes) of every input and variable."""
        for name, axes in {**self.inputs, **self.variables}.items():
            if isinstance(axes, str):
                yield name, None, axes
            else:
                yield from ((name, i, axes) for i, axes in enumerate(axes))

    def call(self, shape_of=lambda name, i, axes: sizes(axes)):
        """Return the shapes of the outputs by name, for the shapes that `shape_of` returns."""
        ops = fused_ops("CPU", f"ContinualTransformers>{self.op}")
        given = {name: [] for name in {**self.inputs, **self.variables}}
        with tf.Graph().as_default():
            for name, i, axes in self.places():
                tensor = self.tensor(name, shape_of(name, i, axes))
                given[name] = tensor if i is None else [*given[name], tensor]
            if self.op.startswith("Session"):
                given["session"] = ops.continual_transformers_session_handle()
            snake = "".join(f"_{c.lower()}" if c.isupper() else c for c in self.op)
            made = getattr(ops, f"continual_transformers{snake}")(**given, **self.options)
        flat = tf.nest.flatten(made)
        return dict(zip(self.outputs, (tensor.shape for tensor in flat), strict=True))

    def tensor(self, name, shape):
        if name in self.variables:
            return tf.raw_ops.VarHandleOp(dtype=tf.float32, shape=tf.TensorShape(shape))
        dtype = DTYPES.get(name, tf.bool if name.endswith("mask") else tf.float32)
        return tf.compat.v1.placeholder(dtype, shape)

    def refusal(self, shape_of):
        """Return the error for these shapes; "" if they are not refused."""
        try:
            self.call(shape_of)
        except ValueError as error:
            return str(error)
        return ""

    def known(self, letters):
        """Return the outputs' shapes if only the axes with these letters are known."""
        if self.op == "SessionStep":
            letters = {*letters, "O", "E"}  # attributes of the op say them
        return {
            name: [size_of(axis) if axis in letters else None for axis in axes]
            for name, axes in self.outputs.items()
        }


def size_of(axis):
    return int(axis) if axis.isdigit() else SIZES[axis]


def sizes(axes):
    return [size_of(axis) for axis in axes]


def lists(shapes):
    return {name: shape.as_list() for name, shape in shapes.items()}


STEPS = dict(query="MTHD", key="MTHD", value="MTHV", streams="M", scale="", key_mask=["MT"])
RINGS = dict(key_cache="SNHD", value_cache="SNHV", key_mask_cache="SN", position="S")
MASKS = dict(attention_mask=["MH1N"], query_mask=["M"], key_mask=["M"])
CACHE = list(RINGS.values())
CASES = {
    "single_output": Case(
        "SingleOutputAttention",
        inputs=dict(**STEPS, attention_mask=["MHTN"]),
        variables=RINGS,
        options=dict(sequence_first=True, return_attention_scores=True, return_window=True),
        outputs=dict(
            output="MTHV",
            attention_scores="MHTN",
            steps_taken="M",
            window_key="MHBD",
            window_value="MHBV",
            window_key_mask="MB",
        ),
    ),
    "retroactive": Case(
        "RetroactiveAttention",
        inputs=STEPS,
        variables=dict(
            **RINGS, query_cache="SNHD", softmax="SH4N", weighted_sum="SHNV", made_with="S2"
        ),
        options=dict(sequence_first=True),
        outputs=dict(output="MTHNV", steps_taken="M"),
    ),
    "co_si_mha_step": Case(
        "CoSiMultiHeadAttentionStep",
        inputs=dict(query="ME", value=["MF"], key=["MG"], streams=["M"], **MASKS),
        variables=dict(variables=[*CACHE, "EHD", "HD", "GHD", "HD", "FHV", "HV", "HVO", "O"]),
        options=dict(sequence_first=True, num_scores=1),
        outputs=dict(result="MO", attention_scores="MHN"),
    ),
    # The rings of a delay follow the cache. The key is the value, and the features have two axes.
    "co_si_mha_step with a gate and a delay": Case(
        "CoSiMultiHeadAttentionStep",
        inputs=dict(query="ME", value=["MF"], key=[], streams=[], **{key: [] for key in MASKS}),
        variables=dict(
            variables=[
                *(*CACHE, "SWHD", "SW", "SWHV"),
                *("EHD", "FHD", "FHV", "EHV", "HVOX"),
            ]
        ),
        options=dict(sequence_first=True, use_bias=False, use_gate=True, use_delay=True),
        outputs=dict(result="MOX"),
    ),
    "co_si_encoder_step": Case(
        "CoSiTransformerEncoderStep",
        inputs=dict(x="ME", streams=["M"]),
        variables=dict(
            variables=[
                *(*CACHE, "EHD", "HD", "EHD", "HD", "EHV", "HV", "HVE", "E"),
                *("E", "E", "EF", "F", "FE", "E", "E", "E"),
            ]
        ),
        options=dict(sequence_first=True),
        outputs=dict(result="ME"),
    ),
    "session_step": Case(
        "SessionStep",
        inputs=dict(streams="M", inputs=["Mab", "Ma"]),
        options=dict(
            output_types=[tf.float32, tf.float32], output_shapes=[sizes("O"), sizes("EO")]
        ),
        outputs=dict(first="MO", second="MEO", ready="M"),
    ),
    "session_clean": Case("SessionClean", dict(streams="M"), dict(position="M")),
    "session_get_state": Case("SessionGetState", dict(streams="M"), dict(states="M")),
    "session_set_state": Case("SessionSetState", dict(streams="M", states="M"), dict(position="M")),
    "session_ensure_streams": Case("SessionEnsureStreams", dict(count=""), dict(held="")),
}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
CO_SI_MHA = [name for name in CASES if name.startswith("co_si_mha")]


def changed(name, **options):
    return dataclasses.replace(CASES[name], options={**CASES[name].options, **options})


def heads_first(case):
    """Return the case for rings in the order of graphs from before `sequence_first`."""

    def reordered(axes):
        return axes.replace("SNH", "SHN") if isinstance(axes, str) else list(map(reordered, axes))

    return dataclasses.replace(
        case,
        variables={name: reordered(axes) for name, axes in case.variables.items()},
        options={**case.options, "sequence_first": False},
    )


def broadcasts(name, axis):
    """Return whether an axis may also have size 1."""
    return name == "attention_mask" and axis < 3


@each_case
def test_all_shapes_are_known(case):
    assert lists(case.call()) == {name: sizes(axes) for name, axes in case.outputs.items()}


@each_case
def test_no_axis_is_known(case):
    assert lists(case.call(lambda name, i, axes: [None] * len(axes))) == case.known("")


@each_case
def test_no_rank_is_known(case):
    for name, shape in case.call(lambda name, i, axes: None).items():
        if case.op == "CoSiMultiHeadAttentionStep" and name == "result":
            assert shape.rank is None  # it has the axes of the output's kernel
        else:
            assert shape.as_list() == case.known("")[name]


@each_case
def test_an_axis_that_one_input_knows_is_known_wherever_it_appears(case):
    for name, i, axes in case.places():
        for at, letter in enumerate(axes):
            if letter.islower() or broadcasts(name, at):
                continue
            place = name, i, at
            made = case.call(
                lambda name, i, axes, place=place: [
                    size_of(axis) if (name, i, at) == place else None
                    for at, axis in enumerate(axes)
                ]
            )
            assert lists(made) == case.known({letter, "B"} if letter == "N" else {letter}), place


@each_case
def test_an_axis_of_another_size_is_refused(case):
    for name, i, axes in case.places():
        for at, letter in enumerate(axes):
            is_shared = sum(letter in axes for _, _, axes in case.places()) > 1
            if letter.islower() or not (is_shared or letter.isdigit()):
                continue
            place = name, i, at
            refusal = case.refusal(
                lambda name, i, axes, place=place: [
                    size_of(axis) + ((name, i, at) == place) for at, axis in enumerate(axes)
                ]
            )
            assert "must be equal" in refusal, place


@each_case
def test_another_rank_is_refused(case):
    for place in case.places():
        if place[2] != place[2].upper() or place[2] == "HVOX":
            continue  # inputs of a model, and the output's kernel without a bias, have any rank
        refusal = case.refusal(lambda *other, place=place: sizes(other[2]) + [1] * (other == place))
        assert re.search("rank|must be equal", refusal), place


@pytest.mark.parametrize("name", ["single_output", "retroactive", *CO_SI_MHA, "co_si_encoder_step"])
def test_rings_with_the_heads_first(name):
    case = heads_first(CASES[name])
    assert lists(case.call()) == {name: sizes(axes) for name, axes in case.outputs.items()}
    of_other_rings = heads_first(CASES[name])
    of_other_rings.options["sequence_first"] = True
    with pytest.raises(ValueError, match="must be equal"):
        of_other_rings.call()


@pytest.mark.parametrize("name", ["single_output", "co_si_mha_step"])
@pytest.mark.parametrize("axis", range(3))
def test_an_attention_mask_broadcasts(name, axis):
    case = CASES[name]
    made = case.call(
        lambda name, i, axes: [
            1 if name == "attention_mask" and at == axis else size_of(letter)
            for at, letter in enumerate(axes)
        ]
    )
    assert lists(made) == {name: sizes(axes) for name, axes in case.outputs.items()}


def test_outputs_that_are_not_wanted_are_empty():
    case = changed("single_output", return_attention_scores=False, return_window=False)
    made = lists(case.call())
    assert made["attention_scores"] == [*sizes("MHT"), 0]
    assert made["window_key"] == [*sizes("MH"), 0, *sizes("D")]
    assert made["window_value"] == [*sizes("MH"), 0, *sizes("V")]
    assert made["window_key_mask"] == [*sizes("M"), 0]


@pytest.mark.parametrize("name", [*CO_SI_MHA, "co_si_encoder_step"])
def test_the_number_of_rows_is_not_known_before_the_first_step(name):
    for shape in changed(name, first_step=3).call().values():
        assert shape.as_list()[0] is None


@pytest.mark.parametrize("name", ["single_output", "retroactive"])
def test_no_steps_are_refused(name):
    with pytest.raises(ValueError, match="at least one step"):
        CASES[name].call(
            lambda name, i, axes: [0 if axis == "T" else size_of(axis) for axis in axes]
        )


@pytest.mark.parametrize("name", ["single_output", "retroactive", "co_si_mha_step"])
def test_an_optional_input_is_given_once(name):
    case = changed(name)
    case.inputs = {**case.inputs, "key_mask": case.inputs["key_mask"] * 2}
    with pytest.raises(ValueError, match="expected at most one key_mask, but got 2"):
        case.call()


def test_scores_are_at_most_one_output():
    with pytest.raises(ValueError, match="expected num_scores 0 or 1, but got 2"):
        changed("co_si_mha_step", num_scores=2).call()


def test_a_session_has_one_shape_for_each_output():
    with pytest.raises(ValueError, match="expected one of output_shapes for each output"):
        changed("session_step", output_shapes=[[3]]).call()


def test_the_handle_and_the_paths_of_a_session_are_scalars():
    ops = fused_ops("CPU", "ContinualTransformers>SessionHandle")
    with tf.Graph().as_default():
        handle = ops.continual_transformers_session_handle()
        assert handle.shape.rank == 0
        path = tf.constant("model.safetensors")
        ops.continual_transformers_initialize_session(handle, path, path, streams=1)
        with pytest.raises(ValueError, match="rank"):
            ops.continual_transformers_initialize_session(handle, path[None], path, streams=1)
        ops.continual_transformers_release_session(shared_name="a")
