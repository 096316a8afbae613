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


def check_same_rows(**inputs):
    """Raises ValueError unless tensors `(M, E)` or `(M, T, E)` agree in M and T, which is not 0."""
    first = next(iter(inputs.values()))
    for name, x in inputs.items():
        if not x.shape[:-1].is_compatible_with(first.shape[:-1]):
            expected = (*first.shape[:-1], x.shape[-1])
            raise ValueError(f"Expected {name} of shape {expected}, but got {tuple(x.shape)}")
    if first.shape.rank == 3 and first.shape[1] == 0:
        raise ValueError(f"Expected at least one step, but got {tuple(first.shape)}")


def check_features(name, x, features):
    """Raises ValueError unless the last axis of a tensor is what the layer was built for."""
    if x.shape[-1] != features:
        raise ValueError(
            f"Expected {name} of shape {(*x.shape[:-1], features)}, but got {tuple(x.shape)}"
        )
