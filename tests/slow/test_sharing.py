"""Shared keys and values and shared attention maps on the built-in model and text: what `docs/sharing.md` claims."""

from __future__ import annotations

from typing import Any

import pytest

from shoal.api.assess import text_of
from shoal.data import Data
from shoal.evaluation import perplexity
from shoal.fitting.result import Job
from shoal.live import running
from shoal.models.load import Loaded, load
from shoal.plan import Plan
from shoal.registry import get

SEVEN = "4-5+7-8+9-10+11-12+13-14+25-26+28-29"


@pytest.fixture(scope="module")
def smollm2() -> Loaded:
    return load("smollm2", dtype="float32")


@pytest.fixture(scope="module")
def texts(smollm2: Loaded) -> tuple[Data, Data]:
    fitted = text_of(smollm2, "builtin", split="calibrate", length=512, limit=8)
    return fitted, text_of(smollm2, "builtin", split="test", length=512, limit=3)


def worth(loaded: Loaded, texts: tuple[Data, Data], name: str, **options: Any) -> float:
    """Perplexity on the test text after the transform."""
    job = Job(loaded.model, texts[0], Plan.identity(loaded.opened.spec))
    made = get("transforms", name).load()(job, **options)
    with running(loaded.model, made.plan, made.weights):
        return perplexity(loaded.model, texts[1]).value


def test_aligned_keys_and_values_are_far_better_than_averages(smollm2: Loaded, texts: tuple[Data, Data]) -> None:
    dense = perplexity(smollm2.model, texts[1]).value
    seven = {how: worth(smollm2, texts, "share-kv", pairs=SEVEN, how=how) for how in ("aligned", "average")}
    assert seven["aligned"] < 2 * dense
    assert seven["aligned"] < 0.6 * seven["average"]
    whole = {how: worth(smollm2, texts, "share-kv", how=how) for how in ("aligned", "average")}
    assert whole["aligned"] < whole["average"] / 10


def test_matched_heads_are_better_than_heads_in_their_order(smollm2: Loaded, texts: tuple[Data, Data]) -> None:
    pairs = "9-10+11-12+13-14+15-16+17-18+19-20+21-22+23-24"
    found = {how: worth(smollm2, texts, "share-maps", pairs=pairs, matched=how) for how in (True, False)}
    assert found[True] < 0.75 * found[False]
