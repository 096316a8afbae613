"""The whole layer's step by the CUDA kernels, against the float64 reference."""

import numpy as np
import pytest

import cuda_calls
from cuda_co_si_mha_step import (
    Layer,
    LayerCall,
    LayerSizes,
    LayerStreams,
    check_layer_call,
    check_layer_results,
    inputs_of,
)
from cuda_single_output import Sizes


def layer_sizes(attention=None, features=(24, 17, 32), output_features=20, **options):
    return LayerSizes(attention or Sizes(2, 7, 12, 16), *features, output_features, **options)


HALVES = dict(attention=Sizes(2, 7, 16, 16, "bfloat16"))
LAYERS = {
    "plain": {},
    "no bias": dict(use_bias=False),
    "gate": dict(use_gate=True),
    "odd sizes": dict(attention=Sizes(3, 5, 11, 7), features=(13, 9, 5), output_features=3),
    "one": dict(attention=Sizes(1, 1, 1, 1), features=(1, 1, 1), output_features=1),
    "float64 weights": dict(
        attention=Sizes(2, 7, 12, 16, "float64"), weights_dtype="float64", delay=2, use_gate=True
    ),
    "bfloat16 ring": HALVES,
    "float16 ring": dict(attention=Sizes(2, 7, 16, 16, "float16"), use_bias=False),
    "bfloat16 weights": dict(weights_dtype="bfloat16", use_gate=True),
    "bfloat16 both": dict(**HALVES, weights_dtype="bfloat16"),
    "float16 ring, bfloat16 weights": dict(
        attention=Sizes(2, 7, 16, 16, "float16"), weights_dtype="bfloat16"
    ),
    "delay": dict(delay=6),
    "delay of one, gate": dict(delay=1, use_gate=True),
    "delay, gate, halves": dict(
        **HALVES, weights_dtype="bfloat16", delay=3, use_gate=True, use_bias=False
    ),
}


@pytest.fixture(params=LAYERS)
def layer(request, random):
    return Layer(random, layer_sizes(**LAYERS[request.param]))


@pytest.mark.sanitizer
def test_layers(machine, random, layer):
    """Every kind of layer, with streams of all ages, and with every mask in some of the cases."""
    heads, n = layer.sizes.attention[:2]
    streams = LayerStreams(random, [0, 1, n - 1, n, 2 * n + 3], layer, gaps=0.2)
    for step, m in enumerate((3, 1, 4, 2, 5)):
        options = dict(
            mask=random.random((m, heads, 1, n)) < 0.8 if step % 3 == 1 else None,
            key_mask=random.random(m) < 0.7 if step % 2 == 0 else None,
            query_mask=random.random(m) < 0.7 if step % 3 == 0 else None,
            update_state=step != 2,
            scores=step != 3,
        )
        chosen = random.permutation(5)[:m]
        check_layer_call(machine, layer, streams, chosen, inputs_of(random, layer, m), **options)


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 8, 17])
@pytest.mark.parametrize("weights_dtype", ["float32", "bfloat16"])
def test_rows(machine, random, rows, weights_dtype):
    sizes = layer_sizes(Sizes(2, 5, 8, 8), (40, 40, 40), 33, weights_dtype=weights_dtype)
    layer = Layer(random, sizes)
    streams = LayerStreams(random, random.integers(0, 12, rows + 2), layer)
    for multiprocessors in (1, 3, 132):
        chosen = random.permutation(rows + 2)[:rows]
        inputs = inputs_of(random, layer, rows)
        options = dict(multiprocessors=multiprocessors)
        check_layer_call(machine, layer, streams, chosen, inputs, **options)


