"""vLLM runs Shoal's planned checkpoints; see README.md. Nothing here imports shoal."""

from __future__ import annotations

CLASSES = ("ShoalForCausalLM", "ShoalMoEForCausalLM")


def register() -> None:
    """Tell transformers and vLLM of planned checkpoints; vLLM calls this in each of its processes."""
    from transformers import AutoConfig
    from vllm import ModelRegistry

    from shoal_vllm.config import PlannedConfig

    AutoConfig.register(PlannedConfig.model_type, PlannedConfig, exist_ok=True)
    for name in CLASSES:
        ModelRegistry.register_model(name, f"shoal_vllm.model:{name}")
