"""Files and folders are written whole, or not at all."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tdlib.core import files
from tdlib.core.files import whole_path, write_folder, write_json


@pytest.fixture
def old(tmp_path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "precious").write_text("old")
    return folder


def new(folder: Path) -> None:
    (folder / "fresh").write_text("new")


def half(error: BaseException):
    def fill(folder: Path) -> None:
        new(folder)
        raise error

    return fill


def listing(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_is_replaced_as_a_whole(old):
    assert write_folder(old, new) == old
    assert listing(old) == ["fresh"] and listing(old.parent) == ["data"]
    assert old.stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("error", [RuntimeError("disk full"), KeyboardInterrupt(), SystemExit(1)])
def test_after_an_error_the_old_folder_is_as_it_was(old, error):
    with pytest.raises(type(error)):
        write_folder(old, half(error))
    assert (old / "precious").read_text() == "old" and listing(old) == ["precious"]
    assert listing(old.parent) == ["data"]


def test_after_an_error_there_is_no_new_folder(tmp_path):
    with pytest.raises(RuntimeError):
        write_folder(tmp_path / "deep" / "data", half(RuntimeError()))
    assert listing(tmp_path / "deep") == []


def test_a_failed_last_step_brings_the_old_folder_back(old, monkeypatch):
    replace, calls = files.os.replace, []

    def failing(source, target):
        calls.append(target)
        if len(calls) == 2:
            raise OSError("no space left on device")
        replace(source, target)

    monkeypatch.setattr(files.os, "replace", failing)
    with pytest.raises(OSError, match="no space"):
        write_folder(old, new)
    assert listing(old) == ["precious"] and listing(old.parent) == ["data"]


def test_a_killed_writer_leaves_the_old_folder(old):
    code = (
        "import os, sys, pathlib; from tdlib.core.files import write_folder\n"
        "def fill(folder):\n"
        "    (folder / 'fresh').write_text('new')\n"
        "    os.kill(os.getpid(), 9)\n"
        "write_folder(pathlib.Path(sys.argv[1]), fill)"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(old)], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert listing(old) == ["precious"]
    assert write_folder(old, new) == old  # what the killed one left is not in the way
    assert listing(old) == ["fresh"]


def test_a_link_stays_a_link(old, tmp_path):
    (tmp_path / "link").symlink_to(old)
    assert write_folder(tmp_path / "link", new) == tmp_path / "link"
    assert (tmp_path / "link").is_symlink() and listing(old) == ["fresh"]
    assert listing(tmp_path) == ["data", "link"]


def test_a_file_is_no_folder_to_replace(tmp_path):
    (tmp_path / "data").write_text("precious")
    with pytest.raises(NotADirectoryError, match="choose another folder"):
        write_folder(tmp_path / "data", new)
    assert (tmp_path / "data").read_text() == "precious" and listing(tmp_path) == ["data"]


def test_two_writers_of_a_file_do_not_meet(tmp_path):
    path = tmp_path / "page.html"  # also where both have one process id, in containers of a cluster
    with whole_path(path) as first, whole_path(path) as second:
        first.write_text("first")
        second.write_text("second")
    assert path.read_text() == "first" and [*tmp_path.iterdir()] == [path]


def test_json_is_written_whole_or_not_at_all(tmp_path):
    write_json(tmp_path / "a.json", {"names": ["日本"]})
    for value, error in (({"a": object()}, TypeError), ({"a": "\ud800"}, UnicodeEncodeError)):
        with pytest.raises(error):
            write_json(tmp_path / "a.json", value)
        assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"names": ["日本"]}
        assert listing(tmp_path) == ["a.json"]
