"""A file or a folder appears whole or not at all: it is made beside its place and takes it in one step."""

from __future__ import annotations

import errno
import glob
import importlib
import os
import re
import secrets
import shutil
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from shoal.errors import WriteError

fcntl: Any = importlib.import_module("fcntl") if os.name == "posix" else None
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """An empty file beside `path` to write to, which takes the name of `path` when the block ends and goes away when it
    fails. A kill leaves the older file or the new one; what it leaves beside them, the next write of `path` removes.

    The permissions of an older file stay, a link is followed, and what is no file (/dev/null) is written to itself.
    Raises `OSError`.
    """
    final = Path(os.path.realpath(path))
    if final.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(final))
    if final.exists() and not final.is_file():
        yield final
        return
    sweep(final)
    draft = _beside(final, "partial", secrets.token_hex(4))  # two threads may write one name
    lock = None
    try:
        draft.touch(exist_ok=False)
        lock = _lock(draft)
        yield draft
        if final.exists():
            with suppress(OSError):  # a file system without permissions
                draft.chmod(stat.S_IMODE(final.stat().st_mode))
        sync_path(draft)
        draft.replace(final)
        sync_path(final.parent)
    finally:
        # Not a function of its own: a Ctrl-C that comes on the way into one would miss this `except`.
        try:
            draft.unlink(missing_ok=True)
        except KeyboardInterrupt:
            draft.unlink(missing_ok=True)
            raise
        finally:
            if lock is not None:
                os.close(lock)


def write_atomically(path: str | Path, content: str | bytes, what: str = "") -> None:
    """Write a file whole or not at all; text is UTF-8 with the same line ends on every system.

    Raises W229, which calls the file `what`.
    """
    target = f"{what} {path}".lstrip()
    try:
        with replacing(path) as draft:
            draft.write_bytes(content.encode() if isinstance(content, str) else content)
    except OSError as error:
        raise WriteError(f"cannot write {target}: {error.strerror}; choose another place", code="W229") from None


@contextmanager
def staged(final: Path) -> Iterator[Path]:
    """An empty folder beside `final` to fill and to `publish`; whatever is under its name at the end is removed.

    Raises `OSError` where no folder can be made, `WriteError` W227 when this process is writing `final` already.
    """
    partial = _beside(final, "partial")
    ours, lock = True, None
    try:
        try:
            partial.mkdir()
        except FileExistsError:
            ours = False
            raise WriteError(f"{final} is being written by this process already; wait for it", code="W227") from None
        lock = _lock(partial)
        yield partial
    finally:
        # Not a function of its own: a Ctrl-C that comes on the way into one would miss this `except`.
        try:
            if ours:
                shutil.rmtree(partial, ignore_errors=True)
        except KeyboardInterrupt:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        finally:
            if lock is not None:
                os.close(lock)


def sweep(final: Path) -> None:
    """Remove what killed writes of `final` left beside it; what a living process is writing stays. An old folder that a
    kill caught between two renames gets its name back."""
    pattern = re.compile(rf"\.{re.escape(final.name)}\.shoal-(\d+)(?:-[0-9a-f]+)?\.(partial|old)")
    for path in final.parent.glob(f".{glob.escape(final.name)}.shoal-*"):
        found = pattern.fullmatch(path.name)
        if found is None or path.is_symlink() or _living(path, int(found[1])):
            continue
        if found[2] == "old" and not final.exists():
            with suppress(OSError):
                path.rename(final)
        elif path.is_file():
            with suppress(OSError):
                path.unlink()
        else:
            shutil.rmtree(path, ignore_errors=True)


def publish(partial: Path, final: Path, *, overwrite: bool) -> None:
    """Bring `partial` to the disk, then under its final name in one step. An older folder there is exchanged with it,
    where the system can in one step as well; otherwise by renames, which are taken back when the new folder cannot get
    the name. It is under `partial`'s name then.

    Raises `OSError`, and `WriteError` W220 when `final` has appeared meanwhile and `overwrite` is False.
    """
    _sync(partial)
    try:
        if not (overwrite and final.exists()):
            partial.rename(final)
        elif not swap_paths(partial, final):
            _by_two_renames(partial, final)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise WriteError(f"{final} exists now; pass --overwrite to replace it", code="W220") from None
        raise
    sync_path(final.parent)


def swap_paths(one: Path, other: Path) -> bool:
    """Let two paths change names in one step (Linux, most file systems); False where that cannot be done."""
    import ctypes  # loaded for a folder that is replaced, not for every start of the command line

    call = getattr(ctypes.CDLL(None), "renameat2", None) if sys.platform == "linux" else None
    return call is not None and call(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0


def _by_two_renames(partial: Path, final: Path) -> None:
    old = _beside(final, "old")
    try:
        final.rename(old)
        partial.rename(final)
        old.rename(partial)
    except BaseException:
        if old.exists():
            old.rename(partial if final.exists() else final)
        raise


def _beside(final: Path, kind: str, number: str = "") -> Path:
    return final.with_name(f".{final.name}.shoal-{os.getpid()}{number and f'-{number}'}.{kind}")


def _lock(path: Path) -> int | None:
    """Held until it is closed or the process ends: it tells a living write from the leftovers of a process whose number
    has been given out again, as happens in containers."""
    if fcntl is None:
        return None
    handle = os.open(path, os.O_RDONLY)
    with suppress(OSError):  # a file system without locks: the process number must do
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return handle


def _living(path: Path, process: int) -> bool:
    if process != os.getpid() and _runs(process):
        return True
    if fcntl is None:
        return False
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno in (errno.EWOULDBLOCK, errno.EACCES)
    finally:
        os.close(handle)
    return False


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def _sync(folder: Path) -> None:
    for place, _, files in os.walk(folder):
        for name in files:
            sync_path(Path(place) / name)
        sync_path(Path(place))


def sync_path(path: Path) -> None:
    """Files must reach the disk before the rename does, or a power cut could leave a name without its content. A system
    that opens or syncs no folders (Windows, some network file systems) keeps them in order itself."""
    with suppress(OSError) if path.is_dir() else nullcontext():
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
