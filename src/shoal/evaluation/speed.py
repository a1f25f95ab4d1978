"""Wall clock, paired: every variant runs in turn in each round, so that what the machine does meets all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

from shoal.errors import UsageError
from shoal.evaluation.decoding import Stepper, random_tokens
from shoal.evaluation.scoring import Progress
from shoal.evaluation.stats import Spread
from shoal.executing.timing import synchronized_time
from shoal.models.calls import device_of
from shoal.models.evaluating import evaluating

Variant = Callable[[], AbstractContextManager[Any]]
Sample = tuple[float, float]


@dataclass(frozen=True, slots=True)
class VariantSpeed:
    """The times of one variant. Ratios are to the first variant in the same round: below 1 is faster."""

    name: str
    prefill: Spread
    """Seconds for one forward over the prompt."""
    decode: Spread
    """Seconds per decoded token of the whole batch, averaged over a round, context growing from the prompt on."""
    prefill_ratio: Spread
    decode_ratio: Spread


@dataclass(frozen=True, slots=True)
class Speed:
    """Paired times and all that they depend on."""

    variants: tuple[VariantSpeed, ...]
    device: str
    dtype: str
    threads: int
    batch: int
    prompt: int
    new: int
    pairs: int
    warmup: int
    seed: int
    kind: Literal["measured"] = "measured"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def speed(
    variants: Mapping[str, Variant],
    *,
    prompt: int = 512,
    new: int = 32,
    batch: int = 1,
    pairs: int = 5,
    warmup: int = 1,
    seed: int = 0,
    progress: Progress | None = None,
) -> Speed:
    """Time prefill and cached decoding of each variant, in `pairs` rounds after `warmup` rounds that do not count.

    A variant is a function that returns a context manager that gives the live model. All see the same random tokens;
    the order within a round alternates. Raises `UsageError`: U510 context too short, U514 nothing to time, U515 a
    model without a cache.
    """
    if not variants or pairs < 1 or new < 1 or prompt < 1 or warmup < 0:
        message = f"{len(variants)} variants, {pairs} pairs, {prompt} + {new} tokens leave nothing to time"
        raise UsageError(f"{message}; use 1 or more of each", code="U514")
    samples: dict[str, list[Sample]] = {name: [] for name in variants}
    facts: dict[str, str] = {}
    done = 0
    for number in range(warmup + pairs):
        for name in list(variants)[:: 1 if number % 2 == 0 else -1]:
            with variants[name]() as model:
                sample = _sample(model, prompt, new, batch, seed)
                facts = facts or {"device": _device_name(model), "dtype": str(model.dtype).removeprefix("torch.")}
            if number >= warmup:
                samples[name].append(sample)
            done += 1
            if progress is not None:
                progress(done, (warmup + pairs) * len(variants), "speed")
    results = _results(samples)
    threads = torch.get_num_threads()
    return Speed(results, facts["device"], facts["dtype"], threads, batch, prompt, new, pairs, warmup, seed)


def _sample(model: Any, prompt: int, new: int, batch: int, seed: int) -> Sample:
    """Seconds of the prefill, and seconds per decoded token."""
    ids = random_tokens(model, batch, prompt + new, seed)
    step = Stepper(model)
    with evaluating(model):
        start = synchronized_time(ids.device)
        cache = step(ids[:, :prompt])
        middle = synchronized_time(ids.device)
        for position in range(prompt, prompt + new):
            cache = step(ids[:, position : position + 1], position, cache)
        end = synchronized_time(ids.device)
    return middle - start, (end - middle) / new


def _device_name(model: Any) -> str:
    device = device_of(model)
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)


def _results(samples: Mapping[str, Sequence[Sample]]) -> tuple[VariantSpeed, ...]:
    reference = next(iter(samples.values()))
    results = []
    for name, own in samples.items():
        spreads = [Spread.of([sample[part] for sample in own]) for part in (0, 1)]
        ratios = [Spread.of([s[part] / r[part] for s, r in zip(own, reference, strict=True)]) for part in (0, 1)]
        results.append(VariantSpeed(name, *spreads, *ratios))
    return tuple(results)
