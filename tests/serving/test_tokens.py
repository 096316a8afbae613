"""Which calls need which token, over both protocols."""

import contextlib

import pytest
import tritonclient.grpc as grpc_triton
import tritonclient.http as http_triton
from kserve import infer
from tritonclient.utils import InferenceServerException

FEATURES = 6

SECRETS = {"token": "a secret", "operator": "an operator's secret"}


@pytest.mark.parametrize(
    ("has", "may_load"),
    [
        ([], [None, "token", "operator"]),
        (["token"], ["token"]),
        (["operator"], ["operator"]),
        (["token", "operator"], ["operator"]),
    ],
    ids=lambda names: "+".join(map(str, names)) or "none",
)
def test_who_may_load_models(start_server, model_file, tmp_path, samples, has, may_load):
    """The same over both protocols, with tritonclient. The list of models is for every client."""
    arguments = []
    for name in has:
        (tmp_path / name).write_text(SECRETS[name])
        option = {"token": "--token-file", "operator": "--operator-token-file"}[name]
        arguments += [option, tmp_path / name]
    server = start_server(model_file, *arguments)
    x = samples(1, FEATURES)
    for sent in (None, "token", "operator"):
        headers = {"authorization": f"Bearer {SECRETS[sent]}"} if sent else {}
        may_step = "token" not in has or sent in has
        with (
            grpc_triton.InferenceServerClient(server.grpc_url) as over_grpc,
            http_triton.InferenceServerClient(f"127.0.0.1:{server.http_port}") as over_http,
        ):
            for client in (over_grpc, over_http):
                with refused_unless(may_step):
                    assert client.get_model_repository_index(headers=headers)
                with refused_unless(sent in may_load):
                    client.load_model("small", headers=headers)
                with refused_unless(sent in may_load):
                    client.unload_model("small", headers=headers)
                    client.load_model("small", headers=headers)
            with refused_unless(may_step):
                infer(over_grpc, x, sequence_id=1, headers=headers)
    # The log has a line of each, the first of the server's start.
    server.stop()  # The log is then read to its end.
    done = [event["event"] for event in server.events if event["event"].startswith("model_")]
    per_caller = ["model_loaded", "model_unloaded", "model_loaded"]
    assert done == ["model_loaded", *per_caller * 2 * len(may_load)]


@contextlib.contextmanager
def refused_unless(allowed):
    """Expect what the block does to be refused for want of a token, or to be allowed."""
    if allowed:
        yield
        return
    with pytest.raises(InferenceServerException, match="the request has no valid token") as error:
        yield
    assert error.value.status() in ("401", "StatusCode.UNAUTHENTICATED")
