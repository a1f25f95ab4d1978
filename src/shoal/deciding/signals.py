"""What a policy can ask an exit, by name."""

from __future__ import annotations

from typing import Literal

Signal = Literal["probability", "margin", "certainty", "saturation", "probe"]
WITHOUT_HEAD = ("saturation", "probe")
"""Signals that are read off the state, so that a look costs next to nothing."""
