"""Numbers of loops that are drawn in training: who runs what, and what it is good for."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from shoal.api.heal import heal
from shoal.data import Data
from shoal.deciding.learning import Learning
from shoal.deciding.policy_text import make_policy
from shoal.errors import UsageError
from shoal.evaluation import perplexity
from shoal.live import running
from shoal.models.load import Loaded
from shoal.models.opened import open_model
from shoal.plan import Plan, parse_plan
from shoal.plan.steps import runs

from .healing import batch_of, deep
from .planted import data_of

LOOP = "0,[1-4]x4,5"
BY_LOOPS = {1: "0-5", 2: "0,[1-4]x2,5", 3: "0,[1-4]x3,5", 4: LOOP}


@pytest.mark.parametrize("menu", ["", "1+2+4"])
def test_each_sequence_makes_as_many_loops_as_a_plan_that_has_them(menu: str) -> None:
    """The first the most, the second the fewest, the others what is drawn."""
    model, ids = deep(), batch_of(6)["ids"]
    with running(model, LOOP, policy=f"loops:menu={menu}" if menu else "loops") as handle:
        with handle.learning(Learning(seed=1)):
            drawn = model(ids).logits
        with torch.no_grad():
            behind = model(ids).logits
    static = {}
    for loops, plan in BY_LOOPS.items():
        with running(model, plan), torch.no_grad():
            static[loops] = model(ids).logits
    assert torch.equal(behind, static[4])  # nothing is drawn where nothing is trained
    assert torch.allclose(drawn[0], static[4][0], atol=1e-5)
    assert torch.allclose(drawn[1], static[1][1], atol=1e-5)
    allowed = (1, 2, 4) if menu else (1, 2, 3, 4)
    for row in range(2, 6):
        assert any(torch.allclose(drawn[row], static[loops][row], atol=1e-5) for loops in allowed)


def test_numbers_are_drawn_alike() -> None:
    model, ids = deep(), torch.ones(402, 2, dtype=torch.long)
    with running(model, LOOP, policy="loops") as handle:
        policy = handle.policy
        assert policy is not None
        seen: Counter[int] = Counter()
        begin = policy.begin

        def noted(forward: object) -> None:
            begin(forward)  # type: ignore[arg-type]
            seen.update(forward.notes["loops"][2:].tolist())  # type: ignore[attr-defined]

        policy.begin = noted  # type: ignore[method-assign]
        with handle.learning(Learning(seed=5)):
            model(ids)
    assert sum(seen.values()) == 400
    # chi-square with three degrees of freedom: above 16.3 once in a thousand, and the seed is the same everywhere
    assert sum((seen[loops] - 100) ** 2 / 100 for loops in (1, 2, 3, 4)) < 16.3


def counted(count: int, seed: int) -> Data:
    """Sequences that go up by one, modulo 40."""
    first = torch.randint(0, 40, (count, 1), generator=torch.Generator().manual_seed(seed))
    return data_of(3 + (first + torch.arange(16)) % 40)


def test_trained_on_many_loops_it_is_better_at_four_than_trained_at_one() -> None:
    """On held-out sequences of a toy task; and at one loop it is not what it would be without training."""
    loss: dict[tuple[str, int], float] = {}
    for how, plan, recipe in (("one", "0-3", "logit-kd"), ("drawn", "0,[1-2]x4,3", "looped")):
        loaded = Loaded(deep(layers=5), None, "own")  # of which both plans leave out the last
        settings = {"learn": "all", "labels": 1.0, "rate": 1e-2} if how == "drawn" else {}
        by_hand = {} if settings else {"terms": ["cross-entropy"], "learn": ["all:rate=1e-2"]}
        healed = heal(
            loaded, plan, recipe, settings=settings, tokens=9000, batch=4, held=16,
            data=counted(400, 0), watch=counted(4, 1), **by_hand,
        )  # fmt: skip
        whole = Plan.identity(loaded.opened.spec)
        for loops in (1, 4):
            steps = [f"{run.layer}:{run.weights}" for run in runs(healed.plan.steps())]
            own = [*steps[:1], *(steps[1:3] * loops), steps[-1]]
            with running(loaded.model, parse_plan(",".join(own), whole), dict(healed.weights)):
                loss[how, loops] = perplexity(loaded.model, counted(64, 2)).nll
    assert loss["drawn", 4] < loss["one", 4] - 0.2
    assert loss["drawn", 1] < 3  # ln 40 = 3.7 knows nothing


@pytest.mark.parametrize("menu", ["0+2", "1+9", "two", "1+²"])
def test_menus_that_name_no_loops_of_the_plan(menu: str) -> None:
    spec = open_model(deep()).spec
    with pytest.raises(UsageError, match="U587"):
        make_policy(f"loops:menu={menu}", parse_plan(LOOP, Plan.identity(spec)), spec)
