"""Text as it is generated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import TextStreamer


class TextPieces(TextStreamer):
    """Hands every finished piece of new text to a function."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._on_text = on_text

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Called by the streamer."""
        self._on_text(text)
