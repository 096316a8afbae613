"""The script that made heads_first.safetensors and heads_first.npz.

It ran with an old version whose rings were heads first. It stays here to document the two files.
Files of this version have other names and axes.
"""

from pathlib import Path

import keras
import numpy as np

import continual_transformers_tf as ct

N, E, H, D = 5, 6, 2, 4
FOLDER = Path(__file__).parent


def model():
    """Return a model with a query that waits, a gate, and a retroactive layer."""
    options = dict(num_heads=H, key_dim=D, value_dim=3, warm_up="partial", use_gate=True)
    inputs = keras.Input((N, E))
    late = ct.CoSiMultiHeadAttention(N, query_index=-2, single_output=False, **options)
    late = keras.layers.Flatten()(late(inputs, inputs)[:, -2:-1])
    window = ct.CoReMultiHeadAttention(N, **options)(inputs, inputs)
    return keras.Model(inputs, keras.layers.Concatenate()([late, keras.layers.Flatten()(window)]))


def main():
    keras.utils.set_random_seed(1)
    streaming = ct.StreamingModel(model(), warm_up="partial")
    x = np.random.default_rng(1).normal(size=(12, 2, E)).astype("float32")
    for step in x[:8]:
        streaming.call_step(step)
    kept = {
        f"state/{layer}/{name}": array
        for layer, part in streaming.get_state().items()
        for name, array in part.items()
    }
    kept |= {"x": x[8:], "y": np.stack([streaming.call_step(step) for step in x[8:]])}
    ct.Session(streaming).save(FOLDER / "heads_first.safetensors")
    np.savez_compressed(FOLDER / "heads_first.npz", **kept)


if __name__ == "__main__":
    main()
