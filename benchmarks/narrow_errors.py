"""Print what 16-bit and 8-bit weights and rings cost in accuracy.

python benchmarks/narrow_errors.py

The first column is of the demo's model, on the recordings of people whom it never saw: the share of
right predictions. The others are the largest errors in 1,000 steps, max|output - exact| /
max|exact|, of the demo's model and of encoders with random weights, on random steps.
"""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np

import continual_transformers_tf as ct
from continual_transformers_tf.demo import watch
from continual_transformers_tf.demo.model import trained_model

# The dtypes of (weights, rings).
CHOICES = [
    ("float32", "float32"),
    ("bfloat16", "float32"),
    ("int8", "float32"),
    ("float32", "float16"),
    ("float32", "bfloat16"),
    ("float32", "int8"),
    ("int8", "int8"),
]
# (window, features, heads, encoders) of models with random weights.
RANDOM = [(64, 64, 4, 1), (64, 64, 4, 3), (256, 512, 8, 1)]
STEPS = 1000


def random_model(window: int, features: int, heads: int, encoders: int) -> keras.Model:
    keras.utils.set_random_seed(1)
    steps = keras.Input((window, features))
    sizes = dict(seq_len=window, embed_dim=features, num_heads=heads, key_dim=features // heads)
    return keras.Model(steps, ct.TransformerEncoder(encoders, **sizes, ff_dim=2 * features)(steps))


def outputs_of(model: keras.Model, recordings: list, choice: tuple[str, str]) -> list:
    """Return the outputs of each recording's steps."""
    session = ct.Session(model, weights_dtype=choice[0], cache_dtype=choice[1])
    return [session.steps(x[None], session.open(1))[0] for x in recordings]


def error(outputs: list, exact: list) -> float:
    largest = max(np.abs(x).max() for x in exact)
    return max(np.abs(x - y).max() for x, y in zip(outputs, exact, strict=True)) / largest


def main() -> None:
    recordings = watch.load_recordings(watch.HELD_OUT)
    labels = np.concatenate([np.full(len(r.samples), r.exercise) for r in recordings])
    random = np.random.default_rng(0)
    cases = [(trained_model(), [r.samples for r in recordings])]
    for size in RANDOM:
        steps = random.standard_normal((STEPS, size[1])).astype("float32")
        cases.append((random_model(*size), [steps]))
    exact = [outputs_of(model, data, CHOICES[0]) for model, data in cases]
    names = [f"N={n} E={e} H={h} L={layers}" for n, e, h, layers in RANDOM]
    print(f"| weights | rings | right | other than in float32 | demo | {' | '.join(names)} |")
    print("| --- | --- | --- | --- | --- |" + " --- |" * len(names))
    predicted_exactly = np.concatenate(exact[0]).argmax(-1)
    for choice in CHOICES:
        found = [outputs_of(model, data, choice) for model, data in cases]
        predicted = np.concatenate(found[0]).argmax(-1)
        cells = [
            *choice,
            f"{np.mean(predicted == labels):.4f}",
            f"{np.sum(predicted != predicted_exactly):,} of {len(labels):,}",
            *(f"{error(y, z):.1e}" for y, z in zip(found, exact, strict=True)),
        ]
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
