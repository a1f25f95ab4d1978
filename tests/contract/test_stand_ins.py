"""Stand-ins from the command line and from Python: chosen by name, fitted, kept with the plan, run again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from shoal.api.assess import evaluate
from shoal.api.inspection import inspect, show
from shoal.api.prune import prune
from shoal.api.pruned import Pruned
from shoal.api.stand_ins import parse_then
from shoal.errors import UsageError, WriteError
from shoal.executing.weights import load_weights
from shoal.live import running
from shoal.models.load import Loaded
from shoal.plan import load_plan

from .families import tiny
from .planted import random_data
from .test_api import folder  # noqa: F401
from .test_cli import SMALL, shoal


def pruned(*then: str, **options: Any) -> Pruned:
    return prune(Loaded(tiny("llama"), None, "tiny"), drop=1, data=random_data(8, 16), then=then, batch=2, **options)


def test_transforms_come_after_the_method_in_order() -> None:
    found = pruned("linear-map:ridge=0.01,bias=false", "parallel-pairs:first=0,last=1", writable=False)
    (gone,) = found.plan.dropped() or (found.plan.steps()[-1],)
    assert [one["transform"] for one in found.then] == [
        "linear-map:ridge=0.01,bias=false",
        "parallel-pairs:first=0,last=1",
    ]
    assert found.then[0]["fits"][0]["stand_in"] < found.then[0]["fits"][0]["drop"], gone
    assert not any(name.endswith(".bias") for name in found.found.weights)
    with running(found.loaded.model, found.plan, found.found.weights), torch.no_grad():
        assert torch.isfinite(found.loaded.model(input_ids=random_data(1, 8).ids).logits).all()
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["weights"]


def test_a_plan_that_comes_with_weights_is_evaluated_with_them() -> None:
    found, text = pruned("refit"), random_data(4, 16, seed=3)
    model = found.loaded
    with_weights = evaluate(model, plan=found.plan, weights=found.found.weights, data=text, generation=False)
    dropped = evaluate(model, plan=f"{pruned().plan}", data=text, generation=False)
    assert with_weights.perplexity.value != dropped.perplexity.value
    again = prune(model, plan=found.plan, weights=found.found.weights)
    assert again.found.weights.keys() == found.found.weights.keys()
    assert "refit" in str(show(found.plan, inspect(model), found.found.weights)["weights"])


def test_what_only_runs_live_is_not_written() -> None:
    with pytest.raises(WriteError, match=r"W204: .* drop"):
        pruned("linear-map")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("refti", r"no transform 'refti' \(did you mean refit\?\)"),
        ("refit:rigde=1", "did you mean ridge"),
        ("refit:ridge=much", "is not of type float"),
        ("refit:", "gives no option"),
    ],
)
def test_a_mistake_in_a_transform_is_found_before_the_search(text: str, why: str) -> None:
    with pytest.raises(UsageError, match=why):
        parse_then([text])
    with pytest.raises(UsageError, match=why):
        pruned(text)


def test_fuse_keeps_a_plan_that_every_verb_takes(folder: Path, tmp_path: Path) -> None:  # noqa: F811
    model, kept = str(folder), tmp_path / "kept"
    words = [model, "--plan", "0-1,3-4", "--with", "linear-map", *SMALL, "--no-assess", "--save-plan", str(kept)]
    said = json.loads(shoal("fuse", *words, "--json", "-q"))
    assert said["plan"] == "0-1,~2,3-4" == str(load_plan(kept))
    assert load_weights(kept).keys() == said["weights"].keys() and said["then"][0]["fits"]
    small = ["--window", "32", "--limit", "2", "--no-generation", "--json"]
    evaluated = json.loads(shoal("evaluate", model, "--plan", str(kept), *small))
    assert evaluated["agreement"]["kl"] >= 0
    assert "new weights map-2-2.weight" in shoal("show", str(kept))
    assert "written_params" in shoal("show", str(kept), "--model", model)
    shoal("generate", model, "Once", "--plan", str(kept), "--max-new-tokens", "2", "--raw")
    assert "W204" in shoal("write", model, "--plan", str(kept), "--output", str(tmp_path / "out"), code=1)
    assert not (tmp_path / "out").exists()
    assert "W204" in shoal("write", model, "--plan", str(kept), "--output", str(tmp_path / "o"), "--stream", code=1)
    assert "U523" in shoal("fuse", model, "--plan", "0-1,3-4", code=1)
    assert "U501" in shoal("prune", model, "--drop", "1", "--then", "slrep", code=1)


def test_fuse_shares_keys_values_and_maps_without_a_plan(folder: Path, tmp_path: Path) -> None:  # noqa: F811
    model, kv, maps = str(folder), tmp_path / "kv", tmp_path / "maps"
    words = [model, *SMALL, "--no-assess", "--json", "-q"]
    said = json.loads(shoal("fuse", *words, "--with", "share-kv:pattern=pairs", "--output", str(kv)))
    assert said["output"] == str(kv) and str(load_plan(kv / "shoal" / "plan.json")) == said["plan"]
    assert said["plan"].startswith("0:share-kv-0,1@0:share-kv-1,2:share-kv-2,3@2:share-kv-3")
    assert said["cost"]["pruned"]["kv_per_token"] < said["cost"]["dense"]["kv_per_token"]
    assert load_weights(kv).keys() == said["weights"].keys() and (kv / "shoal" / "records.jsonl").is_file()
    assert not (kv / "config.json").exists(), "no stock class holds the plan"
    shoal("generate", model, "Once", "--plan", str(kv), "--max-new-tokens", "2", "--raw")
    assert "exists" in shoal("fuse", *words, "--with", "share-kv", "--output", str(kv), code=1)
    shoal("fuse", *words, "--with", "share-maps:span=2-3", "--output", str(maps))
    assert str(load_plan(maps / "shoal" / "plan.json")).startswith("0-1,2@a1")
    assert "U667" in shoal("fuse", *words, "--with", "share-maps:span=9-12", code=1)
    assert "U523" in shoal("fuse", *words, "--with", "share-kv", "--with", "refit", code=1)
