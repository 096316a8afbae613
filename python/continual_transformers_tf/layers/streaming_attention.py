"""What continual single-output (CoSi) and retroactive (CoRe) attention share."""

import functools
from typing import Any, ClassVar, NamedTuple, Self

import keras
import numpy as np
import tensorflow as tf

from continual_transformers_tf.layers.continual_layer import ContinualLayer
from continual_transformers_tf.layers.inputs import (
    TensorLike,
    check_features,
    check_same_rows,
    rows_and_steps,
    step_input,
)
from continual_transformers_tf.layers.plain_layers import cast, project
from continual_transformers_tf.layers.warm_up import check_warm_up
from continual_transformers_tf.ops.attention_cache import AttentionCache
from continual_transformers_tf.ops.single_output import expand_key_mask, expand_mask
from continual_transformers_tf.ops.step import Step
from continual_transformers_tf.ops.stream_state import check_integer

TIME_AXES = ((1,), (-2,))

# What a regular call computes with. Not every version of Keras has all of these methods.
COMPUTATION = (
    "call",
    "_compute_attention",
    "_compute_attention_mask",
    "_compute_causal_mask",
    "_compute_sliding_window_mask",
    "_masked_softmax",
)


class StepMasks(NamedTuple):
    """The masks of a call of T steps of M streams. None: everything is attended to.

    Attributes:
        attention: bool tensor `[M|1, H|1, T|1, N]`, or of retroactive attention
            `[M|1, H|1, T|1, N, N]`: which steps of the window each query attends to.
        query: bool tensor `[M, T]`: which of the call's queries attend at all.
        key: bool tensor `[M, T]`: which of the call's steps can be attended to, now and later.
    """

    attention: tf.Tensor | None
    query: tf.Tensor | None
    key: tf.Tensor | None


