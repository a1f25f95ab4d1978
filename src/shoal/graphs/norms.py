"""Gains of norms, folded into the matrices that read them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from shoal.graphs._graph import Graph, nothing_fits, plain_linears, require_plain, swap
from shoal.graphs._reads import Reads, observed
from shoal.models.evaluating import evaluating

COMES_FIRST = True
"""It changes values, which graphs that lay matrices side by side then copy."""


def norms(model: nn.Module) -> Graph:
    """Fold the gains of norms into the matrices that read them.

    For a norm n(x) = x^ * (c + w) (x^: [.., hidden], the state divided by its size; w: [hidden], the gain; c: 0, or 1
    in families that store the gain less one) every matrix W: [out, hidden] that reads n(x) becomes W diag(c + w), and
    w becomes 1 - c, so that W n(x) is the same. Which matrices read a norm is seen in one forward: it is folded only
    where nothing else takes its output, and where each of them reads nothing else. c is found by running the norm with
    gains of zeros and of ones. Norms with a bias, and those that a tied head reads, are left as they are, and the
    handle says so.

    Not bit for bit: each weight is rounded once more, in its own dtype. Matrices and gains of before are kept, as the
    product cannot be undone; a second copy of the matrices that are folded is held meanwhile. Nothing is saved by this
    alone, since a norm goes on multiplying by ones; it is the state in which a compiler, a rotation or a quantiser
    finds no gain in its way.

    Raises `UsageError` U662 for a model without such a norm, or whose matrices are quantised, sharded, offloaded or
    wrapped by peft.

    Source: Ashkboos et al. 2024, "SliceGPT", arXiv 2401.15024, where it is the step before rotations.

    How we differ: no list of families; gains are folded in the model's dtype and put back at the end.
    """
    require_plain(model, "norms")
    gains = {module: _gain(module) for module in model.modules() if _may_be_norm(module)}
    paths = {module: path for path, module in model.named_modules()}
    left = {
        paths[module]: "it has a bias"
        for module in model.modules()
        if not module._modules and set(module._parameters) == {"weight", "bias"} and _is_vector(module)
    }
    reads = observed(model, [module for module, gain in gains.items() if gain is not None])
    linears, folds = plain_linears(model), dict[nn.Module, _Fold]()
    for norm in dict.fromkeys(module for module, _ in reads.made):
        found = _readers(norm, reads, linears)
        neutral = gains[norm]
        assert neutral is not None
        if isinstance(found, str):
            left[paths[norm]] = found
        else:
            folds[norm] = _Fold(norm, neutral, found)
    if not folds:
        raise nothing_fits("norms", "norm whose gain can be folded", left)
    return _Folded(list(folds.values()), left)


@dataclass(frozen=True)
class _Fold:
    norm: nn.Module
    neutral: float
    """The stored gain with which the norm multiplies by one."""
    readers: tuple[nn.Linear, ...]


class _Folded(Graph):
    def __init__(self, folds: list[_Fold], left: dict[str, str]) -> None:
        super().__init__("norms", len(folds), left)
        self.folds = folds
        self._before: list[tuple[torch.Tensor, torch.Tensor]] = []

    def put(self) -> None:
        for fold in self.folds:
            (gain,) = fold.norm.parameters(recurse=False)
            factor = gain.data.float() + (1.0 - fold.neutral)
            for module in fold.readers:
                weight = module.weight
                folded = (weight.data.float() * factor.to(weight.device)).to(weight.dtype)
                self._before.append((weight, swap(weight, folded)))
            self._before.append((gain, swap(gain, torch.full_like(gain.data, fold.neutral))))

    def take_away(self) -> None:
        while self._before:
            parameter, values = self._before.pop()
            parameter.data = values


def _is_vector(module: nn.Module) -> bool:
    return all(p is not None and p.dim() == 1 for p in module._parameters.values())


def _may_be_norm(module: nn.Module) -> bool:
    return not module._modules and len(module._parameters) == 1 and _is_vector(module) and not module._buffers


def _gain(module: nn.Module) -> float | None:
    """The stored gain with which `module` multiplies by one: 1, or 0 where one is added to it; None for a module whose
    output is not its gain times something that does not depend on it."""
    ((name, held),) = module._parameters.items()
    assert held is not None
    drawn = torch.randn(2, held.numel(), generator=torch.Generator().manual_seed(0)).to(held.device, held.dtype)
    made: list[torch.Tensor] = []
    with evaluating(module):
        for values in (torch.zeros_like(held.data), torch.ones_like(held.data), held.data):
            module._parameters[name] = nn.Parameter(values, requires_grad=False)
            try:
                out = module(drawn)
            except (RuntimeError, TypeError, ValueError):  # a module that wants other inputs is no norm
                return None
            finally:
                module._parameters[name] = held
            if not isinstance(out, torch.Tensor) or out.shape != drawn.shape:
                return None
            made.append(out.float())
    zero, one, own = made
    for neutral, unit in ((1.0, one), (0.0, zero)):
        for stored, seen in ((torch.zeros_like(held), zero), (torch.ones_like(held), one), (held.data, own)):
            if not torch.allclose(seen, unit * (stored.float() + (1.0 - neutral)), rtol=0.02, atol=1e-3):
                break
        else:
            return neutral
    return None


def _readers(norm: nn.Module, reads: Reads, linears: dict[int, tuple[str, nn.Linear]]) -> tuple[nn.Linear, ...] | str:
    """The modules that multiply what `norm` makes, or why its gain cannot be folded."""
    outputs = [out for module, out in reads.made if module is norm]
    own = {id(out) for out in outputs}
    found: dict[int, nn.Linear] = {}
    for use in (use for out in outputs for use in reads.of(out)):
        if use.weight is None:
            return f"{use.call} reads it, which is no matrix"
        if id(use.weight) not in linears:
            return "it is read by a matrix that is tied, the plan's own, or not of a plain nn.Linear"
        path, module = linears[id(use.weight)]
        if any(other.weight is not use.weight or other.rows not in own for other in reads.of(use.weight)):
            return f"{path} reads something else, too"
        found[id(module)] = module
    return tuple(found.values()) or "nothing reads it"
