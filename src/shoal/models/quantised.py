"""Quantised checkpoints: what their config says of it, and whether transformers can load them on this machine."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig
from transformers.quantizers import AutoHfQuantizer

from shoal.errors import ModelError, first_line
from shoal.models.compat import knows_quantisation

Settings = dict[str, Any]
KEYS = ("quantization_config", "quantization")
"""Under which a config says so: that of transformers, and that of MLX."""


def quantisation_settings(config: PreTrainedConfig) -> Settings | None:
    """What a config, or its text part, says of quantisation, as plain data; None for a model that is not quantised."""
    parts = (config, config.get_text_config(decoder=True))
    found = _first([{name: getattr(part, name, None) for name in KEYS} for part in parts])
    if found is None or isinstance(found, dict):
        return found
    return found.to_dict() if hasattr(found, "to_dict") else {"quant_method": str(found)}


def quantisation_said(raw: Settings) -> Any:
    """The same of the plain data of a config.json."""
    text = raw.get("text_config")
    return _first([raw, text] if isinstance(text, dict) else [raw])


def _first(parts: list[Settings]) -> Any:
    for part in parts:
        for name in KEYS:
            found = part.get(name)
            if found is not None and (name == KEYS[0] or (isinstance(found, dict) and "bits" in found)):
                return found
    return None


def described_quantisation(settings: Any) -> str:
    """In words: gptq, 4 bits. `settings` is what a config.json says, which may be anything."""
    if not isinstance(settings, dict):
        return "by unknown means"
    method = str(settings.get("quant_method") or "").lower()
    bits = settings.get("bits", settings.get("w_bit", settings.get("nbits")))
    for name, number in (("load_in_4bit", 4), ("load_in_8bit", 8)):
        if settings.get(name) is True:
            method, bits = method or "bitsandbytes", number
    words = [method[:40] or "by unknown means"]
    if type(bits) is int:
        words.append(f"{bits} bits")
    return ", ".join(words)


def require_quantiser(config: PreTrainedConfig, source: str) -> None:
    """Ask transformers, before a weight is read, whether it can load a quantised checkpoint here.

    Raises `ModelError`: M350 a library is not installed, M352 settings that this transformers does not know, M356
    another reason, such as a missing GPU. A model that is not quantised passes.
    """
    settings = quantisation_settings(config)
    if settings is None:
        return
    what = f"{source} is quantised ({described_quantisation(settings)})"
    otherwise = "or give the model before it was quantised"
    if not knows_quantisation(settings):
        raise ModelError(
            f"{what}, which the installed transformers does not know; install the one that its card names, {otherwise}",
            code="M352",
        )
    try:
        quantiser = AutoHfQuantizer.from_config(settings, pre_quantized=True)
        quantiser.validate_environment(device_map=None, weights_only=True)
    except ImportError as error:
        raise ModelError(
            f"{what} and needs a library that is not installed ({first_line(error)}); install it, {otherwise}",
            code="M350",
        ) from None
    except Exception as error:  # settings from a file that anyone wrote, and what each library asks of a machine
        raise ModelError(
            f"{what} and cannot be loaded here ({first_line(error)}); mend that, {otherwise}", code="M356"
        ) from None
