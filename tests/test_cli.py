"""The command line: what the commands print, write and refuse. The demo, the load test and the
races have tests of their own.
"""

import json
import os
import re
import shlex
import subprocess
import sys

import keras
import numpy as np
import pytest
from click.testing import CliRunner

import continual_transformers_tf as ct
from continual_transformers_tf import cli, native
from continual_transformers_tf.commands import common
from continual_transformers_tf.models import packing
from continual_transformers_tf.serving.ray_command import serve_on_ray
from terminal import open_terminal

N, E = 5, 6


def invoke(*arguments, status=0):
    result = CliRunner().invoke(cli.main, [str(argument) for argument in arguments])
    assert result.exit_code == status, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result


def run(*arguments, status=0):
    return invoke(*arguments, status=status).output


def run_json(*arguments, status=0):
    """Return what a command prints with --json. All else is on stderr."""
    return json.loads(invoke(*arguments, "--json", status=status).stdout)


def plain_model(length):
    """Return a Keras model that cannot stream by itself."""
    x = keras.Input((length, E), name="sensor")
    h = keras.layers.Dense(8)(x)
    h = h + keras.layers.MultiHeadAttention(2, 4)(h, h)
    return keras.Model(x, keras.layers.Dense(3)(h[:, -1]), name="watch")


@pytest.fixture
def saved(random, tmp_path):
    """Return the path of a saved Keras model whose time axis has no fixed length."""
    plain_model(None).save(tmp_path / "watch.keras")
    return tmp_path / "watch.keras"


def largest_difference(said):
    return float(re.search(r"largest difference (\S+) where outputs go up to", said)[1])


@pytest.mark.parametrize("shape", [(12,), (3, 12)], ids=["one stream", "three"])
def test_pack_and_check(saved, random, tmp_path, shape):
    np.save(tmp_path / "x.npy", random.standard_normal((*shape, E)))
    output = tmp_path / "watch.safetensors"
    said = run("pack", saved, output, "--seq-len", N, "--check", tmp_path / "x.npy")
    assert f"written: {output}, {output.stat().st_size:,} bytes" in said
    model = ct.convert(keras.saving.load_model(saved), N)
    assert f"{ct.cost(model).multiplications:,} multiplications" in said
    session = ct.Session.load(output)
    assert f"a stream: {session.state_bytes:,} bytes; receptive field {N} steps, delay 0" in said
    assert f"checked: {shape[0] if len(shape) == 2 else 1} streams of 12 steps" in said
    assert largest_difference(said) < 1e-5
    x = random.standard_normal((2, N, E)).astype("float32")
    expected = keras.saving.load_model(saved)(x)
    np.testing.assert_allclose(session.steps(x)[:, -1], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["watch.keras", "recording.npy", "no_suffix"])
def test_pack_overwrites_no_other_kind_of_file(saved, name):
    output = saved.with_name(name)
    before = output.read_bytes() if output.exists() else None
    said = run("pack", saved, output, "--seq-len", N, status=2)
    assert "expected .safetensors" in said
    assert (output.read_bytes() if output.exists() else None) == before


def test_a_recurrent_model_depends_on_all_steps(tmp_path):
    x = keras.Input((None, E))
    model = keras.Model(x, keras.layers.GRU(4, return_sequences=True)(x))
    model.save(tmp_path / "gru.keras")
    said = run("pack", tmp_path / "gru.keras", tmp_path / "gru.safetensors")
    assert "receptive field all earlier steps, delay 0" in said
    said = run("info", tmp_path / "gru.safetensors")
    assert "receptive field  all earlier steps" in said
    assert run_json("info", tmp_path / "gru.safetensors")["goes_on"] is True


