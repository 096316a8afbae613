"""What a session refuses, with which messages; afterwards every stream continues as before."""

import pickle

import numpy as np
import pytest

from continual_transformers_tf import session as sessions
from continual_transformers_tf.session import Session
from plan_files import (
    PlanFile,
    attention_plan,
    many_ports_plan,
    negative_plan,
    two_ports_plan,
)

F = np.float32
FEATURES, OUTPUTS = 6, 5


@pytest.fixture
def plan(random):
    return attention_plan(random, FEATURES, outputs=OUTPUTS)


@pytest.fixture
def session(plan, random):
    """Return a session whose streams a, b and c, and two default streams, have taken some steps."""
    session = plan.session()
    ids = session.open(3)
    assert ids.tolist() == sorted(set(ids.tolist()))
    session.steps(random.standard_normal((3, 6, FEATURES)).astype(F), streams=ids)
    session.step(random.standard_normal((2, FEATURES)).astype(F))
    session.ids = ids
    return session


def everything(session):
    """Return all that a session remembers."""
    ids = [int(i) for i in session.ids]
    return (
        session.get_state(ids),
        session.get_state(),
        session.position(ids).tolist(),
        session.position().tolist(),
        session.open_streams,
    )


def read_only(*shape):
    array = np.zeros(shape, F)
    array.flags.writeable = False
    return array


def zeros(*shape, dtype=F):
    return np.zeros(shape, dtype)