class StreamingAttention(ContinualLayer, keras.layers.MultiHeadAttention):
    """`keras.layers.MultiHeadAttention` that can also be called on the steps of endless streams.

    Weights are those of `keras.layers.MultiHeadAttention`, in the same order.

    A subclass defines `call_regular` and `_attend`, and makes `_stream_state`, an `AttentionCache`.

    Args:
        seq_len: N, the window: the newest steps.
        num_heads, ..., seed: As in `keras.layers.MultiHeadAttention`.
        warm_up, call_mode: As in `CoSiMultiHeadAttention`.
        single_output: Whether a regular call returns only one row.
        **kwargs: `name`, `dtype` and other arguments of `keras.layers.Layer`.

    Raises:
        ValueError: At construction, if `seq_len` is not a positive integer, if `warm_up` or
            `call_mode` is unknown, or if `attention_axes` is not time and steps or one row are
            asked for.
    """

    # The layers of Keras that `from_regular` takes, and their public names.
    _regular_kinds: ClassVar = {keras.layers.MultiHeadAttention: "MultiHeadAttention"}

    _stream_state: AttentionCache
    _features: tuple[Any, ...]  # Of query, value and key, when the layer is built.

    def __init__(
        self,
        seq_len: int,
        num_heads: int,
        key_dim: int,
        value_dim: int | None = None,
        dropout: float = 0.0,
        use_bias: bool = True,
        output_shape: Any = None,
        attention_axes: Any = None,
        sliding_window: int | None = None,
        flash_attention: bool | None = None,
        kernel_initializer: Any = "glorot_uniform",
        bias_initializer: Any = "zeros",
        kernel_regularizer: Any = None,
        bias_regularizer: Any = None,
        activity_regularizer: Any = None,
        kernel_constraint: Any = None,
        bias_constraint: Any = None,
        use_gate: bool = False,
        seed: int | None = None,
        *,
        warm_up: str = "none",
        call_mode: str = "regular",
        single_output: bool = False,
        **kwargs: Any,
    ) -> None:
        check_integer("seq_len", seq_len, at_least=1)
        along_time = attention_axes is None or tuple(np.atleast_1d(attention_axes)) in TIME_AXES
        if not along_time and (single_output or call_mode != "regular"):
            raise ValueError(
                "Expected attention_axes to be None or 1, the axis of time, because a step adds to "
                f"the window along time, but got {attention_axes!r}. (Other axes work as in Keras "
                'with single_output=False and call_mode="regular".)'
            )
        super().__init__(
            num_heads=num_heads,
            key_dim=key_dim,
            value_dim=value_dim,
            dropout=dropout,
            use_bias=use_bias,
            output_shape=output_shape,
            attention_axes=attention_axes,
            sliding_window=sliding_window,
            flash_attention=flash_attention,
            kernel_initializer=kernel_initializer,
            bias_initializer=bias_initializer,
            kernel_regularizer=kernel_regularizer,
            bias_regularizer=bias_regularizer,
            activity_regularizer=activity_regularizer,
            kernel_constraint=kernel_constraint,
            bias_constraint=bias_constraint,
            use_gate=use_gate,
            seed=seed,
            **kwargs,
        )
        self._seq_len = int(seq_len)
        self._single_output = bool(single_output)
        self._warm_up = check_warm_up(warm_up)
        self.call_mode = call_mode
        self._made_for = self.compute_dtype
        # Why the layer can take no steps, if it cannot.
        self._no_steps = None if along_time else f"attention_axes={attention_axes!r}"

    @property
    def seq_len(self) -> int:
        """N, the window: how many of the newest steps a query attends to."""
        return self._seq_len

    @property
    def receptive_field(self) -> int:
        return self._seq_len

    @property
    def input_features(self) -> dict[str, int]:
        return dict(zip(("query", "value", "key"), self._features, strict=True))

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "seq_len": self._seq_len,
            "flash_attention": self._flash_attention,
            "warm_up": self._warm_up,
        }

    @classmethod
    def from_regular(
        cls, layer: keras.layers.MultiHeadAttention, seq_len: int, **options: Any
    ) -> Self:
        """Return a layer that streams with the weights of a `keras.layers.MultiHeadAttention`.

        Args:
            layer: The Keras layer. It must be built, or there are no weights to copy. Single-output
                attention also takes a `keras.layers.GroupQueryAttention`.
            seq_len: N, the window.
            **options: Other arguments of the constructor. The defaults are the Keras layer's own
                values, also of its name.

        Raises:
            ValueError: If the layer is not such a built layer, or if its
                weights or computation are not those of Keras: it is quantized, has low-rank
                additions, or is a subclass with an attention of its own.
        """
        kind = next((kind for kind in cls._regular_kinds if isinstance(layer, kind)), None)
        if kind is None:
            names = " or ".join(f"keras.layers.{name}" for name in cls._regular_kinds.values())
            raise ValueError(f"Expected a {names}, but got {layer!r}")
        kind_name = f"keras.layers.{cls._regular_kinds[kind]}"
        for name in COMPUTATION:
            method = getattr(type(layer), name, None)
            if not any(vars(base).get(name) is method for base in (*cls.__mro__, kind)):
                raise ValueError(
                    f"Expected the {name} of {kind_name}, but {layer.name} "
                    f"({type(layer).__name__}) has one of its own"
                )
        if not layer.built:
            raise ValueError(
                f"Expected a built layer, which has weights to copy, but {layer.name} was never "
                "called"
            )
        config = {"flash_attention": layer._flash_attention, **layer.get_config()}
        streaming = cls(**{**cls._renamed(config), "seq_len": seq_len, **options})
        shapes = layer._build_shapes_dict
        streaming.build(*(shapes.get(name) for name in ("query_shape", "value_shape", "key_shape")))
        if _weights_of(streaming) != _weights_of(layer):
            raise ValueError(
                f"Expected the weights of a plain {kind_name}, "
                f"{_weights_of(streaming)}, but {layer.name} has {_weights_of(layer)}. Convert the "
                "layer before it is quantized or given low-rank additions"
            )
        streaming.set_weights(layer.get_weights())
        return streaming

    @classmethod
    def _renamed(cls, config: dict[str, Any]) -> dict[str, Any]:
        """Return the config of a layer of Keras with this class's names of its arguments."""
        return config

    # Building and calling.

    def build(
        self,
        query_shape: tuple[int | None, ...],
        value_shape: tuple[int | None, ...] | None = None,
        key_shape: tuple[int | None, ...] | None = None,
    ) -> None:
        """Make the weights.

        Args:
            query_shape: `(B, T, E)`, or of a step, `(B, E)`.
            value_shape, key_shape: Likewise. None: as query_shape, and as value_shape.
        """
        value_shape = query_shape if value_shape is None else value_shape
        key_shape = value_shape if key_shape is None else key_shape
        shapes = [
            (shape[0], self._seq_len, shape[1]) if len(shape) == 2 else tuple(shape)
            for shape in (query_shape, value_shape, key_shape)
        ]
        for name, shape in zip(("query", "value", "key"), shapes, strict=True):
            if len(shape) == 3:
                continue
            if self._single_output:
                raise ValueError(
                    f"Expected {name} of shape (B, T, E), or (B, E) for a step, but got {shape}"
                )
            self._no_steps = self._no_steps or f"{name} of shape {shape}"
        self._build_parts(*shapes)
        self._features = tuple(shape[-1] for shape in shapes)

    def _build_parts(self, query_shape: Any, value_shape: Any, key_shape: Any) -> None:
        """Make the weights, for inputs of these shapes, with their axis of time."""
        super().build(query_shape, value_shape, key_shape)

    def call(
        self,
        query: TensorLike,
        value: TensorLike | None = None,
        key: TensorLike | None = None,
        query_mask: TensorLike | None = None,
        value_mask: TensorLike | None = None,
        key_mask: TensorLike | None = None,
        attention_mask: TensorLike | None = None,
        return_attention_scores: bool = False,
        training: bool | None = None,
        use_causal_mask: bool = False,
        streams: TensorLike | None = None,
        update_state: bool = True,
    ) -> Any:
        mask = getattr(query, "_keras_mask", None)
        if value is None and value_mask is None:
            # Keras passes the masks of its arguments, but value is not an argument here.
            value_mask = mask
        if query_mask is mask:
            # Keras' mask of a step hides the step's key. Its query still attends to the others.
            query_mask = None
        outputs = self._call_by_mode(
            query,
            value,
            key,
            query_mask=query_mask,
            value_mask=value_mask,
            key_mask=key_mask,
            attention_mask=attention_mask,
            return_attention_scores=return_attention_scores,
            training=training,
            use_causal_mask=use_causal_mask,
            streams=streams,
            update_state=update_state,
        )
        if self.active_call_mode != "regular":
            self._put_mask(mask, outputs[0] if return_attention_scores else outputs)
        return outputs

    def call_regular_rows(self, query: Any, value: Any, key: Any = None, **arguments: Any) -> Any:
        """Return all rows of attention on windows, exactly as `keras.layers.MultiHeadAttention`."""
        return super().call(query, value, key, **arguments)

    def call_step(
        self,
        query: TensorLike,
        value: TensorLike | None = None,
        key: TensorLike | None = None,
        attention_mask: TensorLike | None = None,
        return_attention_scores: bool = False,
        training: bool | None = None,
        *,
        query_mask: TensorLike | None = None,
        value_mask: TensorLike | None = None,
        key_mask: TensorLike | None = None,
        use_causal_mask: bool = False,
        streams: TensorLike | None = None,
        update_state: bool = True,
    ) -> Any:
        """Take one step of M streams.

        With `attention_mask`, `use_causal_mask` or `return_attention_scores`, retroactive attention
        computes all rows from the rings, in plain TensorFlow: a row's sums cannot hold what is true
        for one call only.

        Args:
            query: `(M, E)`, the newest step of each stream.
            value, key: `(M, Ev)`, `(M, Ek)`. None: the query, and the value.
            attention_mask: bool, the steps of the window that may be attended to, oldest first.
                Single output: `[N]`, `[M, N]` or `[M, H, N]`. Retroactive: which steps (last axis)
                each step's query (the axis before) may attend to: `[N, N]`, `[M, N, N]` or
                `[M, H, N, N]`.
            return_attention_scores: Whether to return the scores too.
            training: Whether this is training. Dropout then acts on the scores, and the step is
                computed in plain TensorFlow. Pass True for a graph that is differentiated from
                outside.
            query_mask: bool `[M]`. Where it is False, the query attends to nothing. Retroactive
                attention refuses it.
            value_mask, key_mask: bool `[M]`. Where either is False, the stream advances, but the
                step is never attended to, now or later: it is a gap in a recording.
            use_causal_mask: Whether a query attends to no step after its own.
            streams: Integers `[M]`, the stream that each row belongs to, in any order, each once.
                None: row i is stream i, and room is made for M streams.
            update_state: If False, nothing changes: the output is that of the next real call.

        Returns:
            Single output: `(M, E)`. Retroactive: `(M, N, E)`, the outputs of the window, oldest
            step first, zeros for steps that were never taken. Or None while the window fills (see
            `warm_up`). With return_attention_scores a pair with the scores, `(M, H, N)` or
            `(M, H, N, N)`, or with None.

        Raises:
            ValueError, tf.errors.InvalidArgumentError: If shapes, dtypes or streams do not fit. The
                streams then continue as if the call had not been made.
        """
        outputs = self._take_steps(
            "step",
            query,
            value,
            key,
            attention_mask=attention_mask,
            query_mask=query_mask,
            value_mask=value_mask,
            key_mask=key_mask,
            use_causal_mask=use_causal_mask,
            return_attention_scores=return_attention_scores,
            training=training,
            streams=streams,
            update_state=update_state,
        )
        return outputs if return_attention_scores else outputs[0]

    def call_steps(
        self,
        query: TensorLike,
        value: TensorLike | None = None,
        key: TensorLike | None = None,
        attention_mask: TensorLike | None = None,
        return_attention_scores: bool = False,
        training: bool | None = None,
        *,
        query_mask: TensorLike | None = None,
        value_mask: TensorLike | None = None,
        key_mask: TensorLike | None = None,
        use_causal_mask: bool = False,
        streams: TensorLike | None = None,
        update_state: bool = True,
    ) -> Any:
        """Take T steps of M streams, with the same outputs and state as T calls of `call_step`.

        Args:
            query: `(M, T, E)`, the T newest steps of each stream, oldest first.
            value, key: `(M, T, Ev)`, `(M, T, Ek)`. None: the query, and the value.
            attention_mask: As in `call_step`, the same for every step. Or with an axis for T steps:
                `[M, H, T, N]`; retroactive: `[M, H, T, N, N]`.
            query_mask, value_mask, key_mask: bool `[M, T]`, as in `call_step`.
            return_attention_scores, training, use_causal_mask, streams, update_state: As in
                `call_step`.

        Returns:
            `(M, T', E)`; retroactive: `(M, T', N, E)`. In eager mode with `warm_up="none"` these
            are the outputs of the T' newest steps, those with a full window in the stream that has
            come furthest, or None if there are none. Otherwise T' = T. With return_attention_scores
            a pair with the scores, `(M, H, T', N)` or `(M, H, T', N, N)`, or with None.

        Raises:
            ValueError, tf.errors.InvalidArgumentError: As in `call_step`; also if T = 0.
        """
        outputs = self._take_steps(
            "steps",
            query,
            value,
            key,
            attention_mask=attention_mask,
            query_mask=query_mask,
            value_mask=value_mask,
            key_mask=key_mask,
            use_causal_mask=use_causal_mask,
            return_attention_scores=return_attention_scores,
            training=training,
            streams=streams,
            update_state=update_state,
        )
        return outputs if return_attention_scores else outputs[0]

    # The way of a step: check the inputs and masks, project, attend, project back.

    def _take_steps(
        self,
        mode: str,
        query: TensorLike,
        value: TensorLike | None,
        key: TensorLike | None,
        *,
        return_attention_scores: bool,
        training: bool | None,
        streams: TensorLike | None,
        update_state: bool,
        **masks: Any,
    ) -> tuple[Any, Any]:
        """Take the steps of `call_step` ("step") or `call_steps` ("steps").

        Returns:
            (outputs, scores or None), or (None, None) while the window fills.
        """
        one_step = mode == "step"
        query, value, key = self._step_inputs(mode, query, value, key)
        if one_step:
            query, value, key = _with_axis_of_time(query, value, key)
        step_masks = self._step_masks(query, one_step, **masks)
        rows, steps = rows_and_steps(query)

        def compute(step: Step) -> tuple[Any, Any]:
            masks, present = step_masks, step.present(steps)
            if present is not None:
                masks = masks._replace(key=present if masks.key is None else masks.key & present)
            attended, scores = self._attend(
                step, query, value, key, masks, return_attention_scores, training
            )
            unready = self._unready_steps(step)
            if unready > 0:
                if unready == steps:
                    return None, None
                attended = attended[:, unready:]
            output = self._project_output(step, attended, training)
            if one_step:
                output = tf.squeeze(output, 1)
            if not return_attention_scores:
                return output, None
            scores = cast(scores, self.compute_dtype)[:, :, unready:]
            return output, tf.squeeze(scores, 2) if one_step else scores

        return self._streams.take_steps(self, compute, streams, rows, steps, update_state)

    def _step_inputs(
        self, mode: str, query: Any, value: Any, key: Any
    ) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        """Return query, value and key as tensors that fit each other and the layer.

        Without a value, the value is the query's tensor; without a key, the key is the value's.
        """
        if self._no_steps is not None:
            raise ValueError(
                f"Expected regular calls only: with {self._no_steps} the layer is a "
                "keras.layers.MultiHeadAttention, and a step adds to windows (B, T, E) along time"
            )
        self._check_policy()
        dtype = self.compute_dtype
        query = step_input("query", query, mode, dtype)
        value = query if value is None else step_input("value", value, mode, dtype)
        key = value if key is None else step_input("key", key, mode, dtype)
        check_same_rows(query=query, value=value, key=key)
        self._ensure_built(query, value, key)
        for name, x, size in zip(
            ("query", "value", "key"), (query, value, key), self._features, strict=True
        ):
            check_features(name, x, size)
        return query, value, key

    def _step_masks(
        self,
        query: tf.Tensor,
        one_step: bool,
        *,
        attention_mask: Any,
        query_mask: Any,
        value_mask: Any,
        key_mask: Any,
        use_causal_mask: bool,
    ) -> StepMasks:
        """Check the masks of a step, and combine them with what the layer itself masks.

        Args:
            query: `(M, T, E)`; of one step also `(M, E)`.
            one_step: Whether the masks are those of `call_step`.
            attention_mask, ..., use_causal_mask: As in `call_step` or `call_steps`.

        Raises:
            ValueError: If a mask is not bool, or its shape does not fit.
        """
        mask = self._fixed_mask(bool(use_causal_mask))
        if attention_mask is not None:
            given = expand_mask(
                attention_mask,
                query.shape[0],
                1 if one_step else query.shape[1],
                self._stream_state,
                all_rows=self.gives_windows,
                heads=self._num_heads,
            )
            mask = given if mask is None else given & mask
        query_mask, value_mask, key_mask = (
            None if given is None else expand_key_mask(name, given, query, one_step)
            for name, given in (
                ("query_mask", query_mask),
                ("value_mask", value_mask),
                ("key_mask", key_mask),
            )
        )
        if key_mask is None:
            key_mask = value_mask
        elif value_mask is not None:
            key_mask &= value_mask
        return StepMasks(mask, query_mask, key_mask)

    def _fixed_mask(self, use_causal_mask: bool) -> tf.Tensor | None:
        """Return the part of `StepMasks.attention` that is the same for all streams."""
        delay = None if self.gives_windows else self.delay
        allowed = _allowed_in_window(self._seq_len, delay, self._sliding_window, use_causal_mask)
        return None if allowed is None else tf.constant(allowed)

    def _attend(
        self,
        step: Step,
        query: tf.Tensor,
        value: tf.Tensor,
        key: tf.Tensor,
        masks: StepMasks,
        return_attention_scores: bool,
        training: bool | None,
    ) -> tuple[tf.Tensor, tf.Tensor | None]:
        """Project this call's steps, attend to the window, and keep the new steps.

        Args:
            step: The `Step`.
            query, value, key: `(M, T, E)`, `(M, T, Ev)`, `(M, T, Ek)`.
            masks, return_attention_scores, training: As in `_take_steps`.

        Returns:
            The heads' outputs `(M, T, ..., H, Dv)`, gated, of the compute dtype, and the scores
            `(M, H, T, ...)`, if they are wanted.
        """
        raise NotImplementedError

    def _project_output(self, step: Step, attended: tf.Tensor, training: bool | None) -> tf.Tensor:
        """Project the heads' outputs `(M, T', ..., H, Dv)` of the newest T' steps."""
        return project(attended, self._output_dense, self.compute_dtype, training, axes=2)

    def _scores_dropout(self, training: bool | None) -> Any:
        """Return the function that drops some of the attention's scores, or None."""
        if not training or self._dropout == 0:
            return None
        return functools.partial(self._dropout_layer, training=True)

    @property
    def _first_output(self) -> int:
        first = super()._first_output
        # Before step delay + 1 there is no query that could have an output.
        return max(first, self.delay + 1) if self._can_return_none else first

    # Symbolic shapes, and masks.

    def compute_mask(self, inputs: Any, previous_mask: Any) -> Any:
        # Keras would put this mask on the output of any call. The output of a step may be None, or
        # hold fewer steps than the mask: `_put_mask` is for steps.
        return previous_mask if self.active_call_mode == "regular" else None

    def _put_mask(self, mask: tf.Tensor | None, output: tf.Tensor | None) -> None:
        """Put Keras' mask of this call's steps on their output."""

    def compute_output_shape(
        self, query_shape: Any, value_shape: Any = None, key_shape: Any = None
    ) -> tuple[int | None, ...]:
        value_shape = query_shape if value_shape is None else value_shape
        super().compute_output_shape(query_shape, value_shape, key_shape)  # For its checks.
        lead = tuple(query_shape[:-1])
        if self.active_call_mode != "regular":
            lead = (*lead, self._seq_len) if self.gives_windows else lead
        elif self._single_output:
            lead = (lead[0], 1)
        return lead + tuple(self._output_shape or query_shape[-1:])

    def compute_output_spec(
        self,
        query: Any,
        value: Any = None,
        key: Any = None,
        *args: Any,
        return_attention_scores: bool = False,
        **kwargs: Any,
    ) -> Any:
        inputs = [x.shape if x is not None else None for x in (query, value, key)]
        shape = self.compute_output_shape(*inputs)
        output = keras.KerasTensor(shape, dtype=self.compute_dtype)
        if not return_attention_scores:
            return output
        heads = (query.shape[0], self._num_heads)
        if self.active_call_mode == "regular":
            value = query if value is None else value
            scores = (*heads, shape[1], value.shape[1])
        else:
            rows = (self._seq_len,) if self.gives_windows else ()
            scores = (*heads, *query.shape[1:-1], *rows, self._seq_len)
        return output, keras.KerasTensor(scores, dtype=self.compute_dtype)


