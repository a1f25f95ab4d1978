"""A policy on the built-in model, through what users call."""

from __future__ import annotations

import json
from typing import Any

from typer.testing import CliRunner

import shoal
from shoal.cli import app

PROMPT = "The capital of France is"


def test_generate_under_a_policy_says_how_deep_each_token_went(smollm2: Any) -> None:
    plain = shoal.generate(smollm2, PROMPT, chat=False, max_new_tokens=6)
    never = shoal.generate(smollm2, PROMPT, policy="exit:confidence=1,layers=20", chat=False, max_new_tokens=6)
    assert never.text == plain.text
    assert plain.trace is None
    assert never.trace is not None
    assert set(never.trace["depths"][0]) == {30.0}
    assert never.trace["counts"]["heads"] == 5


def test_the_command_line_takes_a_policy_and_refuses_a_wrong_one() -> None:
    words = ["generate", "smollm2", PROMPT, "--raw", "--max-new-tokens", "4", "-q", "--json", "--policy"]
    said = json.loads(CliRunner().invoke(app, [*words, "unified:speedup=1.5"]).stdout)
    assert said["trace"]["depths"][0][-3:] == [20.0] * 3
    assert said["trace"]["counts"]["simulated"] == 0
    assert CliRunner().invoke(app, [*words, "exit:confidence=2"]).exit_code != 0