# (call, exception, message): the message has what was got and expected, and often the cure.
REFUSED = {
    "no input": (lambda s: s.step(), TypeError, "step needs x"),
    "unknown keyword": (
        lambda s: s.step(zeros(1, 6), stream=[0]),
        TypeError,
        "unexpected 'stream'.*streams=, out= and key_mask=",
    ),
    "given twice": (
        lambda s: s.step(zeros(1, 6), [s.ids[0]], streams=[s.ids[0]]),
        TypeError,
        "second 'streams'",
    ),
    "too many positions": (lambda s: s.step(zeros(1, 6), [0], None), TypeError, "by name"),
    "a list": (
        lambda s: s.step([[0.0] * 6]),
        TypeError,
        r"x is of type list.*\(M, 6\) of float32.*np.asarray",
    ),
    "a dict": (lambda s: s.step({"x": zeros(1, 6)}), TypeError, "x is of type dict"),
    "None": (lambda s: s.step(None), TypeError, "x is of type NoneType"),
    "float64": (
        lambda s: s.step(zeros(1, 6, dtype=float)),
        ValueError,
        r"dtype float64.*Expected float32.*x.astype\(np.float32\)",
    ),
    "int32": (lambda s: s.step(zeros(1, 6, dtype="i4")), ValueError, "dtype int32"),
    "float16": (lambda s: s.step(zeros(1, 6, dtype="f2")), ValueError, "dtype float16"),
    "complex": (lambda s: s.step(zeros(1, 6, dtype="c8")), ValueError, "dtype complex64"),
    "objects": (lambda s: s.step(zeros(1, 6, dtype=object)), ValueError, "dtype object"),
    "one row": (lambda s: s.step(zeros(6)), ValueError, r"\(6,\).*\(M, 6\).*np.newaxis"),
    "features": (lambda s: s.step(zeros(1, 7)), ValueError, r"\(1, 7\).*\(M, 6\)"),
    "no axes": (lambda s: s.step(np.float32(0)), TypeError, "type numpy.float32"),
    "no axes of an array": (lambda s: s.step(np.array(0, F)), ValueError, r"shape \(\)"),
    "steps for a step": (lambda s: s.step(zeros(1, 2, 6)), ValueError, r"Session.steps"),
    "step for steps": (lambda s: s.steps(zeros(1, 6)), ValueError, r"\(M, T, 6\).*Session.step "),
    "fewer ids": (
        lambda s: s.step(zeros(2, 6), streams=[s.ids[0]]),
        ValueError,
        "streams names 1 stream, but x has 2 rows",
    ),
    "more ids": (
        lambda s: s.step(zeros(1, 6), streams=s.ids),
        ValueError,
        "streams names 3 streams, but x has 1 row",
    ),
    "an id for two rows": (
        lambda s: s.step(zeros(2, 6), streams=int(s.ids[0])),
        ValueError,
        "1 stream,",
    ),
    "an id twice": (
        lambda s: s.step(zeros(2, 6), streams=[s.ids[0], s.ids[0]]),
        ValueError,
        "twice",
    ),
    "an unknown id": (
        lambda s: s.step(zeros(2, 6), streams=[s.ids[0], 12345]),
        sessions.UnknownStreamError,
        "12345",
    ),
    "a negative id": (
        lambda s: s.step(zeros(1, 6), streams=[-1]),
        sessions.UnknownStreamError,
        "-1",
    ),
    "a huge id": (
        lambda s: s.step(zeros(1, 6), streams=[1 << 80]),
        sessions.UnknownStreamError,
        "64 bits",
    ),
    "bool ids": (lambda s: s.step(zeros(1, 6), streams=[True]), TypeError, "of type bool"),
    "a bool id": (lambda s: s.step(zeros(1, 6), streams=True), TypeError, "of type bool"),
    "bool array ids": (
        lambda s: s.step(zeros(1, 6), streams=np.array([True])),
        TypeError,
        "array of bool",
    ),
    "float ids": (lambda s: s.step(zeros(1, 6), streams=[0.0]), TypeError, "of type float"),
    "float array ids": (
        lambda s: s.step(zeros(1, 6), streams=np.zeros(1)),
        TypeError,
        "array of float64.*int64",
    ),
    "uint64 ids": (
        lambda s: s.step(zeros(1, 6), streams=np.zeros(1, np.uint64)),
        TypeError,
        "array of uint64",
    ),
    "int32 ids": (
        lambda s: s.step(zeros(1, 6), streams=s.ids[:1].astype(np.int32)),
        TypeError,
        "array of int32.*int64",
    ),
    "axes of ids": (
        lambda s: s.step(zeros(1, 6), streams=np.zeros((1, 1), np.int64)),
        ValueError,
        "streams has 2 axes",
    ),
    "text as ids": (lambda s: s.step(zeros(1, 6), streams="a"), TypeError, "type str"),
    "a set as ids": (lambda s: s.step(zeros(1, 6), streams={0}), TypeError, "type set"),
    "out of another type": (
        lambda s: s.step(zeros(1, 6), out=[0.0] * 5),
        TypeError,
        "out is of type list",
    ),
    "out of another dtype": (
        lambda s: s.step(zeros(1, 6), out=np.zeros((1, 5))),
        ValueError,
        "out has dtype float64.*float32",
    ),
    "out of another size": (
        lambda s: s.step(zeros(1, 6), out=zeros(1, 6)),
        ValueError,
        r"out has shape \(1, 6\).*\(1, 5\)",
    ),
    "out of more rows": (
        lambda s: s.step(zeros(1, 6), out=zeros(2, 5)),
        ValueError,
        r"\(2, 5\).*\(1, 5\)",
    ),
    "out of steps": (
        lambda s: s.steps(zeros(1, 3, 6), out=zeros(1, 2, 5)),
        ValueError,
        r"\(1, 2, 5\).*\(1, 3, 5\)",
    ),
    "out read-only": (
        lambda s: s.step(zeros(1, 6), out=read_only(1, 5)),
        ValueError,
        "out is read-only",
    ),
    "out with gaps": (
        lambda s: s.step(zeros(2, 6), out=zeros(2, 10)[:, ::2]),
        ValueError,
        "not C-contiguous",
    ),
    "out transposed": (
        lambda s: s.step(zeros(2, 6), out=zeros(5, 2).T),
        ValueError,
        "not C-contiguous",
    ),
    "out swapped": (
        lambda s: s.step(zeros(1, 6), out=zeros(1, 5, dtype=">f4")),
        ValueError,
        "byte order",
    ),
    "key_mask of numbers in a list": (
        lambda s: s.step(zeros(1, 6), key_mask=[1]),
        ValueError,
        r"key_mask has dtype int64.*list \(1,\) of bool",
    ),
    "key_mask of a bool and a number": (
        lambda s: s.step(zeros(2, 6), key_mask=[True, 0]),
        ValueError,
        "key_mask has dtype int64.*bool",
    ),
    "key_mask of None": (
        lambda s: s.step(zeros(1, 6), key_mask=[None]),
        ValueError,
        "key_mask has dtype object.*bool",
    ),
    "key_mask of text": (
        lambda s: s.step(zeros(1, 6), key_mask="yes"),
        ValueError,
        "key_mask has dtype <U3.*bool",
    ),
    "key_mask, a set": (
        lambda s: s.step(zeros(1, 6), key_mask={True}),
        ValueError,
        "key_mask has dtype object.*bool",
    ),
    "key_mask, one bool": (
        lambda s: s.step(zeros(1, 6), key_mask=False),
        ValueError,
        r"key_mask has shape \(\).*\(1,\)",
    ),
    "key_mask of rows that differ": (
        lambda s: s.steps(zeros(2, 2, 6), key_mask=[[True], [True, False]]),
        ValueError,
        "inhomogeneous",
    ),
    "key_mask of nothing": (
        lambda s: s.step(zeros(1, 6), key_mask=[]),
        ValueError,
        r"key_mask has shape \(0,\).*\(1,\)",
    ),
    "key_mask of fewer rows": (
        lambda s: s.step(zeros(2, 6), key_mask=[True]),
        ValueError,
        r"key_mask has shape \(1,\).*\(2,\)",
    ),
    "key_mask of another dtype": (
        lambda s: s.step(zeros(1, 6), key_mask=zeros(1)),
        ValueError,
        "key_mask has dtype float32.*bool",
    ),
    "key_mask of more rows": (
        lambda s: s.step(zeros(1, 6), key_mask=np.ones(2, bool)),
        ValueError,
        r"key_mask has shape \(2,\).*\(1,\)",
    ),
    "key_mask of steps": (
        lambda s: s.steps(zeros(1, 3, 6), key_mask=np.ones((1, 2), bool)),
        ValueError,
        r"\(1, 2\).*\(1, 3\)",
    ),
    "key_mask without steps": (
        lambda s: s.steps(zeros(1, 3, 6), key_mask=np.ones(1, bool)),
        ValueError,
        r"\(1,\).*\(1, 3\)",
    ),
    "open fewer than none": (lambda s: s.open(-1), ValueError, "count is -1"),
    "open more than there are ids": (
        lambda s: s.open(2**40),
        sessions.TooManyStreamsError,
        "count is 1099511627776.*at most",
    ),
    "open a part": (lambda s: s.open(1.5), TypeError, "of type float"),
    "open True": (lambda s: s.open(True), TypeError, "of type bool"),
    "close one twice": (lambda s: s.close([s.ids[0], s.ids[0]]), ValueError, "twice"),
    "close an unknown one": (
        lambda s: s.close([s.ids[0], 777]),
        sessions.UnknownStreamError,
        "777",
    ),
    "clean an unknown one": (
        lambda s: s.clean_state([s.ids[0], 777]),
        sessions.UnknownStreamError,
        "777",
    ),
    "clean one twice": (lambda s: s.clean_state([s.ids[0]] * 2), ValueError, "twice"),
    "position of an unknown one": (
        lambda s: s.position(777),
        sessions.UnknownStreamError,
        "777",
    ),
    "ready, an unknown one": (lambda s: s.ready([777]), sessions.UnknownStreamError, "777"),
    "copy an unknown one": (
        lambda s: s.get_state([s.ids[0], 777]),
        sessions.UnknownStreamError,
        "777",
    ),
    "set an unknown one": (
        lambda s: s.set_state(s.get_state(s.ids)[::-1], [s.ids[0], s.ids[1], 777]),
        sessions.UnknownStreamError,
        "777",
    ),
    "set one twice": (
        lambda s: s.set_state(s.get_state(s.ids)[:2], [s.ids[2], s.ids[2]]),
        ValueError,
        "twice",
    ),
    "set fewer": (
        lambda s: s.set_state(s.get_state(s.ids)[1:], s.ids),
        ValueError,
        "2 states for 3 streams",
    ),
    "set without names": (
        lambda s: s.set_state(s.get_state(s.ids)),
        ValueError,
        r"3 states for 2 streams.*set_state\(states, session.open\(n\)\)",
    ),
    "set a short one": (
        lambda s: s.set_state([s.get_state(s.ids)[2], b"ab"], s.ids[:2]),
        ValueError,
        "2 bytes",
    ),
    "set a damaged one": (
        lambda s: s.set_state([s.get_state(s.ids)[2], bytes(s.state_bytes)], s.ids[:2]),
        ValueError,
        "not a copy of a stream",
    ),
    "release_gil of another type": (
        lambda s: setattr(s, "release_gil", 1),
        TypeError,
        "release_gil is 1.*True",
    ),
    "profile of no streams": (lambda s: s.profile(0), ValueError, "streams.*1 or more.*0"),
    "weights from nowhere": (
        lambda s: s.load_weights("no/such.safetensors"),
        FileNotFoundError,
        "no/such.safetensors",
    ),
    "save to nowhere": (lambda s: s.save("no/such/folder/model.safetensors"), OSError, "no/such"),
}


