"""The stacks of models that are no causal decoder: encoder, encoder and decoder, vision, text and vision.

Where a stack's depth is written is data: for an encoder and a decoder under one config a pair of fields; a stack with a
config of its own (`text_config`, `vision_config`, ...) has the name of that config.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from shoal.errors import ModelError
from shoal.models.depth import depth_fields
from shoal.models.families import family_of
from shoal.models.lists import Stack, layer_lists, path_of

PAIRS = (
    ("encoder_layers", "decoder_layers"),
    ("num_encoder_layers", "num_decoder_layers"),
    ("num_layers", "num_decoder_layers"),
)
"""(encoder's depth, decoder's depth) in configs that describe both."""
READ_BY = {"pixel_values": "vision", "input_values": "audio", "input_features": "audio"}
"""The name of a model's only stack, by what the model reads; anything else is an encoder of text."""


def named_stacks(model: PreTrainedModel) -> tuple[Stack, ...]:
    """The stacks of `model`, an encoder before its decoder, others in the order of their configs.

    Raises `ModelError` M302 when none can be found, M303 for a family that is refused, M324 for a class whose
    outputs are numbered by depth, M325 for layers in stages.
    """
    config = model.config
    _refuse(model, config)
    stacks: tuple[Stack, ...]
    if config.is_encoder_decoder:
        stacks = tuple(_pair(model))
    else:
        stacks = tuple(_with_configs(model)) or tuple(_single(model))
    for stack in stacks:
        _refuse(model, stack.config)
    if not stacks:
        raise ModelError(
            f"cannot find the layers of {type(model).__name__}: no single list as long as its config says; "
            "add a file to shoal/models/families that names the path",
            code="M302",
        )
    return stacks


def _refuse(model: PreTrainedModel, config: PreTrainedConfig) -> None:
    refused = family_of(config).refused
    if refused is not None:
        raise ModelError(f"{config.model_type} models cannot be planned: {refused}", code="M303")
    stages = getattr(config, "depths", None)
    if isinstance(stages, list | tuple):
        raise ModelError(
            f"the layers of {config.model_type} are in stages ({', '.join(map(str, stages))}) of different widths, and "
            "a plan is for one list; lower a number of depths in its config.json instead",
            code="M325",
        )
    if hasattr(model, "forward_with_filtered_kwargs"):  # what every backbone has, and nothing else
        raise ModelError(
            f"{type(model).__name__} numbers its outputs by depth, so a shallower one would hand on other features "
            "under the same names; load the model without its backbone class (AutoModel)",
            code="M324",
        )


def _pair(model: PreTrainedModel) -> Iterator[Stack]:
    """Encoder and decoder: under one config with two depths, or with a config each."""
    config = model.config
    for place, name, root in ((0, "encoder", model.get_encoder()), (1, "decoder", model.get_decoder())):
        own = getattr(config, name, None)
        if isinstance(own, PreTrainedConfig):
            yield from _in(model, root, name, own.get_text_config(), ())
            continue
        pair = next((p for p in PAIRS if all(isinstance(getattr(config, f, None), int) for f in p)), None)
        if pair is not None:
            yield from _in(model, root, name, config, _all_names(config, pair, place))


def _all_names(config: PreTrainedConfig, pair: tuple[str, str], place: int) -> tuple[str, ...]:
    """The field, and `num_hidden_layers` where it is a field of its own, which means the encoder's depth."""
    counted = isinstance(getattr(type(config), "num_hidden_layers", None), property)  # ProphetNet adds up the two
    alone = not counted and place == 0 and "num_hidden_layers" not in config.attribute_map
    alone = alone and hasattr(config, "num_hidden_layers")
    return (pair[place], "num_hidden_layers") if alone else (pair[place],)


def _with_configs(model: PreTrainedModel) -> Iterator[Stack]:
    """A stack for every part of the model with a config of its own."""
    for name in model.config.sub_configs:
        config = getattr(model.config, name, None)
        if not isinstance(config, PreTrainedConfig):
            continue
        root = next(
            (m for m in model.modules() if m is not model and type(getattr(m, "config", None)) is type(config)), None
        )
        if root is not None:
            yield from _in(model, root, name.removesuffix("_config"), config, ())


def _single(model: PreTrainedModel) -> Iterator[Stack]:
    name = READ_BY.get(model.main_input_name, "encoder")
    pair = next((p for p in PAIRS if all(isinstance(getattr(model.config, f, None), int) for f in p)), None)
    # the encoder alone of a config that was made for a decoder too
    fields = _all_names(model.config, pair, 0) if pair is not None else ()
    yield from _in(model, model, name, model.config, fields)


def _in(
    model: PreTrainedModel, root: nn.Module, name: str, config: PreTrainedConfig, fields: tuple[str, ...]
) -> Iterator[Stack]:
    depth = getattr(config, (fields or depth_fields(config))[0], None)
    for strict in (True, False):
        hits = layer_lists(root, depth, strict) if isinstance(depth, int) else []
        if len(hits) == 1:
            owner, attr = hits[0]
            yield Stack(name, path_of(model, owner, attr), owner, attr, config, fields)
            return
