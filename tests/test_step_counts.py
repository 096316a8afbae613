"""Tests of the guard that counts what a step costs. `make guard` runs the guard itself."""

import json

import pytest

import step_counts
from continual_transformers_tf import native

BEFORE = {"a model": {"instructions": 1000.0, "reads": 400.0, "writes": 0.0, "allocations": 0.0}}


def with_counts(**counts):
    return {"a model": {**BEFORE["a model"], **counts}}


def test_counts_may_fall_and_rise_by_the_tolerance():
    assert step_counts.compare(BEFORE, BEFORE) == []
    assert step_counts.compare(with_counts(instructions=900, reads=407), BEFORE) == []


def test_what_rose_is_named():
    assert step_counts.compare(with_counts(instructions=1030, allocations=1), BEFORE) == [
        "a model: 1,030 instructions a step, recorded are 1,000 (+3.0%)",
        "a model: 1 allocations a step, recorded are 0",
    ]
    assert step_counts.compare({"other": BEFORE["a model"]}, BEFORE) == [
        "other: it is not in the record"
    ]


def test_the_totals_of_callgrind_are_read():
    report = "version: 1\nevents: Ir Dr Dw I1mr\n\nfn=(1) main\n5 7 2 1\n\ntotals: 70 20 10 3\n"
    assert step_counts.totals(report) == {"instructions": 70, "reads": 20, "writes": 10}


def test_the_record_has_all_models():
    record = json.loads(step_counts.RECORD.read_text())
    assert list(record["counts"]) == list(step_counts.MODELS)
    assert record["target"] == step_counts.TARGET
    for counts in record["counts"].values():
        assert counts["instructions"] > counts["writes"] > counts["allocations"] == 0


def test_a_library_of_another_compiler_is_not_compared(monkeypatch, tmp_path):
    library = tmp_path / "library.so"
    library.write_bytes(b"\0GCC: (Debian 12.2.0-14+deb12u1) 12.2.0\0GCC: (GNU) 4.8.5 20150623\0")
    assert step_counts.compiler_of(library) == "Debian 12.2.0, GNU 4.8.5"
    monkeypatch.setattr(step_counts.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(step_counts.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(native, "cpu_targets", lambda: (["AVX2", "SSE2"], "AVX2"))
    monkeypatch.setattr(native, "CORE_LIBRARY_PATH", library)
    assert step_counts.reason_to_skip(None) is None
    assert step_counts.reason_to_skip("Debian 12.2.0, GNU 4.8.5") is None
    assert "the record is of Debian 12.2.0" in step_counts.reason_to_skip("Debian 12.2.0")


@pytest.mark.parametrize("what", ["valgrind", "processor"])
def test_a_machine_that_cannot_count_says_so(monkeypatch, capsys, what):
    if what == "valgrind":
        monkeypatch.setattr(step_counts.shutil, "which", lambda name: None)
    else:
        monkeypatch.setattr(step_counts.shutil, "which", lambda name: f"/usr/bin/{name}")
        monkeypatch.setattr(step_counts.platform, "machine", lambda: "aarch64")
    assert step_counts.main("check") == 0
    assert what in capsys.readouterr().out
    assert step_counts.main("record") == 1
    assert "The counts of a step are not recorded: " in capsys.readouterr().out
