"""Every touch of transformers that may change with its version or that is global: one function each."""

from __future__ import annotations

import transformers


def hide_own_bars() -> None:
    """Switch the progress bars of transformers off for this process; Shoal shows its own."""
    transformers.utils.logging.disable_progress_bar()
