"""The layer's step in PyTorch: continual-inference, and SDPA on a hand-written ring."""

import torch
import torch.nn.functional as F

from continual_transformers_tf.bench.rivals import Contestant, Weights, past_of, rings_of
from continual_transformers_tf.bench.sizes import Size


def _continual_inference(size: Size, weights: Weights, threads: int) -> Contestant:
    import continual

    torch.set_num_threads(threads)
    layer = continual.SingleOutputMultiheadAttention(
        size.features, size.heads, sequence_len=size.seq_len
    ).eval()
    with torch.no_grad():
        kernels, biases = zip(*weights, strict=True)
        layer.in_proj_weight.copy_(torch.cat([torch.from_numpy(w.T) for w in kernels[:3]]))
        layer.in_proj_bias.copy_(torch.cat([torch.from_numpy(b) for b in biases[:3]]))
        layer.out_proj.weight.copy_(torch.from_numpy(kernels[3].T))
        layer.out_proj.bias.copy_(torch.from_numpy(biases[3]))
    step = torch.inference_mode()(lambda x: layer.forward_step(x, x, x))
    for x in past_of(size):
        step(torch.from_numpy(x))
    return step, torch.from_numpy


def _torch_sdpa(size: Size, weights: Weights, threads: int) -> Contestant:
    torch.set_num_threads(threads)
    # In nn.Linear's layout: [outputs, inputs].
    (wq, bq), (wk, bk), (wv, bv), (wo, bo) = (
        (torch.from_numpy(w.T.copy()), torch.from_numpy(b)) for w, b in weights
    )
    keys, values = (torch.from_numpy(ring) for ring in rings_of(size, weights))
    rows, heads, position = size.streams, (size.streams, size.heads, 1, size.head), size.seq_len

    @torch.inference_mode()
    def step(x: torch.Tensor) -> torch.Tensor:
        nonlocal position
        row = position % size.seq_len
        keys[:, :, row : row + 1] = F.linear(x, wk, bk).view(heads)
        values[:, :, row : row + 1] = F.linear(x, wv, bv).view(heads)
        position += 1
        attended = F.scaled_dot_product_attention(F.linear(x, wq, bq).view(heads), keys, values)
        return F.linear(attended.view(rows, -1), wo, bo)

    return step, torch.from_numpy


RIVALS = {"continual_inference": _continual_inference, "torch_sdpa": _torch_sdpa}
