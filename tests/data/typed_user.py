"""A user's program that calls the whole public API: `mypy --strict` accepts it.

tests/test_typing.py runs mypy on it. It also runs, but does nothing then.
"""

from pathlib import Path
from typing import Any, assert_type

import numpy as np
import numpy.typing as npt

import continual_transformers_tf as ct


def stream(model: Any, folder: Path) -> npt.NDArray[np.float32]:
    """Stream a model in a session, and move its streams to another."""
    session = ct.Session(model, streams=8, threads=2, weights_dtype="bfloat16", seq_len=64)
    session.save(folder / "model.safetensors")
    session.load_weights(str(folder / "model.safetensors"))
    assert_type(session.open(), int)
    ids = session.open(3)
    assert_type(ids, npt.NDArray[np.int64])
    x = np.zeros((4, 6), np.float32)
    y = session.step(x, streams=[session.open(), *ids.tolist()])
    window = session.steps(x[:, np.newaxis], streams=ids)
    fields: list[int | None] = [session.receptive_field, session.delay, session.streams]
    names = [f"{spec.name} {spec.shape} {spec.dtype}" for spec in session.inputs]
    states = session.get_state(ids)
    assert_type(states, list[bytes])
    other = ct.Session.load(folder / "model.safetensors", cache_dtype="float16")
    other.set_state(states, other.open(len(states)))
    other.clean_state()
    total: int = other.memory().total
    seconds: float = other.profile(streams=2, repeat=10).seconds
    if bool(np.all(session.ready(ids))) and np.all(session.position(ids) == 1):
        print(fields, names, total, f"{seconds:.2g}", window)
    session.close(ids)
    result: npt.NDArray[np.float32] = np.asarray(y, np.float32)
    return result


@ct.row_wise
def halved(x: Any) -> Any:
    """Compute each row from that row."""
    return x / 2


def layers(x: npt.NDArray[np.float32]) -> list[Any]:
    """Call every layer on windows and on steps."""
    attention = ct.CoSiMultiHeadAttention(64, num_heads=8, key_dim=64, warm_up="partial")
    modern = [
        ct.CoSiMultiHeadAttention(64, 8, 64, num_key_value_heads=2, rotary=ct.Rotary(size=32)),
        ct.CoSiMultiHeadAttention(64, 8, 64, position_bias=ct.ALiBi(), use_sinks=True),
        ct.CoSiMultiHeadAttention(64, 8, 64, position_bias=ct.RelativePositionBias(32, 128)),
        ct.RotaryEmbedding(max_wavelength=5e5),
    ]
    print(modern)
    retroactive = ct.CoReMultiHeadAttention(64, 8, 64)
    y = attention.call_regular(x, x)
    step = attention.call_step(x[:, 0], streams=[0, 1], update_state=False)
    steps = retroactive.call_steps(x)
    blocks = [
        ct.CoSiTransformerEncoder(64, 32, 4, 128),
        ct.CoReTransformerEncoder(64, 32, 4, 128),
        ct.TransformerEncoder(2, 64, 32, 4, 128, kind="retroactive"),
        ct.CoResidual(ct.CoDelay(2)),
        ct.CoWindow(64),
        ct.CircularPositionalEncoding(127, 32),
    ]
    for block in blocks:
        block(x)
        ct.ensure_streams(block, 8)
        with ct.hold_streams(block):
            state: dict[str, Any] = block.get_state()
        block.set_state(state)
        ct.clean_state(block, [0])
        ct.convert_weights(block)
    with ct.call_mode("step"):
        blocks[0](x[:, 0])
    return [y, step, steps, ct.CleanState()]


def models(model: Any, torch_model: Any, folder: Path) -> list[Any]:
    """Convert, explain, count and export models."""
    streaming = ct.convert(model, 64, warm_up="partial")
    assert_type(streaming, ct.StreamingModel)
    fields: int = streaming.receptive_field + streaming.delay
    explanation = ct.explain(streaming, seq_len=64)
    for row in explanation.rows:
        print(f"{row.name} {row.kind} {row.how}", *row.reasons)
    if not explanation.streams:
        raise SystemExit(str(explanation))
    plain: dict[str, Any] = explanation.as_dict()
    operations: int = ct.cost(streaming).flops
    ct.export(streaming, folder)
    translated = ct.from_torch(torch_model)
    return [
        fields,
        plain,
        operations,
        translated,
        ct.co_oad_tr(2, features=64),
        ct.co_audio_transformer(classes=3),
        streaming.call_steps(np.zeros((1, 9, 6), np.float32)),
    ]


def serve(x: npt.NDArray[np.float32]) -> None:
    """Stream over the network."""
    with ct.serving.Client("127.0.0.1:8001") as client:
        watch = client.open("watch")
        assert_type(watch, ct.serving.Stream)
        try:
            print(client.model, watch.step(x), watch.steps(x[np.newaxis]))
        except ct.serving.ServingError as error:
            raise SystemExit(str(error)) from error
        watch.close()


def installation() -> list[str]:
    """Return what is installed."""
    return [ct.__version__, str(ct.ops.LIBRARY_PATH), *sorted(ct.ops.kernels())]