def test_the_check_finds_a_difference(saved, random, tmp_path):
    """bfloat16 weights change the outputs by more than float32's bound, but not much."""
    np.save(tmp_path / "x.npy", random.standard_normal((12, E)).astype("float32"))
    output = tmp_path / "watch.safetensors"
    options = ("--seq-len", N, "--weights-dtype", "bfloat16", "--cache-dtype", "float16")
    said = run("pack", saved, output, *options, "--check", tmp_path / "x.npy")
    difference = largest_difference(said)
    assert 1e-4 < difference < 0.1
    check = ("--check", tmp_path / "x.npy", "--tolerance")
    run("pack", saved, output, *options, *check, 2 * difference)
    said = run("pack", saved, output, *options, *check, difference / 2, status=1)
    assert "largest difference is" in said
    assert "--tolerance needs --check" in run("pack", saved, output, "--tolerance", 1, status=2)
    session = ct.Session.load(output)
    assert (session.weights_dtype, session.cache_dtype) == ("bfloat16", "float16")


def test_several_inputs_are_checked_by_name(random, tmp_path):
    inputs = {name: keras.Input((N, size), name=name) for name, size in (("a", 3), ("b", 4))}
    h = keras.layers.Concatenate()([inputs["b"], inputs["a"]])
    h = keras.layers.PReLU(shared_axes=[1])(h)  # ct.cost does not know this layer.
    h = ct.CoSiMultiHeadAttention(N, 2, 4)(h, h)
    keras.Model(inputs, {"y": h[:, -1], "z": h[:, -1, :2]}).save(tmp_path / "two.keras")
    arrays = {name: random.standard_normal((2, 9, x.shape[-1])) for name, x in inputs.items()}
    np.savez(tmp_path / "x.npz", **arrays)
    files = tmp_path / "two.keras", tmp_path / "two.safetensors"
    said = run("pack", *files, "--check", tmp_path / "x.npz")
    assert "its operations are not counted. Expected a layer whose cost is known" in said
    assert "checked: 2 streams of 9 steps" in said
    assert largest_difference(said) < 1e-5
    np.savez(tmp_path / "x.npz", a=arrays["a"])
    said = run("pack", *files, "--check", tmp_path / "x.npz", status=1)
    assert "an array for each of the model's inputs, ['a', 'b'], but got ['a']" in said
    np.savez(tmp_path / "x.npz", a=arrays["a"][:1], b=arrays["b"])
    said = run("pack", *files, "--check", tmp_path / "x.npz", status=1)
    assert "Expected the same streams and steps in every input" in said


@pytest.mark.parametrize(
    ("array", "why"),
    [
        (np.zeros((12, E + 1)), r"of shape \(T, 6\) or \(streams, T, 6\), but got \(12, 7\)"),
        (np.zeros(12), r"but got \(12,\)"),
        (np.zeros((12, E), complex), "to be float32 and not empty, but got complex128"),
        (np.zeros((0, E)), r"not empty, but got float64 of shape \(0, 6\)"),
    ],
)
def test_recordings_that_do_not_fit_are_refused(saved, tmp_path, array, why):
    np.save(tmp_path / "x.npy", array)
    files = saved, tmp_path / "watch.safetensors"
    said = run("pack", *files, "--seq-len", N, "--check", tmp_path / "x.npy", status=1)
    assert re.search(why, said)
    assert not files[1].exists()


def test_what_cannot_be_packed_is_said_and_nothing_is_written(saved, tmp_path):
    output = tmp_path / "watch.safetensors"
    packed = tmp_path / "packed.safetensors"
    packed.touch()
    assert "is already a model file" in run("pack", packed, output, status=1)
    assert "Expected seq_len" in run("pack", saved, output, status=1)
    x = keras.Input((N, E))
    both_ways = keras.layers.Bidirectional(keras.layers.GRU(4), name="both_ways")
    keras.Model(x, both_ways(x)).save(tmp_path / "model.keras")
    assert "both_ways" in run("pack", tmp_path / "model.keras", output, status=1)
    (tmp_path / "model.keras").write_text("no model")
    assert "Error: " in run("pack", tmp_path / "model.keras", output, status=1)
    run("pack", tmp_path / "none.keras", output, status=2)
    assert not output.exists()


def test_info_of_a_model_file(saved, tmp_path):
    output = tmp_path / "watch.safetensors"
    run("pack", saved, output, "--seq-len", N)
    said = run("info", output)
    assert "watch" in said
    assert "attention" in said
    saved.write_text(json.dumps({}))
    assert "Error: " in run("info", saved, status=1)


