"""Whether a file or a folder can be written, asked before the work that it is to hold."""

from __future__ import annotations

import os
from pathlib import Path

from shoal.errors import WriteError


def require_file_places(*paths: Path | None) -> None:
    """Raise W229 for the first path that no file can take: a folder, or one in no folder that can be written."""
    for path in paths:
        if path is not None and path.is_dir():
            raise WriteError(f"cannot write {path}: it is a folder; name a file in it", code="W229")
        if path is not None and not path.exists() and not _can_be_filled(path.parent):
            raise WriteError(
                f"cannot write {path}: {path.parent} is no folder that can be written; choose another place",
                code="W229",
            )


def require_plan_place(path: Path | None) -> None:
    """Raise W280 when no folder for a plan can be made there; those above it may be made with it."""
    if path is None:
        return
    above = next(one for one in (path, *path.absolute().parents) if os.path.lexists(one))
    if not _can_be_filled(above):
        raise WriteError(
            f"cannot write the plan to {path}: {above} is no folder that can be written; choose another folder",
            code="W280",
        )


def _can_be_filled(folder: Path) -> bool:
    return folder.is_dir() and os.access(folder, os.W_OK)
