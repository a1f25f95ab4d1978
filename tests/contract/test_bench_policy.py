"""Times of a policy on prompts: what is counted beside them is right, and mistakes are named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from shoal.evaluation.token_clock import TokenClock

from .test_api import folder  # noqa: F401
from .test_cli import model, shoal  # noqa: F401

WORDS = ["--new", "6", "--pairs", "2"]


@pytest.fixture
def prompts(tmp_path: Path) -> list[str]:
    file = tmp_path / "prompts.txt"
    file.write_text("abc\nthe river\n", encoding="utf-8")
    return ["--prompts", str(file)]


def _bench(*words: str, **more: Any) -> Any:
    return json.loads(shoal("bench", *words, *WORDS, "--json", **more))


def test_a_policy_that_never_leaves_changes_nothing(model: str, prompts: list[str]) -> None:  # noqa: F811
    found = _bench(model, "--policy", "exit:confidence=1,layers=2", *prompts)
    assert (found["same"], found["prompts"], found["depth"], found["layers"]) == (2, 2, 5, 5)
    assert found["looks"] == 1  # at one exit, for each decoded token
    assert len(found["ratio"]["samples"]) == 2
    assert found["whole"]["median"] > 0
    for round_, ratio in enumerate(found["ratio"]["samples"]):
        times = found["decided"]["samples"][round_], found["whole"]["samples"][round_]
        assert ratio == pytest.approx(times[0] / times[1])


def test_depth_is_that_of_decoded_tokens(model: str, prompts: list[str]) -> None:  # noqa: F811
    found = _bench(model, "--policy", "exit:after=1", *prompts)
    assert (found["depth"], found["layers"], found["looks"], found["simulated"]) == (2, 5, 0, 0)
    assert _bench(model, "--policy", "exit:after=1", "--plan", "0-1,3", *prompts)["layers"] == 3
    said = shoal("bench", model, "--policy", "exit:after=1", *prompts, *WORDS)
    assert "texts are those of the whole plan" in said


@pytest.mark.parametrize(
    "words",
    [["--prompts", "x.txt"], ["--policy", "exit:after=1", "--batch", "2"],
     ["--policy", "exit:after=1", "--against", "smollm2"]],
)  # fmt: skip
def test_what_cannot_be_timed_so_is_refused(model: str, words: list[str]) -> None:  # noqa: F811
    assert "U624" in shoal("bench", model, *words, code=1)


def test_nothing_to_time(model: str, prompts: list[str]) -> None:  # noqa: F811
    assert "U514" in shoal("bench", model, "--policy", "exit:after=1", *prompts, "--new", "1", code=1)


def test_the_prompt_and_the_first_token_are_not_timed() -> None:
    clock = TokenClock(torch.device("cpu"))
    for _ in range(4):
        clock.put(torch.zeros(1))
    clock.at = [(0.0, 0.0), (10.0, 1.0), (12.0, 2.0), (13.0, 2.5)]
    assert clock.seconds == (3.0, 1.5)
