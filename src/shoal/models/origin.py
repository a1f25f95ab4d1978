"""Where a model was read from and how, so that another process can read the same; and whether it did."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Origin:
    """A name and the options with which `shoal.load` reads the model again, on whatever device."""

    source: str
    """A folder or file in full, the built-in model, or a hub id."""
    options: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, source: str | Path, **options: Any) -> Origin:
        """Names on this machine in full; options that are None are left out."""
        kept = {name: value for name, value in options.items() if value is not None}
        if "adapter" in kept:
            kept["adapter"] = _full(kept["adapter"])
        return cls(_full(source), kept)


def fingerprints(model: nn.Module) -> dict[str, str]:
    """Tensor -> sha256 of its bytes, of every parameter and buffer; "" for one that lies in files, or that a quantiser
    holds in a class of its own."""
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: _digest(one) if type(one.data) is torch.Tensor and not one.is_meta else "" for name, one in named}


def difference(mine: Mapping[str, str], theirs: Mapping[str, str]) -> str | None:
    """The first tensor in which two models differ by their `fingerprints`, as far as both hold it; None for none."""
    if mine.keys() != theirs.keys():
        return min(mine.keys() ^ theirs.keys())
    return next((name for name, own in mine.items() if own and theirs[name] and own != theirs[name]), None)


def _digest(tensor: torch.Tensor) -> str:
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    facts = f"{tensor.dtype} {tuple(tensor.shape)}".encode()
    return hashlib.sha256(facts + hashlib.sha256(flat.numpy().data).digest()).hexdigest()


def _full(source: str | Path) -> str:
    """A path of this machine in full; any other name as it is."""
    path = Path(source).expanduser()
    return str(path.resolve()) if path.exists() else str(source)