def test_info_of_the_installation(monkeypatch, tmp_path):
    monkeypatch.setenv("CONTINUAL_TRANSFORMERS_CUDA_LIBRARY", str(tmp_path / "none.so"))
    said = run("info")
    assert f"core library {native.CORE_LIBRARY_PATH}\n" in said
    assert "ct.Session: steps run on the CPU\n" in said
    library = tmp_path / "some.so"
    library.touch()
    monkeypatch.setenv("CONTINUAL_TRANSFORMERS_CUDA_LIBRARY", str(library))
    assert f"ct.Session: steps run on the CPU, and on GPUs by {library}\n" in run("info")
    assert run("info", "--cmake-dir").strip() == str(native.PACKAGE / "cmake")
    assert run("info", "--pkg-config-dir").strip() == str(native.PACKAGE / "pkgconfig")


# explain


def test_explain_a_model_that_streams(saved):
    said = run("explain", saved, "--seq-len", N)
    assert said.startswith("watch streams.\n")
    assert f"attention over a window of {N} steps, single output" in said
    model = keras.saving.load_model(saved)
    assert said == f"{ct.explain(model, N)}\n"
    # Keras' own JSON of tuples is that of lists.
    found = run_json("explain", saved, "--seq-len", N)
    assert found == json.loads(json.dumps(ct.explain(model, N).as_dict()))
    assert found["receptive_field"] == N
    assert "Expected seq_len" in run("explain", saved, status=1)


def test_explain_a_model_that_does_not(tmp_path):
    x = keras.Input((N, E))
    y = keras.layers.LayerNormalization(axis=1, name="norm")(keras.layers.Dense(3)(x))
    keras.Model(x, y, name="normal").save(tmp_path / "model.keras")
    said = run("explain", tmp_path / "model.keras", status=1)
    assert said.startswith("normal does not stream.\n")
    assert re.search(r"norm +LayerNormalization +does not stream\n +may look at several", said)
    found = run_json("explain", tmp_path / "model.keras", status=1)
    assert [row["streams"] for row in found["rows"]] == [True, False]


# check


def test_check_counts_steps_of_the_input(random, tmp_path):
    x = keras.Input((None, E))
    keras.Model(x, keras.layers.Conv1D(3, 3, 2, "causal")(x)).save(tmp_path / "model.keras")
    np.save(tmp_path / "x.npy", random.standard_normal((3, 13, E)))
    said = run("check", tmp_path / "model.keras", tmp_path / "x.npy")
    assert "3 streams of 12 steps" in said


def test_check(saved, random, tmp_path):
    np.save(tmp_path / "x.npy", random.standard_normal((3, 12, E)))
    arguments = "check", saved, tmp_path / "x.npy", "--seq-len", N
    said = run(*arguments)
    assert "checked: 3 streams of 12 steps" in said
    assert largest_difference(said) < 1e-5
    found = run_json(*arguments)
    assert (found["streams"], found["steps"]) == (3, 12)
    assert f"as on windows: yes, on windows of {N} steps" in said
    assert found["equals_windows"]
    assert found["difference"] < 1e-5 < found["largest"]
    narrow = (*arguments, "--weights-dtype", "bfloat16")
    difference = run_json(*narrow)["difference"]
    assert 1e-4 < difference < 0.1
    run(*narrow, "--tolerance", 2 * difference)
    result = invoke(*narrow, "--tolerance", difference / 2, "--json", status=1)
    assert json.loads(result.stdout)["difference"] == difference
    assert re.fullmatch("Error: the largest difference is .*\n", result.stderr)


def test_check_with_a_model_file(saved, random, tmp_path):
    np.save(tmp_path / "x.npy", random.standard_normal((12, E)))
    packed = tmp_path / "watch.safetensors"
    run("pack", saved, packed, "--seq-len", N)
    arguments = "check", saved, tmp_path / "x.npy", "--seq-len", N, "--model-file"
    assert run_json(*arguments, packed)["difference"] < 1e-5
    keras.utils.set_random_seed(7)
    ct.Session(plain_model(N)).save(packed)  # Other weights.
    assert run_json(*arguments, packed)["difference"] > 0.01
    x = keras.Input((N, E), name="sensor")
    y = ct.CoSiMultiHeadAttention(N, 2, 4)(x, x)
    ct.Session(keras.Model(x, y, name="other")).save(packed)
    said = run(*arguments, packed, status=1)
    assert re.search(r"Expected a model file of watch, whose steps return \(3,\), but", said)
    packed.write_text("no model file")
    said = run(*arguments, packed, status=1)
    assert re.fullmatch("Error: .*expected a safetensors file.*\n", said)


