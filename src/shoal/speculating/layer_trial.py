"""Single layers run on states of one token, by which CLaSp and similar drafts choose their layers."""

from __future__ import annotations

import copy

import torch
from transformers.cache_utils import Cache

from shoal.errors import UsageError
from shoal.executing.calls import hidden_of
from shoal.executing.forward import Forward
from shoal.plan.steps import Run
from shoal.speculating.draft_runner import DraftRunner
from shoal.speculating.forward_inputs import ForwardInputs
from shoal.speculating.rows import select_rows


class LayerTrial:
    """Runs single layers at the position of the last token; they read the base model's KV rows and write to none."""

    def __init__(self, runner: DraftRunner, feed: ForwardInputs, cache: Cache, ids: torch.Tensor) -> None:
        """Raises U618 for a model whose layers hand more than the hidden state to each other."""
        require_separable(runner)
        self.runner, self.cache = runner, cache
        spare = select_rows(cache, range(len(cache.layers)), 0)
        self.forward = runner.layer_calls(feed, ids, spare)
        self.start = hidden_of(self.forward.calls[0])
        """What enters layer 0, [1, 1, hidden]."""
        self._together: bool | None = None

    def run(self, step: Run, states: torch.Tensor) -> torch.Tensor:
        """`states`, [n, 1, hidden], through one layer or a part of it, each on its own."""
        if len(states) == 1:
            return self._run(step, states)
        if self._together is None:
            self._together = self._same(step, states)
        if self._together:
            return self._run(step, states)
        return torch.cat([self._run(step, states[n : n + 1]) for n in range(len(states))])

    def _same(self, step: Run, states: torch.Tensor) -> bool:
        """Some families prepare tensors for a batch of one (ALiBi); their layers are tried one state at a time."""
        try:
            both = self._run(step, states[:2])
        except RuntimeError:
            return False
        apart = torch.cat([self._run(step, states[n : n + 1]) for n in range(2)])
        return torch.allclose(both, apart, rtol=1e-2, atol=1e-2 * float(apart.abs().max()))

    def _run(self, step: Run, states: torch.Tensor) -> torch.Tensor:
        row = self.runner.facts.layers[step.layer].row
        forward = Forward(calls=self.forward.calls)
        return self.runner.whole.executor().run_step(step, states, forward, cache=_spread(self.cache, row, len(states)))


def require_separable(runner: DraftRunner) -> None:
    """Raise U618 when a layer of the model cannot be tried alone."""
    needy = next((layer.index for layer in runner.spec.stack("decoder").layers if layer.needs), None)
    carried = next((i for i, fact in enumerate(runner.facts.layers) if fact.carried), None)
    found = needy if needy is not None else carried
    if found is not None:
        raise UsageError(
            f"layer {found} of {type(runner.model).__name__} is handed more than a hidden state by the layers before "
            "it, so layers cannot be tried one by one; use a draft of fixed layers (exit, skip) or swift",
            code="U618",
        )


def similarity(state: torch.Tensor, true: torch.Tensor) -> float:
    """The cosine between two states of one token."""
    return float(torch.cosine_similarity(state.flatten().float(), true.flatten().float(), dim=0))


def _spread(cache: Cache, row: int, times: int) -> Cache:
    """A cache whose row `row` is a copy with the same past for `times` states."""
    out = copy.copy(cache)
    out.layers = list(cache.layers)
    out.layers[row] = one = copy.copy(cache.layers[row])
    if times > 1 and one.keys is not None:
        one.keys, one.values = (t.expand(times, *t.shape[1:]) for t in (one.keys, one.values))
    return out
