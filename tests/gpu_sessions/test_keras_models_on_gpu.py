"""Every Keras model of the tests on a GPU, against the float64 reference of its plan."""

import pytest

from continual_transformers_tf.models.lowering import lower
from continual_transformers_tf.session import Session
from model_case import BOUNDS
from model_cases import CASES
from moves import moved_to_the_cpu_and_back
from streamed import Streamed, by_streams, check
from test_session import referenced


@pytest.mark.sampled(20, rest="slow")
@pytest.mark.parametrize("name", CASES)
def test_every_model(random, device, name):
    case = CASES[name]
    model = case.build()
    lowered = lower(model, case.seq_len)
    if lowered.plan["compute_dtype"] == "float64":
        with pytest.raises(ValueError, match="compute dtype float64 has no kernels on cuda:0"):
            Session(model, seq_len=case.seq_len, device=device)
        return
    session = Session(model, seq_len=case.seq_len, device=device)
    inputs = case.inputs(model, random, (3, 2 * case.window + 8))
    ids = session.open(5)[[3, 0, 4]]
    outputs = by_streams(Streamed(session), inputs, ids)
    check(outputs, referenced(lowered.plan, lowered.weights, inputs), BOUNDS[case.dtype])
    on_cpu = Session(model, seq_len=case.seq_len)
    moved_to_the_cpu_and_back(session, on_cpu, ids, [x[:, 0] for x in inputs], BOUNDS[case.dtype])
