"""What was found out by a forward is remembered for each list of layers, also when one module owns several lists."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest

from shoal.models import opened as module
from shoal.models.opened import OpenedModel
from shoal.models.stacks import find_stack

from .families import tiny


def test_two_lists_of_one_owner_do_not_evict_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    model = copy.deepcopy(tiny("llama"))
    decoder = find_stack(model)
    decoder.owner.more = copy.deepcopy(decoder.layers)
    other = replace(decoder, name="encoder", path="model.more", attr="more")
    ran: list[str] = []
    whole = module.examine

    def counted(model: Any, stack: Any) -> Any:
        ran.append(stack.attr)
        return whole(model, decoder)

    monkeypatch.setattr(module, "examine", counted)
    monkeypatch.setattr(module, "find_stacks", lambda model: (other, decoder))
    opened = OpenedModel(model)
    found: dict[str, list[Any]] = {stack.name: [] for stack in (decoder, other)}
    for stack in (decoder, other, decoder, other):
        found[stack.name].append(opened.facts(stack.name))
    assert ran == ["layers", "more"], "each list is looked at once"
    assert all(once is again for once, again in found.values())
