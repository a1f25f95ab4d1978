"""A cascade of plans over a task: what runs against what was recorded, its ends, a planted task, and mistakes."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shoal.api.cascaded import cascade
from shoal.errors import UsageError
from shoal.evaluation.cascade import Answers, answers, run_cascade, stages_of
from shoal.evaluation.staged import NEVER
from shoal.evaluation.tasks import Item, Tasks, option_scores
from shoal.live import running

from .families import tiny
from .test_api import folder  # noqa: F401
from .test_cli import model, shoal  # noqa: F401
from .test_tasks import Letters

SMALL, MIDDLE, WHOLE = "0", "0-1", "0-3"
PLANS = (SMALL, MIDDLE, WHOLE)


def items(count: int = 12) -> Tasks:
    """Contexts and three options each, of unlike lengths, with right ones at random."""
    draw = np.random.default_rng(3)
    words = ["".join(draw.choice(list("abcdefgh"), 2 + n % 4)) for n in range(4 * count)]
    made = (Item(words[4 * n], tuple(words[4 * n + 1 : 4 * n + 4]), int(draw.integers(3))) for n in range(count))
    return Tasks("t", tuple(made), "")


def stages(found: Any, plans: Sequence[str] = PLANS) -> list[partial[AbstractContextManager[Any]]]:
    return [partial(_on, found, plan) for plan in plans]


class _on:  # noqa: N801 - a context like `running`, which yields the model
    def __init__(self, found: Any, plan: str) -> None:
        self.found, self.handle = found, running(found, plan)

    def __enter__(self) -> Any:
        self.handle.__enter__()
        return self.found

    def __exit__(self, *error: Any) -> None:
        self.handle.__exit__(*error)


def test_answers_are_the_likeliest_options_and_their_share_of_all() -> None:
    found, tasks = tiny("llama"), items()
    said = answers(found, Letters(), tasks)
    for number, options in enumerate(option_scores(found, Letters(), tasks)):
        shares = torch.tensor([one.logprob for one in options], dtype=torch.float64).softmax(0)
        assert said.choice[number] == int(shares.argmax())
        assert said.sure[number] == pytest.approx(float(shares.max()))


def test_a_model_without_numbers_is_sure_of_nothing() -> None:
    broken = copy.deepcopy(tiny("llama"))
    with torch.no_grad():
        broken.lm_head.weight[:] = float("nan")
    said = answers(broken, Letters(), items(3))
    assert (said.choice == -1).all()
    assert (said.sure == 0).all()
    assert said.wrong(items(3)).all()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_what_runs_is_what_was_recorded_and_layers_run_for_those_alone_who_ask(family: str) -> None:
    found, tasks = tiny(family), items()
    recorded = [run_cascade([one], Letters(), tasks, ()).answers for one in stages(found)]
    thresholds = tuple(float(np.median(one.sure)) for one in recorded[:2])
    called = [0, 0, 0, 0]
    layers = next(m for m in found.modules() if isinstance(m, torch.nn.ModuleList))
    hooks = [
        layer.register_forward_hook(lambda *_, n=n: called.__setitem__(n, called[n] + 1))
        for n, layer in enumerate(layers)
    ]
    ran = run_cascade(stages(found), Letters(), tasks, thresholds, batch=1)
    for hook in hooks:
        hook.remove()
    sure = [recorded[n].sure >= thresholds[n] for n in range(2)]
    stage = np.where(sure[0], 0, np.where(sure[1], 1, 2))
    assert {*stage.tolist()} == {0, 1, 2}, "each plan must answer something"
    np.testing.assert_array_equal(ran.stage, stage)
    np.testing.assert_array_equal(ran.answers.choice, np.choose(stage, [one.choice for one in recorded]))
    assert ran.asked == (12, int((stage > 0).sum()), int((stage > 1).sum()))
    a, b, c = (3 * asked for asked in ran.asked)  # three options are three passes
    assert called == [a + b + c, b + c, c, c]
    costs = (0.25, 0.5, 1.0)
    error, cost = stages_of(recorded, tasks, costs).measured(thresholds)
    assert error == pytest.approx(ran.answers.wrong(tasks).mean())
    assert cost == pytest.approx(sum(share * asked for share, asked in zip(costs, ran.asked, strict=True)) / 12)


def test_a_plan_that_is_never_asked_leaves_the_whole_model_bit_for_bit() -> None:
    found, tasks = tiny("llama"), items()
    alone = answers(found, Letters(), tasks)
    never = run_cascade(stages(found), Letters(), tasks, (NEVER, NEVER))
    np.testing.assert_array_equal(never.answers.sure, alone.sure)
    np.testing.assert_array_equal(never.answers.choice, alone.choice)
    assert never.asked == (0, 0, 12)
    always = run_cascade(stages(found), Letters(), tasks, (0.0, 0.0))
    assert always.asked == (12, 0, 0)
    above = run_cascade(stages(found), Letters(), tasks, (1.1, 1.1))
    np.testing.assert_array_equal(above.answers.choice, alone.choice)
    assert above.asked == (12, 12, 12)


def test_planted_the_cheap_plan_answers_what_it_knows_and_nothing_else() -> None:
    """Two thirds are known to a plan of a tenth of the cost, which is sure of nothing else."""
    tasks = items(9)
    gold = np.array([item.gold for item in tasks.items])
    known = np.arange(9) % 3 > 0
    cheap = Answers(np.where(known, gold, (gold + 1) % 3), np.where(known, 0.9, 0.4))
    best = stages_of([cheap, Answers(gold, np.full(9, 0.8))], tasks, (0.1, 1.0)).best((0.8, 1.0, 0.0))
    assert 0.4 < best[0][0] < 0.9
    assert stages_of([cheap, Answers(gold, cheap.sure)], tasks, (0.1, 1.0)).measured(best[0]) == pytest.approx(
        (0, 0.1 + 1 / 3)
    )
    assert best[1] == (NEVER,)
    assert best[2][0] <= 0.4, "where only cost counts the cheap plan answers all"
    dear = stages_of([cheap, Answers(gold, cheap.sure)], tasks, (0.9, 1.0)).best((0.8,))
    assert dear == [(NEVER,)], "a plan that costs more than it spares is not asked"


@pytest.fixture
def file(tmp_path: Path) -> str:
    rows = [{"query": one.context, "choices": one.options, "gold": one.gold} for one in items(12).items]
    (tmp_path / "choices.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return str(tmp_path / "choices.jsonl")


def test_a_table_from_the_command_line(model: str, file: str) -> None:  # noqa: F811
    words = ["evaluate", model, "--tasks", file, "--cascade", "0", "--cascade", "0-2", "--tradeoff", "1"]
    table = json.loads(shoal(*words, "--tradeoff", "0", "--json"))["cascades"][0]
    assert table["plans"] == ["0", "0-2", "0-4"]
    assert table["costs"] == sorted(table["costs"])
    assert table["costs"][-1] == 1
    assert (table["chosen_on"], table["items"]) == (6, 6)
    safe, cheap = table["cascades"]
    whole = table["alone"][-1]
    assert safe["tradeoff"] == 1
    if safe["thresholds"] == [None, None]:
        assert (safe["accuracy"], safe["cost"]) == (whole["accuracy"], 1)
    assert cheap["answered"] == [1, 0, 0]
    assert cheap["cost"] == pytest.approx(table["costs"][0])
    assert cheap["accuracy"] == table["alone"][0]["accuracy"]
    said = shoal(*words)
    assert "6 items; 6 others chose how sure each plan must be" in said
    assert "0-2 alone" in said


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["--tradeoff", "2", "--tasks", "FILE", "--cascade", "0"], "U700"),
        (["--cascade", "0"], "U701"),
        (["--tasks", "FILE", "--task-items", "3", "--cascade", "0"], "U701"),
        (["--tasks", "WORDS", "--cascade", "0"], "U702"),
        (["--tasks", "FILE", "--cascade", "0-4"], "U703"),
        (["--tasks", "FILE", "--plan", "0-1", "--cascade", "0-2"], "U703"),
        (["--tasks", "FILE", "--cascade", "0-9"], "P103"),
        (["--tasks", "FILE", "--cascade", "0-"], "N001"),
    ],
)  # fmt: skip
def test_what_is_no_cascade_is_refused(model: str, file: str, words: list[str], code: str, tmp_path: Path) -> None:  # noqa: F811
    own = tmp_path / "words.jsonl"
    own.write_text('{"context": "a", "continuation": "b"}\n' * 5, encoding="utf-8")
    names = {"FILE": file, "WORDS": str(own)}
    assert code in shoal("evaluate", model, *(names.get(word, word) for word in words), code=1)


def test_mistakes_are_found_before_a_model_is_loaded() -> None:
    with pytest.raises(UsageError, match="U701"):
        cascade("no such model", ["0"], [])
    with pytest.raises(UsageError, match="U700"):
        cascade("no such model", ["0"], ["none.jsonl"], tradeoffs=(-1,))
