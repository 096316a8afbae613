"""Transformer encoders of any depth, on windows and on streams."""

from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from continual_transformers_tf._keras_registration import registered
from continual_transformers_tf.layers.co_re_transformer_encoder import CoReTransformerEncoder
from continual_transformers_tf.layers.co_si_transformer_encoder import CoSiTransformerEncoder
from continual_transformers_tf.layers.composite_layer import CompositeLayer
from continual_transformers_tf.layers.continual_layer import ContinualLayer
from continual_transformers_tf.layers.inputs import TensorLike, rows_and_steps
from continual_transformers_tf.layers.one_input_layer import OneInputLayer
from continual_transformers_tf.layers.plain_layers import layer_norm
from continual_transformers_tf.layers.transformer_encoder_block import TransformerEncoderBlock
from continual_transformers_tf.layers.warm_up import always_partial, check_warm_up
from continual_transformers_tf.ops.step import Step
from continual_transformers_tf.ops.stream_state import check_integer

KINDS = ("single_output", "retroactive")


@registered
class TransformerEncoder(CompositeLayer, OneInputLayer):
    """A stack of encoder blocks that returns the newest step's output.

    Two kinds of stack stream with every step attending to the N newest (Hedegaard et al.,
    "Continual Transformers", ICLR 2023, arXiv 2201.06268):

    - "retroactive": `CoReTransformerEncoder`s, then one `CoSiTransformerEncoder`. On every window
      it is exactly the regular encoder's newest output: the paper's two-block model, and deeper
      ones. A step updates the first block's attention. The blocks above get a window all of whose
      rows have changed, and compute it again, the last block only for the newest row.
    - "single_output": a `CoSiTransformerEncoder` in every layer. A step costs one row in every
      layer, and the newest output depends on 1 + L (N - 1) steps. It is another model than the
      regular encoder: train it on steps, in "steps" mode from a clean state. A regular call returns
      the last output of these steps: attention to the N newest steps in every layer.

    In eager mode a step of kind "single_output" is one op a block. A step of kind "retroactive"
    with more than one block is many ops: call it in a `tf.function`, which is about 20 times
    faster, and serve it as a `ct.Session`.

    Args:
        num_layers: L, the number of blocks.
        seq_len: N, the window.
        embed_dim, num_heads, ff_dim, dropout_rate, call_mode: As in `CoSiTransformerEncoder`.
        key_dim, use_bias, norm_first, activation, epsilon: As in `CoSiTransformerEncoder`.
        kind: "single_output" or "retroactive".
        final_norm: Whether a layer norm follows the last block. None: only with `norm_first`, whose
            blocks end without one.
        warm_up: "none": in eager mode a step returns None until a stream's receptive field is full.
            "partial": it returns the outputs of the shorter sequence.
        cache_dtype, weights_dtype: As in `CoSiTransformerEncoder`, for the blocks of that class.
        **kwargs: `name`, `dtype` and other arguments of `keras.layers.Layer`.

    Attributes:
        blocks: The list of blocks.

    Returns:
        The result of `call_regular`, `call_step` or `call_steps`, as the call mode says.

    Raises:
        ValueError: At construction, if a size is not a positive integer, or `kind` or `warm_up` is
            none of those above.
    """

    def __init__(
        self,
        num_layers: int,
        seq_len: int,
        embed_dim: int,
        num_heads: int,
        ff_dim: int,
        dropout_rate: float = 0.1,
        call_mode: str = "regular",
        *,
        kind: str = "single_output",
        key_dim: int | None = None,
        use_bias: bool = True,
        norm_first: bool = False,
        activation: Any = "gelu",
        epsilon: float = 1e-6,
        final_norm: bool | None = None,
        warm_up: str = "none",
        cache_dtype: str | None = None,
        weights_dtype: str | None = None,
        **kwargs: Any,
    ) -> None:
        check_integer("num_layers", num_layers, at_least=1)
        if kind not in KINDS:
            raise ValueError(f"Expected kind to be one of {KINDS}, but got {kind!r}")
        super().__init__(**kwargs)
        block: dict[str, Any] = dict(
            seq_len=seq_len,
            embed_dim=embed_dim,
            num_heads=num_heads,
            ff_dim=ff_dim,
            dropout_rate=dropout_rate,
            key_dim=key_dim,
            use_bias=use_bias,
            norm_first=norm_first,
            activation=activation,
            epsilon=epsilon,
        )
        self._config = {
            **block,
            "num_layers": num_layers,
            "kind": kind,
            "activation": keras.activations.serialize(keras.activations.get(activation)),
            "final_norm": final_norm,
            "warm_up": warm_up,
            "cache_dtype": cache_dtype,
            "weights_dtype": weights_dtype,
        }
        self.call_mode = call_mode
        self._made_for = self.compute_dtype
        self._warm_up = check_warm_up(warm_up)
        single_output: dict[str, Any] = dict(cache_dtype=cache_dtype, weights_dtype=weights_dtype)
        self.blocks: list[TransformerEncoderBlock] = []
        for i in range(num_layers):
            names: dict[str, Any] = dict(name=f"block_{i}", dtype=self.dtype_policy)
            if kind == "single_output" or i == num_layers - 1:
                self.blocks.append(CoSiTransformerEncoder(**block, **single_output, **names))
            else:
                self.blocks.append(CoReTransformerEncoder(**block, **names))
        # Keras hides lists of layers from tf.train.Checkpoint.
        for block in self.blocks:
            self._track_trackable(block, block.name)
        # The blocks that take steps. The others are called on whole windows.
        self._streaming = self.blocks if kind == "single_output" else self.blocks[:1]
        self._share_streams()
        self.final_norm = None
        if norm_first if final_norm is None else final_norm:
            self.final_norm = keras.layers.LayerNormalization(
                epsilon=epsilon, name="final_norm", dtype=self.dtype_policy
            )

    @property
    def kind(self) -> str:
        """ "single_output" or "retroactive"."""
        return self._config["kind"]

    @property
    def seq_len(self) -> int:
        """N, the window: how many of the newest steps a step attends to."""
        return self._config["seq_len"]

    @property
    def receptive_field(self) -> int:
        return 1 + sum(block.receptive_field - 1 for block in self._streaming)

    @property
    def delay(self) -> int:
        return sum(block.delay for block in self._streaming)

    @property
    def parts(self) -> Sequence[ContinualLayer]:
        return self._streaming

    @property
    def _inner_layers(self) -> Sequence[ContinualLayer]:
        return self.blocks

    @property
    def input_features(self) -> dict[str, int]:
        return self.blocks[0].input_features

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), **self._config}

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        for block in self.blocks:
            if not block.built:
                block.build((None, self.seq_len, input_shape[-1]))
        if self.final_norm is not None:
            self.final_norm.build((None, input_shape[-1]))

    def call_regular(self, x: TensorLike, training: bool | None = None) -> tf.Tensor:
        """Return the newest step's output of whole windows. This does not use the streams' state.

        Args:
            x: `(B, T, E)`, windows, oldest step first. Of kind "single_output" the newest
                `receptive_field` steps matter. With fewer, the output is that of the shorter
                sequence.
            training: Whether dropout acts.

        Returns:
            `(B, 1, E)`.
        """
        x = self._rows_input(x, "regular")
        *below, last = self.blocks
        for i, block in enumerate(below):
            mask = None
            if self.kind == "single_output":
                x = x[:, -(1 + (len(self.blocks) - i) * (self.seq_len - 1)) :]
                mask = self._band(tf.shape(x)[1])
            x = block.call_regular_rows(x, training, mask)
        if self.kind == "single_output":
            x = x[:, -self.seq_len :]
        x = last.call_regular(x, training)
        return x if self.final_norm is None else self.final_norm(x)

    def _take_steps(
        self, mode: str, x: TensorLike, training: bool | None, streams: Any, update_state: bool
    ) -> tf.Tensor | None:
        x = self._rows_input(x, mode)
        one_step = mode == "step"

        def compute(step: Step) -> tf.Tensor | None:
            unready = self._unready_steps(step)
            y = x
            with always_partial():
                for block in self._streaming:
                    # Only a layer norm can follow the last block. Nothing can fail after its op.
                    last = one_step and block is self.blocks[-1] and step.whole is self
                    step.op_advances = last
                    call = block.call_step if one_step else block.call_steps
                    y = call(y, training, update_state=update_state)
                if len(self._streaming) < len(self.blocks):
                    y = self._call_above(y, step, training)
            if unready > 0:
                if unready == steps:
                    return None
                y = y[:, unready:]
            if self.final_norm is not None:
                y = layer_norm(y, self.final_norm, self.compute_dtype)
            return y

        rows, steps = rows_and_steps(x, mode)
        return self._streams.take_steps(self, compute, streams, rows, steps, update_state)

    def _call_above(self, windows: tf.Tensor, step: Step, training: bool | None) -> tf.Tensor:
        """Return the newest outputs of the blocks above the first, given the first's outputs.

        Args:
            windows: The first block's outputs, `(M, N, E)` of one step, or `(M, T, N, E)`.
            step: The `Step`.
            training: Whether dropout acts.

        Returns:
            `(M, E)` or `(M, T, E)`.
        """
        lead = tf.shape(windows)[:-2]
        n, features = self.seq_len, windows.shape[-1]
        # How many steps each stream has taken by each of these steps, [M, T].
        number = tf.range(tf.cast(step.steps, tf.int64))
        taken = step.position[:, tf.newaxis] + 1 + number
        there = tf.range(tf.constant(n, tf.int64)) >= n - taken[..., tf.newaxis]
        x, there = tf.reshape(windows, [-1, n, features]), tf.reshape(there, [-1, n])
        for block in self.blocks[1:]:
            x = block.call_regular(x, training, key_mask=there)
        return tf.reshape(x, tf.concat([lead, [features]], 0))

    def _band(self, steps: int | tf.Tensor) -> tf.Tensor:
        """Return bool `[1, T, T]`: each step attends to the N newest of those up to it."""
        step = tf.range(steps)
        age = step[:, tf.newaxis] - step
        return ((age >= 0) & (age < self.seq_len))[tf.newaxis]

    def compute_output_shape(self, input_shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
        if self.active_call_mode == "regular":
            return (input_shape[0], 1, input_shape[2])
        return tuple(input_shape)

    def convert_weights(self) -> None:
        """Convert the kernels as they are now for steps in `weights_dtype`.

        `ct.convert_weights` says when to call it.
        """
        for block in self.blocks:
            block.convert_weights()
