"""A model whose layers stay in its files: each is read when it runs and dropped afterwards, by accelerate's hooks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from shoal.errors import ModelError
from shoal.models.lists import Stack
from shoal.models.quantised import described_quantisation, quantisation_settings
from shoal.models.stacks import find_stacks


def require_streamable(source: str, dtype: Any, config: PreTrainedConfig) -> None:
    """Raise M340 where accelerate is missing, M341 for another dtype than the checkpoint's, which would be a copy of
    the whole model, M391 for a quantised model."""
    refuse_packed(source, config)
    if find_spec("accelerate") is None:
        raise ModelError(
            f"streaming {source} needs the package accelerate; run: pip install 'shoal[stream]'", code="M340"
        )
    if dtype not in (None, "auto"):
        raise ModelError(
            f"the layers of {source} are read as its files hold them, not as {dtype}; leave out the dtype", code="M341"
        )


def refuse_packed(source: str, config: PreTrainedConfig) -> None:
    """Raise M391 for a quantised model whose layers should lie in files: quantisers pack whole models."""
    if (settings := quantisation_settings(config)) is not None:
        raise ModelError(
            f"{source} is quantised ({described_quantisation(settings)}), and quantised layers are not read from their "
            "files one by one; leave out --stream (and disk in the device map), or give the model before it was "
            "quantised",
            code="M391",
        )


def device_map(structure: PreTrainedModel, device: str) -> dict[str, str]:
    """Module or parameter -> `device`, or disk for every layer of every stack; `structure` is the model on meta."""
    layers = {id(stack.layer(i)) for stack in find_stacks(structure) for i in range(stack.depth)}
    found: dict[str, str] = {}

    def visit(module: nn.Module, name: str) -> None:
        inside = any(id(child) in layers for child in module.modules())
        if id(module) in layers or (name and not inside):
            found[name] = "disk" if id(module) in layers else device
            return
        prefix = f"{name}." if name else ""
        own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        found.update({prefix + child: device for child, _ in own})
        for child, inner in module.named_children():
            visit(inner, prefix + child)

    visit(structure, "")
    return found


def is_streamed(stack: Stack) -> bool:
    """Whether the layers of the stack lie elsewhere and are read whenever they run."""
    return all(_hooks(stack.layer(i)) for i in range(stack.depth))


def is_hooked(layer: nn.Module) -> bool:
    """Whether accelerate brings weights of the layer in for its calls, be they here or not."""
    return any(getattr(hook, "weights_map", None) is not None for _, hook in _all_hooks(layer))


@contextmanager
def weights_loaded(layer: nn.Module) -> Iterator[None]:
    """Until the end of the block the weights of an offloaded layer are in memory, read once however often it runs."""
    with ExitStack() as stack:
        for module, hook in _hooks(layer):
            hook.pre_forward(module)
            stack.callback(hook.post_forward, module, None)
            hook.offload = False
            # undone first: what is marked as not offloaded is not dropped
            stack.callback(setattr, hook, "offload", True)
        yield


def parameters_of(layer: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of a layer by name; those of an offloaded one are read, and held for as long as they are used."""
    with weights_loaded(layer):
        return dict(layer.named_parameters())


def _hooks(layer: nn.Module) -> list[tuple[nn.Module, Any]]:
    """The modules whose own tensors are offloaded, with the hook that fetches them."""
    return [(module, hook) for module, hook in _all_hooks(layer) if getattr(hook, "offload", False)]


def _all_hooks(layer: nn.Module) -> Iterator[tuple[nn.Module, Any]]:
    for module in layer.modules():
        hook = module.__dict__.get("_hf_hook")
        yield from ((module, one) for one in getattr(hook, "hooks", (hook,)))