@pytest.mark.parametrize("features", [64, 130, 256])
def test_features(machine, random, features):
    """Sums over many features, and outputs of many blocks."""
    for weights_dtype in ("float32", "bfloat16"):
        attention = Sizes(4, 6, features // 4, features // 4)
        sizes = layer_sizes(attention, (features,) * 3, features, weights_dtype=weights_dtype)
        layer = Layer(random, sizes)
        streams = LayerStreams(random, [4, 9], layer)
        for chosen in ([1], [1, 0]):
            inputs = inputs_of(random, layer, len(chosen))
            check_layer_call(machine, layer, streams, chosen, inputs)


@pytest.mark.parametrize("rows", [1, 3, 17])
@pytest.mark.parametrize("features", [512, 1024])
def test_the_papers_sizes(machine, random, features, rows):
    if not machine.is_gpu:
        pytest.skip("the emulator is too slow for this size; test_features has smaller ones")
    for dtype, weights_dtype in (("float32", "float32"), ("bfloat16", "bfloat16")):
        attention = Sizes(8, 64, features // 8, features // 8, dtype)
        sizes = layer_sizes(attention, (features,) * 3, features, weights_dtype=weights_dtype)
        layer = Layer(random, sizes)
        streams = LayerStreams(random, random.integers(0, 200, rows), layer)
        for _ in range(3):
            inputs = inputs_of(random, layer, rows)
            check_layer_call(machine, layer, streams, range(rows), inputs, in_order=True)


def test_a_long_window_is_cut(machine, random):
    n = 4096 if machine.is_gpu else 300
    layer = Layer(random, layer_sizes(Sizes(1, n, 8, 8), (8, 8, 8), 8))
    streams = LayerStreams(random, [2 * n + 5, n // 3], layer)
    for chosen in ([0], [1, 0]):
        inputs = inputs_of(random, layer, len(chosen))
        options = dict(multiprocessors=132)
        check_layer_call(machine, layer, streams, chosen, inputs, **options)


@pytest.mark.parametrize("weights_dtype", ["float32", "bfloat16"])
def test_unaligned(machine, random, weights_dtype):
    sizes = layer_sizes(
        Sizes(2, 7, 16, 16), (32, 32, 32), 32, weights_dtype=weights_dtype, delay=2, use_gate=True
    )
    layer = Layer(random, sizes)
    streams = LayerStreams(random, [4, 19], layer)
    for _ in range(4):
        inputs = inputs_of(random, layer, 2)
        check_layer_call(machine, layer, streams, [1, 0], inputs, misaligned=True)


def test_no_result_wanted(machine, random):
    layer = Layer(random, layer_sizes(use_gate=True, delay=2))
    streams = LayerStreams(random, [4, 19], layer)
    for result in (False, True, False):
        inputs = inputs_of(random, layer, 2)
        check_layer_call(machine, layer, streams, [1, 0], inputs, result=result, scores=False)


@pytest.mark.parametrize("delay", [0, 2])
def test_positions_that_stay(machine, random, delay):
    layer = Layer(random, layer_sizes(delay=delay, use_gate=True))
    streams = LayerStreams(random, [5, 0, 30], layer)
    inputs = inputs_of(random, layer, 3)
    check_layer_call(machine, layer, streams, [2, 0, 1], inputs, advance_position=False)


@pytest.mark.sanitizer
@pytest.mark.parametrize("delay", [0, 2])
def test_no_such_stream_touches_nothing(machine, random, delay):
    layer = Layer(random, layer_sizes(delay=delay, use_gate=True))
    streams = LayerStreams(random, [5, -1, 3, 0], layer)
    chosen = [2, 5, 1, -1, 0, np.iinfo(np.int32).max]
    for update_state in (True, False):
        inputs = inputs_of(random, layer, len(chosen))
        check_layer_call(machine, layer, streams, chosen, inputs, update_state=update_state)


def test_no_rows(machine, random):
    layer = Layer(random, layer_sizes())
    streams = LayerStreams(random, [5, 1], layer)
    check_layer_call(machine, layer, streams, [], inputs_of(random, layer, 0))


@pytest.mark.parametrize("delay", [0, 3])
def test_replayed_while_the_streams_age(machine, random, delay):
    layer = Layer(random, layer_sizes(delay=delay))
    streams = LayerStreams(random, [0, 2, 30], layer)
    chosen = [2, 0]
    inputs = inputs_of(random, layer, 2)
    # A kernel's first launch does work that must not happen in a capture.
    check_layer_call(machine, layer, LayerStreams(random, [0, 2, 30], layer), chosen, inputs)
    call = LayerCall(machine, layer, streams, chosen, inputs)
    replay = machine.memory.capture(call.launch)
    for step in range(20):
        if step > 0:
            inputs = inputs_of(random, layer, 2)
            for name, x in zip(("query", "key", "value"), inputs, strict=True):
                call.arena.set(name, x)
        if step == 10:
            chosen = [1, 2]
            call.arena.set("streams", chosen)
        replay()
        check_layer_results(call, streams, chosen, inputs)


def test_steps_follow_one_another(machine, random):
    """A step that is launched without waiting sees what earlier steps wrote."""
    layer = Layer(random, layer_sizes(Sizes(2, 7, 16, 16), (32, 32, 32), 32))
    streams = LayerStreams(random, [3], layer)
    lap, laps = 15, 200 if machine.is_gpu else 2
    inputs = inputs_of(random, layer, lap)
    call = LayerCall(machine, layer, streams, [0] * lap, inputs, scores=False)
    call.struct.attention.num_streams = 1
    places = [(call.struct.attention, name) for name in ("query", "key", "value")]
    places = [(*place, getattr(*place)) for place in [*places, (call.struct, "result")]]
    for _ in range(laps):
        for i in range(lap):
            for holder, name, first in places:
                setattr(holder, name, first + i * call.arena.arrays[name][0].nbytes)
            call.launch()
    results = call.results()
    np.testing.assert_array_equal(results["position"], 3 + laps * lap)
    together = results["result"]
    single = LayerStreams(random, [0], layer)
    for i in range(lap):
        apart = check_layer_call(machine, layer, single, [0], [x[i : i + 1] for x in inputs])
        if i >= layer.sizes.attention.window:
            np.testing.assert_allclose(together[i], apart["result"][0], rtol=2e-5, atol=2e-5)


def refused_step(machine, random, sizes, **fields):
    layer = Layer(random, sizes)
    streams = LayerStreams(random, [5, 7], layer)
    call = LayerCall(machine, layer, streams, [1, 0], inputs_of(random, layer, 2))
    for name, value in fields.items():
        holder = call.struct if hasattr(call.struct, name) else call.struct.attention
        setattr(holder, name, value)
    with pytest.raises(cuda_calls.Refused) as refused:
        call.launch()
    call.arena.written.clear()
    call.arena.results()
    return str(refused.value)


def test_sizes_that_no_kernel_takes_are_said(machine, random):
    assert "size" in refused_step(machine, random, layer_sizes(Sizes(1, 2, 5000, 1)))
    for name in ("num_heads", "window", "key_dim", "value_dim"):
        assert "expected" in refused_step(machine, random, layer_sizes(), **{name: 0})
    for name in ("compute_dtype", "cache_dtype", "weights_dtype"):
        assert "under float32" in refused_step(machine, random, layer_sizes(), **{name: 9})