@pytest.mark.parametrize(("call", "error", "says"), REFUSED.values(), ids=REFUSED.keys())
def test_is_refused_and_changes_nothing(session, call, error, says):
    before = everything(session)
    with pytest.raises(error, match=says):
        call(session)
    assert everything(session) == before


def test_outputs_may_not_overlap_inputs(random):
    session = attention_plan(random, 6, outputs=6).session()
    memory = zeros(4, 6)
    a = session.open()
    for out in (memory[:1], memory[0].reshape(1, 6)):
        with pytest.raises(ValueError, match="shares memory"):
            session.step(memory[:1], streams=a, out=out)
    flat = memory.reshape(-1)
    with pytest.raises(ValueError, match="shares memory"):
        session.step(flat[:6].reshape(1, 6), streams=a, out=flat[5:11].reshape(1, 6))
    assert session.position(a) == 0
    # Adjacent memory does not overlap.
    session.step(flat[:6].reshape(1, 6), streams=a, out=flat[6:12].reshape(1, 6))
    # A non-contiguous input is copied first.
    session.step(memory[:, :2].T.repeat(6, 0)[::2][:2, :].reshape(-1)[:6].reshape(1, 6), streams=a)
    assert session.position(a) == 2


@pytest.fixture
def ports(random):
    plan, _ = many_ports_plan(random)
    session = plan.session()
    session.ids = session.open(2)
    words = np.array([3, 4], np.int32)
    session.step({"sound": np.ones((2, 3), F), "word": words}, streams=session.ids)
    session.step({"sound": np.ones((1, 3), F), "word": words[:1]})
    return session


