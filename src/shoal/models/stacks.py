"""Where a model keeps its layers, found by probing; exceptions are data in `families/`."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from shoal.errors import ModelError
from shoal.models.depth import depth_of
from shoal.models.families import family_of
from shoal.models.kinds import is_causal
from shoal.models.lists import Stack, layer_lists, path_of
from shoal.models.named_stacks import named_stacks

__all__ = ["Stack", "find_stack", "find_stacks", "unwrap"]


def unwrap(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside a PEFT wrapper or what torch.compile made of it, or the model itself. Raises M301
    for anything else."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    inner = getattr(inner, "_orig_mod", inner)
    if not isinstance(inner, PreTrainedModel):
        raise ModelError(
            f"{type(model).__name__} is not a transformers model; load it with shoal.load or an Auto class", code="M301"
        )
    return inner


def find_stacks(model: nn.Module) -> tuple[Stack, ...]:
    """The stacks of a model. Causal language models have one, called decoder; others see `named_stacks`. Raises M302
    when none can be found.

    Rule for causal models: inside `get_decoder()`, the only `nn.ModuleList` of as many `GradientCheckpointingLayer`s as
    the text config has layers (right for 160 of 171 causal families of transformers 5.23, never two hits); then the
    same without asking for the class; then the same in the whole model. A family file may name the path instead.
    """
    inner = unwrap(model)
    if not is_causal(inner):
        return named_stacks(inner)
    config = inner.config.get_text_config(decoder=True)
    family = family_of(config)
    if family.refused is not None:
        raise ModelError(f"{config.model_type} models cannot be planned: {family.refused}", code="M303")
    if family.stack_path is not None:
        owner_path, _, attr = family.stack_path.rpartition(".")
        return (Stack("decoder", family.stack_path, inner.get_submodule(owner_path), attr, config),)
    depth = depth_of(config)
    hits = [
        hit
        for root in (inner.get_decoder(), inner)
        for strict in (True, False)
        if root is not None
        for hit in (layer_lists(root, depth, strict),)
        if len(hit) == 1
    ]
    if not hits:
        raise ModelError(
            f"cannot find the layers of {type(inner).__name__}: no single list of {depth} layers in it; "
            "add a file to shoal/models/families that names the path",
            code="M302",
        )
    owner, attr = hits[0][0]
    return (Stack("decoder", path_of(inner, owner, attr), owner, attr, config),)


def find_stack(model: nn.Module, name: str | None = None) -> Stack:
    """The stack called `name`; without a name the decoder, or the only one. Raises M304 for an unknown name."""
    stacks = {stack.name: stack for stack in find_stacks(model)}
    wanted = name or ("decoder" if "decoder" in stacks else next(iter(stacks)))
    if wanted not in stacks:
        raise ModelError(f"the model has no stack {wanted!r}; it has {', '.join(stacks)}", code="M304")
    return stacks[wanted]
