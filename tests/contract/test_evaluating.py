"""Evaluation mode for a while: no dropout, no gradients unless they are wanted, and every module as it was."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn

import shoal
from shoal.models.evaluating import evaluating


def model() -> nn.Module:
    made = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 4)))
    made.train()
    made[2].eval()  # users train some modules and keep others in evaluation mode
    return made


def modes(made: nn.Module) -> list[bool]:
    return [module.training for module in made.modules()]


def test_modules_get_their_own_modes_back() -> None:
    made = model()
    before = modes(made)
    assert len(set(before)) == 2
    with evaluating(made):
        assert not any(modes(made))
        with evaluating(made):
            assert not any(modes(made))
        assert not any(modes(made)), "the inner one gives back what it found"
    assert modes(made) == before


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt])
def test_modes_come_back_after_a_failure(failure: type[BaseException]) -> None:
    made = model()
    before = modes(made)

    def fails() -> None:
        with evaluating(made):
            raise failure

    with pytest.raises(failure):
        fails()
    assert modes(made) == before and torch.is_grad_enabled()


def test_gradients_stay_as_they_are_where_they_are_wanted() -> None:
    made, x = model(), torch.ones(1, 4)
    with evaluating(made):
        assert not made(x).requires_grad
    with evaluating(made, gradients=True):
        assert made(x).requires_grad
        assert torch.equal(made(x), made(x)), "no dropout"
        with torch.no_grad(), evaluating(made, gradients=True):
            assert not made(x).requires_grad, "they are not switched on"


def test_no_other_file_keeps_modes_by_itself() -> None:
    home = Path(shoal.__file__).parent
    found = {
        str(path.relative_to(home))
        for path in home.rglob("*.py")
        if re.search(r"\.training = |if module\.training\]", path.read_text())
    }
    assert found == {"models/evaluating.py"}, "use shoal.models.evaluating"
