"""Training a few tensors of a plan while the model stands still; what is kept is what held-out batches like best."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from shoal.data import Data
from shoal.evaluation.scoring import logits_of, scored_tokens, token_nll
from shoal.executing.bind import bind
from shoal.models.evaluating import evaluating
from shoal.plan import Plan

Loss = Callable[[int], torch.Tensor]
"""Number of a batch -> its mean loss, of which gradients can be taken."""


class Learned:
    """Tensors that are trained in float32, and what turns them into the plan's."""

    def __init__(
        self, tensors: Mapping[str, torch.Tensor], dtypes: Mapping[str, torch.dtype], factors: Mapping[str, float]
    ) -> None:
        """`dtypes` and `factors` by name: the plan's tensor is the trained one times its factor (1 without)."""
        self.leaves = {name: t.detach().float().clone().requires_grad_() for name, t in tensors.items()}
        self.dtypes, self.factors = dtypes, factors
        self._start = [leaf.detach().clone() for leaf in self.leaves.values()]

    def tensors(self) -> dict[str, torch.Tensor]:
        """As the plan names them; gradients reach the leaves."""
        return {n: (leaf * self.factors.get(n, 1.0)).to(self.dtypes[n]) for n, leaf in self.leaves.items()}

    def finished(self) -> dict[str, torch.Tensor]:
        """The same for good."""
        return {name: tensor.detach().contiguous() for name, tensor in self.tensors().items()}

    def moved(self) -> bool:
        """Whether training changed anything."""
        return any(not torch.equal(leaf, old) for leaf, old in zip(self.leaves.values(), self._start, strict=True))


@dataclass(frozen=True)
class Trained:
    """Mean losses before and after, over the batches that were fitted and over those held back."""

    before: float
    after: float
    held_before: float | None
    held_after: float | None


def train(
    leaves: Sequence[torch.Tensor],
    loss: Loss,
    fitted: Sequence[int],
    held: Sequence[int],
    *,
    epochs: int,
    rate: float,
    seed: int,
    on_epoch: Callable[[int], None] = lambda epoch: None,
) -> Trained:
    """Adam with a cosine schedule over the fitted batches in random order, `epochs` times.

    `leaves` end as they were after the epoch that the held-out batches (without any: the fitted ones) like best. They
    end as they began where no epoch is better, or where the fitted batches end worse: never worse than not training.
    """
    generator = torch.Generator().manual_seed(seed)
    selection = held or fitted
    start = [leaf.detach().clone() for leaf in leaves]
    before = _mean(loss, fitted)
    held_before = least = _mean(loss, selection) if held else before
    best, after, held_after = start, before, held_before
    optimiser = torch.optim.Adam(leaves, lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, max(1, epochs * len(fitted)))
    for epoch in range(epochs):
        for index in torch.randperm(len(fitted), generator=generator).tolist():
            with torch.enable_grad():
                gradients = torch.autograd.grad(loss(fitted[index]), leaves)
            for leaf, gradient in zip(leaves, gradients, strict=True):
                leaf.grad = gradient
            optimiser.step()
            schedule.step()
        on_epoch(epoch + 1)
        if (now := _mean(loss, selection)) < least:
            least, best = now, [leaf.detach().clone() for leaf in leaves]
    _load(leaves, best)
    if best is not start:
        after, held_after = (_mean(loss, fitted) if held else least), least
    if after > before:
        _load(leaves, start)
        after, held_after = before, held_before
    return Trained(before, after, held_before if held else None, held_after if held else None)


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No parameter of the model asks for gradients and nothing drops out; afterwards each is as it was."""
    asked = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in asked:
        parameter.requires_grad_(False)
    try:
        with evaluating(model, gradients=True):
            yield
    finally:
        for parameter in asked:
            parameter.requires_grad_(True)


def language_loss(
    model: nn.Module, data: Data, batch: int, plan: Plan, tensors: Callable[[], dict[str, torch.Tensor]]
) -> Loss:
    """The mean cross-entropy in nats of the next tokens of a batch of `data`, under `plan` with what `tensors` says by
    then."""
    batches, bound = list(data.batches(batch)), bind(model, plan, tensors())

    def loss(number: int) -> torch.Tensor:
        ids, mask = batches[number]
        bound.use(tensors())
        with bound.running():
            logits = logits_of(model, ids, mask)
        nll = token_nll(logits, ids)
        return nll[scored_tokens(data.info, ids, mask, first=number * batch)].mean()

    return loss


@torch.no_grad()
def _load(leaves: Sequence[torch.Tensor], values: Sequence[torch.Tensor]) -> None:
    for leaf, value in zip(leaves, values, strict=True):
        leaf.copy_(value)


@torch.no_grad()
def _mean(loss: Loss, numbers: Sequence[int]) -> float:
    return sum(float(loss(number)) for number in numbers) / len(numbers)
