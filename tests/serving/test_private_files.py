"""Folders and files that only this user may change or read."""

import os
import stat

import pytest

from continual_transformers_tf.serving import private_files
from continual_transformers_tf.serving.haproxy import Haproxy
from continual_transformers_tf.serving.node_server import NodeServer


def mode(path):
    return stat.S_IMODE(path.lstat().st_mode)


def test_folders_are_made_for_this_user_only(tmp_path):
    base, folder = tmp_path / "a" / "b", tmp_path / "a" / "b" / "c" / "d"
    before = os.umask(0)
    try:
        private_files.make_folder(folder, base)
    finally:
        os.umask(before)
    assert {mode(path) for path in (folder, folder.parent, base, base.parent)} == {0o700}
    private_files.make_folder(folder, base)
    base.parent.chmod(0o755)  # Above the base: not checked again.
    base.chmod(0o755)  # Readable.
    private_files.make_folder(folder, base)


def link(path):
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


def file(path):
    path.rename(path.with_name("elsewhere"))
    path.touch()


@pytest.mark.parametrize("name", ["base", "base/c", "base/c/d"])
@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (link, "is a link"),
        (file, "is no folder"),
        (lambda path: path.chmod(0o770), r"may be written by others \(mode 770\)"),
        (lambda path: path.chmod(0o1777), r"may be written by others \(mode 1777\)"),
    ],
)
def test_a_folder_that_others_may_have_changed_is_refused(tmp_path, name, change, problem):
    base, folder = tmp_path / "base", tmp_path / "base" / "c" / "d"
    private_files.make_folder(folder, base)
    change(tmp_path / name)
    with pytest.raises(OSError, match=f"{name} {problem}, expected a folder"):
        private_files.make_folder(folder, base)


def test_a_folder_of_another_user_is_refused(tmp_path, monkeypatch):
    private_files.make_folder(tmp_path / "a")
    user = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: user + 1)
    with pytest.raises(PermissionError, match=f"belongs to the user with the id {user}, expected"):
        private_files.make_folder(tmp_path / "a")


def test_servers_and_proxies_refuse_such_a_folder(tmp_path, model_file):
    folder = tmp_path / "folder"
    folder.mkdir()
    folder.chmod(0o777)
    with pytest.raises(PermissionError, match="may be written by others"):
        NodeServer(folder, "n1", "127.0.0.1", {"small": model_file})
    if Haproxy.program():
        with pytest.raises(PermissionError, match="may be written by others"):
            Haproxy(folder, "127.0.0.1", 1)
    assert list(folder.iterdir()) == []


def test_a_file_is_replaced_not_written_to(tmp_path):
    target = tmp_path / "target"
    target.write_text("as it was")
    target.chmod(0o644)
    path = tmp_path / "file"
    path.symlink_to(target)
    private_files.write(path, "new")
    assert target.read_text() == "as it was"
    assert (path.read_text(), path.is_symlink(), mode(path)) == ("new", False, 0o600)
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError):
        private_files.write(tmp_path / "folder", "new")
    assert {found.name for found in tmp_path.iterdir()} == {"target", "file", "folder"}


def test_a_secret_that_others_may_know_is_none(tmp_path, monkeypatch):
    path = tmp_path / "secret"
    assert private_files.read_secret(path) is None
    private_files.write(path, "a secret")
    assert private_files.read_secret(path) == "a secret"
    for bits in (0o640, 0o604, 0o620):
        path.chmod(bits)
        assert private_files.read_secret(path) is None
    path.chmod(0o600)
    (tmp_path / "link").symlink_to(path)
    assert private_files.read_secret(tmp_path / "link") is None
    os.mkfifo(tmp_path / "pipe", 0o600)
    assert private_files.read_secret(tmp_path / "pipe") is None
    user = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: user + 1)
    assert private_files.read_secret(path) is None
