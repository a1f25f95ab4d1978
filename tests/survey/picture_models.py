"""Tiny models that read pictures and text, and prompts with a picture for them; made of random numbers."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel

from .overrides import OVERRIDES, SMALL
from .overrides_pictures import PICTURE_OVERRIDES, PICTURES, TOWER
from .tiny import filled, merged

Inputs = dict[str, torch.Tensor]
TEXT = ("text", "decoder", "llm", "thinker")
SPECIAL = re.compile(r"(image|video|vision|audio|boi|eoi|boa|eoa|im|media|fake|img)\w*_(id|index)$")
"""Fields with the number of a token that stands for a picture or its bounds."""
PICTURE_TOKEN = ("image_token_id", "image_token_index", "media_placeholder_token_id")
FIRST_SPECIAL = 45
LIMIT = 1e-4


def tiny_pictures(model_type: str) -> PreTrainedModel:
    """The tiny model of a type with random weights large enough that every layer matters; the same ones every time."""
    torch.manual_seed(0)
    return filled(AutoModelForImageTextToText.from_config(tiny_picture_config(model_type)))


def tiny_picture_config(model_type: str) -> PreTrainedConfig:
    """The type's own config class with small sizes, 6 text layers and special tokens inside the small vocabulary."""
    kind = CONFIG_MAPPING[model_type]
    fields = _shrunk(kind, SMALL)
    special = sorted(
        name for name in kind().to_dict() if SPECIAL.search(name) and isinstance(getattr(kind(), name), int)
    )
    fields |= {name: FIRST_SPECIAL + place for place, name in enumerate(special)}
    for changes in (OVERRIDES, PICTURE_OVERRIDES):
        fields = merged(fields, changes.get(model_type, {}))
    return kind(**fields)


def _shrunk(kind: type[PreTrainedConfig], small: dict[str, Any]) -> dict[str, Any]:
    default = kind()
    names = {own: canonical for canonical, own in default.attribute_map.items()}
    found = default.to_dict()
    fields = {own: small[key] for own in found for key in (own, names.get(own, own)) if key in small}
    for name in default.sub_configs:
        sub = getattr(default, name, None)
        if isinstance(sub, PreTrainedConfig):
            inner = SMALL if name.startswith(TEXT) else SMALL | TOWER
            fields[name] = {"model_type": sub.model_type} | _shrunk(type(sub), inner)
    return fields


