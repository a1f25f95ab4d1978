"""Every number is a record: what was computed, on what, with which versions, by which command. Kept as JSON lines."""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

_PACKAGES = ("shoal", "torch", "transformers", "safetensors", "numpy")


def _here() -> dict[str, Any]:
    return dict(environment())


@dataclass(frozen=True, slots=True)
class Record:
    """One result. `what` names the verb or the evaluation, `numbers` is its plain data."""

    what: str
    numbers: dict[str, Any]
    plan: str | None = None
    """Hash of the plan that ran; None for the dense model."""
    base: str | None = None
    """Fingerprint of the base model."""
    seed: int | None = None
    command: tuple[str, ...] = ()
    environment: dict[str, Any] = field(default_factory=_here)
    time: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))

    def to_dict(self) -> dict[str, Any]:
        """Plain data; what is not finite becomes None."""
        return {name: plain(value) for name, value in asdict(self).items()}


def plain(value: Any) -> Any:
    """`value` as JSON can say it, all through: tuples become lists; NaN and infinities, which JSON lacks, None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def environment() -> dict[str, Any]:
    """Versions, machine and the state of the source tree, as far as they can be known without importing anything."""
    return dict(_environment())  # each caller's own, who may add to it


@cache
def _environment() -> dict[str, Any]:
    return {
        "python": platform.python_version(),
        "system": platform.platform(),
        "cpus": os.cpu_count(),
        "git": _git_state(),
        **{name: _version(name) for name in _PACKAGES},
    }


def append(path: Path, record: Record) -> None:
    """Add one line to a records file; a line is written in one call, so that a kill leaves whole lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    append_line(path, record.to_dict())


def append_line(path: Path, entry: dict[str, Any]) -> None:
    """Add a JSON line in one write, behind the end of one that a kill cut short."""
    text = json.dumps(plain(entry), ensure_ascii=False, allow_nan=False) + "\n"
    with path.open("ab+", buffering=0) as stream:
        size = stream.seek(0, os.SEEK_END)
        stream.seek(max(0, size - 1))
        stream.write((b"" if stream.read(1) in (b"", b"\n") else b"\n") + text.encode())


def read_objects(path: Path) -> list[dict[str, Any]]:
    """What each line of a file holds, none if there is no file: a JSON object, or an empty one for a line that a kill
    cut short and for one that is no object."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    return [_object(line) for line in text.splitlines()]


def _object(line: str) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def command_line() -> tuple[str, ...]:
    """The command as the user typed it, the program by its name alone: shoal for `python -m shoal` too."""
    name = Path(sys.argv[0]).name
    return ("shoal" if name == "__main__.py" else name, *sys.argv[1:])


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git_state() -> str | None:
    """Commit of Shoal's own source tree, with + when it has changes; None for an installed package."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        head = subprocess.run(  # noqa: S603
            ["git", "-C", str(root), "describe", "--always", "--dirty=+", "--abbrev=12"],  # noqa: S607
            capture_output=True,
            text=True,
            timeout=5,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return head.stdout.strip() or None