def both(sound=None, word=None):
    return {
        "sound": np.ones((2, 3), F) if sound is None else sound,
        "word": np.array([0, 6], np.int32) if word is None else word,
    }


REFUSED_PORTS = {
    "one array": (lambda s: s.step(zeros(2, 3)), "numpy.ndarray.*'sound', 'word'"),
    "a list": (lambda s: s.step(list(both().values())), "a list of 2.*dict.*'sound', 'word'"),
    "one lacks": (lambda s: s.step({"sound": zeros(2, 3)}), "keys .*'sound'.*'word'"),
    "another name": (
        lambda s: s.step({"sound": zeros(2, 3), "wort": np.zeros(2, np.int32)}),
        "wort.*'sound', 'word'",
    ),
    "one more": (lambda s: s.step(both() | {"more": zeros(2)}), "more"),
    "rows differ": (
        lambda s: s.step(both(word=np.zeros(3, np.int32)), streams=s.ids),
        r"'word' has shape \(3,\).*\(2,\)",
    ),
    "dtype": (
        lambda s: s.step(both(word=np.zeros(2, np.int64)), streams=s.ids),
        r"'word' has dtype int64.*int32",
    ),
    "index too large": (
        lambda s: s.step(both(word=np.array([0, 7], np.int32)), streams=s.ids),
        "7",
    ),
    "index negative": (
        lambda s: s.step(both(word=np.array([-1, 0], np.int32)), streams=s.ids),
        "-1",
    ),
    "index in a later step": (
        lambda s: s.steps(
            both(zeros(2, 2, 3), np.array([[0, 1], [2, 7]], np.int32)), streams=s.ids
        ),
        "7",
    ),
    "out's structure": (lambda s: s.step(both(), out=zeros(2, 3)), "out is .*'sum', 'late'"),
    "out's inner structure": (
        lambda s: s.step(both(), out={"sum": None, "late": zeros(2, 3)}),
        "out is .*a list of 1",
    ),
    "outs overlap": (
        lambda s: (lambda y: s.step(both(), streams=s.ids, out={"sum": y, "late": [y]}))(
            zeros(2, 3)
        ),
        "shares memory",
    ),
}


