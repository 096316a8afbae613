"""ct.from_torch: streamed side by side with the module that provided the weights."""

import sys

import numpy as np
import pytest

import continual_transformers_tf as ct
import reference

torch = pytest.importorskip("torch", reason="the extra torch is not installed")
co = pytest.importorskip("continual", reason="continual-inference is not installed")

N, E, H = 6, 12, 3


def module_of(cls=torch.nn.MultiheadAttention, dtype=torch.float64, **options):
    torch.manual_seed(20260611)
    module = cls(E, H, dtype=dtype, **options).eval()
    with torch.no_grad():
        for parameter in module.parameters():  # No bias should be zero.
            parameter.copy_(torch.randn(parameter.shape) * parameter.shape[-1] ** -0.5)
    return module


def newest(module, query, key, value):
    """Return PyTorch's output for the newest step of a window [B, T, ...]."""
    given = [torch.tensor(x, dtype=module.out_proj.weight.dtype) for x in (query, key, value)]
    if not module.batch_first:
        given = [x.transpose(0, 1) for x in given]
    with torch.no_grad():
        output = module(*given, need_weights=False)[0]
    return (output[:, -1] if module.batch_first else output[-1]).double().numpy()


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(batch_first=True),
        dict(bias=False),
        dict(kdim=5),
        dict(kdim=5, vdim=7, batch_first=True),
        dict(vdim=7, bias=False),
    ],
    ids=str,
)
def test_streams_side_by_side(backend, random, options):
    module = module_of(**options)
    layer = ct.from_torch(module, N)
    assert layer.dtype == "float64"
    sizes = (E, module.vdim, module.kdim)
    query, value, key = (random.normal(size=(2, 3 * N, size)) for size in sizes)
    for t in range(3 * N):
        output = layer.call_step(query[:, t], value[:, t], key[:, t])
        window = slice(max(0, t - N + 1), t + 1)
        expected = newest(module, query[:, window], key[:, window], value[:, window])
        if t < N - 1:
            assert output is None
        else:
            assert reference.relative_error(output, expected) < 1e-12
    whole = layer(query[:, -N:], value[:, -N:], key[:, -N:])
    assert reference.relative_error(whole[:, 0], expected) < 1e-12


@pytest.mark.parametrize("query_index", [-1, -3, 2])
@pytest.mark.parametrize("single_output_forward", [True, False])
def test_streams_side_by_side_with_continual_inference(random, query_index, single_output_forward):
    module = module_of(
        co.SingleOutputMultiheadAttention,
        sequence_len=N,
        query_index=query_index,
        single_output_forward=single_output_forward,
        embed_dim_second=True,
        forward_returns_attn_mask=False,
    )
    layer = ct.from_torch(module)
    assert (layer.seq_len, layer.delay, layer.receptive_field) == (
        N, module.delay, module.receptive_field,
    )  # fmt: skip
    x = random.normal(size=(2, 3 * N, E))
    for t in range(3 * N):
        with torch.no_grad():
            expected = module.forward_step(torch.tensor(x[:, t]))
        if t >= N - 1:  # Until then the module attends to zeros.
            output = layer.call_step(x[:, t])
            assert reference.relative_error(output, expected.numpy()) < 1e-12
        else:
            assert layer.call_step(x[:, t]) is None
    with torch.no_grad():
        whole = module(torch.tensor(x[:, -N:]).transpose(1, 2)).transpose(1, 2)
    assert reference.relative_error(layer(x[:, -N:]), whole.numpy()) < 1e-12


