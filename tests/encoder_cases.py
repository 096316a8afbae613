"""Regular encoders, for the tests of the continual ones."""

import keras

N, E, H, FF = 6, 8, 2, 12


class RegularEncoder:
    """A block made of `keras.layers` with the weights of one of our blocks. It gives all rows."""

    def __init__(
        self, layer, key_dim=E, norm_first=False, activation="gelu", epsilon=1e-6, use_bias=True
    ):
        dtype = layer.compute_dtype
        attention, norm1, hidden, output, norm2 = (
            keras.layers.MultiHeadAttention(H, key_dim, use_bias=use_bias, dtype=dtype),
            keras.layers.LayerNormalization(epsilon=epsilon, dtype=dtype),
            keras.layers.Dense(FF, activation=activation, dtype=dtype),
            keras.layers.Dense(E, dtype=dtype),
            keras.layers.LayerNormalization(epsilon=epsilon, dtype=dtype),
        )
        inputs = keras.Input((None, E), dtype=dtype)
        if norm_first:
            x = norm1(inputs)
            x = inputs + attention(x, x)
            self.model = keras.Model(inputs, x + output(hidden(norm2(x))))
        else:
            x = norm1(inputs + attention(inputs, inputs))
            self.model = keras.Model(inputs, norm2(x + output(hidden(x))))
        weights = layer.get_weights()
        for part in (attention, norm1, hidden, output, norm2):
            part.set_weights([weights.pop(0) for _ in part.weights])
        assert not weights

    def newest(self, window):
        return self.model(window)[:, -1].numpy()


class RegularStack:
    """The regular encoder with the weights of a `ct.TransformerEncoder`. It gives all rows."""

    def __init__(self, stack, **options):
        self.blocks = [RegularEncoder(block, **options).model for block in stack.blocks]
        self.norm = stack.final_norm

    def __call__(self, x):
        for block in self.blocks:
            x = block(x)
        return x if self.norm is None else self.norm(x)
