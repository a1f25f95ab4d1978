"""Files appear whole or not at all: kills, failures, permissions, links, and what killed writes leave beside them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from shoal.atomic import replacing, write_atomically
from shoal.errors import WriteError

SOURCE = Path(__file__).parents[2] / "src" / "shoal"
KILLED = """
import os, signal, sys
from shoal.atomic import replacing
with replacing(sys.argv[1]) as draft:
    draft.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def killed(path: Path) -> None:
    assert subprocess.run([sys.executable, "-c", KILLED, str(path)], check=False).returncode < 0


def test_the_new_content_takes_the_name(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    write_atomically(file, "één\nline\n")
    assert file.read_bytes() == "één\nline\n".encode()
    write_atomically(str(file), b"bytes")
    assert file.read_bytes() == b"bytes" and names(tmp_path) == ["a.json"]


@pytest.mark.parametrize("older", [None, "old"])
@pytest.mark.parametrize("failure", [RuntimeError, OSError, KeyboardInterrupt])
def test_a_failure_midway_keeps_the_older_file(tmp_path: Path, older: str | None, failure: type[BaseException]) -> None:
    file = tmp_path / "a"
    if older is not None:
        file.write_text(older)

    def write() -> None:
        with replacing(file) as draft:
            draft.write_text("half")
            raise failure

    with pytest.raises(failure):
        write()
    assert names(tmp_path) == ([] if older is None else ["a"])
    assert older is None or file.read_text() == older


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL is of POSIX; ends when Windows is supported")
def test_a_kill_midway_keeps_the_older_file_and_the_next_write_tidies_up(tmp_path: Path) -> None:
    file = tmp_path / "a"
    killed(file)
    assert not file.exists()
    file.write_text("old")
    killed(file)
    assert file.read_text() == "old"
    write_atomically(file, "new")
    assert file.read_text() == "new" and names(tmp_path) == ["a"]


def test_what_another_thread_writes_under_the_same_name_stays(tmp_path: Path) -> None:
    file, inside, done = tmp_path / "a", threading.Event(), threading.Event()

    def slow() -> None:
        with replacing(file) as draft:
            draft.write_text("slow")
            inside.set()
            done.wait(10)

    other = threading.Thread(target=slow)
    other.start()
    assert inside.wait(10)
    write_atomically(file, "quick")
    assert file.read_text() == "quick"
    done.set()
    other.join()
    assert file.read_text() == "slow" and names(tmp_path) == ["a"]


def test_an_interrupt_at_any_call_leaves_nothing_beside(tmp_path: Path) -> None:
    def once(number: int) -> bool:
        file, left = tmp_path / f"out{number}", number

        def trace(*_: object) -> None:
            nonlocal left
            left -= 1
            if left == 0:
                raise KeyboardInterrupt

        file.write_text("old")
        before = sys.gettrace()
        try:
            with replacing(file) as draft:
                draft.write_text("new")
                sys.settrace(trace)
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(before)
        assert file.read_text() in ("old", "new")
        assert [name for name in names(tmp_path) if name.startswith(".")] == [], number
        return left > 0

    assert next(number for number in range(1, 1000) if once(number)) > 5


@pytest.mark.skipif(os.name != "posix", reason="permission bits are of POSIX; ends when Windows is supported")
@pytest.mark.parametrize("mode", [0o600, 0o640, 0o664])
def test_the_permissions_of_an_older_file_stay(tmp_path: Path, mode: int) -> None:
    file, plain = tmp_path / "a", tmp_path / "plain"
    plain.touch()
    write_atomically(file, "1")
    assert file.stat().st_mode == plain.stat().st_mode, "a new file has those of any other"
    file.chmod(mode)
    write_atomically(file, "2")
    assert file.stat().st_mode & 0o777 == mode and file.read_text() == "2"


def test_a_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "a").symlink_to(tmp_path / "real" / "a")
    for text in ("1", "2"):
        write_atomically(tmp_path / "a", text)
        assert (tmp_path / "a").is_symlink() and (tmp_path / "real" / "a").read_text() == text


@pytest.mark.skipif(not Path("/dev/null").exists(), reason="this system has no /dev/null; runs on POSIX")
def test_what_is_no_file_is_written_to_itself(tmp_path: Path) -> None:
    (tmp_path / "null").symlink_to("/dev/null")
    write_atomically(tmp_path / "null", "gone")
    assert not Path("/dev/null").is_file() and (tmp_path / "null").is_symlink()


def test_a_place_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for place, why in ((tmp_path / "no" / "a", "No such file"), (tmp_path / "folder", "directory")):
        with pytest.raises(WriteError, match=rf"W229: cannot write {re.escape(str(place))}: .*{why}.*; choose another"):
            write_atomically(place, "x")
    with pytest.raises(WriteError, match=r"W229: cannot write the policy .*a: .*; choose another place"):
        write_atomically(tmp_path / "no" / "a", "x", "the policy")
    assert names(tmp_path) == ["folder"]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere; runs as a user")
def test_a_folder_without_permission_keeps_the_older_file(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(WriteError, match="W229"):
            write_atomically(tmp_path / "a", "new")
        assert (tmp_path / "a").read_text() == "old" and names(tmp_path) == ["a"]
    finally:
        tmp_path.chmod(0o700)


def test_no_other_file_makes_temporary_names_of_its_own() -> None:
    own = re.compile(r"os\.replace|\.replace\((path|final|file)\b|getpid\(\)\}\.tmp")
    found = {str(path.relative_to(SOURCE)) for path in SOURCE.rglob("*.py") if own.search(path.read_text())}
    assert found == {"atomic.py", "writing/gguf_out/published.py"}, "use shoal.atomic"
