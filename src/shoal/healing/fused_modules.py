"""Modules whose weight fused kernels read without calling the module: an adapter in them would do nothing."""

from __future__ import annotations

FUSED: dict[str, frozenset[str]] = dict.fromkeys(
    ("falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h"), frozenset({"conv1d", "out_proj"})
)
"""By model type, last parts of names; peft refuses the same ones."""
