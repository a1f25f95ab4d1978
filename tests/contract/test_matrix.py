"""Every family runs every kind of plan right, or says with a code or a reason why it does not."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from shoal.executing import executor
from shoal.executing.paged import Pages

from .families import FAMILIES
from .matrix import ATTENTIONS, BATCHES, CACHES, KINDS, SHARED, WAYS, Outcome, cells, markdown, run_cell
from .shares import pairs_where

UNTIED = {"tie": "P127", "relaxed tie": "P127"}
# what is refused, family by family; a refusal that is not in this table is a regression
REFUSED = {
    "mamba2": {"attention only": "P105", "mlp only": "P105", **dict.fromkeys(SHARED, "P109")},
    "nemotron_h": {"attention only": "P105", "mlp only": "P105", **UNTIED},
    "gemma3n_text": {
        "drop first": "P111",
        "attention only": "P105",
        "mlp only": "P105",
        **dict.fromkeys(SHARED, "P108"),
        **UNTIED,
    },
    # their attention does not go through transformers' interface
    **{name: {"attention map": "P141", "later source": "P163"} for name in ("falcon", "bloom", "gptj", "gpt_neo")},
    # of these layers 1 and 2 are of two structures: dense and with experts, attention and recurrent
    **dict.fromkeys(("qwen2_moe", "qwen3_moe", "jamba", "llama4_text"), UNTIED),
    "deepseek_v3": {**UNTIED, **dict.fromkeys(("keys alone", "values alone", "attention map"), "P109")},
}
NO_SDPA = ("gemma2", "gpt_oss", "bloom", "mamba2", "gptj", "gpt_neo")
NO_STATIC = {
    "bloom": "its alibi has the length of the mask, not of the cache",
    "gpt_neo": "it masks a static cache wrongly",
}
PAGED = {"keys alone": "P162", "values alone": "P162", "attention map": "P141", "later source": "P163"}
NO_PAGED = (
    "gpt2", "gemma2", "falcon", "bloom", "mamba2", "jamba", "gptj", "gpt_neo", "stablelm", "llama4_text", "deepseek_v3",
    "nemotron_h",
)  # fmt: skip
"""Families for which transformers' own continuous batching falls over or writes something else."""


def test_the_matrix_is_as_large_as_we_say() -> None:
    assert len(FAMILIES) >= 28
    assert (len(KINDS), len(ATTENTIONS), len(CACHES), len(BATCHES), len(WAYS)) == (18, 2, 3, 2, 5)
    assert len(set(cells())) == len(FAMILIES) * 180


def _by_default(family: str, attention: str) -> bool:
    """Both kinds of attention of two families that are unlike each other, and one kind of every fourth one."""
    if family in ("llama", "gemma3_text"):
        return True
    return attention == ("eager" if family in NO_SDPA else "sdpa") and list(FAMILIES).index(family) % 4 == 0


@pytest.mark.parametrize(("family", "attention"), pairs_where(_by_default, FAMILIES, ATTENTIONS))
def test_cells_are_right_refused_or_not_possible(family: str, attention: str) -> None:
    found, expected = {}, {}
    for cell in cells((family,), (attention,)):
        outcome = run_cell(*cell)
        found[cell] = (outcome.state, outcome.why if outcome.state == "refused" else "")
        expected[cell] = _expected(*cell)
        if outcome.state != "right":
            assert outcome.why, f"{cell} is {outcome.state} without a reason"
        if found[cell] != expected[cell]:
            found[cell] = (outcome.state, outcome.why)
    assert found == expected


def _expected(family: str, kind: str, attention: str, cache_kind: str, _: str) -> tuple[str, str]:
    if (attention == "sdpa" and family in NO_SDPA) or (cache_kind == "static" and family in NO_STATIC):
        return "not possible", ""
    if cache_kind == "paged" and family in NO_PAGED:
        return "not possible", ""
    code = REFUSED.get(family, {}).get(kind)
    if cache_kind == "paged" and kind in PAGED:
        code = code or PAGED[kind]
    return ("refused", code) if code else ("right", "")


