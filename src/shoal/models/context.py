"""How long a text a model takes."""

from __future__ import annotations

from typing import Any


def positions_of(model: Any) -> int | None:
    """The positions that the config of the text's decoder names (`max_position_embeddings`); None where it names no
    number above 0."""
    found = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    return found if isinstance(found, int) and not isinstance(found, bool) and found > 0 else None
