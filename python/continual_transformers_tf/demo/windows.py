"""The demo's rival: the same model and weights, called on every whole window, in plain Keras."""

from collections.abc import Sequence

import keras
import numpy as np
import numpy.typing as npt
import tensorflow as tf

from continual_transformers_tf.demo.model import EMBED_DIM, NUM_HEADS, SEQ_LEN
from continual_transformers_tf.demo.watch import Recording

BATCH_SIZE = 256


def windows_of(samples: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Return every full window of a recording as a view: [T, 6] -> [T - N + 1, N, 6]."""
    windows = np.lib.stride_tricks.sliding_window_view(samples, SEQ_LEN, axis=0)
    return windows.transpose(0, 2, 1)


class WindowModel:
    """The demo's model with `keras.layers.MultiHeadAttention` as its attention.

    Args:
        model: The trained model whose weights it uses.
    """

    def __init__(self, model: keras.Model) -> None:
        self._model = model
        self._attention = keras.layers.MultiHeadAttention(NUM_HEADS, EMBED_DIM)
        self._attention.build((None, SEQ_LEN, EMBED_DIM), (None, SEQ_LEN, EMBED_DIM))
        self._attention.set_weights(model.get_layer("encoder").attention.get_weights())
        self.logits = tf.function(
            self._logits,
            input_signature=[
                tf.TensorSpec([None, SEQ_LEN, 6], tf.float32),
                tf.TensorSpec([None], tf.int64),
            ],
        )

    def _logits(self, windows: tf.Tensor, first_step: tf.Tensor) -> tf.Tensor:
        """Return the logits of windows [B, N, 6].

        Args:
            windows: Full windows.
            first_step: int64 [B], the position of each window's oldest sample in its stream.
        """
        layer = self._model.get_layer
        encoder = layer("encoder")
        table = layer("position").embeddings.value
        rows = first_step[:, tf.newaxis] + tf.range(SEQ_LEN, dtype=tf.int64)
        rows = tf.math.floormod(rows, tf.shape(table, tf.int64)[0])
        x = layer("embedding")(layer("hidden")(layer("normalization")(windows)))
        x += tf.gather(table, rows)
        # Attend with the newest step's query only: leave out everything that a Keras user could.
        x = encoder.attention_norm(x[:, -1] + self._attention(x[:, -1:], x)[:, 0])
        x = encoder.output_norm(x + encoder.feed_forward_output(encoder.feed_forward(x)))
        return layer("classifier")(x)

    def predictions(self, samples: npt.NDArray[np.float32]) -> npt.NDArray[np.int64]:
        """Return the predictions for each full window of a recording: [T, 6] -> [T - N + 1]."""
        windows = windows_of(samples)
        first_step = np.arange(len(windows))
        return np.concatenate(
            [
                self.logits(windows[i : i + BATCH_SIZE], first_step[i : i + BATCH_SIZE])
                .numpy()
                .argmax(-1)
                for i in range(0, len(windows), BATCH_SIZE)
            ]
        )


def window_accuracy(model: keras.Model, recordings: Sequence[Recording]) -> float:
    """Return the model's accuracy on the full windows of these recordings."""
    window_model = WindowModel(model)
    right = [window_model.predictions(r.samples) == r.exercise for r in recordings]
    return float(np.concatenate(right).mean())
