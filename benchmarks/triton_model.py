"""Triton's Python backend runs this: a session that steps the sequences of a batch in one call."""

import json
import sys

import numpy as np
import triton_python_backend_utils as triton


class TritonPythonModel:
    """The model that triton_rival.py writes a config.pbtxt for."""

    def initialize(self, args):
        """Load the model file. Triton calls it once."""
        parameters = json.loads(args["model_config"])["parameters"]
        sys.path.insert(0, parameters["package"]["string_value"])
        import continual_transformers_tf as ct

        self._session = ct.Session.load(parameters["model_file"]["string_value"])
        self._input, self._output = self._session.inputs[0].name, self._session.outputs[0].name
        self._streams = {}

    def execute(self, requests):
        """Take one step of each request's sequence."""

        def values(name):
            return [triton.get_input_tensor_by_name(r, name).as_numpy() for r in requests]

        keys = [int(key.item()) for key in values("CORRID")]
        for key, start in zip(keys, values("START"), strict=True):
            if start.item():
                self._end(key)
                self._streams[key] = self._session.open()
        x = np.concatenate(values(self._input))
        y = self._session.step(x, streams=[self._streams[key] for key in keys])
        for key, end in zip(keys, values("END"), strict=True):
            if end.item():
                self._end(key)
        rows = (triton.Tensor(self._output, y[i : i + 1]) for i in range(len(y)))
        return [triton.InferenceResponse([row]) for row in rows]

    def _end(self, key):
        if key in self._streams:
            self._session.close(self._streams.pop(key))