def text_prompt(model: PreTrainedModel, length: int = 12) -> Inputs:
    """[1, length] ids without a special token, and their mask."""
    ids = torch.randint(3, FIRST_SPECIAL, (1, length), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def picture_prompt(model: PreTrainedModel) -> Inputs:
    """Four tokens of text, as many picture tokens as the model makes of a picture, and six tokens of text."""
    pixels = {name: value for name, value in _pixels(model).items() if name in _names(model)}
    count = picture_tokens(model, pixels)
    config = model.config
    token = next(getattr(config, name) for name in PICTURE_TOKEN if hasattr(config, name))
    text = text_prompt(model, 10)["input_ids"]
    ids = torch.cat([text[:, :4], torch.full((1, count), token), text[:, 4:]], 1)
    here = (ids == token).long()
    more = {"mm_token_type_ids": here, "token_type_ids": here}
    found = {"input_ids": ids, "attention_mask": torch.ones_like(ids)} | pixels
    return found | {name: value for name, value in more.items() if name in _names(model)}


@torch.no_grad()
def picture_tokens(model: PreTrainedModel, pixels: Inputs) -> int:
    """How many tokens the model makes of these pictures."""
    reader = getattr(model, "get_image_features", None) or model.model.get_image_features
    names = inspect.signature(reader).parameters
    made: Any = reader(**{name: value for name, value in pixels.items() if name in names})
    found = getattr(made, "pooler_output", made)
    if found is None and hasattr(made, "deepstack_features"):
        found = made.deepstack_features[0][1]  # of the first place, (layer, features); there are as many for the others
    made = made.last_hidden_state if found is None else found
    made = made if isinstance(made, list | tuple) else [made]
    return sum(one.numel() // one.shape[-1] for one in made)


def _names(model: PreTrainedModel) -> set[str]:
    found = {*inspect.signature(model.forward).parameters}
    inner = getattr(model, "model", None)
    return found | ({*inspect.signature(inner.forward).parameters} if inner is not None else set())


def _pixels(model: PreTrainedModel) -> Inputs:
    """The picture, as the type wants it."""
    vision = getattr(model.config, "vision_config", model.config)
    generator = torch.Generator().manual_seed(2)
    size = getattr(vision, "image_size", 28)
    high, wide = size if isinstance(size, list | tuple) else (size, size)
    channels = getattr(vision, "num_channels", None) or getattr(vision, "in_channels", 3)
    match PICTURES.get(model.config.model_type, "plain"):
        case "patches":
            patch, time = vision.patch_size, getattr(vision, "temporal_patch_size", 1)
            values = torch.randn(16, channels * time * patch * patch, generator=generator)
            return {"pixel_values": values, "image_grid_thw": torch.tensor([[1, 4, 4]])}
        case "crops":
            values = torch.randn(16, channels, vision.patch_size, vision.patch_size, generator=generator)
            return {"pixel_values": values, "image_grid_thw": torch.tensor([[1, 4, 4]])}
        case "list":
            return {"pixel_values": torch.randn(1, 1, channels, high, wide, generator=generator)}
        case "tiles":
            sizes = torch.tensor([[high, wide]])
            return {"pixel_values": torch.randn(1, 2, channels, high, wide, generator=generator), "image_sizes": sizes}
        case "sized":
            sizes = torch.tensor([[high, wide]])
            return {"pixel_values": torch.randn(1, channels, high, wide, generator=generator), "image_sizes": sizes}
        case _:
            return {"pixel_values": torch.randn(1, channels, high, wide, generator=generator)}


@torch.no_grad()
def answers(model: PreTrainedModel, prompt: Inputs, wanted: Iterable[str] = ()) -> Inputs:
    """`uncached`: the logits [1, t, vocab] of one pass; `cached`: the same in three passes over one cache, the picture
    in the first; `written`: the logits of four greedy tokens by `generate`. Without `wanted`, cached passes that differ
    from the uncached one and what fails are left out: what the stock model cannot do is not asked of a plan."""
    _forget(model)
    found = {"uncached": model(**prompt, use_cache=False).logits.float()}
    for name, answer in (("cached", _cached), ("written", _written)):
        if wanted and name not in wanted:
            continue
        try:
            made = answer(model, prompt)
        except Exception:
            if wanted:
                raise
            continue
        if wanted or name != "cached" or (made - found["uncached"]).abs().max().item() <= LIMIT:
            found[name] = made
    return found


def _forget(model: PreTrainedModel) -> None:
    """How far the picture of an earlier prompt moved the positions is nothing to this one."""
    for module in model.modules():
        if "rope_deltas" in module.__dict__:
            module.rope_deltas = None


def _cached(model: PreTrainedModel, prompt: Inputs) -> torch.Tensor:
    _forget(model)
    ids, mask = prompt["input_ids"], prompt["attention_mask"]
    length, logits, past = ids.shape[1], [], None
    for start, end in ((0, length - 3), (length - 3, length - 1), (length - 1, length)):
        first = {name: value for name, value in prompt.items() if name not in ("input_ids", "attention_mask")}
        first = {name: value[:, :end] if value.shape[-1] == length else value for name, value in first.items()}
        # without a mask: with one, models with positions in three dimensions count those of the whole text again
        more = {"attention_mask": mask[:, :end]} | first if start == 0 else {"past_key_values": past}
        out = model(input_ids=ids[:, start:end], use_cache=True, **more)
        past = out.past_key_values
        logits.append(out.logits.float())
    return torch.cat(logits, 1)


def _written(model: PreTrainedModel, prompt: Inputs) -> torch.Tensor:
    _forget(model)
    out = model.generate(
        **prompt, do_sample=False, max_new_tokens=4, min_new_tokens=4, return_dict_in_generate=True, output_logits=True
    )
    return torch.stack(out.logits, 1).float()
