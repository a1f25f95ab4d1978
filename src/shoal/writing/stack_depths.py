"""Sets the depths of a config that has more than one: an encoder's and a decoder's, or a config for each stack."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicCache

from shoal.errors import WriteError
from shoal.models.stacks import Stack


def with_depths(
    whole: PreTrainedConfig, stack: Stack, slots: tuple[int, ...]
) -> tuple[PreTrainedConfig, dict[str, tuple[Any, Any]]]:
    """`whole` with the depth of `stack` in the fields where it stands, and {field: (old, new)} of what changed."""
    made = copy.deepcopy(whole)
    for name in stack.fields:
        setattr(made, name, len(slots))
    before = {name: getattr(stack.config, name) for name in stack.fields}
    return made, {name: (old, len(slots)) for name, old in before.items() if old != len(slots)}


def described(model: PreTrainedModel, stack: Stack, field: str) -> str:
    """A field's name in config.json, with that of the config that it is in."""
    own = next((n for n in model.config.sub_configs if getattr(model.config, n, None) is stack.config), None)
    return field if own is None else f"{own}.{field}"


def refuse_cache(
    base: PreTrainedConfig, config: PreTrainedConfig, stacks: tuple[Stack, ...], depths: Mapping[str, int]
) -> None:
    """Raise W241 when `generate` would make a cache with fewer rows than the decoder has layers: some configs (T5) name
    the encoder's depth `num_hidden_layers`, and the rows of the cache are counted by it."""
    before = {stack.name: stack.depth for stack in stacks}
    if "decoder" not in depths or not config.is_encoder_decoder or _rows(base) < before["decoder"]:
        return
    if _rows(config) < depths["decoder"]:
        raise WriteError(
            f"the decoder would have {depths['decoder']} layers and the encoder {depths.get('encoder')}, but for "
            f"{config.model_type} transformers makes a KV cache of {_rows(config)} rows, and generate fails; keep as "
            "many layers of the encoder as of the decoder, or more",
            code="W241",
        )


def _rows(config: PreTrainedConfig) -> int:
    return len(DynamicCache(config=config.get_text_config(decoder=True)).layers)
