"""What a model of any kind can be given to run once: token ids, images, audio features, made without data."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from shoal.errors import ModelError
from shoal.models.kinds import is_causal

Inputs = dict[str, torch.Tensor]


def sample_inputs(
    model: PreTrainedModel, place: torch.device | str, *, batch: int = 1, length: int = 1, seed: int = 0
) -> Inputs:
    """Random inputs of `model.forward` by name, the same for one seed: `input_ids` and `attention_mask`
    [batch, length], `decoder_input_ids` [batch, length], `pixel_values` [batch, channels, height, width],
    `input_features` [batch, mel bins, frames], `input_values` [batch, samples]. A decoder gets text alone, also one
    that reads pictures or sound beside it.

    On the meta device masks are left out, since their values would be read. Raises M321 for a model that reads
    something else, M385 for pictures of which the config does not say the size.
    """
    names = inspect.signature(model.forward).parameters
    generator = torch.Generator().manual_seed(seed)
    config = model.config
    found: Inputs = {}
    meta, text_alone = torch.device(place).type == "meta", is_causal(model)
    if "input_ids" in names:
        found["input_ids"] = _ids(_texts(config), batch, length, generator)
        if "attention_mask" in names and not meta:
            found["attention_mask"] = torch.ones(batch, length, dtype=torch.long)
    if "pixel_values" in names and not text_alone:
        found["pixel_values"] = _images(model, batch, generator)
    if "input_features" in names and not text_alone:
        found["input_features"] = _features(model, batch, generator)
    if "input_values" in names and not found:
        found["input_values"] = torch.randn(batch, 4000, generator=generator)
    if config.is_encoder_decoder and "decoder_input_ids" in names:
        found["decoder_input_ids"] = _ids(config.get_text_config(decoder=True), batch, length, generator)
    if not found:
        raise _unknown(model)
    if meta and "inputs_embeds" in names and "decoder_input_ids" not in found:  # some look for padding in the ids
        width = model.get_input_embeddings().weight.shape[-1]
        found = {"inputs_embeds": torch.zeros(batch, length, width)}
    dtype = model.dtype
    return {name: t.to(place, dtype if t.is_floating_point() else t.dtype) for name, t in found.items()}


def _texts(config: PreTrainedConfig) -> PreTrainedConfig:
    """The config of what reads text: the encoder's, or that of the text beside images."""
    found = getattr(config, "encoder", None) or config.get_text_config(encoder=True)
    return found if hasattr(found, "vocab_size") else config.get_text_config()


def _ids(config: PreTrainedConfig, batch: int, length: int, generator: torch.Generator) -> torch.Tensor:
    """Without the padding token, of which RoBERTa makes positions."""
    ids = torch.randint(0, config.vocab_size, (batch, length), generator=generator)
    pad = getattr(config, "pad_token_id", None)
    return torch.where(ids == pad, (ids + 1) % config.vocab_size, ids) if isinstance(pad, int) else ids


def _images(model: PreTrainedModel, batch: int, generator: torch.Generator) -> torch.Tensor:
    config = model.config
    own = getattr(config, "vision_config", None) or getattr(config, "encoder", None) or config
    size: Any = getattr(own, "image_size", None)
    if isinstance(size, dict):
        size = (size.get("height"), size.get("width"))
    height, width = size if isinstance(size, list | tuple) else (size, size)
    if not isinstance(height, int) or not isinstance(width, int):
        raise ModelError(
            f"{type(model).__name__} reads pictures of a size that no config of {config.model_type} says, so no sample "
            "can be made and its layers cannot be planned; give the model under the class that writes text, if it has "
            "one (architectures in config.json)",
            code="M385",
        )
    return torch.randn(batch, getattr(own, "num_channels", 3), height, width, generator=generator)


def _features(model: PreTrainedModel, batch: int, generator: torch.Generator) -> torch.Tensor:
    """Whisper's convolutions make one position of the encoder from two frames."""
    bins = getattr(model.config, "num_mel_bins", None)
    positions = getattr(model.config, "max_source_positions", None)
    if not isinstance(bins, int) or not isinstance(positions, int):
        raise _unknown(model)
    return torch.randn(batch, bins, 2 * positions, generator=generator)


def _unknown(model: PreTrainedModel) -> ModelError:
    return ModelError(
        f"{type(model).__name__} reads {model.main_input_name}, for which no sample can be made; only models of text, "
        "images and Whisper's audio features can be planned",
        code="M321",
    )