@pytest.mark.parametrize("release_gil", [None, True])
@pytest.mark.parametrize(("call", "says"), REFUSED_PORTS.values(), ids=REFUSED_PORTS.keys())
def test_structures_are_refused_and_change_nothing(ports, call, says, release_gil):
    ports.release_gil = release_gil
    before = everything(ports)
    with pytest.raises(ValueError, match=says):
        call(ports)
    assert everything(ports) == before


@pytest.fixture
def listed(random):
    """Return a session whose inputs and outputs are lists, with streams that have taken a step."""
    session = two_ports_plan(random).session()
    session.ids = session.open(2)
    session.step([zeros(2, 3), np.ones((2, 2), F)], streams=session.ids)
    session.step([zeros(1, 3), np.ones((1, 2), F)])
    return session


EXPECTED_LIST = "the model's own structure, a list of 2: prices, calendar; or a dict with these"
REFUSED_LISTS = {
    "one array": (lambda s: s.step(zeros(2, 3)), f"type numpy.ndarray.*{EXPECTED_LIST}"),
    "a list of one": (lambda s: s.step([zeros(2, 3)]), f"a list of 1.*{EXPECTED_LIST}"),
    "a tuple of three": (lambda s: s.step((zeros(2, 3),) * 3), f"a tuple of 3.*{EXPECTED_LIST}"),
    "no keys": (lambda s: s.step({}), rf"the keys \[\].*{EXPECTED_LIST}"),
    "one lacks": (
        lambda s: s.step({"prices": zeros(2, 3)}),
        rf"the keys \['prices'\].*{EXPECTED_LIST}",
    ),
    "another name": (
        lambda s: s.step({"prices": zeros(2, 3), "calender": zeros(2, 2)}),
        rf"the keys \['prices', 'calender'\].*{EXPECTED_LIST}",
    ),
    "one more": (
        lambda s: s.step({"prices": zeros(2, 3), "calendar": zeros(2, 2), "more": zeros(2)}),
        f"'more'.*{EXPECTED_LIST}",
    ),
    "places for names": (
        lambda s: s.step({0: zeros(2, 3), 1: zeros(2, 2)}),
        rf"the keys \[0, 1\].*{EXPECTED_LIST}",
    ),
    "out": (
        lambda s: s.step([zeros(2, 3), zeros(2, 2)], out=zeros(2, 3)),
        "out is .*a list of 2: sum, late;",
    ),
    "a dict for lists in a list": (
        lambda s: s.nested.step({"a": zeros(1, 2), "b": zeros(1, 2), "c": zeros(1, 2)}),
        r"Expected the model's own structure, a list of 2: a, \(a list of 2: b, c\)\.",
    ),
    "a dict for inputs of one name": (
        lambda s: s.of_one_name.step({"x": zeros(1, 2)}),
        r"Expected the model's own structure, a list of 2: x, x\.",
    ),
}


