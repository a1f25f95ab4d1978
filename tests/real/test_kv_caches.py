"""Compressing caches on the built-in model, through what users call."""

from __future__ import annotations

import json
from typing import Any

import torch
from typer.testing import CliRunner

import shoal
from shoal.cli import app
from shoal.compressing.cache import make_cache
from shoal.evaluation.memory import values_held

PROMPT = "The capital of France is"


@torch.no_grad()
def test_seven_pairs_hold_what_they_say(smollm2: Any) -> None:
    model = smollm2.model
    ids = torch.randint(0, 49152, (1, 256), generator=torch.Generator().manual_seed(0)).to(model.device)
    plain = model.model(ids, use_cache=True).past_key_values
    cache = make_cache(model, "minicache:start=16,keep=0.05")
    model.model(ids, past_key_values=cache, use_cache=True)
    assert (values_held(cache), values_held(plain)) == (2_352_384, 2_949_120)
    assert sum(getattr(row, "whole", 2 * row.keys.numel()) for row in cache.layers) == 2_949_120


def test_generate_writes_over_a_compressing_cache(smollm2: Any) -> None:
    plain = shoal.generate(smollm2, PROMPT, chat=False, max_new_tokens=6)
    null = shoal.generate(smollm2, PROMPT, chat=False, max_new_tokens=6, kv_cache="minicache:start=16,keep=1")
    assert null.text == plain.text and null.kv_cache == "minicache:start=16,keep=1" and plain.kv_cache is None
    both = shoal.generate(
        smollm2, PROMPT, plan="0-11,14-29", chat=False, max_new_tokens=6, kv_cache="minicache:start=14"
    )
    assert both.tokens > 0


def test_the_command_line_scores_behind_a_compressed_prefix() -> None:
    words = ["evaluate", "smollm2", "--limit", "1", "--window", "64", "-q", "--kv-cache"]
    said = json.loads(CliRunner().invoke(app, [*words, "minicache:start=16", "--json"]).stdout)
    assert said["kv"]["whole"] == 32 * 11_520 and 0.7 < said["kv"]["values"] / said["kv"]["whole"] < 0.9
    assert said["perplexity"]["tokens"] == 31 and "generation" not in said
    assert "KV values held" in CliRunner().invoke(app, [*words, "shared-basis:rank=8"]).stdout
    assert CliRunner().invoke(app, [*words, "minicache:start=30"]).exit_code == 1
