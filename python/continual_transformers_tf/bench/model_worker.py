"""The process of a contestant in the race of whole models; see `worker.py`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from continual_transformers_tf.bench import worker


class ModelWorker:
    """The requests that a contestant answers: each method is one, by its name."""

    def __init__(self, name: str, threads: int) -> None:
        self._name, self._threads = name, threads
        self._contestant: Any = None
        self._inputs: list[Any] = []

    def pack(self, size: Sequence[int], directory: str) -> dict[str, Any]:
        """Write the model file of a size."""
        import continual_transformers_tf as ct
        from continual_transformers_tf.bench.model_rivals.tensorflow_models import streaming_model
        from continual_transformers_tf.bench.sizes import ModelSize

        session = ct.Session(streaming_model(ModelSize(*size)))
        session.save(str(Path(directory, "model.safetensors")))
        return {}

    def prepare(self, size: Sequence[int], directory: str) -> dict[str, Any]:
        """Make the contestant of a size."""
        from continual_transformers_tf.bench import model_rivals
        from continual_transformers_tf.bench.sizes import ModelSize

        self._contestant, self._inputs = None, []  # Free those of the last size first.
        self._size = ModelSize(*size)
        self._contestant = model_rivals.make(
            self._name, self._size, self._threads, str(Path(directory, "model.safetensors"))
        )
        self._inputs = [self._contestant.convert(x) for x in model_rivals.inputs_of(self._size)]
        return {}

    def check(self) -> dict[str, Any]:
        """Take steps until the receptive field is full; return the last outputs of two streams."""
        import numpy as np

        from continual_transformers_tf.bench import model_rivals

        contestant, size = self._contestant, self._size
        steps = model_rivals.checked_steps(size, contestant.windows)
        # A contestant on windows begins with all steps of its window but the newest.
        for step in range(steps - 1 if contestant.windows else 0, steps):
            outputs = contestant.step(self._inputs[step % len(self._inputs)])
        outputs = np.asarray(contestant.output(outputs))
        rows = outputs[model_rivals.checked_rows(size)]
        return {"steps": steps, "outputs": rows.tolist(), "positions": contestant.positions}

    def burst(self, seconds: float, least: int) -> dict[str, Any]:
        """Time steps, and return their median in microseconds."""
        return worker.burst(self._contestant.step, self._inputs, seconds, least)

    def versions(self) -> dict[str, str]:
        """Return the installed versions of the packages that contestants need."""
        return worker.installed_versions()


if __name__ == "__main__":
    worker.main(ModelWorker)
