"""Requests to a server with tritonclient, as the tests make them."""

import numpy as np
import tritonclient.grpc as triton
from tritonclient.utils import np_to_triton_dtype


def tensor(name, array):
    """Return an input of a request."""
    array = np.asarray(array)
    if array.dtype.kind in "OSU":
        array = np.array([str(x).encode() for x in array.ravel()], object).reshape(array.shape)
    made = triton.InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype))
    return made.set_data_from_numpy(array)


def infer(client, x, streams=None, step=None, model="small", **options):
    """Take the steps x; return the outputs y.

    Args:
        streams: The names of many streams. Left out: the stream of `sequence_id` in options.
        step: The number of the first step: an integer, or one for each of many streams.
    """
    inputs = [tensor("x", x)]
    if streams is not None:
        inputs.append(tensor("streams", streams))
    if np.ndim(step) == 1:
        inputs.append(tensor("step", np.asarray(step, np.int64)))
    elif step is not None:
        options["parameters"] = {"step": int(step), **options.get("parameters", {})}
    return client.infer(model, inputs, **options).as_numpy("y")