def _states(family: str, *kinds: str) -> set[str]:
    """Of ordinary caches, which the executor fits and redirects; pages it does not."""
    attention = "eager" if family in NO_SDPA else "sdpa"
    return {run_cell(*cell).state for cell in cells((family,), (attention,)) if cell[1] in kinds and cell[3] != "paged"}


def test_rows_that_are_not_fitted_to_the_plan_turn_cells_red(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _states("llama4_text", "drop first") == {"right"}
    monkeypatch.setattr(executor, "prepare_rows", lambda cache, rows: None)
    assert _states("llama", "repeat") == {"crashed"}
    assert "wrong" in _states("llama4_text", "drop first")


def test_one_slot_for_all_layers_turns_cells_red(monkeypatch: pytest.MonkeyPatch) -> None:
    slots = executor.slots_of
    monkeypatch.setattr(executor, "slots_of", lambda steps: dict.fromkeys(slots(steps), 0))
    # attention meets a mask of another length and falls over; a recurrent layer has nothing to notice it by
    assert _states("llama", "drop", "repeat", "reorder") == {"crashed"}
    assert _states("mamba2", "drop", "repeat", "reorder") == {"wrong"}


def test_two_runs_on_one_paged_row_turn_cells_red(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_cell("llama", "repeat", "sdpa", *WAYS[-1]) == Outcome("right")
    monkeypatch.setattr(Pages, "seen_by", lambda self, at, arguments: arguments)
    assert run_cell("llama", "repeat", "sdpa", *WAYS[-1]).state == "wrong"


def test_a_step_that_does_not_run_turns_cells_red(monkeypatch: pytest.MonkeyPatch) -> None:
    schedule = executor.schedule

    def forgetful(*args: Any) -> Any:
        due, kept = schedule(*args)
        return [*due[:-1], []], kept

    monkeypatch.setattr(executor, "schedule", forgetful)
    assert _states("llama", "identity", "drop", "mlp only") == {"wrong"}


def test_an_identity_that_is_only_close_turns_cells_red(monkeypatch: pytest.MonkeyPatch) -> None:
    proxy_call = executor.Executor.proxy_call

    def noisy(*args: Any) -> Any:
        return torch.nextafter(proxy_call(*args), torch.tensor(1e9))

    monkeypatch.setattr(executor.Executor, "proxy_call", noisy)
    assert _states("llama", "identity") == {"wrong"}


def test_the_page_says_each_verdict_and_why() -> None:
    outcomes = dict.fromkeys(cells(), Outcome("right"))
    outcomes |= {cell: Outcome("refused", "P105") for cell in cells(("mamba2",)) if cell[1] == "mlp only"}
    outcomes |= {cell: Outcome("not possible", "no sdpa here") for cell in cells(("gemma2", "bloom"), ("sdpa",))}
    outcomes |= {cell: Outcome("wrong", "off by 1") for cell in cells(("opt",)) if cell[1] == "map"}
    lines = markdown(outcomes).splitlines()
    rows = {line.split(" | ")[0].removeprefix("| "): line for line in lines if line.startswith("| ")}
    assert set(rows) == {"family", *FAMILIES}
    assert rows["llama"].count("right 10/10") == len(KINDS)
    assert rows["mamba2"].count(" P105 ") == 1
    assert rows["gemma2"].count("5 right, 5 n/a<sup>1</sup>") == len(KINDS)
    assert "10 wrong<sup>2</sup>" in rows["opt"]
    assert lines[-2:] == ["1. no sdpa here", "2. off by 1"]
    assert all(row.replace(r"\|", "").count("|") == len(KINDS) + 2 for row in rows.values())
    assert f"{len(outcomes)} cells: " in markdown(outcomes)
