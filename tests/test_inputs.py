"""The errors of every layer for an input that is None, or of another rank."""

import numpy as np
import pytest

import continual_transformers_tf as ct
from co_si_mha_cases import D, E, H, N


@pytest.mark.parametrize(
    "make",
    [
        lambda: ct.CoSiMultiHeadAttention(N, H, D),
        lambda: ct.CoReMultiHeadAttention(N, H, D),
        lambda: ct.CoSiTransformerEncoder(N, E, H, 9),
        lambda: ct.TransformerEncoder(2, N, E, H, 9),
        lambda: ct.CoDelay(2),
        lambda: ct.CircularPositionalEncoding(N, E),
        lambda: ct.CoResidual(ct.CoDelay(2)),
    ],
)
@pytest.mark.parametrize("mode", ["regular", "step", "steps"])
def test_no_input_is_named_as_such(make, mode):
    """While a window fills, a step returns None. A user may pass it to the next layer."""
    layer = make()
    with pytest.raises(ValueError, match="Expected .* but got None.*while its window fills"):
        getattr(layer, f"call_{mode}")(None)
    with ct.call_mode(mode), pytest.raises(ValueError, match="input of .* but got None"):
        layer(None)


def test_a_window_of_another_rank_is_said_to_be_one():
    for layer in (ct.CoSiTransformerEncoder(N, E, H, 9), ct.TransformerEncoder(2, N, E, H, 9)):
        with pytest.raises(ValueError, match=r"shape \(B, T, E\), windows of T steps, but got"):
            layer.call_regular(np.ones((2, E), "float32"))
