"""Taylor: what setting a layer's weights to zero would change to first order, from the gradient."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from shoal.evaluation.mean_scores import mean_scores
from shoal.evaluation.scoring import logits_of, require_context, require_scored, windows
from shoal.executing.inputs import require_whole
from shoal.models.evaluating import evaluating
from shoal.models.matrices import Matrices, layer_matrices
from shoal.models.opened import open_model
from shoal.scores import Scores, Traits

if TYPE_CHECKING:
    from shoal.data import Data
    from shoal.evaluation import Progress

TRAITS = Traits(errors=False)
Group = list[tuple[int, nn.Parameter]]
"""(layer, parameter)"""


def taylor(
    model: Any,
    data: Data,
    *,
    part: Literal["layer", "attention", "mlp"] = "layer",
    over: Literal["text", "sequence"] = "text",
    at_once: int = 8,
    stack: str | None = None,
    batch: int = 1,
    progress: Progress | None = None,
) -> Scores:
    """The sum over a layer's weights of |gradient of the loss x weight|.

    T_i = sum over the matrices W of layer i and their entries of |dL/dW_jk W_jk|, L the mean cross-entropy in nats per
    token over the whole text; with `over="sequence"` the mean over sequences of the same with L of one sequence, which
    has a standard error and cannot cancel between sequences. 0 for a layer whose output is multiplied by zero weights.

    Source: Shortened LLaMA (Kim et al. 2024, arXiv 2402.02834), after Molchanov et al. 2019 (arXiv 1906.10771).

    How we differ: the first four and last two layers are not protected here (the paper's Taylor+ keeps them; a search
    can); padding is left out. Memory: activations of one batch and float32 gradients of `at_once` layers, for each of
    which groups the text is run once; with `over="sequence"` of one matrix in a single run. Raises U534 for offloaded
    or quantised weights, U531 for parts that no layer has, U507 while a plan is running.
    """
    require_whole(model, "Taylor", stack)
    require_context(model, data.ids.shape[1])
    matrices = layer_matrices(model, "Taylor", part=part, stack=stack)
    groups = _groups(matrices, len(matrices) if over == "sequence" else max(1, at_once))
    gather = _BySequence(len(matrices), len(data)) if over == "sequence" else _OverText(len(matrices))
    tokens = 0
    for number, group in enumerate(groups):
        done = 0
        with _gradients(model, group, gather.collect):
            for ids, mask, keep in windows(data, 1 if over == "sequence" else batch, None, "Taylor"):
                counted = int(keep.sum())
                tokens += counted if number == 0 else 0
                _loss(model, ids, mask, keep).div(max(1, counted) if over == "sequence" else 1).backward()
                done += len(ids)
                gather.next(done)
                if progress is not None:
                    progress(number * len(data) + done, len(groups) * len(data), "Taylor")
        gather.close()
    require_scored(tokens, data)
    name, absent = open_model(model).stack(stack).name, [not own for own in matrices]
    if isinstance(gather, _BySequence):
        sums = [[math.nan] * len(data) if none else own for own, none in zip(gather.sums, absent, strict=True)]
        return mean_scores("taylor", "nats per token", sums, [1] * len(data), data, stack=name, tokens=tokens)
    return Scores(
        measure="taylor",
        stack=name,
        unit="nats per token",
        values=tuple(math.nan if none else t / tokens for t, none in zip(gather.totals, absent, strict=True)),
        errors=(None,) * len(matrices),
        sequences=len(data),
        tokens=tokens,
        data=data.info.describe(),
        notes=("the gradient of the whole text has no error over sequences; over=sequence has",),
    )


class _OverText:
    """Gradient x weight summed over the text, then sized up: one float32 tensor for each matrix of the group."""

    def __init__(self, layers: int) -> None:
        self.totals = [0.0] * layers
        self._held: dict[nn.Parameter, tuple[int, torch.Tensor]] = {}

    def collect(self, layer: int, parameter: nn.Parameter, change: torch.Tensor) -> None:
        if parameter in self._held:
            self._held[parameter][1].add_(change)
        else:
            self._held[parameter] = (layer, change)

    def next(self, done: int) -> None:
        """Nothing: the text is one."""

    def close(self) -> None:
        for layer, held in self._held.values():
            self.totals[layer] += held.abs().sum(-1).cpu().double().sum().item()
        self._held.clear()


class _BySequence:
    """Gradient x weight sized up as it is made: one number for each layer and sequence."""

    def __init__(self, layers: int, sequences: int) -> None:
        self.sums = [[0.0] * sequences for _ in range(layers)]
        self._row = 0

    def collect(self, layer: int, parameter: nn.Parameter, change: torch.Tensor) -> None:
        self.sums[layer][self._row] += change.abs().sum(-1).cpu().double().sum().item()

    def next(self, done: int) -> None:
        self._row = done

    def close(self) -> None:
        """Nothing is held."""


def _groups(matrices: Matrices, size: int) -> list[Group]:
    """The (layer, parameter) pairs of `size` layers at a time."""
    return [
        [(layer, p) for layer in range(start, min(start + size, len(matrices))) for _, p in matrices[layer]]
        for start in range(0, len(matrices), size)
    ]


def _loss(model: Any, ids: torch.Tensor, mask: torch.Tensor | None, keep: torch.Tensor) -> torch.Tensor:
    """The sum of the cross-entropy over the kept tokens, in float32."""
    logits = logits_of(model, ids, mask)[:, :-1].float().flatten(0, 1)
    targets = torch.where(keep, ids[:, 1:], -100).flatten().to(logits.device)
    return nn.functional.cross_entropy(logits, targets, reduction="sum")


@contextmanager
def _gradients(model: Any, group: Group, collect: Callable[[int, nn.Parameter, torch.Tensor], None]) -> Iterator[None]:
    """Hand gradient x weight of each matrix of `group` to `collect` as soon as it is made and drop the gradient; the
    model stays as it was."""
    asked = {parameter: parameter.requires_grad for parameter in model.parameters()}
    kept = {parameter: parameter.grad for _, parameter in group}
    handles = []

    def hook(layer: int) -> Callable[[nn.Parameter], None]:
        def made(parameter: nn.Parameter) -> None:
            assert parameter.grad is not None
            collect(layer, parameter, parameter.grad.float() * parameter.detach().float())
            parameter.grad = None

        return made

    try:
        model.requires_grad_(False)
        for layer, parameter in group:
            parameter.grad = None
            parameter.requires_grad_(True)
            handles.append(parameter.register_post_accumulate_grad_hook(hook(layer)))
        with evaluating(model, gradients=True), torch.enable_grad():
            yield
    finally:
        for handle in handles:
            handle.remove()
        for parameter, wanted in asked.items():
            parameter.requires_grad_(wanted)
        for parameter, gradient in kept.items():
            parameter.grad = gradient
