"""Time steps in TensorFlow on a GPU: `python benchmarks/gpu/tensorflow_benchmark.py --json FILE`.

It times the fused op, and an attention layer and an encoder block that are made of it. Beside them
are the same steps in plain TensorFlow (CONTINUAL_TRANSFORMERS_BACKEND=tensorflow), and Keras' own
attention on the same work: for the op `keras.ops.dot_product_attention` on the same rings, for the
layer `keras.layers.MultiHeadAttention` on the window of inputs, for the block its own call on that
window. Each step is taken in a loop of a `tf.function`, as a `tf.function`, and eagerly. All times
are by the clock on the wall, with many steps between two waits for the GPU.

It needs TensorFlow with a GPU, and this package. Each result is printed and written when it is
there, the most telling first.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

import numpy as np

from gpu_sizes import AttentionSize, LayerSize
from session_benchmark import microseconds

STEPS = 50  # Between two waits for the GPU.
# The largest difference from plain TensorFlow's outputs, relative to the largest output.
AGREEMENT = {"float32": 1e-4, "bfloat16": 4e-2, "float16": 1e-2}
WAYS = ("loop", "function", "eager")
COLUMNS = ("fused", "plain", "keras")

SIZES = (
    AttentionSize(1, 8, 512, 64, "float32"),
    LayerSize(1, 1024, 8, 64, "float32"),
    LayerSize(1, 1024, 8, 64, "float32", hidden=1024),
    AttentionSize(64, 8, 512, 64, "float32"),
    LayerSize(64, 1024, 8, 64, "float32"),
    LayerSize(64, 1024, 8, 64, "float32", hidden=1024),
    AttentionSize(2048, 8, 512, 64, "bfloat16"),
    LayerSize(1024, 1024, 8, 64, "float32"),
    AttentionSize(1, 8, 4096, 64, "bfloat16"),
)


class Backend:
    """Sets what `CONTINUAL_TRANSFORMERS_BACKEND` says while steps are traced or taken."""

    def __init__(self, name):
        self.name = name

    def __enter__(self):
        self.before = os.environ.get("CONTINUAL_TRANSFORMERS_BACKEND")
        os.environ["CONTINUAL_TRANSFORMERS_BACKEND"] = self.name

    def __exit__(self, *error):
        if self.before is None:
            del os.environ["CONTINUAL_TRANSFORMERS_BACKEND"]
        else:
            os.environ["CONTINUAL_TRANSFORMERS_BACKEND"] = self.before


BACKENDS = {"fused": "fused", "plain": "tensorflow", "keras": "tensorflow"}


def attention_steps(size, random):
    """Return (inputs of a step, {column: function of them}) for attention on projected steps."""
    import keras
    import tensorflow as tf

    from continual_transformers_tf.ops import AttentionCache, single_output_attention

    s, h, n, d = size.streams, size.heads, size.window, size.dim
    inputs = [tf.cast(tf.constant(random.normal(size=(s, h, d))), size.dtype) for _ in range(3)]
    past = [random.normal(size=(1, n, h, d)).astype("float32") for _ in range(2)]

    def ours():
        cache = AttentionCache(s, h, n, d, dtype=size.dtype)
        for ring, rows in zip((cache.keys, cache.values), past, strict=True):
            ring.assign(tf.broadcast_to(tf.cast(rows, size.dtype), (s, n, h, d)))
        cache.key_mask.assign(tf.fill([s, n], True))
        cache.position.assign(tf.fill([s], tf.constant(n, tf.int64)))
        return lambda query, key, value: single_output_attention(query, key, value, cache)

    rings = [
        tf.Variable(tf.broadcast_to(tf.cast(rows, size.dtype), (s, n, h, d)), trainable=False)
        for rows in past
    ]

    def on_rings(query, key, value):
        # The first step of a ring that is full overwrites the first row, and so does this one
        # always: for its time it does not matter which.
        for ring, row in zip(rings, (key, value), strict=True):
            ring[:, 0].assign(row)
        return keras.ops.dot_product_attention(query[:, None], *rings)[:, 0]

    return inputs, {"fused": ours(), "plain": ours(), "keras": on_rings}


def layer_steps(size, random):
    """Return the same as `attention_steps`, for an attention layer or an encoder block."""
    import keras
    import tensorflow as tf

    import continual_transformers_tf as ct

    m, e, n, h = size.streams, size.features, size.window, size.heads
    x = tf.constant(random.normal(size=(m, e)), tf.float32)
    past = random.normal(size=(1, n, e)).astype("float32")

    def made():
        if size.hidden:
            layer = ct.CoSiTransformerEncoder(n, e, h, size.hidden, key_dim=e // h,
                                              warm_up="partial")  # fmt: skip
        else:
            layer = ct.CoSiMultiHeadAttention(n, h, e // h, warm_up="partial")
        layer.build((None, n, e))
        return layer

    weights = [random.normal(scale=w.shape[0] ** -0.5, size=w.shape) for w in made().weights]

    def ours():
        layer = made()
        layer.set_weights(weights)
        layer.ensure_streams(m)
        for t in range(n):
            layer.call_step(tf.broadcast_to(past[:, t], (m, e)))
        return layer.call_step

    window = tf.Variable(tf.broadcast_to(past, (m, n, e)), trainable=False)
    whole = made()
    whole.set_weights(weights)
    regular = keras.layers.MultiHeadAttention(h, e // h)
    regular.build((m, n, e), (m, n, e))
    if not size.hidden:
        regular.set_weights(weights)

    def on_window(x):
        window.assign(tf.concat([window[:, 1:], x[:, None]], 1))
        # Both compute only the newest row.
        return whole(window)[:, 0] if size.hidden else regular(window[:, -1:], window)[:, 0]

    return [x], {"fused": ours(), "plain": ours(), "keras": on_window}


def callers(step, inputs):
    """Return {way: a function that takes STEPS steps and waits for the device}."""
    import tensorflow as tf

    function = tf.function(step, autograph=False)

    @tf.function
    def loop(*inputs):
        output = step(*inputs)
        for _ in tf.range(STEPS - 1):
            output = step(*inputs)
        return output

    def repeat(once):
        for _ in range(STEPS - 1):
            once(*inputs)
        return once(*inputs).numpy()

    return {
        "loop": lambda: loop(*inputs).numpy(),
        "function": lambda: repeat(function),
        "eager": lambda: repeat(step),
    }


def measure(size, save=lambda entry: None, **timing):
    """Return the entry of one size. `save` is called with it after each of its figures.

    Raises:
        RuntimeError: If the outputs differ from plain TensorFlow's.
    """
    random = np.random.default_rng(17)
    make = layer_steps if isinstance(size, LayerSize) else attention_steps
    with Backend("fused"):
        inputs, steps = make(size, random)
    entry = dict(size=size._asdict(), name=str(size))
    outputs = {}
    for column, step in steps.items():
        with Backend(BACKENDS[column]):
            outputs[column] = np.asarray(step(*inputs)).astype("float64")
    largest = np.abs(outputs["plain"]).max()
    for column in ("fused", "keras"):
        error = float(np.abs(outputs[column] - outputs["plain"]).max() / largest)
        entry[f"{column}_error"] = error
        if not error < AGREEMENT[size.dtype]:  # True for NaN, too.
            raise RuntimeError(
                f"{column}: the outputs of a step differ from plain TensorFlow's by {error:g}, "
                f"expected <{AGREEMENT[size.dtype]:g}"
            )
    for way in WAYS:
        entry[way] = {}
        for column, step in steps.items():
            with Backend(BACKENDS[column]):
                taken = microseconds(callers(step, inputs)[way], **timing)
            entry[way][column] = {name: us / STEPS for name, us in taken.items()}
            save(entry)
    return entry


def lines(entry):
    """Return an entry as lines of the table."""
    if "skipped" in entry:
        return [f"{entry['name']:42} {entry['skipped']}"]
    made = []
    for way in WAYS:
        cells = [f"{entry[way][column]['median']:>12,.1f}" for column in COLUMNS]
        ratio = entry[way]["keras"]["median"] / entry[way]["fused"]["median"]
        made.append(f"{entry['name']:42} {way:9} {' '.join(cells)} {ratio:>8.1f} x")
    return made


def run(sizes, seconds, save=lambda found: None, **timing):
    """Measure all sizes, and skip those that are left when the seconds are over.

    An error is recorded in the entry of its size.
    """
    import tensorflow as tf

    begin = time.monotonic()
    # TensorFloat-32 has 10 bits of mantissa. The fused steps of float32 have 23.
    tf.config.experimental.enable_tensor_float_32_execution(False)
    gpus = tf.config.list_physical_devices("GPU")
    found = dict(
        gpus=[tf.config.experimental.get_device_details(gpu) for gpu in gpus],
        tensorflow=tf.__version__, steps_between_waits=STEPS, entries=[], failures=[],
    )  # fmt: skip
    heading = " ".join(f"{column:>12}" for column in COLUMNS)
    print(f"{'µs a step':42} {'':9} {heading} {'keras / fused':>13}", flush=True)
    for size in sizes:
        entry = dict(size=size._asdict(), name=str(size))
        found["entries"].append(entry)
        try:
            if time.monotonic() - begin > seconds:
                entry["skipped"] = f"not measured: no time left of {seconds:g} s"
            else:

                def keep(figures, entry=entry):
                    entry.update(figures)
                    save(found)

                keep(measure(size, keep, **timing))
        except (RuntimeError, ValueError, tf.errors.OpError) as error:  # Full memory, too.
            entry["skipped"] = f"failed: {str(error).splitlines()[0]}"
            found["failures"].append(f"{entry['name']}: {entry['skipped']}")
        print("\n".join(lines(entry)), flush=True)
        save(found)
    return found


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0].split(":")[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--seconds", type=float, default=80, help="start no size after these")
    chosen = parser.parse_args(arguments)
    import tensorflow as tf

    if not tf.config.list_physical_devices("GPU"):
        print("TensorFlow sees no GPU here, expected one to measure.", file=sys.stderr)
        return 1

    def save(found):
        if chosen.json:
            chosen.json.parent.mkdir(parents=True, exist_ok=True)
            part = chosen.json.with_name(f"{chosen.json.name}.part")
            part.write_text(json.dumps(found, indent=1, default=str))
            part.replace(chosen.json)  # The file is complete at any time.

    found = run(SIZES, chosen.seconds, save)
    for failure in found["failures"]:
        print(failure, file=sys.stderr)
    return 1 if found["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
