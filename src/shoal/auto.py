"""`import shoal.auto`: from then on the Auto classes of transformers load planned checkpoints."""

from __future__ import annotations

from shoal.planned import ShoalConfig, ShoalForCausalLM, ShoalForSeq2SeqLM

__all__ = ["ShoalConfig", "ShoalForCausalLM", "ShoalForSeq2SeqLM"]
