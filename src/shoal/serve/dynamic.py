"""Ways of writing whose depth is decided at run time: under a policy, and with a draft."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from shoal.decoding.decoder import Decoder
from shoal.executing.weights import Tensors
from shoal.live import running
from shoal.models.evaluating import evaluating
from shoal.models.load import Loaded
from shoal.plan import Plan
from shoal.serve.batched import batched, where_it_fits
from shoal.serve.generating import Generate, GenerationCounts, GenerationRequest, Prepare, calling, under_plan
from shoal.speculating.speculator import Speculator

AT_ONCE = 16
"""Requests in one forward, where nobody says how many."""


def tokens_cached(at_once: int | None, positions: int | None, asked: int | None) -> int:
    """Tokens for whose keys and values a server of `at_once` requests makes room: 1024 for each, and all of the longest
    text where the user has `asked` for its length."""
    usual = (AT_ONCE if at_once is None else at_once) * 1024
    return usual if asked is None else max(usual, positions or asked)


def under_policy(
    loaded: Loaded, policy: Any, plan: Plan | str | None = None, weights: Tensors | None = None
) -> Prepare:
    """The model's own `generate` under `policy`, as `exit:confidence=0.9` or an object. Entering it raises `PlanError`
    (P1xx) for a policy that cannot decide on this model or plan."""

    @contextmanager
    def prepare() -> Iterator[Generate]:
        base = Plan.identity(loaded.opened.spec) if plan is None else plan
        with running(loaded.model, base, weights, policy=policy) as handle, evaluating(loaded.model):

            def counts(request: GenerationRequest) -> GenerationCounts:
                # the last column of the prompt decides the first token, and the last token is never read
                return GenerationCounts(layers=sum(handle.trace.depths[0][len(request.ids) - 1 :]))

            yield calling(Decoder(loaded.model).generate, loaded, counts=counts)

    return prepare


def drafted(loaded: Loaded, draft: str, **options: Any) -> Prepare:
    """The text of the model alone, written by self-speculation with `draft`, as `exit:8`; `options` are those of
    `Speculator`. Raises what it raises, here already."""
    speculator = Speculator(loaded.model, draft, **options)

    def counts(request: GenerationRequest) -> GenerationCounts:
        stats = speculator.stats
        behind = stats.layers_per_token
        layers = None if behind is None else stats.depth + round(behind * (stats.tokens - 1))
        return GenerationCounts(layers=layers, drafted=stats.drafted, accepted=stats.accepted)

    @contextmanager
    def prepare() -> Iterator[Generate]:
        with evaluating(loaded.model):
            yield calling(speculator.generate, loaded, counts=counts)

    return prepare


def chosen_way(
    loaded: Loaded,
    plan: Plan | None,
    weights: Tensors | None,
    *,
    policy: str | None = None,
    draft: str | None = None,
    compiled: int | None = None,
    kv_cache: str | None = None,
    at_once: int | None = 1,
    cached: int = 0,
) -> Prepare:
    """What the options of `shoal serve` ask for: a plan, with compiled layers, a compressing KV cache or neither, a
    policy on it, or a draft for the whole model. `at_once`: requests in one forward, with a plan alone; None: as many
    as usual where that fits the model. `cached`: see `batched`."""
    if draft is not None:
        return drafted(loaded, draft)
    if policy is not None:
        return under_policy(loaded, policy, plan, weights)
    if compiled is not None or kv_cache is not None or at_once == 1:
        return under_plan(loaded, plan, weights, compiled=compiled, kv_cache=kv_cache)
    if at_once is None:
        return where_it_fits(loaded, plan, weights, at_once=AT_ONCE, cached=cached)
    return batched(loaded, plan, weights, at_once=at_once, cached=cached)