@pytest.mark.parametrize(("call", "says"), REFUSED_LISTS.values(), ids=REFUSED_LISTS.keys())
def test_lists_are_refused_and_change_nothing(listed, call, says):
    listed.nested = negative_plan(["a", "b", "c"], [0, [1, 2]]).session()
    listed.of_one_name = negative_plan(["x", "x"], [0, 1]).session()
    before = everything(listed)
    with pytest.raises(ValueError, match=says):
        call(listed)
    assert everything(listed) == before


def test_a_failing_id_changes_nothing(session):
    class Bad:
        def __index__(self):
            raise LookupError("mine")

    class Shrinking:
        def __init__(self, ids):
            self.ids = ids

        def __index__(self):
            self.ids.clear()
            return int(session.ids[0])

    before = everything(session)
    with pytest.raises(LookupError, match="mine"):
        session.step(zeros(1, 6), streams=[Bad()])
    ids = []
    ids += [Shrinking(ids), int(session.ids[1])]
    with pytest.raises(ValueError, match="streams names 1 stream, but x has 2 rows"):
        session.step(zeros(2, 6), streams=ids)
    assert everything(session) == before


def test_more_streams_than_there_is_room_for(plan):
    session = plan.session(streams=3)
    ids = session.open(2)
    with pytest.raises(sessions.TooManyStreamsError, match="3") as raised:
        session.open(2)
    assert isinstance(raised.value, RuntimeError)
    assert session.open_streams == 2
    with pytest.raises(sessions.TooManyStreamsError):
        session.step(zeros(2, 6))  # This needs two more default streams.
    assert session.open_streams == 2
    session.step(zeros(1, 6))
    with pytest.raises(sessions.TooManyStreamsError):
        session.open()
    session.close(ids[0])
    assert isinstance(session.open(), int)


def test_options_that_do_not_fit(plan, tmp_path):
    path = plan.write(tmp_path)
    for options, says in [
        ({"streams": 0}, "streams.*1 or more.*0"),
        ({"streams": -3}, "-3"),
        ({"threads": 0}, "threads.*1 or more.*0"),
        ({"threads": True}, "threads"),
        ({"cache_dtype": "int7"}, "cache_dtype.*bfloat16.*int7"),
        ({"weights_dtype": "float16"}, "weights_dtype.*float16"),
        ({"device": "gpu"}, "device.*'cpu'.*gpu"),
        ({"cache_dtype": "float64"}, "float64"),
        ({"weights_dtype": "float64"}, "float64"),
    ]:
        with pytest.raises(ValueError, match=says):
            Session.load(path, **options)
    with pytest.raises(TypeError, match=r"threads.*1\.5"):
        Session.load(path, threads=1.5)
    with pytest.raises(TypeError, match="Session.load"):
        Session(str(path))