def positioned(x):
    x = ct.CircularPositionalEncoding(2 * N - 1, E)(x)
    return ct.TransformerEncoder(2, N, E, 2, 8, kind="retroactive")(x)[:, -1]


def as_trained(x):
    return keras.layers.MultiHeadAttention(2, 4)(x, x)


def looks_further_back(x):
    return ct.TransformerEncoder(2, N, E, 2, 8, kind="single_output")(x)[:, -1]


@pytest.mark.sampled(2, rest="slow")
@pytest.mark.parametrize(
    ("function", "streams", "windows", "equal"),
    [
        (as_trained, 3, 3 * (30 - N + 1), True),
        (as_trained, 70, 70 * (30 - N + 1), True),
        (positioned, 3, 3, True),
        (looks_further_back, 3, 3 * (30 - N + 1), False),
    ],
)
def test_check_on_windows(random, tmp_path, function, streams, windows, equal):
    x = keras.Input((N, E))
    keras.Model(x, function(x)).save(tmp_path / "model.keras")
    np.save(tmp_path / "x.npy", random.standard_normal((streams, 30, E)))
    arguments = "check", tmp_path / "model.keras", tmp_path / "x.npy", "--windows"
    found = run_json(*arguments)["on_windows"]
    assert (found["windows"], found["steps"]) == (windows, N)
    assert (found["difference"] < 1e-5) == equal
    said = run(*arguments, "--tolerance", 1e-5, status=0 if equal else 1)
    assert f"on windows: {windows:,} windows of {N} steps" in said
    np.save(tmp_path / "x.npy", random.standard_normal((streams, N - 1, E)))
    said = run(*arguments, status=1)
    assert f"Expected recordings of at least {N} steps" in said


@pytest.mark.parametrize("at_once", [1, 2, 5, 256])
def test_recordings_are_compared_in_parts(random, tmp_path, monkeypatch, at_once):
    """The parts are shorter than the delay, than the window, or hold everything."""
    monkeypatch.setattr(packing, "STEPS_AT_ONCE", at_once)
    x = keras.Input((N, E))
    y = ct.CoResidual(ct.CoSiMultiHeadAttention(N, 2, 4, query_index=-4))(x)
    model = keras.Model(x, keras.layers.Dense(2)(y))
    session = ct.Session(model)
    recordings = [random.standard_normal((2, 17, E)).astype("float32")]
    taken = []
    found = packing.compare(model, session, recordings, on_step=taken.append)
    assert taken == list(range(1, 18))
    assert found.difference < 1e-5 < found.largest
    assert session.open_streams == 0
    model.layers[-1].bias.assign([0, 1])
    assert packing.compare(model, session, recordings).difference == pytest.approx(1, abs=1e-4)


def test_a_streaming_model_is_checked(random, tmp_path):
    ct.convert(plain_model(N), N).save(tmp_path / "streaming.keras")
    np.save(tmp_path / "x.npy", random.standard_normal((12, E)))
    assert run_json("check", tmp_path / "streaming.keras", tmp_path / "x.npy")["difference"] < 1e-5
    assert run_json("explain", tmp_path / "streaming.keras")["equals_windows"]


# JSON


