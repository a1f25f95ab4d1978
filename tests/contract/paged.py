"""Forwards over the paged KV cache of transformers' continuous batching, as `generate_batch` makes them."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.generation import ContinuousBatchingConfig
from transformers.generation.continuous_batching import PagedAttentionCache, RequestState
from transformers.generation.continuous_batching.distributed import DistributedHelper
from transformers.generation.continuous_batching.input_outputs import ContinuousBatchingIOs
from transformers.generation.continuous_batching.requests import FutureRequestState

from shoal.executing.layer_list import LayerProxyList
from shoal.executing.paged import Pages

SIZES = {
    "num_blocks": 16,
    "page_size": 4,
    "max_batch_tokens": 32,
    "max_requests_per_batch": 4,
    "max_memory_percent": 0.5,
}
NO_PROCESSORS = SimpleNamespace(tensors_required=0, fill_defaults=lambda _: None, prepare_tensor_args=lambda **_: None)


@contextmanager
def paged_attention(model: PreTrainedModel) -> Iterator[None]:
    """Eager attention reads a paged cache under another name."""
    before = model.config._attn_implementation
    if before == "eager":
        model.set_attn_implementation("paged|eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@torch.no_grad()
def paged_logits(model: PreTrainedModel, batch: dict[str, torch.Tensor], ends: list[int]) -> torch.Tensor:
    """Logits [batch, tokens, vocabulary] of left-padded `batch`, each row a request, in passes that end at `ends`.

    All requests are packed into one sequence of a pass, without padding; logits of padding are 0.
    """
    with paged_attention(model):
        return _passes(model, batch["input_ids"], batch["attention_mask"].bool(), ends)


def _passes(model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor, ends: list[int]) -> torch.Tensor:
    config = _text_config(model)
    settings = ContinuousBatchingConfig(**SIZES, max_blocks_per_request=0, use_cuda_graph=(False, False))
    pages = planned_pages(model)
    config = config if pages is None else pages.config(config)
    cache = PagedAttentionCache(config, settings, model.device, DistributedHelper(None, 300, {}), model.dtype)
    if pages is not None:
        pages.own(cache)
    inputs = ContinuousBatchingIOs(cache, config, settings, model.device, model.dtype, NO_PROCESSORS)
    requests = [RequestState(str(row), ids[row, mask[row]].tolist()) for row in range(len(ids))]
    out: list[torch.Tensor] = []
    start = 0
    for end in ends:
        counts = mask[:, start:end].sum(1).tolist()
        for request, count in zip(requests, counts, strict=True):
            at = request.position_offset
            request.tokens_to_process = request.initial_tokens[at : at + count]
            assert cache.can_store_request_tokens(request, count)
        ready = [FutureRequestState(r, True, {}, n) for r, n in zip(requests, counts, strict=True)]
        inputs.prepare_batch_tensors(ready, NO_PROCESSORS, False, sum(counts), start * len(ids), False)
        packed = model(**inputs.get_model_kwargs()).logits[0]
        step = packed.new_zeros(len(ids), end - start, packed.shape[-1])
        step[mask[:, start:end]] = packed
        out.append(step)
        start = end
    return torch.cat(out, 1)


def planned_pages(model: PreTrainedModel) -> Pages | None:
    """The rows that a cache is given which is made while the running plan is there; None without a plan."""
    planned = [one for one in model.modules() if isinstance(one, LayerProxyList)]
    return planned[0].executor.pages if planned else None


def _text_config(model: PreTrainedModel) -> Any:
    """The config that sizes the pages; our tiny ones name KV heads in families that have none of their own."""
    config = copy.deepcopy(model.config.get_text_config())
    if not hasattr(type(config)(), "num_key_value_heads"):
        del config.num_key_value_heads
    return config
