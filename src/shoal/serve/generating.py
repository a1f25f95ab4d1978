"""What the engine runs: one function that writes for one request, made by a context that prepares the model.

Another way of writing (a policy, self-speculation) is another context of this shape: it prepares the model and yields
`calling(...)` with its own `generate` and, when it counts more than tokens, its own `counts`.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from shoal.api.assess import planned
from shoal.compressing.cache import cache_to_write
from shoal.decoding.arguments import sampling, stopping
from shoal.decoding.decoder import Decoder
from shoal.decoding.listening import NewTokens, OnTokens
from shoal.executing.weights import Tensors
from shoal.models.calls import device_of
from shoal.models.evaluating import evaluating
from shoal.models.load import Loaded
from shoal.plan import Plan


@dataclass(frozen=True)
class GenerationRequest:
    """What one request wants written. A temperature of 0 takes the likeliest token; no seed draws one."""

    ids: tuple[int, ...]
    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class GenerationCounts:
    """What a way of writing counted over one request beside its tokens; None for what it does not count.

    `layers`: executed layers, summed over the generated tokens, a layer without its mlp as a half. `drafted`,
    `accepted`: tokens that a draft proposed, and those of them that were kept.
    """

    layers: float | None = None
    drafted: int | None = None
    accepted: int | None = None


Generate = Callable[[GenerationRequest, OnTokens], GenerationCounts]
"""Writes for one request, hands over each new token at once, and stops within a token when told to."""


def at_once_of(generate: Generate) -> int:
    """How many calls of a way of writing may run at the same time: what its attribute `at_once` says, else 1."""
    found: int = getattr(generate, "at_once", 1)
    return found


Prepare = Callable[[], AbstractContextManager[Generate]]
"""Entered by the thread that generates, once, before the first request, and left after the last."""


def settings(request: GenerationRequest) -> dict[str, Any]:
    """The arguments of transformers' `generate` for this request; whatever else the model's own generation config says
    (a repetition penalty) stays."""
    return sampling(request.temperature, top_p=float(request.top_p), top_k=0) | {
        "max_new_tokens": request.max_new_tokens
    }


def _nothing(request: GenerationRequest) -> GenerationCounts:
    return GenerationCounts()


def calling(
    generate: Callable[..., Any],
    loaded: Loaded,
    *,
    counts: Callable[[GenerationRequest], GenerationCounts] = _nothing,
) -> Generate:
    """A `Generate` that calls `generate` of `loaded` as one calls transformers' own: `input_ids` and `attention_mask`
    [1, tokens], `settings` and a stopping criterion. `counts` is asked after each request for what that one
    request counted."""
    device, stops = device_of(loaded.model), stopping(loaded.model, loaded.tokenizer)

    def write(request: GenerationRequest, on_tokens: OnTokens) -> GenerationCounts:
        ids = torch.tensor([request.ids], dtype=torch.long, device=device)
        torch.manual_seed(secrets.randbits(63) if request.seed is None else request.seed)
        generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            stopping_criteria=[NewTokens(len(request.ids), on_tokens)],
            **settings(request),
            **stops,
        )
        return counts(request)

    return write


def under_plan(
    loaded: Loaded,
    plan: Plan | str | None = None,
    weights: Tensors | None = None,
    *,
    compiled: int | None = None,
    kv_cache: str | None = None,
) -> Prepare:
    """The model's own `generate`, with `plan` (and the tensors that it names) running when one is given.

    `compiled`: tokens of prompt and answer up to which layers are compiled, all of it before the first request; None
    compiles nothing. `kv_cache`: each request has a compressing cache of its own, as `minicache:start=16`. Entering it
    raises `PlanError` (P1xx) for a plan that cannot run, U563 or U564 for a model that cannot be compiled, and what
    `cache_to_write` raises.
    """

    @contextmanager
    def prepare() -> Iterator[Generate]:
        with planned(loaded.model, plan, weights)() as model, evaluating(model):
            decoder = Decoder(model, compiled=compiled is not None)
            if compiled is not None:
                decoder.prepare(compiled)
            yield calling(decoder.generate if kv_cache is None else _compressing(decoder, kv_cache), loaded)

    return prepare


def _compressing(decoder: Decoder, kv_cache: str) -> Callable[..., Any]:
    """The decoder's `generate` with a new compressing cache for each text."""
    cache_to_write(decoder.model, kv_cache, torch.zeros((1, 1), dtype=torch.long))  # refused before the first request

    def generate(*, input_ids: torch.Tensor, **more: Any) -> Any:
        cache = cache_to_write(decoder.model, kv_cache, input_ids)
        return decoder.generate(input_ids=input_ids, past_key_values=cache, **more)

    return generate
