from __future__ import annotations

import io
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from edge_slm_runtime.errors import DataError, TargetExists
from edge_slm_runtime.files import (
    LONGEST_LINE,
    copy_lines,
    read_lines,
    read_text,
    write_aside,
    write_folder_aside,
    write_json,
    write_text,
)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_file_takes_the_place_of_the_old_one(tmp_path: Path) -> None:
    target = tmp_path / "new" / "file.txt"
    write_text("one", target)
    with write_aside(target) as aside:
        aside.write_text("two")
        assert target.read_text() == "one"
    assert target.read_text() == "two"
    write_json({"a": "é"}, target)
    assert target.read_bytes().decode() == '{\n "a": "é"\n}\n'
    assert names(target.parent) == {"file.txt"}


def test_an_error_leaves_what_was_there(tmp_path: Path) -> None:
    target = tmp_path / "file"
    write_text("one", target)

    def stop_a_file() -> None:
        with write_aside(target) as aside:
            aside.write_text("half")
            raise KeyboardInterrupt

    def stop_a_folder() -> None:
        with write_folder_aside(tmp_path / "folder") as folder:
            (folder / "part").write_text("half")
            raise KeyboardInterrupt

    for stop in (stop_a_file, stop_a_folder):
        with pytest.raises(KeyboardInterrupt):
            stop()
    assert target.read_text() == "one"
    assert names(tmp_path) == {"file"}


@pytest.mark.skipif(os.name != "posix", reason="needs locks of files")
def test_what_killed_processes_left_is_removed(tmp_path: Path) -> None:
    """By the next one that writes there; what is being written stays."""
    script = """
import os, signal, sys
from pathlib import Path
from edge_slm_runtime.files import write_aside, write_folder_aside
with write_aside(Path(sys.argv[1])), write_folder_aside(Path(sys.argv[2])) as folder:
    (folder / "part").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    file, folder = tmp_path / "file", tmp_path / "folder"
    for _ in range(2):
        subprocess.run([sys.executable, "-c", script, str(file), str(folder)], check=False)
    assert len(names(tmp_path)) == 4
    for path in tmp_path.iterdir():
        os.utime(path, (1, 1))
    with write_folder_aside(folder) as aside:
        os.utime(aside, (1, 1))
        write_text("whole", file)
        assert aside.is_dir()
    assert names(tmp_path) == {"file", "folder"}


@pytest.mark.parametrize("kind", ["file", "folder", "broken link"])
def test_what_exists_is_not_replaced_unasked(kind: str, tmp_path: Path) -> None:
    target = tmp_path / "target"
    if kind == "file":
        target.write_text("precious")
    elif kind == "folder":
        target.mkdir()
    else:
        target.symlink_to(tmp_path / "nowhere")
    with pytest.raises(TargetExists), write_folder_aside(target):
        pass
    with pytest.raises(TargetExists), write_aside(target, replace=False):
        pass
    late = tmp_path / "late"
    with pytest.raises(TargetExists), write_folder_aside(late):
        late.mkdir()
    assert names(tmp_path) == {"target", "late"}


def test_a_folder_appears_as_a_whole(tmp_path: Path) -> None:
    target = tmp_path / "folder"
    with write_folder_aside(target) as folder:
        (folder / "inner").mkdir()
        (folder / "inner" / "file").write_text("content")
        assert not target.exists()
    assert (target / "inner" / "file").read_text() == "content"
    assert names(tmp_path) == {"folder"}


@pytest.mark.skipif(os.name != "posix", reason="POSIX permissions")
def test_permissions_follow_the_umask(tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; from edge_slm_runtime.files import *\n"
        "os.umask(0o027); folder = Path(sys.argv[1])\n"
        "write_text('', folder / 'usual')\n"
        "with write_aside(folder / 'private', mode=0o600): pass\n"
        "with write_folder_aside(folder / 'folder'): pass"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert modes == {"usual": 0o640, "private": 0o600, "folder": 0o750}


def test_a_huge_line_is_cut_and_the_next_one_is_read() -> None:
    lines = io.BytesIO(b"a\n" + b"b" * (LONGEST_LINE + 9) + b"\n" + b"c")
    assert [len(line) for line in read_lines(lines)] == [2, LONGEST_LINE + 1, 1]


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="POSIX")
def test_what_never_ends_is_refused(tmp_path: Path) -> None:
    zeros = Path("/dev/zero")
    with pytest.raises(OSError, match="File too large"):
        read_text(zeros)
    with zeros.open("rb") as stream, pytest.raises(DataError, match="more than 256 MiB"):
        list(read_lines(stream))
    with (
        zeros.open("rb") as stream,
        Path("/dev/null").open("wb") as target,
        pytest.raises(DataError, match="more than 256 MiB"),
    ):
        copy_lines(stream, target)