def test_pack_and_info_as_json(saved, random, tmp_path):
    np.save(tmp_path / "x.npy", random.standard_normal((12, E)))
    output = tmp_path / "watch.safetensors"
    found = run_json("pack", saved, output, "--seq-len", N)
    session = ct.Session.load(output)
    assert found["written"] == str(output)
    assert found["bytes"] == output.stat().st_size
    assert found["state_bytes"] == session.state_bytes
    cost = ct.cost(ct.convert(keras.saving.load_model(saved), N))
    assert found["operations"]["multiplications"] == cost.multiplications
    assert found["check"] is None
    found = run_json("pack", saved, output, "--seq-len", N, "--check", tmp_path / "x.npy")
    assert found["check"]["steps"] == 12
    assert found["equals_windows"]
    info = run_json("info", output)
    assert (info["name"], info["receptive_field"]) == ("watch", N)
    assert info["inputs"] == [{"name": "sensor", "shape": [E], "dtype": "float32"}]
    assert info["state_bytes"] == session.state_bytes
    assert info["parameters"] == sum(w.size for w in keras.saving.load_model(saved).get_weights())


def test_info_of_the_installation_as_json():
    found = run_json("info")
    assert found["version"] == ct.__version__
    assert found["tensorflow"].startswith("2.")
    assert found["kernels"] == sorted(ct.ops.kernels())
    assert found["cmake_dir"] == str(native.PACKAGE / "cmake")
    assert "--cmake-dir prints only a folder" in run("info", "--cmake-dir", "--json", status=2)


def test_numbers_that_json_does_not_have_are_null(capsys):
    common.print_json({"a": [float("nan"), 1.5], "b": {"c": (float("inf"),)}})
    assert json.loads(capsys.readouterr().out) == {"a": [None, 1.5], "b": {"c": [None]}}


# Errors, help and what is missing.


@pytest.mark.parametrize("command", ["explain", "pack", "check"])
def test_what_is_no_keras_model_is_a_sentence(saved, tmp_path, command):
    more = {"explain": (), "pack": (tmp_path / "y.safetensors",), "check": (tmp_path / "x.npy",)}
    np.save(tmp_path / "x.npy", np.zeros((2, E)))

    @keras.saving.register_keras_serializable("user")
    class Mine(keras.layers.Layer):
        def call(self, x):
            return x

    x = keras.Input((N, E))
    keras.Model(x, Mine()(x)).save(tmp_path / "own.keras")
    keras.saving.get_custom_objects().pop("user>Mine")
    keras.Model(x, keras.layers.Lambda(lambda y: 2 * y)(x)).save(tmp_path / "lambda.keras")
    (tmp_path / "text.keras").write_text("no model")
    for name, what in (
        ("lambda.keras", "holds a keras.layers.Lambda, .* safe_mode=False"),
        ("own.keras", "needs Mine, which is not of Keras"),
        ("text.keras", "Expected a Keras model"),
    ):
        said = run(command, tmp_path / name, *more[command], status=1)
        assert re.fullmatch(f"Error: [^\n]*{what}[^\n]*\n", said)


@pytest.mark.parametrize("content", [b"", b"text", b"PK\x03\x04 no archive"])
def test_what_is_no_recording_is_a_sentence(saved, tmp_path, content):
    (tmp_path / "x.npz").write_bytes(content)
    said = run("check", saved, tmp_path / "x.npz", "--seq-len", N, status=1)
    assert re.fullmatch(r"Error: Expected an \.npy or \.npz file of numbers[^\n]*x\.npz\n", said)


MISSING = {
    ("explain", "x"): {"cpu": ["tensorflow"]},
    ("pack", "x", "y.safetensors"): {"cpu": ["keras"]},
    ("check", "x", "x"): {"cpu": ["tensorflow", "keras"]},
    ("demo",): {"demo": ["seglearn"], "cpu": ["keras"]},
    ("demo", "--save-model", "y"): {"cpu": ["tensorflow"]},
    ("load",): {"demo": ["rich"], "client": ["google.protobuf"]},
    ("bench",): {"bench": ["matplotlib"], "cpu": ["tensorflow"]},
    ("serve", "--ray", "auto", "x"): {"ray": ["ray"]},
}


