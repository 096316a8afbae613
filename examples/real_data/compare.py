"""Train both kinds of stack on real recordings, and stream them: `python compare.py`.

The retroactive stack is the regular encoder, with the same weights: trained on windows, it streams
the regular encoder's predictions. The single-output stack is trained on steps. The script compares
both with the regular encoder on sliding windows: how many steps of unseen recordings they get
right, and how long a step takes.
"""

import json
import statistics
import time
from pathlib import Path

import click
import keras
import matplotlib
import numpy as np
import rich.console
import rich.progress
import rich.table
import tensorflow as tf
from recordings import DATA

import continual_transformers_tf as ct

EMBED_DIM, NUM_HEADS, FF_DIM, NUM_LAYERS = 32, 4, 64, 2
BATCH_SIZE = 64
# The single-output stack learns from a label for every step, not for every window.
BATCHES = {"retroactive": 1200, "single_output": 600}
LEARNING_RATE = 2e-3


class Classifier(keras.Model):
    """A classifier of the newest step: embedding, circular encoding, stack, head."""

    def __init__(self, kind, data):
        super().__init__()
        samples = np.concatenate([samples for samples, _ in data.train])
        self.normalization = keras.layers.Normalization()
        self.normalization.adapt(samples)
        self.embedding = keras.layers.Dense(EMBED_DIM)
        self.position = ct.CircularPositionalEncoding(2 * data.seq_len - 1, EMBED_DIM)
        self.encoder = ct.TransformerEncoder(
            NUM_LAYERS,
            data.seq_len,
            EMBED_DIM,
            NUM_HEADS,
            FF_DIM,
            key_dim=EMBED_DIM // NUM_HEADS,
            kind=kind,
            norm_first=True,
            warm_up="partial",
        )
        self.head = keras.layers.Dense(data.classes)

    def call(self, x, training=None, streams=None):
        x = self.position(self.embedding(self.normalization(x)), streams=streams)
        return self.head(self.encoder(x, training=training, streams=streams))

    @property
    def kind(self):
        return self.encoder.kind


class Crops(keras.utils.PyDataset):
    """Batches of pieces of recordings. All classes are equally frequent.

    Each batch has (samples `[B, T, features]`, classes `[B, T']`, weights `[B, T']`). T' is 1 for
    windows and T for steps. Steps without a full window have weight 0.
    """

    def __init__(self, data, kind, batches, seed, **kwargs):
        super().__init__(**kwargs)
        self._data, self._steps, self._batches = data, kind == "single_output", batches
        self._length = data.crop if self._steps else data.seq_len
        long = [(x, y) for x, y in data.train if len(x) >= self._length]
        self._by_class = [[x for x, y in long if y == label] for label in range(data.classes)]
        self._random = np.random.default_rng(seed)

    def __len__(self):
        return self._batches

    def __getitem__(self, index):
        random, length = self._random, self._length
        labels = random.integers(self._data.classes, size=BATCH_SIZE)
        crops = []
        for label in labels:
            samples = self._by_class[label][random.integers(len(self._by_class[label]))]
            start = random.integers(len(samples) - length + 1)
            crops.append(samples[start : start + length])
        steps = length if self._steps else 1
        weights = np.ones((BATCH_SIZE, steps), np.float32)
        if self._steps:
            weights[:, : self._data.seq_len - 1] = 0
        return np.stack(crops), np.repeat(labels[:, None], steps, 1), weights


class Bar(keras.callbacks.Callback):
    def __init__(self, progress, title, batches):
        super().__init__()
        self._progress, self._task = progress, progress.add_task(title, total=batches)

    def on_train_batch_end(self, batch, logs=None):
        self._progress.update(self._task, advance=1)


def train(data, kind, batches, seed, progress):
    """Return a classifier, trained on windows by regular calls, or on steps of clean streams."""
    keras.utils.set_random_seed(seed)
    model = Classifier(kind, data)
    mode = "steps" if kind == "single_output" else "regular"
    ct.ensure_streams(model, BATCH_SIZE)
    with ct.call_mode(mode):
        model.compile(
            keras.optimizers.AdamW(
                keras.optimizers.schedules.CosineDecay(LEARNING_RATE, batches), weight_decay=1e-2
            ),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        )
        bar = Bar(progress, f"{data.name}: {kind} stack learns", batches)
        model.fit(Crops(data, kind, batches, seed), verbose=0, callbacks=[bar, ct.CleanState()])
    return model


def stream(model, data, progress):
    """Return the predictions of each test recording's steps with a full window, streamed."""
    ct.ensure_streams(model, len(data.test))
    ct.clean_state(model)
    longest = max(len(x) for x, _ in data.test)
    predictions = [[] for _ in data.test]
    with ct.call_mode("step"):
        step = tf.function(lambda x, streams: model(x, streams=streams), reduce_retracing=True)
        for t in progress.track(range(longest), description=f"{data.name}: {model.kind} streams"):
            streams = [i for i, (x, _) in enumerate(data.test) if len(x) > t]
            x = np.stack([data.test[i][0][t] for i in streams])
            logits = step(tf.constant(x), tf.constant(streams)).numpy()
            if t >= data.seq_len - 1:
                for i, prediction in zip(streams, logits.argmax(1), strict=True):
                    predictions[i].append(prediction)
    return [np.array(p) for p in predictions]


