"""Write the demo's model as a LiteRT file, and a recording for it, into a folder.

python examples/litert/export.py FOLDER
"""

import json
import sys
from pathlib import Path

import numpy as np

import continual_transformers_tf as ct
from continual_transformers_tf.demo.model import trained_model
from continual_transformers_tf.demo.watch import EXERCISE_NAMES, HELD_OUT, load_recordings

SECONDS, RATE = 12, 50  # Of each exercise.


def main():
    folder = Path(sys.argv[1])
    folder.mkdir(exist_ok=True)
    ct.export_litert(trained_model(), folder / "watch.tflite")
    # One person whom the model never saw does one exercise after another.
    samples = [x.samples[: SECONDS * RATE] for x in load_recordings(HELD_OUT[:1])]
    recording = {
        "exercises": EXERCISE_NAMES,
        "rate": RATE,
        "samples": np.concatenate(samples).tolist(),
    }
    (folder / "recording.json").write_text(json.dumps(recording))


if __name__ == "__main__":
    main()
