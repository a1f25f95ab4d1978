"""Every touch of transformers that may change with its version or that is global: one function each."""

from __future__ import annotations

from typing import Any

import transformers


def hide_own_bars() -> None:
    """Switch the progress bars of transformers off for this process; Shoal shows its own."""
    transformers.utils.logging.disable_progress_bar()


def decoded(raw: dict[str, Any]) -> dict[str, Any]:
    """The content of a config.json with infinities and NaN, which JSON cannot say, as numbers again."""
    found: dict[str, Any] = transformers.PreTrainedConfig._decode_special_floats(raw)
    return found