def on_windows(model, data, progress):
    """Return the same predictions by the regular encoder, which recomputes every window."""
    call = tf.function(lambda x: model(x), reduce_retracing=True)
    predictions = []
    for samples, _ in progress.track(data.test, description=f"{data.name}: on windows"):
        windows = np.lib.stride_tricks.sliding_window_view(samples, data.seq_len, 0)
        windows, found = windows.transpose(0, 2, 1), []
        for i in range(0, len(windows), 512):
            batch = windows[i : i + 512]
            # Each window begins at the same row of the encoding as the stream's window.
            rows = np.arange(i, i + len(batch)) % (2 * data.seq_len - 1)
            model.position.set_state({"index": rows, "position": np.zeros_like(rows)})
            found.append(call(tf.constant(batch))[:, 0].numpy().argmax(1))
        predictions.append(np.concatenate(found))
    return predictions


def accuracy(predictions, data):
    """Return the share of steps that are right."""
    right = [p == label for p, (_, label) in zip(predictions, data.test, strict=True)]
    return float(np.concatenate(right).mean())


def microseconds(call, times=300):
    for _ in range(20):
        call()
    found = []
    for _ in range(times):
        start = time.perf_counter_ns()
        call()
        found.append((time.perf_counter_ns() - start) / 1e3)
    return statistics.median(found)


def compare(data, scale, seed, progress):
    """Return a dict with the accuracy of each kind and the time of its step."""
    models = {
        kind: train(data, kind, max(2, int(batches * scale)), seed, progress)
        for kind, batches in BATCHES.items()
    }
    window = tf.constant(data.test[0][0][np.newaxis, : data.seq_len])
    regular = tf.function(models["retroactive"])
    expected = on_windows(models["retroactive"], data, progress)
    figures = {
        "regular, on windows": dict(
            accuracy=accuracy(expected, data), microseconds=microseconds(lambda: regular(window))
        )
    }
    for kind, model in models.items():
        predictions = stream(model, data, progress)
        if kind == "retroactive":
            differ = sum((p != e).sum() for p, e in zip(predictions, expected, strict=True))
            figures["regular, on windows"]["predictions"] = sum(map(len, expected))
            figures["regular, on windows"]["differ_from_the_stream"] = int(differ)
        with ct.call_mode("step"):
            step = tf.function(lambda x, model=model: model(x))
            figures[f"{kind}, streamed"] = dict(
                accuracy=accuracy(predictions, data),
                microseconds=microseconds(lambda step=step: step(window[:, 0])),
            )
    return figures


def draw(path, results):
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(results), figsize=(6 * len(results), 4), squeeze=False)
    for axis, (name, figures) in zip(axes[0], results.items(), strict=True):
        for model, figure_of in figures.items():
            axis.scatter(figure_of["microseconds"], figure_of["accuracy"], s=80, label=model)
        axis.set(title=name, xscale="log", xlabel="µs a step", ylabel="steps that are right")
        axis.grid(alpha=0.3, which="both")
        axis.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


@click.command()
@click.option("--only", type=click.Choice(list(DATA)), multiple=True, help="The recordings to use.")
@click.option("--scale", default=1.0, show_default=True, help="Multiplies the training batches.")
@click.option("--recordings", type=int, help="Stream only the first few.")
@click.option("--seed", default=0, show_default=True)
@click.option("--output", type=click.Path(path_type=Path), default=Path("build"), show_default=True)
def main(only, scale, recordings, seed, output):
    """Train both stacks on real recordings and stream them."""
    console = rich.console.Console()
    results = {}
    with rich.progress.Progress(console=console) as progress:
        for name in only or DATA:
            data = DATA[name]()
            data = data._replace(test=data.test[:recordings])
            results[name] = compare(data, scale, seed, progress)
    table = rich.table.Table("recordings", "model", "right", "µs a step")
    for name, figures in results.items():
        for model, found in figures.items():
            table.add_row(name, model, f"{found['accuracy']:.4f}", f"{found['microseconds']:,.0f}")
        found = figures["regular, on windows"]
        console.print(
            f"{name}: {found['differ_from_the_stream']} of {found['predictions']:,} predictions of "
            "the retroactive stream differ from the regular encoder's on windows"
        )
    console.print(table)
    output.mkdir(parents=True, exist_ok=True)
    (output / "real_data.json").write_text(json.dumps(results, indent=1) + "\n")
    draw(output / "real_data.png", results)
    console.print(f"written: {output / 'real_data.json'}, {output / 'real_data.png'}")


if __name__ == "__main__":
    main()
