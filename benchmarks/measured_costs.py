"""Compare what `ct.cost` counts for a step with its time: regular, retroactive, single output.

PYTHONPATH=python python benchmarks/measured_costs.py
"""

import itertools
import os
import statistics
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import click
import matplotlib
import numpy as np
import rich.console
import rich.progress
import tensorflow as tf

import continual_transformers_tf as ct
from continual_transformers_tf.bench.worker_process import machine
from continual_transformers_tf.models.cost_formulas import Cost

EMBED_DIM, NUM_HEADS, FF_DIM = 256, 4, 512
DEPTHS, WINDOWS = (1, 2), (16, 32, 64, 128, 256, 512)
WAYS = ("regular", "retroactive", "single output")


def block(layer, seq_len):
    """Return a built block, with room for one stream."""
    made = layer(seq_len, EMBED_DIM, NUM_HEADS, FF_DIM, key_dim=EMBED_DIM // NUM_HEADS)
    made.build((None, seq_len, EMBED_DIM))
    made.ensure_streams(1)
    return made


def stack(depth, seq_len, kind):
    """Return a built stack. With one block it is that block itself, with all of its outputs."""
    if depth == 1:
        layers = {
            "retroactive": ct.CoReTransformerEncoder, "single_output": ct.CoSiTransformerEncoder
        }  # fmt: skip
        return block(layers[kind], seq_len)
    sizes = (depth, seq_len, EMBED_DIM, NUM_HEADS, FF_DIM)
    made = ct.TransformerEncoder(*sizes, kind=kind, key_dim=EMBED_DIM // NUM_HEADS)
    made.build((None, seq_len, EMBED_DIM))
    made.built = True
    made.ensure_streams(1)
    return made


def regular_encoder(depth, seq_len):
    """Return a function of an encoder whose blocks compute all rows of the window, and its cost."""
    blocks = [block(ct.CoReTransformerEncoder, seq_len) for _ in range(depth)]

    def call(x):
        for layer in blocks:
            x = layer.call_regular(x)
        return x

    return call, sum((ct.cost(layer, "regular") for layer in blocks), Cost())


def ways(depth, seq_len, random):
    """Return (a function that takes one step, its `ct.cost`) for each way to answer at a step.

    Each way runs in the mode that suits it best: steps of many ops as a `tf.function`, single ops
    eagerly.
    """
    window = tf.constant(random.normal(size=(1, seq_len, EMBED_DIM)), tf.float32)
    steps = itertools.cycle(tf.unstack(window, axis=1))
    regular, regular_cost = regular_encoder(depth, seq_len)
    regular = tf.function(regular)
    retroactive = stack(depth, seq_len, "retroactive")
    step = tf.function(lambda x: retroactive.call_step(x))
    single = stack(depth, seq_len, "single_output")
    for _ in range(seq_len):  # Fill all windows.
        step(next(steps))
    for _ in range(depth * seq_len):
        single.call_step(next(steps))
    return {
        "regular": (lambda: regular(window), regular_cost),
        "retroactive": (lambda: step(next(steps)), ct.cost(retroactive)),
        "single output": (lambda: single.call_step(next(steps)), ct.cost(single)),
    }


def burst(call, seconds):
    """Return a call's median microseconds, from calls for `seconds` and at least five of them.

    This is processor time of this process, so other work on the machine does not add to it. With
    one thread, it is the time that would pass on an idle machine.
    """
    times = []
    while len(times) < 5 or sum(times) < seconds * 1e6:
        start = time.process_time_ns()
        call()
        times.append((time.process_time_ns() - start) / 1e3)
    return statistics.median(times)


def measure(depth, seq_len, rounds, seconds, advance):
    """Measure all ways in turn, and return (its Cost, microseconds) for each.

    The time is the median of a round's calls, in the fastest round. During the others, other work
    on the machine may have used the caches.
    """
    found = ways(depth, seq_len, np.random.default_rng(1))
    times = {name: [] for name in found}
    for _ in range(rounds):
        for name, (call, _) in found.items():
            times[name].append(burst(call, seconds))
            advance()
    return {name: (cost, min(times[name])) for name, (_, cost) in found.items()}


def costs_table(results):
    yield "| blocks | N | million operations | bytes read, millions | µs measured |"
    yield "| --- | --- | --- | --- | --- |"
    for (depth, seq_len), found in results.items():
        flops = " / ".join(f"{cost.flops / 1e6:,.3g}" for cost, _ in found.values())
        read = " / ".join(f"{cost.read_bytes / 1e6:,.3g}" for cost, _ in found.values())
        times = " / ".join(f"{time:,.0f}" for _, time in found.values())
        yield f"| {depth} | {seq_len} | {flops} | {read} | {times} |"


def ratios_table(results):
    yield "| blocks | N | regular / retroactive, counted | measured | / single output | measured |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for (depth, seq_len), found in results.items():
        (all_flops, all_time), *others = ((cost.flops, time) for cost, time in found.values())
        ratios = (f"{all_flops / flops:.1f} | {all_time / time:.1f}" for flops, time in others)
        yield f"| {depth} | {seq_len} | {' | '.join(ratios)} |"


def draw(path, results):
    """Draw operations, bytes and time against the window: a row of plots for each depth."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    depths = sorted({depth for depth, _ in results})
    figure, axes = plt.subplots(len(depths), 3, figsize=(13, 3.4 * len(depths)), squeeze=False)
    for row, depth in zip(axes, depths, strict=True):
        windows = [n for d, n in results if d == depth]
        for way in WAYS:
            found = [results[depth, n][way] for n in windows]
            columns = (
                [cost.flops / 1e6 for cost, _ in found],
                [cost.read_bytes / 1e6 for cost, _ in found],
                [time for _, time in found],
            )
            for axis, numbers in zip(row, columns, strict=True):
                axis.plot(windows, numbers, "o-", label=way)
        labels = (
            "million operations, ct.cost",
            "million bytes read, ct.cost",
            "µs of the processor, measured",
        )
        for axis, label in zip(row, labels, strict=True):
            axis.set(xscale="log", yscale="log", xlabel="N, steps in the window", ylabel=label)
            axis.set_xticks(windows, windows, minor=False)
            axis.minorticks_off()
            axis.grid(alpha=0.3)
        row[1].set(yscale="linear", ylim=(0, None))
        row[0].set_title(f"{depth} block{'s' * (depth > 1)}", loc="left")
        row[0].legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


@click.command()
@click.option("--windows", type=int, multiple=True, default=WINDOWS, show_default=True)
@click.option("--rounds", type=click.IntRange(min=1), default=10, show_default=True)
@click.option("--seconds", default=0.05, show_default=True, help="Time for each way in a round.")
@click.option("--picture", type=click.Path(path_type=Path), default=Path("docs/cost.png"))
def main(windows, rounds, seconds, picture):
    """Measure steps of one and of two blocks, and print the tables of docs/cost.md."""
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    found, results = machine(), {}
    with rich.progress.Progress(console=rich.console.Console(stderr=True)) as progress:
        task = progress.add_task("", total=len(DEPTHS) * len(windows) * rounds * len(WAYS))
        for depth in DEPTHS:
            for seq_len in windows:
                progress.update(task, description=f"{depth} blocks, N = {seq_len}")
                advance = lambda: progress.advance(task)  # noqa: E731
                results[depth, seq_len] = measure(depth, seq_len, rounds, seconds, advance)
    print(f"{found.get('Model name', 'unknown')}, {found['instructions']}, one thread\n")
    print("\n".join(costs_table(results)), "\n")
    print("\n".join(ratios_table(results)))
    draw(picture, results)


if __name__ == "__main__":
    main()
