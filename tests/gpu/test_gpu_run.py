"""The parts of `make gpu` that need no GPU: its steps' limits, its exit status, its messages."""

import json
import os
import subprocess
import sys
import time

import pytest

import bundle
import cuda_build
import gpu_run


def python(program, limit=20.0, name="step", **options):
    return gpu_run.Step(name, [sys.executable, "-c", program], limit, **options)


def test_without_a_gpu_one_sentence_and_a_status(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(cuda_build, "find_capability", lambda: None)
    assert gpu_run.main(["--out", str(tmp_path / "out")]) == 1
    assert capsys.readouterr().out.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_as_a_person_would_run_it():
    """The program needs neither this package nor a virtual environment."""
    if cuda_build.find_capability() is not None:
        pytest.skip("there is a GPU here")
    command = ["make", "--no-print-directory", "gpu", f"PYTHON={sys.executable}"]
    done = subprocess.run(command, cwd=cuda_build.ROOT, capture_output=True, text=True)
    assert done.returncode != 0
    assert "Found no GPU" in done.stdout
    assert "pip install" not in done.stdout


def test_a_step_that_ends_well(tmp_path):
    found = gpu_run.run_steps([python("print('all is well')")], tmp_path)
    assert found["step"]["went"] == "ok"
    assert found["step"]["last_line"] == "all is well"
    assert not gpu_run.is_wrong(found)


def test_a_step_that_fails(tmp_path):
    steps = [
        python("print('why'); raise SystemExit(3)", name="build"),
        python("print('never')", name="suite", needs=("build",)),
        python("print('anyway')", name="other"),
    ]
    found = gpu_run.run_steps(steps, tmp_path)
    assert (found["build"]["went"], found["build"]["status"]) == ("failed", 3)
    assert found["suite"]["went"] == gpu_run.NOT_RUN
    assert "build" in found["suite"]["last_line"]
    assert found["other"]["went"] == "ok"
    assert gpu_run.is_wrong(found)


def test_a_step_at_its_limit_is_ended_with_its_children(tmp_path):
    program = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    begin = time.monotonic()
    found = gpu_run.run_steps([python(program, limit=2.0), python("", name="after")], tmp_path)
    assert time.monotonic() - begin < 30
    assert found["step"]["went"] == "timed out"
    assert found["after"]["went"] == "ok"
    assert gpu_run.is_wrong(found)
    child = int((tmp_path / "step.txt").read_text())
    for _ in range(100):  # The child's new parent reaps it after a while.
        try:
            os.kill(child, 0)
            with open(f"/proc/{child}/stat") as stat:
                if stat.read().rsplit(")", 1)[1].split()[0] == "Z":
                    return
        except (ProcessLookupError, FileNotFoundError):
            return
        time.sleep(0.1)
    pytest.fail("the child process is still running")


def test_all_together_have_a_limit(tmp_path):
    steps = [python("import time; time.sleep(60)", name=name) for name in ("one", "two")]
    begin = time.monotonic()
    found = gpu_run.run_steps(steps, tmp_path, seconds=2)
    assert time.monotonic() - begin < 20
    assert {step["went"] for step in found.values()} == {"timed out"}
    assert gpu_run.is_wrong(found)


def test_what_is_not_there_is_no_fault_and_is_said(tmp_path):
    found = gpu_run.run_steps(
        [python("", name="tensorflow", reason="it is not installed")], tmp_path
    )
    assert not gpu_run.is_wrong(found)
    assert "it is not installed" in gpu_run.summary(found)


def test_the_steps_and_their_limits(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_run, "why_no_tensorflow", lambda: "it is not wanted here")
    monkeypatch.setattr(bundle, "why_unusable", lambda: None)
    steps = {step.name: step for step in gpu_run.steps(tmp_path, "90")}
    assert list(steps) == [
        "session-build", "build", "suite", "sessions", "session-benchmark", "persistent",
        "persistent-benchmark", "memcheck", "racecheck", "session-memcheck",
        "persistent-racecheck", "benchmark", "tensorflow",
    ]  # fmt: skip
    assert gpu_run.ALL_SECONDS < 8 * 60
    for step in steps.values():
        assert step.limit < gpu_run.ALL_SECONDS / 2
        assert set(step.needs) < set(steps)
        for word in step.command:
            if str(word).startswith(("tests/", "tools/", "benchmarks/")):
                assert (cuda_build.ROOT / word).exists()
    built = steps["session-build"].environment
    assert built["CONTINUAL_TRANSFORMERS_CUDA_ARCHITECTURES"] == "90"
    assert built["PYTHONPATH"].startswith(str(bundle.FOLDER))
    in_package = [name for name in steps if name.startswith(("session", "persistent"))]
    for name in in_package[1:]:  # The first one builds it.
        assert steps[name].environment["PYTHONPATH"].startswith(str(bundle.PACKAGE))


def test_without_the_bundle_sessions_are_no_fault_and_it_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_run, "why_no_tensorflow", lambda: "it is not wanted here")
    monkeypatch.setattr(bundle, "why_unusable", lambda: "no bundle in build/gpu-bundle")
    chosen = [
        step
        for step in gpu_run.steps(tmp_path, "90")
        if "session" in step.name or "persistent" in step.name
    ]
    assert len(chosen) == 7
    found = gpu_run.run_steps(chosen, tmp_path)
    assert {step["went"] for step in found.values()} == {gpu_run.NOT_RUN}
    assert not gpu_run.is_wrong(found)
    assert "no bundle in build/gpu-bundle" in gpu_run.summary(found)


