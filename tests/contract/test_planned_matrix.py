"""Every family keeps every kind of plan in a planned checkpoint bit for bit, or says with a code why it does not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from shoal import planned
from shoal.executing import planned_tensors
from shoal.writing import planned_folder

from . import planned_cells
from .families import FAMILIES
from .matrix import KINDS, Outcome
from .planned_cells import ALL, MORE, READER, run_cell, section
from .test_matrix import REFUSED

NO_HALVES = dict.fromkeys(("tied half", "halves of two layers", "group, bypass", "all at once"), "P105")
EXPERTS = {"fewer neurons": "U687"}
UNTIED = {"all tied to one": "P127"}
HALVES_UNTIED = {"tied half": "P127"}
BY_ITS_OWN = ("gemma2", "cohere2", "gemma3n_text")
"""Of which a model does more with its last state than norm and head."""
MORE_REFUSED: dict[str, dict[str, str]] = {
    "mixtral": EXPERTS,
    "gpt_oss": EXPERTS,
    "qwen2_moe": EXPERTS | UNTIED | HALVES_UNTIED,
    "qwen3_moe": EXPERTS | UNTIED,
    "jamba": UNTIED,
    "llama4_text": EXPERTS | UNTIED | HALVES_UNTIED,
    "deepseek_v3": EXPERTS | UNTIED | {"added values": "P109", "all at once": "P127"},
    "mamba2": EXPERTS | NO_HALVES | {"added values": "P109"},
    "nemotron_h": EXPERTS | NO_HALVES | UNTIED,
    "gemma3n_text": EXPERTS | NO_HALVES | UNTIED | {"added values": "P108", "fewer heads": "P129"},
    # norms over all heads of keys
    "olmo2": {"fewer heads": "P129"},
    "stablelm": {"fewer heads": "P129"},
}
"""What is refused of the kinds that the matrix of live plans has not; there too a new refusal is a regression."""
ONE_HEAD = ("gpt2", "phi3", "gpt_neox", "opt", "falcon", "bloom", "mamba2", "gptj", "gpt_neo", "deepseek_v3")
"""Families in which no module makes two heads of keys alone."""


@pytest.fixture(scope="module", autouse=True)
def _reader() -> Iterator[None]:
    yield
    READER.close()


def _expected(family: str, kind: str) -> tuple[str, str]:
    if kind in ("gate", "exit"):
        return "refused", "P125"
    if kind == "fewer heads" and family in ONE_HEAD:
        return "not possible", ""
    if kind == "scores of depths" and family in BY_ITS_OWN:
        return "refused", "P166"
    code = REFUSED.get(family, {}).get(kind) or MORE_REFUSED.get(family, {}).get(kind)
    return ("refused", code) if code else ("right", "")


def _by_default(family: str, kind: str) -> bool:
    """A few of each family, so that each kind is there more than once."""
    return (list(FAMILIES).index(family) * 5 + ALL.index(kind)) % 14 == 0


def _compare(family: str, kinds: tuple[str, ...]) -> None:
    found, expected = {}, {}
    for kind in kinds:
        outcome = run_cell(family, kind)
        expected[kind] = _expected(family, kind)
        found[kind] = (outcome.state, outcome.why if outcome.state == "refused" else "")
        if found[kind] != expected[kind]:
            found[kind] = (outcome.state, outcome.why)
    assert found == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_a_loaded_checkpoint_is_the_live_plan(family: str) -> None:
    _compare(family, tuple(kind for kind in ALL if _by_default(family, kind)))


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_all_of_them_are(family: str) -> None:
    _compare(family, tuple(kind for kind in ALL if not _by_default(family, kind)))


def test_each_kind_and_each_family_is_in_the_default_run() -> None:
    assert (len(KINDS), len(MORE), len(set(ALL))) == (18, 24, 42)
    chosen = [(family, kind) for family in FAMILIES for kind in ALL if _by_default(family, kind)]
    assert {family for family, _ in chosen} == set(FAMILIES)
    kept = [kind for family, kind in chosen if _expected(family, kind)[0] == "right"]
    assert all(kept.count(kind) > 0 for kind in ALL if kind not in ("gate", "exit"))
    assert len(chosen) < 100


def test_a_tensor_that_is_a_little_off_turns_cells_red(monkeypatch: pytest.MonkeyPatch) -> None:
    save = planned_folder.save_checkpoint

    def off(folder: Path, *args: object, **more: object) -> None:
        save(folder, *args, **more)  # type: ignore[arg-type]
        held = load_file(folder / "planned.safetensors")
        held["model.norm.weight"] = torch.nextafter(held["model.norm.weight"], torch.tensor(9.0))
        save_file(held, folder / "planned.safetensors", {"format": "pt"})

    monkeypatch.setattr(planned_folder, "save_checkpoint", off)
    outcome = run_cell("llama", "drop")
    assert outcome.state == "wrong" and "differs" in outcome.why


def test_another_plan_in_the_folder_turns_cells_red(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the same tensors."""
    config_of = planned.config_of

    def other(*args: object) -> object:
        made = config_of(*args)  # type: ignore[arg-type]
        made.plan["stacks"]["decoder"] = ["0-3"]
        del made.plan["hash"]
        return made

    monkeypatch.setattr(planned, "config_of", other)
    assert run_cell("llama", "reorder").why.startswith("uncached differs")
    assert "M310" in run_cell("llama", "drop").why


def test_parameters_that_nobody_counts_turn_cells_red(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planned_cells, "cost", lambda *_, **__: Outcome("1"))
    monkeypatch.setattr(Outcome, "params", 1, raising=False)
    assert "as its cost" in run_cell("llama", "identity").why


def test_what_no_run_reads_is_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or the reader says so."""
    monkeypatch.setattr(planned, "tensors_read", lambda opened, *_: frozenset(opened.model.state_dict()))
    outcome = run_cell("llama", "tie")
    assert outcome.state == "wrong" and "M400" in outcome.why
    assert planned_tensors.NEW == "shoal."


def test_the_page_says_each_verdict_and_why() -> None:
    outcomes = dict.fromkeys(((family, kind) for family in FAMILIES for kind in ALL), Outcome("right"))
    outcomes["opt", "gate"] = Outcome("refused", "P125")
    outcomes["opt", "loop"] = Outcome("wrong", "off by 1")
    outcomes["gpt2", "fewer heads"] = Outcome("not possible", "it has none")
    text = section(outcomes)
    rows = {line.split(" | ")[0].removeprefix("| "): line for line in text.splitlines() if line.startswith("| ")}
    assert set(rows) == {"family", *FAMILIES}
    assert rows["llama"].count(" same ") == len(ALL)
    assert " P125 " in rows["opt"] and "wrong<sup>" in rows["opt"] and "n/a<sup>1</sup>" in rows["gpt2"]
    assert "it has none" in text and f"{len(outcomes)} cells: " in text
    assert all(row.replace(r"\|", "").count("|") == len(ALL) + 2 for row in rows.values())