@pytest.mark.parametrize("prefix", ["", "blocks.0.self_attn."])
@pytest.mark.parametrize("options", [dict(), dict(kdim=5, vdim=7, bias=False)], ids=str)
def test_from_weights_and_from_files(random, tmp_path, prefix, options):
    module = module_of(dtype=torch.float32, **options)
    expected = ct.from_torch(module, N)
    tensors = {prefix + name: tensor for name, tensor in module.state_dict().items()}
    if prefix:
        tensors["blocks.0.linear1.weight"] = torch.zeros(3, 3)
    layers = [ct.from_torch(tensors, N, num_heads=H, prefix=prefix)]
    arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
    layers.append(ct.from_torch(arrays, num_heads=H, seq_len=N, prefix=prefix))
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    for path in (tmp_path / "weights.safetensors", str(tmp_path / "again.safetensors")):
        safetensors.save_file(tensors, path)
        layers.append(ct.from_torch(path, N, num_heads=H, prefix=prefix))
    for layer in layers:
        assert layer.dtype == "float32"
        for weight, other in zip(layer.get_weights(), expected.get_weights(), strict=True):
            np.testing.assert_array_equal(weight, other)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_and_options(random, tmp_path, dtype):
    module = module_of(dtype=getattr(torch, dtype), dropout=0.25)
    layer = ct.from_torch(module, N, warm_up="partial", query_index=-2, name="attention")
    assert (layer.dtype, layer.warm_up, layer.delay, layer.name) == (
        dtype,
        "partial",
        1,
        "attention",
    )
    assert layer.get_config()["dropout"] == 0.25
    kernel = module.in_proj_weight.detach().float().numpy()[:E].T.reshape(E, H, E // H)
    np.testing.assert_array_equal(np.float32(layer.get_weights()[0]), kernel)
    wide = ct.from_torch(module, N, dtype="float32")
    np.testing.assert_array_equal(wide.get_weights()[0], kernel)
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    safetensors.save_file(module.state_dict(), tmp_path / "half.safetensors")
    file = ct.from_torch(tmp_path / "half.safetensors", N, num_heads=H)
    assert file.dtype == dtype
    np.testing.assert_array_equal(np.float32(file.get_weights()[0]), kernel)


def test_weights_are_copies():
    module = module_of()
    layer = ct.from_torch(module, N)
    before = layer.get_weights()[0]
    with torch.no_grad():
        module.in_proj_weight.zero_()
    np.testing.assert_array_equal(layer.get_weights()[0], before)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: module_of(add_bias_kv=True), "add_bias_kv=True: a learned step"),
        (lambda: module_of(add_zero_attn=True), "Expected add_zero_attn=False"),
        (lambda: torch.nn.Linear(3, 3), "but got torch.nn.modules.linear.Linear"),
        (lambda: None, "but got builtins.NoneType"),
    ],
)
def test_what_has_no_counterpart_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        ct.from_torch(make(), N)


def test_retroactive_attention_side_by_side(random):
    """For logits of order one, the published update is exact enough to compare with."""
    module = module_of(
        co.RetroactiveMultiheadAttention, torch.float32, batch_first=True, sequence_len=N
    )
    layer = ct.from_torch(module)
    assert isinstance(layer, ct.CoReMultiHeadAttention)
    x = random.normal(size=(2, N + 3, E)).astype("float32")
    window = torch.from_numpy(x[:, -N:])
    with torch.no_grad():
        expected = module.forward(window, window, window)
    expected = (expected[0] if isinstance(expected, tuple) else expected).numpy()
    assert reference.relative_error(layer.call_steps(x)[:, -1], expected) < 5e-6


ENCODER = dict(d_model=E, nhead=H, dim_feedforward=10, dropout=0.0)


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize(
    "activation",
    ["relu", "gelu", torch.tanh, torch.nn.SiLU()],
    ids=["relu", "gelu", "tanh", "silu"],
)
def test_encoder_layers_side_by_side(random, norm_first, activation):
    module = torch.nn.TransformerEncoderLayer(
        **ENCODER, activation=activation, norm_first=norm_first, batch_first=True,
        layer_norm_eps=1e-3,
    ).eval()  # fmt: skip
    layer = ct.from_torch(module, seq_len=N)
    x = random.normal(size=(2, 2 * N, E)).astype("float32")
    for t in range(2 * N):
        output = layer.call_step(x[:, t])
        if t >= N - 1:
            with torch.no_grad():
                expected = module(torch.from_numpy(x[:, t - N + 1 : t + 1]))[:, -1].numpy()
            assert reference.relative_error(output, expected) < 1e-5


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("norm", [None, torch.nn.LayerNorm(E, eps=1e-5)], ids=str)
def test_whole_encoders_side_by_side(random, depth, norm):
    module = torch.nn.TransformerEncoder(
        torch.nn.TransformerEncoderLayer(**ENCODER, batch_first=True), depth, norm,
        enable_nested_tensor=False,
    ).eval()  # fmt: skip
    with torch.no_grad():  # PyTorch initializes all layers as copies of one.
        for weight in module.parameters():
            weight.copy_(torch.from_numpy(random.normal(scale=0.4, size=weight.shape)))
    stack = ct.from_torch(module, seq_len=N)
    x = random.normal(size=(2, N + 4, E)).astype("float32")
    steps = stack.call_steps(x)
    for t in range(5):
        with torch.no_grad():
            expected = module(torch.from_numpy(x[:, t : t + N]))[:, -1].numpy()
        assert reference.relative_error(steps[:, t], expected) < 1e-5
    banded = ct.from_torch(module, seq_len=N, kind="single_output")
    assert banded.receptive_field == 1 + depth * (N - 1)


