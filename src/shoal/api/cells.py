"""The file in which `compare` keeps every finished cell: one JSON line each, so that a run cut off goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from shoal.errors import DataError
from shoal.record import append_line, read_objects

FORMAT = "shoal-compare/1"


class Cells:
    """Finished cells by key, in memory and in `folder/cells.jsonl`.

    The first line names the model, the data and the protocol; a folder of another comparison is refused (D460).
    """

    def __init__(self, folder: Path, facts: dict[str, Any]) -> None:
        self.path = folder / "cells.jsonl"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lines = read_objects(self.path)
        except OSError as error:
            raise DataError(f"cannot keep results in {folder} ({error.strerror}); name another", code="D460") from None
        wanted = json.loads(json.dumps({"compare": FORMAT, **facts}))
        if not lines:
            append_line(self.path, wanted)
        elif changed := [key for key in wanted if lines[0].get(key) != wanted[key]]:
            raise DataError(
                f"{folder} holds the results of another comparison (its {changed[0]} differs); name another folder",
                code="D460",
            )
        self.done = {str(line["key"]): line for line in lines[1:] if "key" in line}

    def add(self, row: dict[str, Any]) -> None:
        """Keep a finished cell."""
        append_line(self.path, row)
        self.done[row["key"]] = json.loads(json.dumps(row))
