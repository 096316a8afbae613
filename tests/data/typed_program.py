"""A typed program of a user: tests/test_typing.py has mypy check it. Nothing runs it."""

import numpy as np
import numpy.typing as npt

import continual_transformers_tf as ct


def serve(path: str, samples: npt.NDArray[np.float32]) -> list[float]:
    session = ct.Session.load(path, streams=1000, threads=2)
    stream = session.open()
    more = session.open(3)
    found: list[float] = []
    for sample in samples:
        y = session.step(sample[None], stream)
        found.append(float(np.asarray(y)[0, 0]))
    session.steps(samples[None], more[:1])
    states: list[bytes] = session.get_state([stream])
    session.set_state(states, [stream])
    ready: npt.NDArray[np.bool_] = session.ready([stream])
    print(ready, session.receptive_field, session.delay, session.state_bytes)
    session.clean_state([stream])
    session.close([stream])
    session.save("other.safetensors")
    return found


def train() -> None:
    layer = ct.CoSiMultiHeadAttention(seq_len=64, num_heads=8, key_dim=64)
    layer.ensure_streams(10)
    y = layer.call_step(np.zeros((3, 128), "float32"), streams=[7, 5, 3])
    print(y, layer.ready, layer.get_state(streams=[7]))
    encoder = ct.CoSiTransformerEncoder(64, 32, num_heads=4, ff_dim=64)
    stack = ct.TransformerEncoder(2, seq_len=64, embed_dim=32, num_heads=4, ff_dim=64)
    with ct.call_mode("step"):
        encoder(np.zeros((1, 32), "float32"))
    print(ct.cost(stack).flops)
    streaming = ct.convert(encoder, seq_len=64)
    ct.export(streaming, "folder", streams=10, states=False)
    ct.export_litert(streaming, "step.tflite", weights="int8", key_mask=True)
    ct.clean_state(streaming, streams=[1])
    chunked = ct.CoChunkedMultiHeadAttention(chunk=4, left_chunks=2, num_heads=2, key_dim=8)
    print(chunked.block, ct.CoTemporal(chunked, window=3).span, ct.CoRecurrent(chunked).goes_on)
    print(ct.LearnedQueries(count=3, features=8)(np.zeros((1, 4, 8), "float32")))
    session = ct.Session(streaming, weights_dtype="bfloat16")
    session.load_weights(streaming)


def call(url: str) -> None:
    client = ct.serving.Client(url, token="a", timeout=3.0)
    with client.open("name") as stream:
        y = stream.step(np.zeros(6, np.float32))
        print(y, stream.next_step)
    client.step(np.zeros((2, 6), np.float32), streams=["a", "b"], steps=[0, 0], end=True)
    try:
        client.end(["a"])
    except ct.serving.ServingError as error:
        print(error.reason, error.expected)


print(ct.ops.kernels(), ct.ops.load_error(), ct.ops.cpu_targets(), ct.__version__)
