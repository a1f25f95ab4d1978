"""The file in which `compare` keeps every finished cell: one JSON line each, so that a run cut off goes on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from shoal.api.study import file_name
from shoal.errors import DataError
from shoal.executing.weights import Tensors
from shoal.ledger import Ledger, Store, StoredEntry

FORMAT = "shoal-compare/1"


class ComparisonFile:
    """Finished cells by key, in memory and in `folder/cells.jsonl`.

    The first line names the model, the data and the protocol; a folder of another comparison is refused (D460).
    """

    def __init__(self, folder: Path, facts: dict[str, Any]) -> None:
        self.path, self._folder = folder / "cells.jsonl", folder / "untimed"
        try:
            store = Store(self.path, _entry, lambda key, row, spent: row)
        except OSError as error:
            raise DataError(f"cannot keep results in {folder} ({error.strerror}); name another", code="D460") from None
        if (changed := store.begin({"compare": FORMAT, **facts})) is not None:
            raise DataError(
                f"{folder} holds the results of another comparison (its {changed} differs); name another folder",
                code="D460",
            )
        self.done: Ledger[dict[str, Any]] = Ledger(store)

    def add(self, row: dict[str, Any]) -> None:
        """Keep a finished cell; the later of two lines with one key counts."""
        self.done.add(row["key"], json.loads(json.dumps(row)))

    def hold(self, key: str, weights: Tensors) -> None:
        """Keep the tensors of a plan until it is timed; do so before the cell is added."""
        if weights:
            self._folder.mkdir(exist_ok=True)
            save_file({name: tensor.detach().cpu().clone() for name, tensor in weights.items()}, self._held(key))

    def held(self, key: str) -> Tensors | None:
        """The tensors of a plan, none for one without; None when they are not there."""
        if not self.done[key].get("result", {}).get("weights"):
            return {}
        return load_file(self._held(key)) if self._held(key).is_file() else None

    def release(self, key: str) -> None:
        """Forget the tensors."""
        self._held(key).unlink(missing_ok=True)
        if self._folder.is_dir() and not any(self._folder.iterdir()):
            self._folder.rmdir()

    def _held(self, key: str) -> Path:
        return self._folder / f"{file_name(key)}.safetensors"


def _entry(line: Mapping[str, Any]) -> StoredEntry[dict[str, Any]] | None:
    return StoredEntry(str(line["key"]), dict(line), 0.0) if "key" in line else None
