"""Ties, shared matrices and factors in encoders, encoder-decoders and vision models: live and as stock copies."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from shoal.live import running
from shoal.models.linear import is_linear, is_transposed, matrix_of
from shoal.models.opened import open_model
from shoal.plan import cost, shapes_of
from shoal.writing.surgery import rewrite

from .kinds import STACKS, inputs_of, kind, plan_of, returned
from .references import CLOSE
from .shares import every

CELLS = [(name, stack) for name, stacks in STACKS.items() for stack in stacks]


def layers_of(model: Any, stack: str) -> Any:
    return open_model(model).stack(stack)


def tied_by_hand(model: Any, stack: str, change: dict[str, torch.Tensor] | None = None) -> Any:
    made = copy.deepcopy(model)
    layers = layers_of(made, stack)
    with torch.no_grad():
        source = dict(layers.layer(1).named_parameters())
        for name, p in layers.layer(3).named_parameters():
            if p.dim() > 1 and name in source:
                p.copy_(source[name])
        for path, delta in (change or {}).items():
            module = layers.layer(3).get_submodule(path)
            module.weight += delta.T if is_transposed(module) else delta
    return made


def factors(model: Any, stack: str) -> tuple[str, torch.Tensor, torch.Tensor]:
    path, module = next((n, m) for n, m in layers_of(model, stack).layer(3).named_modules() if is_linear(m))
    out, into = matrix_of(module).shape
    generator = torch.Generator().manual_seed(4)
    return path, torch.randn(out, 2, generator=generator) * 0.2, torch.randn(2, into, generator=generator) * 0.2


def same(found: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    assert found.keys() == want.keys()
    for name, tensor in want.items():
        torch.testing.assert_close(found[name], tensor, **CLOSE)


@pytest.mark.parametrize("cell", every(3, CELLS), ids=str)
def test_matrices_of_another_layer(cell: tuple[str, str]) -> None:
    """`3=1`, the same with a change of rank 2, and as new matrices that both runs share."""
    name, stack = cell
    model = kind(name)
    inputs, spec = inputs_of(model), open_model(model).spec
    path, up, down = factors(model, stack)
    own = {f"own.{path}.up": up, f"own.{path}.down": down}
    source = layers_of(model, stack).layer(1)
    shared = {f"s.{n}": p.detach().clone() for n, p in source.named_parameters() if p.dim() > 1}
    before = returned(model, inputs)
    plain = returned(tied_by_hand(model, stack), inputs)
    changed = returned(tied_by_hand(model, stack, {path: up @ down}), inputs)
    for text, weights, want in (
        ("0-2,3=1,4-5", {}, plain),
        ("0-2,3=1:own,4-5", own, changed),
        ("0,1=s,2,3=s:own,4-5", own | shared, changed),
    ):
        plan = plan_of(model, f"{stack}: {text}")
        with running(model, plan, weights):
            same(returned(model, inputs), want)
        same(returned(rewrite(model, plan, weights=weights), inputs), want)
        less = sum(p.numel() for p in source.parameters() if p.dim() > 1)
        more = sum(tensor.numel() for key, tensor in weights.items() if key.startswith("own."))
        assert cost(plan, spec, weights=shapes_of(weights)).params == spec.params - less + more
    same(returned(model, inputs), before)
