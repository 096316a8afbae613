"""The demo, from the data to the command line."""

import json

import numpy as np
import pytest
from click.testing import CliRunner

import continual_transformers_tf as ct
from continual_transformers_tf import cli
from continual_transformers_tf.demo import model, report, stream, train, watch


@pytest.fixture(scope="module")
def figures(tmp_path_factory):
    """Return the JSON of the demo, run from the command line on two recordings of each person."""
    picture = tmp_path_factory.mktemp("demo") / "somewhere" / "stream.png"
    result = CliRunner().invoke(
        cli.main, ["demo", "--json", "--recordings", "2", "--picture", str(picture)]
    )
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_stream_and_windows_agree_prediction_by_prediction(figures):
    assert figures["disagreements"] == 0
    assert figures["stream_accuracy"] == figures["window_accuracy"]
    recordings = [r for s in watch.HELD_OUT for r in watch.load_recordings([s])[:2]]
    windows = sum(len(r.samples) - model.SEQ_LEN + 1 for r in recordings)
    assert figures["predictions"] == windows
    assert figures["subjects"] == list(watch.HELD_OUT)
    assert figures["ratio"] == pytest.approx(
        figures["window_microseconds_per_step"] / figures["stream_microseconds_per_step"]
    )


def test_the_picture_is_a_png(figures):
    with open(figures["picture"], "rb") as file:
        assert file.read(8) == b"\x89PNG\r\n\x1a\n"


def test_the_shipped_weights_beat_the_random_forest_on_people_they_never_saw():
    record = json.loads((model.WEIGHTS.parent / "watch.json").read_text())
    assert record["held_out_subjects"] == list(watch.HELD_OUT)
    assert not set(record["trained_on_subjects"]) & set(watch.HELD_OUT)
    recordings = watch.load_recordings(watch.HELD_OUT)
    accuracy = stream_accuracy(model.trained_model(), recordings)
    assert accuracy == pytest.approx(record["held_out_window_accuracy"], abs=0.003)
    assert accuracy > record["held_out_random_forest_accuracy"]


def stream_accuracy(trained, recordings):
    """Return the share of full windows that the model gets right. Each recording is one call."""
    session = ct.Session(trained)
    right = []
    for recording in recordings:
        stream_id = session.open()
        logits = session.steps(recording.samples[np.newaxis], stream_id)[0]
        session.close(stream_id)
        predictions = logits.argmax(-1)[model.SEQ_LEN - 1 :]
        right.append(predictions == recording.exercise)
    return np.concatenate(right).mean()


@pytest.mark.slow
def test_training_makes_what_the_demo_loads(monkeypatch, tmp_path):
    monkeypatch.setattr(train, "STEPS_PER_EPOCH", 4)
    recordings = watch.load_recordings([1])
    trained = train.train(recordings, epochs=1, seed=0)
    trained.save_weights(tmp_path / "watch.weights.h5")
    loaded = model.build_model()
    loaded.load_weights(tmp_path / "watch.weights.h5")
    people = stream.wearers_of([r._replace(samples=r.samples[:300]) for r in recordings[:1]])
    result = stream.stream(loaded, people)
    summary = report.summarize(people, result, stream.on_windows(loaded, people))
    assert summary["disagreements"] == 0
    assert summary["predictions"] == 300 - model.SEQ_LEN + 1


def test_recordings():
    recordings = watch.load_recordings()
    assert len(recordings) == 140
    assert sum(len(r.samples) for r in recordings) == 244_102
    assert {r.subject for r in recordings} == set(watch.SUBJECTS)
    assert {r.exercise for r in recordings} == set(range(len(watch.EXERCISES)))


def test_info_says_which_kernels_are_loaded(monkeypatch):
    result = CliRunner().invoke(cli.main, ["info"])
    assert "fused kernels: CPU" in result.output
    monkeypatch.setenv("CONTINUAL_TRANSFORMERS_BACKEND", "tensorflow")
    result = CliRunner().invoke(cli.main, ["info"])
    assert "fused kernels: none" in result.output
    assert "the reason:" in result.output


def test_a_missing_extra_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    result = CliRunner().invoke(cli.main, ["demo"])
    assert result.exit_code == 1
    assert "pip install 'continual-transformers-tf[demo]'" in result.output