@functools.lru_cache(maxsize=256)
def _allowed_in_window(
    seq_len: int, delay: int | None, sliding_window: int | None, use_causal_mask: bool
) -> np.ndarray | None:
    """Return which steps of a window a step's queries may attend to by the layer's own arguments.

    A causal query attends only to steps up to its own that are still in the window.

    Args:
        seq_len: N.
        delay: How many steps before the newest the only query stands. None: all N are queries.
        sliding_window: As in `keras.layers.MultiHeadAttention`.
        use_causal_mask: Whether queries attend to no later step.

    Returns:
        bool `[1, 1, 1, N]`, or with N queries `[1, 1, 1, N, N]`. None if all may be attended to.
    """
    columns = np.arange(seq_len)
    queries = columns[:, np.newaxis] if delay is None else np.array(seq_len - 1 - delay)
    age = queries - columns
    allowed = np.full(age.shape, True)
    if sliding_window is not None:
        allowed &= np.abs(age) < sliding_window
    if use_causal_mask:
        allowed &= age >= 0
    return None if allowed.all() else allowed[np.newaxis, np.newaxis, np.newaxis]


def _with_axis_of_time(
    query: tf.Tensor, value: tf.Tensor, key: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Turn one step `(M, E)` into `(M, 1, E)`. Inputs that are the same tensor stay the same."""
    steps = {id(x): tf.expand_dims(x, 1) for x in {id(x): x for x in (query, value, key)}.values()}
    return steps[id(query)], steps[id(value)], steps[id(key)]


def _weights_of(layer: keras.layers.Layer) -> list[tuple[str, tuple[int, ...], str]]:
    return [("/".join(w.path.split("/")[-2:]), tuple(w.shape), w.dtype) for w in layer.weights]
