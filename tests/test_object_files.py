"""tools/object_files.py compiles a file again only if something has changed."""

import os
import shutil
import time

import pytest

from object_files import compile_object

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++ on PATH")


@pytest.fixture
def program(tmp_path):
    """Return (the command that compiles a source file with a header, the folder)."""
    (tmp_path / "a.cc").write_text('#include "a.h"\nint f() { return N; }\n')
    (tmp_path / "a.h").write_text("#define N 1\n")
    long_ago = time.time() - 100
    for path in tmp_path.iterdir():
        os.utime(path, (long_ago, long_ago))
    return ["g++", "-c", str(tmp_path / "a.cc")], tmp_path


def compiled(command, folder, heading=""):
    """Return whether the compiler was called."""
    target = folder / "objects" / "a.o"
    before = target.stat().st_ino if target.exists() else None
    compile_object(command, target, heading)
    return target.stat().st_ino != before


def test_what_has_not_changed_is_not_compiled_again(program):
    assert compiled(*program)
    assert not compiled(*program)
    assert not [name for name in os.listdir(program[1] / "objects") if name.startswith("tmp")]


@pytest.mark.parametrize("changed", ["a.cc", "a.h"])
def test_a_file_that_has_changed(program, changed):
    command, folder = program
    assert compiled(command, folder)
    os.utime(folder / changed)
    assert compiled(command, folder)
    assert not compiled(command, folder)


def test_a_header_that_a_system_header_includes(program):
    command, folder = program
    (folder / "system").mkdir()
    (folder / "system" / "s.h").write_text('#include "a.h"\n')
    (folder / "a.cc").write_text("#include <s.h>\nint f() { return N; }\n")
    command = [*command, "-isystem", str(folder / "system"), f"-I{folder}"]
    assert compiled(command, folder)
    (folder / "a.h").write_text("#define N 2\n")
    assert compiled(command, folder)
    assert not compiled(command, folder)


def test_another_command_or_another_heading(program):
    command, folder = program
    assert compiled(command, folder, "g++ 12\n")
    assert compiled([*command, "-DM=1"], folder, "g++ 12\n")
    assert compiled([*command, "-DM=1"], folder, "g++ 13\n")
    assert not compiled([*command, "-DM=1"], folder, "g++ 13\n")


def test_a_header_that_is_gone(program):
    command, folder = program
    assert compiled(command, folder)
    (folder / "a.cc").write_text("int f() { return 1; }\n")
    (folder / "a.h").unlink()
    assert compiled(command, folder)
    assert not compiled(command, folder)


def test_a_header_that_is_edited_while_it_is_compiled(program):
    command, folder = program
    compiler = folder / "compiler"
    compiler.write_text(f'#!/bin/sh\ng++ "$@" || exit 1\nsleep 0.1\ntouch {folder}/a.h\n')
    compiler.chmod(0o755)
    command = [str(compiler), *command[1:]]
    assert compiled(command, folder)
    assert compiled(command, folder)


def test_what_the_compiler_says(program):
    command, folder = program
    (folder / "a.cc").write_text("#warning careful\n")
    target = folder / "objects" / "a.o"
    assert "careful" in compile_object(command, target)
    assert compile_object(command, target) == ""
    assert "careful" in target.with_suffix(".log").read_text()


def test_an_error_is_the_compiler_s_and_leaves_the_object_before_it(program):
    command, folder = program
    assert compiled(command, folder)
    (folder / "a.cc").write_text("int f() { return nothing; }\n")
    with pytest.raises(SystemExit, match=r"g\+\+ -c .*a\.cc\n(.|\n)*nothing"):
        compiled(command, folder)
    assert (folder / "objects" / "a.o").exists()
    # The object is not of the new file, so the next build tries again.
    with pytest.raises(SystemExit):
        compiled(command, folder)
