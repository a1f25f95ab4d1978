"""bench --policy: what deciding at run time does to the time of a token, on prompts, not on random tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from shoal.api.assess import Source, opened_base, planned
from shoal.api.prompts import encoded, texts_of
from shoal.deciding.gating import ungated
from shoal.decoding.arguments import timed
from shoal.decoding.decoder import Decoder
from shoal.errors import UsageError
from shoal.evaluation.scoring import Progress
from shoal.evaluation.stats import Spread
from shoal.evaluation.token_clock import TokenClock
from shoal.executing.weights import Tensors, plan_and_weights
from shoal.live import Running, running
from shoal.models.calls import device_of
from shoal.models.evaluating import evaluating
from shoal.models.kinds import require_causal
from shoal.models.opened import open_model
from shoal.plan import Given, Plan
from shoal.record import plain

Side = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class PolicyBench:
    """Times of decoded tokens, whole plan and policy in turn. Ratios are policy over whole: below 1 is faster."""

    policy: str
    whole: Spread
    """Seconds a token without the policy, over rounds."""
    decided: Spread
    ratio: Spread
    """Within a round, wall clock."""
    ratio_cpu: Spread
    """The same by CPU time of the process, which other work on the machine hardly touches."""
    depth: float
    """Layers of a decoded token, mean."""
    layers: float
    """Layers of the plan."""
    looks: float
    """Runs of norm and head at exits for each decoded token."""
    simulated: float
    """Layer runs for each decoded token that the policy had skipped and that ran for others."""
    same: int
    """Texts that are those of the whole plan."""
    prompts: int
    new: int
    pairs: int
    device: str
    dtype: str
    threads: int

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        found: dict[str, Any] = plain(asdict(self))
        return found


def bench_policy(
    source: Source,
    policy: str,
    *,
    plan: Given | None = None,
    weights: Tensors | None = None,
    prompts: Sequence[str] | None = None,
    new: int = 32,
    pairs: int = 3,
    chat: bool | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> PolicyBench:
    """Let the plan without and with `policy` write `new` greedy tokens for each of `prompts` (default: six that come
    along), in turn, `pairs` times after a round that does not count; one sequence at a time.

    Random tokens would do for a plan, whose layers never look at them, but not for a policy. Prefill is not timed: a
    token's time runs from the first new token to the last. Raises U514 for nothing to time, and what `running` raises.
    """
    if new < 2 or pairs < 1:
        raise UsageError(f"{new} new tokens in {pairs} rounds leave nothing to time; use 2 and 1 or more", code="U514")
    loaded = opened_base(source, **options)
    model = loaded.model
    require_causal(model, "bench")
    base = Plan.identity(open_model(model).spec)
    chosen, weights = plan_and_weights(base if plan is None else plan, base, weights)
    tasks = [encoded(loaded, text, chat) for text in texts_of(prompts)]
    without = ungated(chosen)
    sides: dict[str, Side] = {
        "whole": planned(model, None if without == base else without, weights),
        "policy": partial(running, model, chosen, weights, policy=policy),
    }
    rounds: dict[str, list[_Round]] = {name: [] for name in sides}
    for number in range(pairs + 1):
        for name in list(sides)[:: 1 if number % 2 == 0 else -1]:
            rounds[name].append(_round(model, sides[name], tasks, new))
            if progress is not None:
                progress(sum(map(len, rounds.values())), (pairs + 1) * len(sides), "rounds")
    whole, decided = ([one.seconds for one in rounds[name][1:]] for name in sides)
    wall, cpu = (Spread.of([a[n] / b[n] for a, b in zip(decided, whole, strict=True)]) for n in (0, 1))
    first = rounds["policy"][0]
    return PolicyBench(
        policy, Spread.of([s[0] for s in whole]), Spread.of([s[0] for s in decided]), wall, cpu,
        first.depth, first.layers, first.looks, first.simulated,
        sum(torch.equal(a, b) for a, b in zip(first.texts, rounds["whole"][0].texts, strict=True)), len(tasks), new,
        pairs, str(device_of(model)), str(model.dtype).removeprefix("torch."), torch.get_num_threads(),
    )  # fmt: skip


@dataclass
class _Round:
    """Every prompt once; all but `texts` for each decoded token."""

    texts: list[torch.Tensor]
    seconds: tuple[float, float]
    depth: float = 0.0
    layers: float = 0.0
    looks: float = 0.0
    simulated: float = 0.0


def _round(model: Any, side: Side, tasks: Sequence[dict[str, torch.Tensor]], new: int) -> _Round:
    found, tokens, wall, cpu = _Round([], (0.0, 0.0)), (new - 1) * len(tasks), 0.0, 0.0
    for task in tasks:
        clock = TokenClock(task["input_ids"].device)
        with side() as handle, evaluating(model):
            text = Decoder(model).generate(**task, **timed(new), streamer=clock)
        found.texts.append(text)
        wall, cpu = wall + clock.seconds[0], cpu + clock.seconds[1]
        if isinstance(handle, Running):
            trace, counts = handle.trace, handle.trace.counts.to_dict()
            # the last token that was written is never read
            found.depth += sum(trace.depths[0][task["input_ids"].shape[1] :]) / tokens
            found.looks += counts["heads"] / tokens
            found.simulated += counts["simulated"] / tokens
            found.layers = trace.layers
    found.seconds = wall / tokens, cpu / tokens
    return found
