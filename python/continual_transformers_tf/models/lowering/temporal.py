"""Lowering of layers that read neighbouring steps: convolutions, pooling, spectra.

A value of a place in the model where a step has several rows is `[rows, ...]`; where it has one
row, `[...]`.
"""

import math
from typing import Any

import keras
import numpy as np

from continual_transformers_tf.layers.co_temporal import CONVOLUTIONS, CoTemporal, Frames
from continual_transformers_tf.models.lowering.activations import activate
from continual_transformers_tf.models.lowering.continual_layers import (
    CONTINUAL,
    POSITION,
    State,
    StateOf,
    history,
    kernel_of,
)
from continual_transformers_tf.models.lowering.logic_ops import select_rows
from continual_transformers_tf.models.lowering.plan_builder import (
    PlanBuilder,
    Symbol,
    contiguous_strides,
)
from continual_transformers_tf.ops.step import ALL_ROWS, Rows

# Far below every number of a pooling, and finite, as all numbers of a plan.
_LOWEST = -3e38


def co_temporal(
    b: PlanBuilder, layer: Any, x: Symbol, given: Rows = ALL_ROWS, rows: int | None = None
) -> tuple[Symbol, State]:
    """Lower a step of a `CoTemporal` layer.

    Args:
        b: The `PlanBuilder`.
        layer: The layer.
        x: Its input.
        given: The `Rows` of its input.
        rows: How many rows of its input a step has; None: one block of the layer.
    """
    inner, frames = layer.layer, layer.frames(given)
    rows = layer.block if rows is None else rows
    x = b.cast(x, b.dtype)
    if isinstance(inner, keras.layers.ZeroPadding1D):
        return x.with_mask(None), {"position": POSITION}
    before = max(0, frames.history)
    there = None
    if frames.before > 0 and not isinstance(inner, CONVOLUTIONS):
        there = present(b, rows, -before - given.lag, before + rows)
        there = b.reshape(there, (*there.shape, 1))
    past, ring = history(b, of_sequence(b, x, given, rows), rows, before)
    state: dict[str, State] = {"position": POSITION}
    if frames.span > 1:
        layout = ("rows", rows) if rows > 1 else ()
        state["steps"] = None if ring is None else StateOf(ring.index, "ring", layout)
    outputs = rows // frames.stride
    first = max(0, -frames.history)
    needed = (outputs - 1) * frames.stride + frames.span
    past = b.slice(past, 0, first, needed)
    if there is not None:
        there = b.slice(there, 0, first, needed)
    y = _of_frames(b, inner, past, there, frames, outputs)
    if layer.gives_one_row:  # A pooling of the whole window: only the newest output is asked for.
        y = b.slice(y, 0, outputs - 1, 1)
        outputs = 1
    return (b.reshape(y, y.shape[1:]) if outputs == 1 else y), state


def present(b: PlanBuilder, rows: int, first: int, count: int) -> Symbol:
    """Return 1 for rows of a sequence, and 0 for those before its row 0: `[count]`.

    Args:
        b: The `PlanBuilder`.
        rows: How many rows a step has.
        first: The number of the first of these rows, in a stream's first step.
        count: How many rows.
    """
    return b.node("present", [], (count,), name="present", rows=rows, first=first)


def mask_of_sequence(b: PlanBuilder, lag: int, rows: int = 1) -> Symbol | None:
    """Return a mask `[rows]` that is false in a stream's first `lag` rows; None if lag is 0."""
    return b.cast(present(b, rows, -lag, rows), "bool") if lag > 0 else None


def of_sequence(b: PlanBuilder, x: Symbol, given: Rows, rows: int) -> Symbol:
    """Return x, with zeros in rows before row 0 of its sequence."""
    mask = mask_of_sequence(b, given.lag, rows)
    if mask is None:
        return x
    if rows == 1:
        return b.node("masked", [x, mask], x.shape, name="of_sequence")
    return select_rows(b, mask, x, np.zeros(()))


def frames_of(
    b: PlanBuilder, x: Symbol, outputs: int, stride: int, taps: int, dilation: int = 1
) -> Symbol:
    """Return frames `[outputs, taps, ...]` of rows `[L, ...]`."""
    size = math.prod(x.shape[1:])
    row = contiguous_strides(x.shape)[1:]
    if (outputs == 1 or stride == taps) and dilation == 1 and x.shape[0] == outputs * taps:
        return b.reshape(x, (outputs, taps, *x.shape[1:]))
    strides = [stride * size, dilation * size, *row]
    return b.strided(x, (outputs, taps, *x.shape[1:]), strides, name="frames")


CONTINUAL[CoTemporal] = co_temporal


# Layers on rows that hold all frames, padding among them.


