"""Writing a page so that a kill leaves the old one or the new one."""

from __future__ import annotations

import os
from pathlib import Path

from shoal.errors import WriteError


def write_page(path: str | Path, page: str) -> None:
    """Write by way of a temporary sibling. Raises W229 when that is not possible."""
    path = Path(path)
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        draft.write_text(page, encoding="utf-8", newline="\n")
        draft.replace(path)
    except OSError as error:
        draft.unlink(missing_ok=True)
        raise WriteError(f"cannot write {path}: {error.strerror}; choose another place", code="W229") from None
