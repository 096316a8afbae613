"""The program with --journal: a server that is killed, and another that goes on from Redis."""

import numpy as np
import pytest
import tritonclient.grpc as triton
from kserve import infer
from tritonclient.utils import InferenceServerException

FEATURES = 6


def test_another_server_goes_on_where_the_last_answer_was(
    start_server, model_file, redis, session, samples
):
    streams, ids = ["a", "b", "c"], session.open(3)
    one = session.open()
    numbered = 0
    for life in range(3):
        server = start_server(model_file, "--journal", redis)
        with triton.InferenceServerClient(server.grpc_url) as client:
            # More steps than the receptive field in the first life, fewer in the second.
            for _ in range([12, 2, 4][life]):
                x = samples(3, FEATURES)
                y = infer(client, x, streams)
                np.testing.assert_allclose(y, session.step(x, streams=ids), atol=1e-5)
                x = samples(1, FEATURES)
                y = infer(client, x, sequence_id="numbered", step=numbered)
                np.testing.assert_allclose(y, session.step(x, streams=[one]), atol=1e-5)
                numbered += 1
            # The last answer is there, too, and a wrong number is refused.
            again = infer(client, x, sequence_id="numbered", step=numbered - 1)
            np.testing.assert_allclose(again, y, atol=1e-5)
            with pytest.raises(InferenceServerException, match=f"expects step {numbered}"):
                infer(client, x, sequence_id="numbered", step=numbered + 1)
        server.kill()


def test_a_journal_that_cannot_be_reached(model_file, start_server):
    with pytest.raises(AssertionError, match="redis://127.0.0.1:1"):
        start_server(model_file, "--journal", "redis://127.0.0.1:1")
