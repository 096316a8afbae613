"""Take steps of a LiteRT file, and print what the model sees. The state stays in this loop.

It needs NumPy and ai-edge-litert, and runs in the folder that export.py wrote.
"""

import json
from pathlib import Path

import numpy as np
from ai_edge_litert.interpreter import Interpreter

recording = json.loads(Path("recording.json").read_text())
step = Interpreter("watch.tflite", num_threads=1).get_signature_runner("step")
state = {
    name: np.zeros(part["shape"], part["dtype"])
    for name, part in step.get_input_details().items()
    if name.startswith("state_")
}
seen = None
for t, sample in enumerate(recording["samples"]):
    outputs = step(samples=np.array([sample], np.float32), **state)
    state = {name: outputs[name] for name in state}
    exercise = recording["exercises"][outputs["y"].argmax()]
    if outputs["ready"] and exercise != seen:
        print(f"{t / recording['rate']:.2f} s: {exercise}")
        seen = exercise
