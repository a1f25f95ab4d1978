"""What is in a .gguf file, and the code of a refusal."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFReader

from shoal.errors import ShoalError


def contents(file: Path, key: str) -> Any:
    return GGUFReader(file).fields[key].contents()


def tensors(file: Path) -> dict[str, tuple[str, bytes]]:
    return {t.name: (t.tensor_type.name, t.data.tobytes()) for t in GGUFReader(file).tensors}


def refused(code: str, call: Callable[[], object]) -> str:
    with pytest.raises(ShoalError) as found:
        call()
    assert found.value.code == code, str(found.value)
    return str(found.value)
