"""Lists of layers inside a module: what a stack is made of."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedConfig
from transformers.modeling_layers import GradientCheckpointingLayer

BESIDE = "shoal"
"""Under this name a model holds the modules of a plan that learns (`shoal.executing.modules`): they are none of its
own, and nothing that is found out about the model looks at them."""


def beside(model: nn.Module) -> set[int]:
    """The identities of the modules that a model holds for a plan."""
    held = model._modules.get(BESIDE)
    return set() if held is None else {id(module) for module in held.modules()}


@dataclass(frozen=True)
class Stack:
    """One list of layers inside a model: `getattr(owner, attr)` is the `nn.ModuleList` called `path`."""

    name: str
    path: str
    owner: nn.Module
    attr: str
    config: PreTrainedConfig
    """The model's config or one inside it: where the depth is written."""
    fields: tuple[str, ...] = ()
    """The fields of `config` that hold the depth, where `shoal.models.depth.depth_fields` means another stack."""

    @property
    def layers(self) -> nn.ModuleList:
        """The list as it is now, a running plan's stand-in included."""
        found = getattr(self.owner, self.attr)
        assert isinstance(found, nn.ModuleList)
        return found

    def layer(self, index: int) -> nn.Module:
        """The real layer with this base index."""
        found = self.layers._modules[str(index)]
        assert found is not None
        return found

    @property
    def depth(self) -> int:
        return len(self.layers._modules)


def multiplied(layer: nn.Module) -> dict[str, tuple[int, ...]]:
    """The shapes of the matrices of a layer by name, without tables that are looked up (`nn.Embedding`: T5's bias by
    position): of these another stack has others, as it counts positions in another way."""
    tables = {id(p) for module in layer.modules() if isinstance(module, nn.Embedding) for p in module.parameters()}
    held = layer.named_parameters(remove_duplicate=False)
    return {name: tuple(p.shape) for name, p in held if p.dim() > 1 and id(p) not in tables}


def layer_lists(root: nn.Module, depth: int | None, strict: bool) -> list[tuple[nn.Module, str]]:
    """(owner, attribute) of every list of `depth` layers; lists inside another hit (experts) are left out. `strict`:
    only lists of `GradientCheckpointingLayer`s."""
    hits: list[tuple[nn.Module, str]] = []
    inside = beside(root)
    for module in root.modules():
        for attr, child in module.named_children() if id(module) not in inside else ():
            if not isinstance(child, nn.ModuleList) or len(child._modules) != depth or id(child) in inside:
                continue
            members = list(child._modules.values())
            if all(isinstance(m, GradientCheckpointingLayer) if strict else _has_children(m) for m in members):
                hits.append((module, attr))
                inside |= {id(m) for m in child.modules()}
    return hits


def _has_children(module: nn.Module | None) -> bool:
    return module is not None and len(list(module.children())) > 1


def path_of(model: nn.Module, owner: nn.Module, attr: str) -> str:
    """The name of the list `attr` of `owner` inside `model`."""
    prefix = next(name for name, module in model.named_modules() if module is owner)
    return f"{prefix}.{attr}" if prefix else attr
