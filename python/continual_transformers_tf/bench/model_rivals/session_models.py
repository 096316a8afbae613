"""Our session as it is served: loaded from a model file, without TensorFlow in the process."""

import numpy as np

import continual_transformers_tf as ct
from continual_transformers_tf.bench.model_rivals import Contestant
from continual_transformers_tf.bench.sizes import ModelSize


def _session(size: ModelSize, model_file: str, threads: int) -> Contestant:
    session = ct.Session.load(model_file, streams=size.streams, threads=threads)
    streams = session.open(size.streams)
    return Contestant(lambda x: session.step(x, streams=streams), np.ascontiguousarray)


RIVALS = {"session": _session}
