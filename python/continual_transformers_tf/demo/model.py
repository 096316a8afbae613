"""The demo's model: one continual encoder between a small embedding and a classifier."""

from importlib import resources

import keras

import continual_transformers_tf as ct
from continual_transformers_tf.demo.watch import CHANNELS, EXERCISES

SEQ_LEN = 100  # Two seconds.
EMBED_DIM = 32
NUM_HEADS = 4
HIDDEN_DIM = 64
FF_DIM = 128
DROPOUT = 0.2

WEIGHTS = resources.files("continual_transformers_tf.demo") / "watch.weights.h5"


class WatchModel(keras.Model):
    """Which exercise is being done: logits for the newest sample, on windows and on streams.

    Call arguments:
        x: `(B, T, 6)` windows, or, called in mode "step", `(M, 6)` samples.
        streams: in mode "step", integers `[M]`, which streams the samples belong to.

    Returns:
        Logits `(B, 1, 7)`, or of a step `(M, 7)`. While the window fills they are those of the
        samples seen so far.
    """

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.normalization = keras.layers.Normalization()
        self.hidden = keras.layers.Dense(HIDDEN_DIM, activation="gelu")
        self.embedding = keras.layers.Dense(EMBED_DIM)
        self.position = ct.CircularPositionalEncoding(2 * SEQ_LEN - 1, EMBED_DIM)
        self.encoder = ct.CoSiTransformerEncoder(
            SEQ_LEN, EMBED_DIM, NUM_HEADS, FF_DIM, dropout_rate=DROPOUT, warm_up="partial"
        )
        self.classifier = keras.layers.Dense(len(EXERCISES))

    def embed(self, x):
        """Each sample's features, without position."""
        return self.embedding(self.hidden(self.normalization(x)))

    def call(self, x, training=None, streams=None):
        x = self.position(self.embed(x), streams=streams)
        x = self.encoder(x, training=training, streams=streams)
        return self.classifier(x)


def build_model():
    """A `WatchModel` with new weights."""
    model = WatchModel()
    model.normalization.build((None, len(CHANNELS)))
    model(keras.ops.zeros((1, SEQ_LEN, len(CHANNELS))))
    return model


def trained_model():
    """The `WatchModel` that `demo/train.py` trained, whose weights come with the package."""
    model = build_model()
    with resources.as_file(WEIGHTS) as path:
        model.load_weights(path)
    ct.clean_state(model)
    return model