def test_a_step_beside_others_runs_until_one_needs_it(tmp_path):
    flag = tmp_path / "flag"
    waits = f"import os, time\nwhile not os.path.exists({str(flag)!r}): time.sleep(0.01)"
    steps = [
        python(waits, name="slow", is_beside=True),
        python(f"open({str(flag)!r}, 'w')", name="meanwhile"),
        python("print('after')", name="after", needs=("slow",)),
        python("raise SystemExit(1)", name="bad", is_beside=True),
        python("", name="never", needs=("bad",)),
        python("import time; time.sleep(60)", limit=0.5, name="last", is_beside=True),
    ]
    found = gpu_run.run_steps(steps, tmp_path)
    assert list(found) == [step.name for step in steps]
    went = [found[name]["went"] for name in found]
    assert went == ["ok", "ok", "ok", "failed", gpu_run.NOT_RUN, "timed out"]


def test_benchmarks_are_told_to_end_before_their_limit(tmp_path):
    program = "import sys; print(sys.argv[1:])"
    names = ("benchmark", "session-benchmark", "sessions")
    found = gpu_run.run_steps([python(program, limit=20, name=name) for name in names], tmp_path)
    said = [found[name]["last_line"] for name in names]
    assert said == ["['--seconds', '16']", "['--seconds', '16']", "[]"]


@pytest.mark.parametrize("good", [True, False])
def test_what_it_leaves_and_says(monkeypatch, tmp_path, capsys, good):
    monkeypatch.setattr(cuda_build, "find_capability", lambda: "90")
    status = 0 if good else 1
    build = python(f"print('built'); raise SystemExit({status})", name="build")
    monkeypatch.setattr(gpu_run, "steps", lambda out, capability: [build, python("", name="suite")])
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    assert gpu_run.main(["--only", "build"]) == status
    printed = capsys.readouterr().out
    found = json.loads((tmp_path / "out" / "gpu.json").read_text())
    assert list(found["steps"]) == ["build"]
    assert found["wrong"] is not good
    assert ("SOMETHING WAS WRONG" in printed) is not good
    assert (tmp_path / "out" / "build.txt").read_text() == "built\n"


def test_an_unknown_step_is_refused(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(cuda_build, "find_capability", lambda: "90")
    monkeypatch.setattr(gpu_run, "why_no_tensorflow", lambda: "it is not wanted here")
    with pytest.raises(SystemExit) as stopped:
        gpu_run.main(["--out", str(tmp_path), "--only", "bild"])
    assert stopped.value.code == 2
    assert "racecheck" in capsys.readouterr().err
