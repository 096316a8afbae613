"""tf.function for tests that are not about AutoGraph, which doubles the time of tracing.

Every kind of layer has a test that uses tf.function itself, as users do.
"""

import functools

import tensorflow as tf

traced = functools.partial(tf.function, autograph=False)
