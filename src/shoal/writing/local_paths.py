"""Paths of this machine in texts that others will read."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath

_PATH = re.compile(r"(?<![\w:./~\\<-])(?:[A-Za-z]:[\\/]|~?/)[^\s'\"`<>|,;:=()\[\]{}&]*")
"""An absolute path as commands, JSON and pages hold it; no part of a URL and no end tag."""


def without_folders(text: str) -> str:
    """`text`, a command, with each absolute path as its last name: where a file lies is nobody's business."""
    return _PATH.sub(lambda found: _name(found[0]), text)


def local_paths(text: str, roots: Iterable[Path]) -> Iterator[str]:
    """Paths in `text` that lie in one of `roots` or are one, once each, in their order."""
    known = [root.as_posix() for root in roots if len(root.parts) > 1]
    for path in dict.fromkeys(found[0].replace("\\\\", "\\").rstrip("./\\") for found in _PATH.finditer(text)):
        plain = path.replace("\\", "/")
        if any(plain == root or plain.startswith(f"{root}/") for root in known):
            yield path


def own_roots(*more: Path) -> tuple[Path, ...]:
    """The folders whose names say something about this machine or its user: home, the working folder, and `more`."""
    return tuple(dict.fromkeys((Path.home(), Path.cwd(), *more)))


def shortened(text: str, folder: Path, repo: str) -> str:
    """`text`, a record of Shoal's, with `folder` as `repo` and each other path of this machine as its last name."""

    def short(found: re.Match[str]) -> str:
        path = Path(found[0])
        if path == folder or folder in path.parents:
            return "/".join((repo, *path.relative_to(folder).parts))
        return _name(found[0]) if _is_here(path) else found[0]

    return _PATH.sub(short, text)


def _is_here(path: Path) -> bool:
    """Whether the first folder of a path that has several is one of this machine."""
    return path.is_absolute() and len(path.parts) > 2 and Path(*path.parts[:2]).is_dir()


def _name(path: str) -> str:
    kind = PureWindowsPath if re.match(r"[A-Za-z]:[\\/]", path) else PurePosixPath
    return kind(path).name or path
