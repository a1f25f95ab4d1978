"""Double precision on devices that have none: the sums go to the CPU, and nobody asks such a device for float64."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from shoal.fitting.lens import _normal
from shoal.fitting.normal import Normal
from shoal.models import precision

SOURCE = Path(precision.__file__).parents[1]


class WithoutFloat64(TorchDispatchMode):
    """The device type "meta" stands for one that has no float64, as MPS."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.device.type == "meta" and out.dtype == torch.float64:
            raise TypeError("Cannot convert a meta Tensor to float64 dtype")
        return out


@pytest.fixture
def _forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "_HAS", {})


@pytest.mark.usefixtures("_forgotten")
def test_a_device_is_asked_whether_it_has_float64() -> None:
    meta = torch.device("meta")
    assert precision.float64_device(meta) == meta
    precision._HAS.clear()
    with WithoutFloat64():
        assert precision.float64_device(meta) == torch.device("cpu")
        assert precision.float64_device(torch.device("cpu")) == torch.device("cpu")


@pytest.mark.usefixtures("_forgotten")
def test_normal_equations_stand_where_float64_is() -> None:
    with WithoutFloat64():
        assert Normal(3, 2, torch.device("meta")).xx.device.type == "cpu"
        assert _normal(torch.empty(4, 3, device="meta")).xx.device.type == "cpu"
    precision._HAS.clear()
    assert _normal(torch.empty(4, 3, device="meta")).xx.device.type == "meta", "a device that has it keeps it"


def test_nobody_asks_a_device_for_float64_directly() -> None:
    """Whoever wants double precision says `.cpu()` first, or goes through `in_float64`."""
    found = [
        f"{path.relative_to(SOURCE)}: {line.strip()}"
        for path in sorted(SOURCE.rglob("*.py"))
        if path != Path(precision.__file__)
        for line in path.read_text(encoding="utf-8").splitlines()
        if re.search(r"(?<!\.cpu\(\))\.double\(\)", line)
    ]
    assert found == []
