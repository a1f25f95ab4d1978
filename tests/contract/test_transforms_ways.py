"""What every transform makes runs right in every way: whole, over dynamic, static and paged caches, alone and
left-padded, in the causal families.

The reference is the plan's own uncached forward, and of each sentence alone where the stock model is the same there;
whether that is right is other tests' business. A way that the stock model itself does not have is left out.
"""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import pytest
import torch

from shoal.errors import ShoalError
from shoal.fitting.result import Transformed
from shoal.live import apply, running
from shoal.models.inspect import inspect
from shoal.plan import check, shapes_of

from .families import tiny
from .matrix import LENGTH, WAYS, _baseline, _batch, _cached, _uncached
from .shares import pairs
from .transform_jobs import EXAMPLES, HOLE, SHORT, do, job

FAMILIES = (
    "llama", "gpt2", "opt", "qwen2", "gemma3_text", "olmo2", "phi3", "stablelm", "cohere2", "gpt_neox", "granite",
    "mixtral",
)  # fmt: skip
ABSOLUTE = ("gpt2",)
"""Families that count positions from the first column, padding included, unless they are told them."""
CLOSE = {"atol": 1e-4, "rtol": 1e-4}
PREPARED = {"relax": "tie"}
"""Transforms that change what another one makes."""


@cache
def made(name: str, family: str) -> Transformed | str:
    """The result on the tiny model, or the code with which the family is refused."""
    model = tiny(family)
    removed = [] if EXAMPLES[name].role == "other" else [HOLE]
    given = job(model, removed)
    try:
        if name in PREPARED:
            first = do(PREPARED[name], given)
            given = type(given)(model, given.data, first.plan, first.weights, batch=4)
        return do(name, given, **SHORT[name])
    except ShoalError as error:
        return error.code


@pytest.mark.parametrize(("name", "family"), pairs(7, sorted(EXAMPLES), FAMILIES, step=5))
def test_a_transform_is_right_in_every_way(name: str, family: str) -> None:
    found, model = made(name, family), tiny(family)
    if isinstance(found, str):
        pytest.skip(f"{name} refuses {family}: {found}")
    assert not check(found.plan, inspect(model), shapes_of(found.weights))
    try:
        apply(model, found.plan, found.weights).restore()
    except ShoalError as error:
        pytest.skip(f"what {name} makes is refused on {family}: {error.code}")
    lacking = {(family, *way) for way in WAYS if _baseline(family, "sdpa", *way) is not None}
    with running(model, found.plan, found.weights):
        for cache_kind, batch_kind in WAYS:
            batch = _batch(batch_kind)
            seen = batch["attention_mask"].bool()
            want = _uncached(model, batch)[seen]
            if family not in ABSOLUTE:
                torch.testing.assert_close(_alone(model, batch), want, **CLOSE)
            if (family, cache_kind, batch_kind) in lacking:
                continue
            try:
                steps = _cached(model, batch, cache_kind)
            except ShoalError:
                if cache_kind != "paged":  # what pages cannot hold is refused there, by name
                    raise
                continue
            torch.testing.assert_close(steps[seen], want, **CLOSE, msg=partial("{}: {}".format, cache_kind))


def _alone(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The logits of the real tokens, each sentence on its own, [tokens, vocabulary]."""
    rows = zip(batch["input_ids"], batch["attention_mask"].bool(), strict=True)
    with torch.no_grad():
        return torch.cat([model(input_ids=ids[mask][None], use_cache=False).logits[0] for ids, mask in rows])


def test_the_families_and_ways_are_as_many_as_we_say() -> None:
    assert len(FAMILIES) >= 12
    assert {kind for kind, _ in WAYS} == {"dynamic", "static", "paged"} and LENGTH > 8