@pytest.mark.parametrize(
    "make", [co.SingleOutputTransformerEncoderLayer, co.RetroactiveTransformerEncoderLayer]
)
def test_encoder_layers_of_continual_inference(random, make):
    activation = torch.nn.GELU()
    module = make(**ENCODER, activation=activation, sequence_len=N).eval()
    layer = ct.from_torch(module)
    x = random.normal(size=(2, N, E)).astype("float32")
    with torch.no_grad():  # The module's arrays are (B, E, T).
        expected = module.forward(torch.from_numpy(x.swapaxes(1, 2).copy())).numpy().swapaxes(1, 2)
    output = layer.call_steps(x)[:, -1].numpy()
    wanted = expected if output.ndim == 3 else expected[:, -1]
    assert reference.relative_error(output, wanted) < 1e-5


def test_encoders_without_counterpart_are_refused():
    def layer(**options):
        return torch.nn.TransformerEncoderLayer(**{**ENCODER, "batch_first": True, **options})

    with pytest.raises(ValueError, match="Expected seq_len"):
        ct.from_torch(layer())
    with pytest.raises(ValueError, match="activation"):
        ct.from_torch(layer(activation=torch.nn.functional.softplus), seq_len=N)
    with pytest.raises(ValueError, match="biases"):
        ct.from_torch(layer(bias=False), seq_len=N)
    stack = torch.nn.TransformerEncoder(layer(), 2, enable_nested_tensor=False)
    stack.layers[1].dropout1.p = 0.5
    with pytest.raises(ValueError, match="equal options"):
        ct.from_torch(stack, seq_len=N)
    with pytest.raises(ValueError, match="no self_attn"):
        ct.from_torch(co.Sequential(torch.nn.Linear(2, 2)))
    delayed = co.SingleOutputTransformerEncoderLayer(**ENCODER, sequence_len=N, query_index=0)
    with pytest.raises(ValueError, match="query_index"):
        ct.from_torch(delayed)


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        ({}, dict(seq_len=None), "Expected seq_len"),
        ({}, dict(num_heads=None), "Expected num_heads"),
        ({}, dict(num_heads=5), "Expected num_heads to divide the 12 features, but got 5"),
        ({}, dict(prefix="attention."), "prefix="),
        ({"linear1.weight": np.zeros(3)}, {}, "but got .'linear1.weight'"),
        ({"in_proj_weight": None}, {}, "there is no .'q_proj_weight'"),
        ({"in_proj_bias": None}, {}, "or neither, but got .'out_proj.bias'"),
        ({"in_proj_weight": np.zeros((9, E))}, {}, "Expected projections to the 12 features"),
        ({"bias_k": np.zeros((1, 1, E))}, {}, "Expected weights without bias_k"),
    ],
    ids=str,
)
def test_weights_that_do_not_fit_are_named(change, arguments, message):
    weights = {name: x.numpy() for name, x in module_of().state_dict().items()} | change
    weights = {name: x for name, x in weights.items() if x is not None}
    with pytest.raises(ValueError, match=message):
        ct.from_torch(weights, **{"seq_len": N, "num_heads": H, **arguments})


def test_without_safetensors_a_file_names_the_cure(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "safetensors.numpy", None)
    with pytest.raises(ImportError, match="weights.safetensors: `pip install safetensors`"):
        ct.from_torch(tmp_path / "weights.safetensors", N, num_heads=H)
