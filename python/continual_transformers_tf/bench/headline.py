"""The README's picture: a step of whole models, by a session and by what users have today."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from continual_transformers_tf.bench import model_report

if TYPE_CHECKING:
    from pathlib import Path

    from continual_transformers_tf.bench.sizes import ModelSize

# Who is shown, under which name, in this order.
SHOWN = {
    "keras_windows": "Keras on windows",
    "torch_ring": "PyTorch, rings",
    "onnxruntime": "ONNX Runtime, rings",
    model_report.OURS: "ct.Session",
}
COLOUR, OURS_COLOUR = "#b8bec8", "#ff6f00"


def draw(path: Path, models: dict[str, Any]) -> None:
    """Draw the models of one stream, with one thread, on a logarithmic axis.

    Args:
        path: Where to write the picture, a PNG.
        models: The result of `model_race.run`.

    Raises:
        ValueError: If no model of one stream ran with one thread.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = [(size, rivals) for size, rivals in model_report.rows(models, 1) if size.streams == 1]
    if not panels:
        raise ValueError("Expected results of a model of one stream with one thread, got none")
    figure, axes = plt.subplots(
        *(1, len(panels)), figsize=(4.2 * len(panels), 2.3), layout="constrained", squeeze=False
    )
    for axis, (size, rivals) in zip(axes[0], panels, strict=True):
        shown = [name for name in SHOWN if name in rivals]
        times = [rivals[name]["median"] for name in shown]
        colours = [OURS_COLOUR if name == model_report.OURS else COLOUR for name in shown]
        bars = axis.barh([SHOWN[name] for name in shown], times, color=colours, log=True)
        labels = [f"{model_report.number(time)} µs" for time in times]
        axis.bar_label(bars, labels, padding=3)
        axis.set_xlim(1, 12 * max(times))
        axis.set_title(_title(size), fontsize="medium")
        axis.spines[["top", "right", "bottom"]].set_visible(False)
        axis.tick_params(axis="x", which="both", bottom=False, labelbottom=False)
        axis.tick_params(axis="y", left=False)
    for axis in axes[0, 1:]:
        axis.tick_params(labelleft=False)
    figure.supxlabel("one step of one stream, one thread, logarithmic", fontsize="small")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _title(size: ModelSize) -> str:
    encoders = f"{size.layers} encoder{'s'[: size.layers > 1]}"
    return f"{encoders}, {size.embed_dim} features, {size.seq_len} steps"
