"""The examples run. That of examples/real_data takes only a few training steps here."""

import json
import os
import re
import runpy
import subprocess
import sys
import wave
from importlib import util
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from click.testing import CliRunner

EXAMPLES = Path(__file__).parent.parent / "examples"
EXAMPLE = EXAMPLES / "real_data" / "compare.py"


@pytest.mark.slow
@pytest.mark.parametrize("data", ["smartwatch", "vowels"])
def test_stacks_on_real_recordings(tmp_path, data):
    if data == "vowels":
        pytest.importorskip("aeon", reason="the extra examples is not installed")
    options = ["--only", data, "--scale", "0.01", "--recordings", "2", "--output", str(tmp_path)]
    result = subprocess.run(
        [sys.executable, str(EXAMPLE), *options],
        env={**os.environ, "MPLBACKEND": "Agg"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    figures = json.loads((tmp_path / "real_data.json").read_text())[data]
    assert set(figures) == {
        "regular, on windows", "retroactive, streamed", "single_output, streamed"
    }  # fmt: skip
    assert figures["regular, on windows"]["differ_from_the_stream"] == 0
    assert figures["regular, on windows"]["predictions"] > 0
    assert (tmp_path / "real_data.png").stat().st_size > 0


@pytest.fixture
def example(monkeypatch):
    """Return a function that gives the names of a script of examples/models."""
    monkeypatch.syspath_prepend(EXAMPLES / "models")
    keras.utils.set_random_seed(1)
    return lambda name: runpy.run_path(str(EXAMPLES / "models" / f"{name}.py"))


def test_a_decoder_of_today_streams(example):
    decoder = example("decoder")
    tokens = np.random.default_rng(1).integers(0, 1000, (1, 40)).astype("int32")
    for options in (
        dict(),
        dict(query_key_norm=True, logit_soft_cap=20.0, use_sinks=True),
    ):
        model = decoder["build"](features=32, heads=4, blocks=2, window=7, **options)
        assert decoder["compare"](model, tokens).error < 5e-6


@pytest.mark.parametrize(("name", "block"), [("conformer", 1280), ("watch", 2)])
def test_a_model_of_examples_equals_itself_on_the_whole_recording(example, name, block):
    names = example(name)
    if name == "conformer":
        model, recording = names["build"](24, 2, 1, 5), names["recording"](seconds=2)
    else:
        random = np.random.default_rng(1)
        model = names["build"](features=8, heads=2, window=16)
        recording = random.normal(size=(1, 80, 6)).astype("float32")
    result = names["compare"](model, recording, seq_len=16)
    assert result.error < 2e-5
    assert result.block == block


def test_a_keyword_spotter_equals_itself_on_windows(example):
    spotter = example("keyword_spotter")
    rows = np.random.default_rng(1).normal(size=(1, 20, 40)).astype("float32")
    model = spotter["build"](8, 1, 2, 3, window=12)
    assert spotter["compare_first_window"](model, rows).error < 5e-6


def test_oad_tr_with_its_decoder_equals_itself_on_windows(example):
    oad_tr = example("oad_tr")
    video = np.random.default_rng(1).normal(size=(1, 10, 5)).astype("float32")
    model = oad_tr["build"](8, 2, 3, 4, 1, window=6, inputs=5)
    assert oad_tr["compare_first_window"](model, video).error < 5e-6


def trained_and_streamed(monkeypatch, main, arguments, **small):
    """Run a script's command with a small model, and return how many predictions differ, of all."""
    names = main.callback.__globals__
    build = names["build"]
    monkeypatch.setitem(names, "build", lambda **options: build(**small, **options))
    result = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    differ, of = re.search(r"(\d+) of ([\d,]+) predictions differ", result.output).groups()
    return int(differ), int(of.replace(",", ""))


@pytest.mark.skipif(util.find_spec("seglearn") is None, reason="the extra demo is not installed")
@pytest.mark.slow
def test_a_watch_is_trained_and_streams_what_the_model_predicts(example, monkeypatch):
    names = example("watch")
    load = names["watch"].load_recordings
    # Two short recordings.
    monkeypatch.setattr(
        names["watch"],
        "load_recordings",
        lambda people: [r._replace(samples=r.samples[:500]) for r in load(people)[:2]],
    )
    differ, of = trained_and_streamed(
        monkeypatch, names["main"], ["--epochs", "1", "--batches", "1"], features=8, heads=2
    )
    assert (differ, of) == (0, 2 * 250)


@pytest.mark.sampled(2, rest="slow")
@pytest.mark.parametrize(
    ("name", "small"),
    [
        ("keyword_spotter", dict(features=8, blocks=2, window=20)),
        ("conformer", dict(features=8, heads=2, blocks=1)),
    ],
)
@pytest.mark.filterwarnings("ignore:Even though the `tf.config.experimental_run_functions_eagerly`")
def test_a_model_of_speech_is_trained_and_streams_what_it_predicts(
    example, monkeypatch, words_folder, name, small
):
    arguments = [str(words_folder), "--epochs", "1", "--batches", "1", "--words", "4"]
    main = example(name)["main"]
    # To trace the training takes longer than a batch.
    tf.config.run_functions_eagerly(True)
    try:
        differ, of = trained_and_streamed(monkeypatch, main, arguments, **small)
    finally:
        tf.config.run_functions_eagerly(False)
    assert differ == 0
    assert of > 30


@pytest.fixture
def words_folder(tmp_path):
    """Return a folder of tones in the place of words: recordings are not installed everywhere."""
    names = [f"digits/{i}" for i in range(12)] + [f"letters/{i}" for i in "abc"] + ["phonetic/a_p"]
    for i, name in enumerate(names):
        path = tmp_path / f"{name}.wav"
        path.parent.mkdir(exist_ok=True)
        tone = np.sin(2 * np.pi * (300 + 200 * i) / 8000 * np.arange(1200))
        with wave.open(str(path), "wb") as file:
            file.setparams((1, 2, 8000, 0, "NONE", None))
            file.writeframes((0.5 * 2**15 * tone).astype("<i2").tobytes())
    return tmp_path


def test_the_classes_of_windows_and_rows(example):
    example("keyword_spotter")  # Puts the folder of speech.py on the path.
    import speech

    # Row r has the samples from 80 r to 80 r + 200. The window has 10 rows, of 920 samples.
    spoken = [speech.Spoken(3, 800, 1200)]
    classes = speech.classes_of_windows(spoken, 40, window=10)
    whole = [r for r in range(40) if 80 * (r - 9) <= 800 and 80 * r + 200 >= 1200]
    some = [r for r in range(40) if 80 * (r - 9) < 1200 and 80 * r + 200 > 800]
    assert (classes[whole] == 3).all()
    assert whole == [13, 14, 15, 16, 17, 18, 19]
    unknown = [r for r in range(40) if r < 9 or (r in some and r not in whole)]
    assert (classes[unknown] == speech.UNKNOWN).all()
    assert (classes == speech.OTHER).sum() == 40 - len(whole) - len(unknown)
    assert speech.classes_of_rows(spoken, 6, 320).tolist() == [10, 10, 3, 10, 10, 10]
