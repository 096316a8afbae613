"""What every continual layer asks of its inputs."""

import tensorflow as tf

_AXES = {2: "(M, E), one step of M streams", 3: "(M, T, E), T steps"}


def step_input(name, x, rank, dtype):
    """An input of a call, as a tensor of the layer's compute dtype.

    Args:
        name: of the argument, for the message.
        x: what the user gave.
        rank: 2 for one step, 3 for several or for windows.
        dtype: the layer's compute dtype; other floating dtypes are cast to it, as Keras does.

    Raises:
        ValueError: if the rank is another, or the dtype not floating.
    """
    x = tf.convert_to_tensor(x)
    if x.shape.rank != rank:
        raise ValueError(f"Expected {name} of shape {_AXES[rank]}, but got {tuple(x.shape)}")
    if not x.dtype.is_floating:
        raise ValueError(f"Expected {name} of a floating dtype, but got {x.dtype.name}")
    return tf.cast(x, dtype)


def check_features(inputs, features):
    """Raises ValueError unless tensors have the features a layer was built for, and the same rows.

    Args:
        inputs: dict from a name to a tensor `(M, E)` or `(M, T, E)`; the first sets M and T.
        features: the E of each, in their order.
    """
    first = next(iter(inputs.values()))
    for (name, x), size in zip(inputs.items(), features, strict=True):
        if x.shape[-1] != size or not x.shape[:-1].is_compatible_with(first.shape[:-1]):
            expected = (*first.shape[:-1], size)
            raise ValueError(f"Expected {name} of shape {expected}, but got {tuple(x.shape)}")
    if first.shape.rank == 3 and first.shape[1] == 0:
        raise ValueError(f"Expected at least one step, but got {tuple(first.shape)}")
