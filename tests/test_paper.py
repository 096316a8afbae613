"""The paper's models: their sizes, and their outputs on windows and in steps."""

import keras
import numpy as np
import pytest

import continual_transformers_tf as ct
import reference


@pytest.mark.parametrize(
    ("num_layers", "parameters"), [(1, 9_468_950), (2, 15_766_550), (3, 22_064_150)]
)
def test_co_oad_tr_has_the_papers_parameters(num_layers, parameters):
    model = ct.co_oad_tr(num_layers)
    assert model.count_params() == parameters
    assert model(np.zeros((1, 64, 3072), "float32")).shape == (1, 1, 22)
    assert model.receptive_field == 64


@pytest.mark.parametrize("build", [ct.co_oad_tr, ct.co_audio_transformer])
@pytest.mark.parametrize("size", ["features", "classes", "seq_len", "embed_dim", "num_heads"])
@pytest.mark.parametrize("wrong", [0, None, 1.5, "a"])
def test_sizes_that_are_none_are_named(build, size, wrong):
    with pytest.raises(ValueError, match=f"Expected {size} to be an integer >= 1, but got"):
        build(**{size: wrong})


SMALL = dict(features=7, classes=3, seq_len=6, embed_dim=16, num_heads=4, ff_dim=12)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("build", [ct.co_oad_tr, ct.co_audio_transformer])
@pytest.mark.parametrize("num_layers", [1, 2, pytest.param(3, marks=pytest.mark.slow)])
def test_steps_are_the_windows_newest_outputs(tmp_path, random, build, num_layers):
    model = build(num_layers, **SMALL)
    for weight in model.weights:
        weight.assign(random.normal(scale=0.3, size=weight.shape))
    model.save(tmp_path / "model.keras")
    model = keras.models.load_model(tmp_path / "model.keras")
    x = random.normal(size=(2, 13, 7)).astype("float32")
    streamed = model.call_steps(x)
    assert streamed.shape == (2, 8, 3)
    model.clean_state()
    for t in range(13):
        output = model.call_step(x[:, t])
        assert (output is None) == (t < 5)
        if output is not None:
            assert reference.relative_error(output, streamed[:, t - 5].numpy()) < 1e-5
    for t in range(5, 13):
        window = x[:, t - 5 : t + 1]
        model.clean_state()  # Windows begin at the first row of the positional encoding.
        steps = model.call_steps(window)[:, -1]
        assert reference.relative_error(model(window)[:, 0], steps.numpy()) < 1e-5


def test_the_audio_model():
    model = ct.co_audio_transformer()
    assert model(np.zeros((2, 120, 128), "float32")).shape == (2, 1, 10)
    assert model.model.get_layer("encoder").blocks[0].attention.key_dim == 12
    dense = 128 * 192 + 192 + 192 * 10 + 10
    block = 4 * (192 * 192 + 192) + 2 * (192 * 192 + 192) + 4 * 192
    assert model.count_params() == dense + 239 * 192 + block + 2 * 192


def test_heads_that_do_not_fit():
    with pytest.raises(ValueError, match="multiple of num_heads"):
        ct.co_oad_tr(embed_dim=10, num_heads=4)
