"""One pass over data, watching what goes into each layer and what comes out; nothing is kept but what the watcher keeps."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from shoal.models.stacks import find_stack, unwrap

Watch = Callable[[int, torch.Tensor, torch.Tensor], None]
"""Called with the base layer, its input and its output, each [batch, length, hidden], in the order of execution."""



@torch.no_grad()
def observe(
    model: nn.Module,
    batches: Iterable[tuple[torch.Tensor, torch.Tensor | None]],
    watch: Watch,
    *,
    before: Callable[[torch.Tensor, torch.Tensor | None], None],
    stack: str | None = None,
) -> None:
    """Run `model` without its head on every batch of (ids, mask), [batch, length] each, and call `watch` at every layer.

    `before` is called with each batch before it runs. Works on the model as it is, a running plan included.
    """
    inner = unwrap(model)
    found = find_stack(inner, stack)
    handles = [found.layer(index).register_forward_hook(_hook(index, watch), with_kwargs=True) for index in range(found.depth)]
    training = [module for module in inner.modules() if module.training]
    inner.eval()
    # the head is the dearest matrix of a small model and no layer needs it
    backbone = inner.base_model
    device = inner.get_input_embeddings().weight.device
    try:
        for ids, mask in batches:
            before(ids, mask)
            attention = {} if mask is None else {"attention_mask": mask.to(device)}
            backbone(input_ids=ids.to(device), use_cache=False, **attention)
    finally:
        for handle in handles:
            handle.remove()
        for module in training:
            module.training = True


def _hook(index: int, watch: Watch) -> Callable[..., None]:
    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        watch(index, args[0] if args else kwargs["hidden_states"], out[0] if isinstance(out, tuple) else out)

    return hook