@pytest.mark.parametrize("command", MISSING, ids=" ".join)
def test_each_missing_extra_is_named(command, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x").touch()
    for packages in MISSING[command].values():
        for package in packages:
            monkeypatch.setitem(sys.modules, package, None)
    said = run(*command, status=1)
    extras = list(MISSING[command])
    for extra in extras:
        assert all(package in said for package in MISSING[command][extra])
    assert f"pip install 'continual-transformers-tf[{','.join(extras)}]'\n" in said
    assert said.count("\n") == 1
    assert not (tmp_path / "y").exists()


def test_without_the_server_it_says_how_to_get_it(monkeypatch, tmp_path):
    from continual_transformers_tf.serving import program

    monkeypatch.setattr(program, "PATH", tmp_path / "none")
    said = run("serve", "model.safetensors", status=1)
    assert "tools/server_packages.py" in said
    assert "pip install" in said
    assert said.count("\n") == 1
    assert run_json("info")["server"] is None


# The help of `serve` is that of the server's program: tests/serving/test_serving_page.py checks it.
# With --ray it is the package's own.
HELPS = {(c.name,): c for c in cli.COMMANDS if c.name != "serve"}
HELPS["serve", "--ray", "auto"] = serve_on_ray


@pytest.mark.parametrize("words", HELPS, ids=" ".join)
def test_the_help_has_an_example_with_options_that_exist(words):
    command = HELPS[words]
    said = run(*words, "--help")
    (example,) = re.findall(r"Example:\n +continual-transformers (.*)\n", said)
    name, *arguments = shlex.split(example)
    assert name == words[0]
    options = {argument for argument in arguments if argument.startswith("--")}
    assert options <= {o for parameter in command.params for o in parameter.opts}
    assert f"  {name}" in run("--help")
    # Every line fits a terminal, and each option says what it is for.
    assert max(map(len, said.splitlines())) <= 88
    assert all(p.help for p in command.params if p.param_type_name == "option")


# Progress, and TensorFlow's log.


def bar_on(stderr, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", stderr)
        with common.progress("Comparing", 3) as on_step:
            for i in range(3):
                on_step(i + 1)
        stderr.flush()


def test_the_bar_is_for_terminals_only(monkeypatch, tmp_path):
    with open_terminal() as terminal:
        bar_on(terminal.screen, monkeypatch)
        print("end", file=terminal.screen, flush=True)
        assert "Comparing" in terminal.said("end\r\n")
        with monkeypatch.context() as patch:  # Without rich there is no bar.
            patch.setitem(sys.modules, "rich", None)
            bar_on(terminal.screen, monkeypatch)
            print("end", file=terminal.screen, flush=True)
        assert terminal.said("end\r\n") == "end\r\n"
    with open(tmp_path / "stderr", "w+") as file:
        bar_on(file, monkeypatch)
        file.seek(0)
        assert file.read() == ""


def test_only_information_is_left_out_of_the_log(capfd):
    information = b"I0000 00:00:1795916802.473237   12430 port.cc:153] oneDNN custom operations\n"
    before = b"WARNING: All log messages before absl::InitializeLog() is called are written\n"

    def fail():
        with common._without_information():
            os.write(2, before + information + b"W0000 00:00:1.2  3 a.cc:1] a warning\n")
            raise ImportError("the import fails")

    with pytest.raises(ImportError):
        fail()
    os.write(2, b"later\n")
    assert capfd.readouterr().err == "W0000 00:00:1.2  3 a.cc:1] a warning\nlater\n"


@pytest.mark.parametrize(
    "command",
    [
        "info",
        pytest.param("explain model.keras", marks=pytest.mark.slow),
        pytest.param("demo --save-model demo.safetensors", marks=pytest.mark.slow),
    ],
)
def test_nothing_of_tensorflow_is_on_stderr(command, tmp_path):
    plain_model(N).save(tmp_path / "model.keras")
    environment = {k: v for k, v in os.environ.items() if k != "TF_CPP_MIN_LOG_LEVEL"}
    program = [sys.executable, "-m", "continual_transformers_tf.cli", *command.split()]

    def stderr(**more):
        done = subprocess.run(
            program, capture_output=True, text=True, cwd=tmp_path, env={**environment, **more}
        )
        assert done.returncode == 0, done.stderr
        return done.stderr

    assert stderr() == ""
    if command.startswith("explain"):  # A user who wants the log gets it.
        assert "TensorFlow" in stderr(TF_CPP_MIN_LOG_LEVEL="0")
