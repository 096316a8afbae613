"""Print how errors grow with the logits: the published update, naive recomputing, and ours.

PYTHONPATH=python:tools python benchmarks/retroactive_errors.py
"""

import os

import numpy as np

from continual_transformers_tf.ops import RetroactiveCache, retroactive_attention
from published_retroactive import PublishedUpdate, naive_attention

N = D = 64
STEPS = 1000


def main():
    os.environ["CONTINUAL_TRANSFORMERS_BACKEND"] = "fused"
    random = np.random.default_rng(1)
    print('| std of the logits | published | naive, recomputed | `algorithm="update"` |')
    print("| --- | --- | --- | --- |")
    for std in (1, 2, 4, 9, 16, 36):
        query, key = random.normal(scale=std**0.5, size=(2, STEPS, D)).astype("float32")
        inputs = (query, key, random.normal(size=(STEPS, D)).astype("float32"))
        cache = RetroactiveCache(1, 1, N, D)
        steps = [x[np.newaxis, :, np.newaxis] for x in inputs]
        ours = retroactive_attention(*steps, cache, algorithm="update").numpy()[0, :, 0]
        published = PublishedUpdate(*(x[:N] for x in inputs))
        errors = []
        for t in range(N, STEPS):
            window = [x[t - N + 1 : t + 1] for x in inputs]
            expected = naive_attention(*(x.astype("float64") for x in window))
            outputs = (
                published.step(*(x[t] for x in inputs)),
                naive_attention(*window),
                ours[t],
            )
            largest = np.abs(expected).max()
            errors.append([np.abs(x - expected).max() / largest for x in outputs])
        print(f"| {std} | {' | '.join(f'{error:.1e}' for error in np.max(errors, 0))} |")


if __name__ == "__main__":
    main()