def _of_frames(
    b: PlanBuilder,
    layer: Any,
    x: Symbol,
    there: Symbol | None,
    frames: Frames,
    outputs: int,
) -> Symbol:
    """Return a layer's outputs `[outputs, ...]` for frames that lie side by side in x."""
    if isinstance(layer, keras.layers.STFTSpectrogram):
        return spectrum(b, layer, x, outputs)
    if isinstance(layer, keras.layers.Conv1D):
        return convolution(b, layer, x, outputs)
    if isinstance(layer, (keras.layers.DepthwiseConv1D, keras.layers.SeparableConv1D)):
        return depthwise(b, layer, x, outputs)
    taken = frames_of(b, x, outputs, frames.stride, frames.span)
    counted = None
    if there is not None:
        counted = frames_of(b, there, outputs, frames.stride, frames.span)
    if isinstance(layer, (keras.layers.MaxPooling1D, keras.layers.GlobalMaxPooling1D)):
        if counted is not None:  # 0 where there is a row, and far below elsewhere.
            taken = b.binary("add", taken, b.affine(counted, -_LOWEST, _LOWEST))
        return b.reduce(taken, "max", [1])
    if counted is None:
        return b.reduce(taken, "mean", [1])
    number = b.reduce(counted, "sum", [1])
    # A frame without a row belongs to no output of the sequence; it is not divided by 0.
    number = b.binary("maximum", number, b.constant(np.ones(number.shape)))
    return b.binary("divide", b.reduce(taken, "sum", [1]), number)


def convolution(b: PlanBuilder, layer: Any, x: Symbol, outputs: int) -> Symbol:
    """Lower a `Conv1D` without padding, on rows `[L, channels]`."""
    (taps,), (stride,), (dilation,) = layer.kernel_size, layer.strides, layer.dilation_rate
    kernel, groups = kernel_of(layer), layer.groups
    frames = frames_of(b, x, outputs, stride, taps, dilation)
    channels, filters = x.shape[-1] // groups, layer.filters // groups
    bias = None if layer.bias is None else b.variable(layer.bias)
    if groups == 1:
        matrix = b.variable(kernel, (-1, filters), kernel=True, name=layer.path + "/kernel")
        y = b.dense(b.reshape(frames, (outputs, taps * channels)), matrix, bias)
        return activate(b, y, layer.activation)
    parts = []
    for g in range(groups):
        name = b.derived(
            f"kernel_{g}",
            np.asarray(kernel)[:, :, g * filters : (g + 1) * filters].reshape(-1, filters),
        )
        b.kernels.add(name)
        part = b.slice(frames, 2, g * channels, channels)
        parts.append(b.dense(b.reshape(part, (outputs, taps * channels)), name))
    y = b.concat(parts, 1)
    if bias is not None:
        y = b.affine(y, 1, np.asarray(layer.bias.value))
    return activate(b, y, layer.activation)


def depthwise(b: PlanBuilder, layer: Any, x: Symbol, outputs: int) -> Symbol:
    """Lower a `DepthwiseConv1D` or `SeparableConv1D` without padding, on rows `[L, channels]`."""
    separable = isinstance(layer, keras.layers.SeparableConv1D)
    (taps,), (stride,), (dilation,) = layer.kernel_size, layer.strides, layer.dilation_rate
    kernel = layer.depthwise_kernel if separable else layer.kernel
    made = math.prod(kernel.shape[1:])
    weights = {"kernel": b.variable(kernel, (taps, made))}
    bias = None if layer.bias is None else b.variable(layer.bias)
    if bias is not None and not separable:
        weights["bias"] = bias
    y = b.node(
        "depthwise", [x], (outputs, made), name="depthwise" if separable else None,
        weights=weights, stride=stride, dilation=dilation,
    )  # fmt: skip
    if separable:
        pointwise = b.variable(layer.pointwise_kernel, (-1, layer.filters), kernel=True)
        y = b.dense(y, pointwise, bias)
    return activate(b, y, layer.activation)


def spectrum(b: PlanBuilder, layer: Any, x: Symbol, outputs: int) -> Symbol:
    """Lower an `STFTSpectrogram` without padding, on rows `[L, channels]`."""
    frames = frames_of(b, x, outputs, layer._frame_step, layer.frame_length)
    frames = b.transpose(frames, (0, 2, 1))  # [outputs, channels, taps]
    kernels = [np.asarray(k)[:, 0] for k in _kernels(layer)]
    bins = kernels[0].shape[1]
    name = b.derived("kernel", np.concatenate(kernels, 1))
    b.kernels.add(name)
    y = b.dense(frames, name)
    if layer.mode == "angle":
        real, imaginary = (b.slice(y, 2, i * bins, bins) for i in (0, 1))
        y = b.binary("arctan2", imaginary, real)
    elif layer.mode not in ("real", "imag", "stft"):
        squares = b.activation(y, "square")
        power = b.binary("add", *(b.slice(squares, 2, i * bins, bins) for i in (0, 1)))
        if layer.mode == "psd":
            # Every bin but the first and the last stands for two.
            double = np.full(bins, 2.0)
            double[[0, -1]] = 1
            y = b.affine(power, double, 0)
        else:
            least = keras.config.epsilon()
            y = b.binary("maximum", power, b.constant(np.full(power.shape, least)))
            y = b.activation(y, "sqrt")
            if layer.mode == "log":
                y = b.binary("maximum", y, b.constant(np.full(y.shape, least)))
                y = b.activation(y, "log")
    if layer.expand_dims:
        return b.transpose(y, (0, 2, 1))
    return b.reshape(y, (outputs, y.size // outputs))


def _kernels(layer: Any) -> list[Any]:
    """Return the kernels of a Fourier transform that its mode reads: real and imaginary."""
    kernels = []
    if layer.mode != "imag":
        kernels.append(layer.real_kernel.value)
    if layer.mode != "real":
        kernels.append(layer.imag_kernel.value)
    return kernels
