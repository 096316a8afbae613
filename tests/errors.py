"""The exceptions for an input that does not fit, from Python or from an op."""

import tensorflow as tf

BAD_INPUT = (ValueError, tf.errors.InvalidArgumentError)
