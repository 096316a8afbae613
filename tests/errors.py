"""What is raised for input that does not fit: by Python, or by an op."""

import tensorflow as tf

BAD_INPUT = (ValueError, tf.errors.InvalidArgumentError)
