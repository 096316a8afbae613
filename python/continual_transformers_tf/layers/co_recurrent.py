"""A recurrent layer on the steps of streams."""

from typing import Any

import keras
import tensorflow as tf

from continual_transformers_tf._keras_registration import registered
from continual_transformers_tf.layers.call_modes import call_mode as calling
from continual_transformers_tf.layers.inputs import (
    TensorLike,
    check_features,
    expect_given,
    rows_and_steps,
    step_input,
)
from continual_transformers_tf.layers.wrapping_layer import WrappingLayer
from continual_transformers_tf.ops.delay import put_steps, windows_of
from continual_transformers_tf.ops.step import Step

RECURRENT = (keras.layers.GRU, keras.layers.LSTM, keras.layers.SimpleRNN, keras.layers.RNN)
_CELLS = (keras.layers.GRUCell, keras.layers.LSTMCell, keras.layers.SimpleRNNCell)


@registered
class CoRecurrent(WrappingLayer):
    """Runs a recurrent Keras layer on windows or step by step.

    There are two ways to take steps, because a layer that was trained on windows begins each of
    them with a state of zeros, where a stream goes on:

    - Without a `window`, the stream's state goes on from step to step. Outputs equal those of a
      call on the whole sequence, from the stream's first step on. A step costs what one step of the
      cell costs. Its outputs depend on all earlier steps, so there is no receptive field, and what
      a model does with a part of a stream does not tell what it does with the whole.
    - With a `window`, each step runs the layer on the `window` newest steps, from zeros. Outputs
      equal those of a call on that window. A step costs as much as `window` steps of the cell.

    `ct.convert` makes these of the layers in a model; its `recurrence` says which way.

    Args:
        layer: A `GRU`, `LSTM`, `SimpleRNN` or `RNN`, which returns outputs, not states. It is not
            copied.
        window: N, how many steps it runs on; None: the state goes on.
        warm_up: "none": in eager mode, steps return None until a stream's window is full.
            "partial": they return the outputs of shorter windows. Without a window there is no
            warm-up.
        call_mode: What calling the layer does: "regular", "step" or "steps".
        **kwargs: `name` and other arguments of `keras.layers.Layer`. The default `dtype` is the
            given layer's.

    Attributes:
        layer, window: As given.

    Returns:
        The result of `call_regular`, `call_step` or `call_steps`, as the call mode says.

    Raises:
        ValueError: At construction, if the layer is none of these, or has an option that steps
            cannot follow: `go_backwards`, `stateful`, `return_state`.
    """

    def __init__(
        self,
        layer: keras.layers.Layer,
        window: int | None = None,
        *,
        warm_up: str = "none",
        call_mode: str = "regular",
        **kwargs: Any,
    ) -> None:
        if not isinstance(layer, RECURRENT):
            kinds = ", ".join(kind.__name__ for kind in RECURRENT)
            raise ValueError(f"Expected a layer of one of these kinds: {kinds}; but got {layer!r}")
        whole: Any = layer
        for option, why in (
            ("go_backwards", "begins with the newest step, and all later steps change its outputs"),
            ("stateful", "keeps states of batches; streams have states of their own"),
            ("return_state", "returns states, which a stream keeps for itself"),
        ):
            if getattr(whole, option, False):
                raise ValueError(
                    f"Expected {option}=False, but {layer.name} has True: it {why}. Leave it out"
                )
        warm_up = "partial" if window is None else warm_up
        super().__init__(layer, window, warm_up, call_mode, **kwargs)
        self._features: int | None = None  # Of a row; known when the layer is built.

    @property
    def seq_len(self) -> int | None:
        """The window; None: the state goes on."""
        return self.window

    @property
    def receptive_field(self) -> int:
        return self.window or 1

    @property
    def goes_on(self) -> bool:
        """Whether outputs depend on all earlier steps of the stream."""
        return self.window is None

    @property
    def gives_windows(self) -> bool:  # type: ignore[override]
        """Whether a step returns the outputs of the whole window, all of which change."""
        return self.window is not None and bool(self.layer.return_sequences)

    @property
    def heeds_masks(self) -> bool:
        """Whether a mask of Keras can skip steps: an unknown cell has no output to repeat."""
        cells = getattr(self.layer.cell, "cells", [self.layer.cell])
        return all(isinstance(cell, _CELLS) for cell in cells)

    @property
    def input_features(self) -> dict[str, Any]:
        return {"x": self._features}

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        features = input_shape[-1]
        if features is None:
            raise ValueError(f"Expected features of a known size, but got {input_shape}")
        if not self.layer.built:
            self.layer.build((None, None, features))
        if self._features is None:
            self._features = features
            if self.window is None:
                for i, size in enumerate(keras.tree.flatten(self.layer.state_size)):
                    self._stream_state.add_row(f"state_{i}", [size], self.compute_dtype)
            else:
                rows = max(1, self.window - 1)
                self._stream_state.add_row("steps", [rows, features], self.compute_dtype)

    def get_build_config(self) -> dict[str, Any]:
        return {"features": self._features}

    def build_from_config(self, config: dict[str, Any]) -> None:
        if config["features"] is not None:
            self.build((None, None, config["features"]))
        self.built = True

    def call_regular(
        self, x: TensorLike, mask: TensorLike | None = None, training: bool | None = None
    ) -> tf.Tensor:
        """Return the layer's output for windows `(B, T, F)`. This does not use streams' state."""
        expect_given("x", x)
        return self.layer(x, mask=mask, training=training)

    def call_step(
        self,
        x: TensorLike,
        mask: TensorLike | None = None,
        training: bool | None = None,
        *,
        streams: TensorLike | None = None,
        update_state: bool = True,
    ) -> tf.Tensor | None:
        """Take one step of M streams.

        Args:
            x: `(M, F)`.
            mask: bool `(M,)`: which streams' steps count. The others leave the state as it is, and
                return the newest output again.
            training: Whether dropout acts.
            streams: Integers `[M]`, the stream that each row belongs to, in any order, each once.
                None: row i is stream i, and room is made for M streams.
            update_state: If False, nothing changes: the output is that of the next real call.

        Returns:
            `(M, units)`; with a window and `return_sequences=True` `(M, N, units)`, the outputs of
            the window's steps, zeros for steps that were never taken. Or None while the window
            fills (see `warm_up`).

        Raises:
            ValueError: If shapes, dtypes or streams do not fit (in a graph, for streams,
                tf.errors.InvalidArgumentError). The streams then continue as if the call had not
                been made.
        """
        x = tf.expand_dims(step_input("x", x, "step", self.compute_dtype), 1)
        mask = None if mask is None else tf.expand_dims(tf.cast(mask, "bool"), 1)
        y = self._take_steps(x, mask, training, streams, update_state)
        return None if y is None else tf.squeeze(y, 1)

    def call_steps(
        self,
        x: TensorLike,
        mask: TensorLike | None = None,
        training: bool | None = None,
        *,
        streams: TensorLike | None = None,
        update_state: bool = True,
    ) -> tf.Tensor | None:
        """Take T steps of M streams, with the same outputs and state as T calls of `call_step`.

        Gradients flow to the steps of this call. Those of earlier calls are constants.

        Args:
            x: `(M, T, F)`, oldest step first.
            mask: bool `(M, T)`, as in `call_step`.
            training, streams, update_state: As in `call_step`.

        Returns:
            `(M, T', units)` or `(M, T', N, units)`, those with a full window if `warm_up="none"` in
            eager mode, or None if there are none.

        Raises:
            ValueError, tf.errors.InvalidArgumentError: As in `call_step`; also if T = 0.
        """
        x = step_input("x", x, "steps", self.compute_dtype)
        if x.shape[1] == 0:
            raise ValueError(f"Expected at least one step, but got {tuple(x.shape)}")
        mask = None if mask is None else tf.cast(mask, "bool")
        return self._take_steps(x, mask, training, streams, update_state)

    def compute_output_spec(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        if self.active_call_mode == "regular":
            return self.layer.compute_output_spec(x)
        return super().compute_output_spec(x, *args, **kwargs)

    def compute_mask(self, inputs: Any, previous_mask: Any = None) -> Any:
        return self.layer.compute_mask(inputs, previous_mask)

    # Steps.

    def _take_steps(
        self,
        x: tf.Tensor,
        mask: tf.Tensor | None,
        training: bool | None,
        streams: TensorLike | None,
        update_state: bool,
    ) -> tf.Tensor | None:
        """Take the steps x `(M, T, F)`, and return `(M, T', ...)` or None."""
        self._check_policy()
        if not self.built:
            with tf.init_scope(), calling("steps"):
                self.build(x.shape)
            self.built = True
        check_features("x", x, self._features or 0)
        if mask is not None and (self.window or not self.heeds_masks):
            raise ValueError(
                f"Expected no mask, but {self.name} got one: with a window, or with a cell of your "
                "own, it cannot skip steps"
            )
        rows, steps = rows_and_steps(x)

        def compute(step: Step) -> tf.Tensor | None:
            take = self._go_on if self.window is None else self._run_windows
            return self._ready_outputs(step, take(step, x, mask, training))

        return self._streams.take_steps(self, compute, streams, rows, steps, update_state)

    def _go_on(
        self, step: Step, x: tf.Tensor, mask: tf.Tensor | None, training: bool | None
    ) -> tf.Tensor:
        cell, kept = self.layer.cell, self._stream_state
        present = step.present(tf.shape(x)[1])
        if present is not None:
            mask = present if mask is None else mask & present
        begins = step.position[:, tf.newaxis] == 0
        sizes = keras.tree.flatten(self.layer.state_size)
        first = keras.tree.flatten(self.layer.get_initial_state(tf.shape(x)[0]))
        before = [
            # tf.where, because what an earlier stream left there may be NaN.
            tf.where(begins, tf.cast(zeros, kept_row.dtype), tf.gather(kept_row, step.numbers))
            for zeros, kept_row in zip(
                first, (getattr(kept, f"state_{i}") for i in range(len(sizes))), strict=True
            )
        ]
        outputs = tf.zeros([tf.shape(x)[0], cell.output_size], x.dtype)
        structure, output_state = self.layer.state_size, len(sizes) - _states_of_last(cell)
        options = {"training": training} if getattr(cell, "_call_has_training_arg", False) else {}

        def take_one(carried: tuple[Any, tf.Tensor], given: tuple[tf.Tensor, ...]) -> Any:
            state, row = carried[0], given[0]
            states = keras.tree.pack_sequence_as(structure, state)
            states = list(states) if isinstance(states, (list, tuple)) else [states]
            y, after = cell(row, states, **options)
            after = keras.tree.flatten(after)
            if mask is not None:
                counts = given[1][:, tf.newaxis]
                after = [tf.where(counts, a, b) for a, b in zip(after, state, strict=True)]
                # The output of these cells is their state, of stacked ones that of the last.
                y = tf.where(counts, y, state[output_state])
            return tuple(after), y

        over_time = [tf.transpose(x, [1, 0, 2])]
        if mask is not None:
            over_time.append(tf.transpose(mask))
        drops = training is not False and _drops_out(cell)
        if drops:
            # Cells keep their masks for a call: they must be of this graph, not of the loop's.
            packed = keras.tree.pack_sequence_as(structure, before)
            self.layer._maybe_config_dropout_masks(cell, x[:, 0], packed)
        try:
            states, outputs = tf.scan(take_one, tuple(over_time), (tuple(before), outputs))
        finally:
            if drops:
                self.layer._maybe_reset_dropout_masks(cell)
        after = [state[-1] for state in states]
        index = step.numbers[:, tf.newaxis]

        def keep() -> None:
            for i, new in enumerate(after):
                getattr(kept, f"state_{i}").scatter_nd_update(index, new)

        step.at_the_end(keep)
        return tf.transpose(outputs, [1, 0, 2])

    def _run_windows(
        self, step: Step, x: tf.Tensor, mask: tf.Tensor | None, training: bool | None
    ) -> tf.Tensor:
        n, ring = self.window or 1, self._stream_state.steps
        position = step.rows_before(tf.shape(x)[1])
        windows, there = windows_of(ring, x, step.numbers, position, n)
        lag = step.rows_of_input.lag
        if lag > 0:
            there = there & (_numbers_of_windows(step, tf.shape(x)[1], n) >= 0)
        step.at_the_end(lambda: put_steps(ring, x, step.numbers, position))
        lead = tf.shape(windows)[:2]
        flat = tf.reshape(windows, [-1, n, windows.shape[-1]])
        y = self.layer(flat, mask=tf.reshape(there, [-1, n]), training=training)
        y = tf.reshape(y, tf.concat([lead, tf.shape(y)[1:]], 0))
        if self.layer.return_sequences:
            y = tf.where(there[..., tf.newaxis], y, tf.zeros([], y.dtype))
        return y


def _states_of_last(cell: Any) -> int:
    """Return how many states the cell, or the last of stacked cells, has."""
    cells = getattr(cell, "cells", [cell])
    return len(keras.tree.flatten(cells[-1].state_size))


def _drops_out(cell: Any) -> bool:
    """Return whether the cell, or one of stacked cells, has dropout."""
    cells = getattr(cell, "cells", [cell])
    return any(getattr(c, "dropout", 0) or getattr(c, "recurrent_dropout", 0) for c in cells)


def _numbers_of_windows(step: Step, rows: tf.Tensor, n: int) -> tf.Tensor:
    """Return the numbers in the sequence of the rows of all windows: int64 `[M, T, N]`."""
    newest = step.numbers_of(rows)[:, :, tf.newaxis]
    return newest - n + 1 + tf.range(n, dtype=tf.int64)