def test_files_that_are_none(plan, tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing"):
        Session.load(tmp_path / "nothing")
    with pytest.raises((OSError, sessions.ModelFileError), match=tmp_path.name):
        Session.load(tmp_path)
    data = plan.to_bytes()
    for name, content in {
        "empty": b"",
        "short": data[:100],
        "cut": data[:-1],
        "foreign": b"PK\x03\x04" + bytes(1000),
        "newer": data.replace(b'"format_version": "1"', b'"format_version": "2"'),
    }.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(sessions.ModelFileError) as raised:
            Session.load(tmp_path / name)
        assert isinstance(raised.value, ValueError)
        assert len(str(raised.value)) > 20


def test_structures_of_a_file_are_checked(tmp_path, random):
    for key, structure in [
        ("input_structure", 1),
        ("input_structure", [0, 0]),
        ("input_structure", []),
        ("input_structure", "x"),
        ("output_structure", {"y": -1}),
        ("output_structure", None),
    ]:
        plan = attention_plan(random)
        plan.plan[key] = structure
        with pytest.raises(sessions.ModelFileError, match=key):
            plan.session()


def test_state_of_another_model(session, random):
    other = attention_plan(random, FEATURES, window=5, outputs=OUTPUTS).session()
    before = everything(session)
    a = other.open()
    with pytest.raises(sessions.OtherModelError) as raised:
        session.set_state(other.get_state(a), [session.ids[0]])
    assert isinstance(raised.value, ValueError)
    # All or nothing: the second state does not fit, so neither is put back.
    states = [session.get_state(session.ids)[1], *other.get_state(a)]
    with pytest.raises(sessions.OtherModelError):
        session.set_state(states, session.ids[[0, 2]])
    assert everything(session) == before


def test_state_of_another_training(session, random):
    other = attention_plan(random, FEATURES, outputs=OUTPUTS).session()
    x = random.standard_normal((1, 3, FEATURES)).astype(F)
    a = other.open()
    other.steps(x, streams=a)
    before = everything(session)
    with pytest.raises(sessions.OtherModelError, match="weights|training"):
        session.set_state(other.get_state(a), session.ids[:1])
    assert everything(session) == before
    session.set_state(other.get_state(a), session.ids[:1], other_weights=True)
    assert session.position(session.ids[0]) == 3


@pytest.mark.parametrize("own", ["float32", "bfloat16", "float16", "int8"])
@pytest.mark.parametrize("other", ["float32", "bfloat16", "float16", "int8"])
def test_state_of_another_cache_dtype(plan, tmp_path, own, other):
    path = plan.write(tmp_path)
    session, from_ = Session.load(path, cache_dtype=own), Session.load(path, cache_dtype=other)
    stream, states = session.open(), from_.get_state(from_.open())
    if own == other:
        session.set_state(states, stream)
        return
    says = f"the same model with the cache_dtype {other}, and this session has .*{own}"
    with pytest.raises(sessions.OtherModelError, match=says):
        session.set_state(states, stream, other_weights=True)


def test_sessions_of_one_file_share_states_whatever_their_weights_dtype(plan, tmp_path):
    # The message above says so.
    path = plan.write(tmp_path)
    session, from_ = Session.load(path), Session.load(path, weights_dtype="bfloat16")
    session.set_state(from_.get_state(from_.open()), session.open())


def test_weights_of_another_model(session, random, tmp_path):
    before = everything(session)
    path = attention_plan(random, FEATURES, window=5, outputs=OUTPUTS).write(tmp_path)
    with pytest.raises(sessions.OtherModelError):
        session.load_weights(path)
    assert everything(session) == before


def test_a_subclass_that_does_not_initialize():
    class Lazy(Session):
        def __init__(self):
            pass

    with pytest.raises(TypeError, match="__init__"):
        Lazy()
    with pytest.raises(RuntimeError, match="not initialized"):
        Session.__new__(Session).step(zeros(1, 6))
    with pytest.raises(RuntimeError, match="not initialized"):
        Session.__new__(Session).open()
    with pytest.raises(RuntimeError, match="not initialized"):
        repr(Session.__new__(Session))
    with pytest.raises(TypeError, match="int"):
        Session.step(3, zeros(1, 6))
    with pytest.raises(TypeError, match="int"):
        Session._open(3, None)


def test_exceptions_can_be_pickled():
    for name in ("UnknownStreamError", "TooManyStreamsError", "ModelFileError", "OtherModelError"):
        error = getattr(sessions, name)("why")
        copy = pickle.loads(pickle.dumps(error))
        assert type(copy) is type(error)
        assert copy.args == ("why",)


def test_an_input_that_numpy_does_not_have():
    plan = PlanFile(weights_dtype="bfloat16")
    x = plan.input("x", 3, dtype="bfloat16")
    plan.output("y", plan.node("cast", [x], plan.value(3)))
    with pytest.raises(sessions.ModelFileError):
        plan.session()


def test_too_many_threads_are_refused(plan):
    with pytest.raises(ValueError, match="threads to be an int of 1 or more, at most 1024"):
        plan.session(threads=10**9)
