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


def build_model() -> keras.Model:
    """Return a model that recognizes the exercise being done, with new weights.

    It is a functional Keras model: windows `(B, 100, 6)` give logits `(B, 1, 7)` for the newest
    sample. In a `ct.Session` a step takes samples `(M, 6)` and returns logits `(M, 7)`. While the
    window fills, the logits are based on the samples seen so far.
    """
    windows = keras.Input((SEQ_LEN, len(CHANNELS)), name="samples")
    x = keras.layers.Normalization(name="normalization")(windows)
    x = keras.layers.Dense(HIDDEN_DIM, activation="gelu", name="hidden")(x)
    x = keras.layers.Dense(EMBED_DIM, name="embedding")(x)
    x = ct.CircularPositionalEncoding(2 * SEQ_LEN - 1, EMBED_DIM, name="position")(x)
    x = ct.CoSiTransformerEncoder(
        SEQ_LEN,
        EMBED_DIM,
        NUM_HEADS,
        FF_DIM,
        dropout_rate=DROPOUT,
        warm_up="partial",
        name="encoder",
    )(x)
    logits = keras.layers.Dense(len(EXERCISES), name="classifier")(x)
    return keras.Model(windows, logits, name="watch")


def trained_model() -> keras.Model:
    """Return the model with the weights that `demo/train.py` trained and the package contains."""
    model = build_model()
    with resources.as_file(WEIGHTS) as path:
        model.load_weights(path)
    ct.clean_state(model)
    return model
