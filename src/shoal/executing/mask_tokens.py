"""Embeddings of tokens that are not known yet: what stands in their place at the bottom of the model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from shoal.models.calls import device_of
from shoal.models.evaluating import evaluating
from shoal.plan.around import MASKS

_CHUNK = 4096
"""Tokens whose embeddings are averaged at a time."""


@contextmanager
def masked(model: Any, columns: torch.Tensor, vectors: torch.Tensor) -> Iterator[None]:
    """Until the end of the block the embedding of the token at each place of `columns`, int64 [batch, tokens], is
    `vectors`[column], [n, hidden]; where the column is -1 it is the token's own. Gradients flow to `vectors`."""

    def replaced(_: nn.Module, __: Any, out: torch.Tensor) -> torch.Tensor:
        at = columns.to(out.device)
        return torch.where((at >= 0)[..., None], vectors.to(out.device, out.dtype)[at.clamp(min=0)], out)

    handle = model.get_input_embeddings().register_forward_hook(replaced)
    try:
        yield
    finally:
        handle.remove()


def mean_embedding(model: Any) -> torch.Tensor:
    """The mean over the vocabulary of what the embedding makes of a token, float32 [hidden]."""
    embedding = model.get_input_embeddings()
    tokens = torch.arange(model.config.get_text_config(decoder=True).vocab_size, device=device_of(model))
    with evaluating(model):
        sums = [embedding(part[None])[0].float().sum(0) for part in tokens.split(_CHUNK)]
    return torch.stack(sums).sum(0) / len(tokens)


def masks_in(tensors: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
    """Those among the tensors of a plan, [n, hidden]; None where it has none."""
    return next((tensor for name, tensor in tensors.items() if name.endswith(f".{MASKS}")), None)
