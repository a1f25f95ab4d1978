"""tune_draft: the draft with the most tokens per second on these prompts, or the advice to draft nothing."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch

from shoal.api.prompts import encoded, texts_of
from shoal.decoding.arguments import GREEDY
from shoal.decoding.decoder import Decoder
from shoal.errors import UsageError
from shoal.evaluation import Progress
from shoal.executing.timing import synchronized_time
from shoal.models.calls import device_of
from shoal.models.evaluating import evaluating
from shoal.models.kinds import require_causal
from shoal.models.load import Loaded
from shoal.speculating.candidates import layer_drafts, ranked
from shoal.speculating.forecast import Forecast, SampleText
from shoal.speculating.lengths import Confidence
from shoal.speculating.speculator import Speculator

WORTH = 1.03
"""A draft is advised when its median round is this much faster than plain decoding, and its worst not slower."""


@dataclass(frozen=True)
class TimedSetting:
    """One setting, generated with in turn with plain `generate`."""

    draft: str
    length: int
    confidence: Confidence
    foreseen: float | None
    """Speed-up that was foreseen; None for a draft that the user named."""
    speedup: float
    """Median over rounds of plain seconds / speculative seconds, prefill included, all prompts together."""
    worst: float
    best: float
    acceptance: float | None
    tokens_per_round: float
    layers_per_token: float
    different: int
    """Prompts whose text was another than plain decoding's."""
    close_calls: int
    """Greedy choices between two logits less than 1e-4 apart: only there rounding may choose another token."""


@dataclass(frozen=True)
class Tuned:
    """What the tuner found."""

    prompts: int
    new: int
    device: str
    dtype: str
    threads: int
    plain_tokens_per_second: float
    foreseen: list[dict[str, Any]]
    verified: list[TimedSetting]
    draft: str | None
    """The draft to use; None: plain decoding is faster."""
    length: int = 0
    confidence: Confidence = None
    speedup: float = 1.0
    verdict: str = ""
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def tune_draft(
    loaded: Loaded,
    prompts: Sequence[str] | None = None,
    *,
    new: int = 64,
    finalists: int = 3,
    pairs: int = 3,
    also: Sequence[str] = (),
    chat: bool | None = None,
    few: bool = False,
    progress: Progress | None = None,
) -> Tuned:
    """Find the draft that generates fastest from `prompts` (default: six that come along, of three kinds).

    The base model writes `new` tokens for each prompt; each candidate is run over that text once, which shows what it
    would have drafted; every length and confidence is then counted and timed by measured passes, and the best
    `finalists`, with the drafts `also`, generate in turn with plain `generate`, `pairs` times. `few`: fewer candidates.
    Greedy decoding, batch 1. Raises D440 without a tokenizer, U619 when the model ends every text at once, and what
    `Speculator` raises for a model that cannot be drafted for.
    """
    require_causal(loaded.model, "tune-draft")
    start = synchronized_time(device_of(loaded.model))
    texts = texts_of(prompts)
    tell = progress or (lambda *_: None)
    model = loaded.model
    with evaluating(model):
        tasks = [encoded(loaded, text, chat) for text in texts]
        speculator = Speculator(model, "lookup")
        samples, plain = _written(model, tasks, new, tell)
        with speculator.runner as runner:
            forecast = Forecast(runner, samples)
            times = forecast.time_base()
            drafts = layer_drafts(forecast, few)
            rows = ranked(forecast, times, drafts, times.full[1])
            del forecast
        settings = [(str(r["draft"]), r["length"], r["confidence"], r["speedup"]) for r in _finalists(rows, finalists)]
        settings += [(text, 4, "auto", None) for text in also]
        verified = []
        for number, setting in enumerate(settings):
            tell(number, len(settings), f"verifying {setting[0]}")
            verified.append(_verified(model, tasks, new, pairs, setting))
        tell(len(settings), len(settings), "verified")
    return _tuned(model, tasks, new, plain, rows, verified, synchronized_time(device_of(model)) - start)


def _finalists(rows: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """The best lookup, the best layers and the best of both before the next best: they win on different prompts."""
    first: dict[tuple[bool, bool], dict[str, Any]] = {}
    for row in rows:
        pieces = str(row["draft"]).split("+")
        first.setdefault((pieces[0].startswith("lookup"), pieces[-1].startswith("lookup")), row)
    chosen = list(first.values())
    chosen += [row for row in rows if row not in chosen]
    return chosen[:count]


def _greedy(new: int) -> dict[str, Any]:
    return GREEDY | {"max_new_tokens": new, "stop_strings": None}


def _written(
    model: Any, tasks: list[dict[str, torch.Tensor]], new: int, tell: Callable[..., Any]
) -> tuple[list[SampleText], float]:
    """What plain decoding writes, and its tokens per second."""
    samples, seconds, tokens = [], 0.0, 0
    for number, task in enumerate(tasks):
        tell(number, len(tasks), "plain decoding")
        ids, spent = _timed(partial(Decoder(model).generate, **task, **_greedy(new)), model)
        prompt = task["input_ids"].shape[1]
        seconds, tokens = seconds + spent, tokens + ids.shape[1] - prompt
        if ids.shape[1] - prompt > 2 and prompt > 1:
            samples.append(SampleText(ids, prompt))
    if not samples:
        raise UsageError(
            "the model ends its text at once on every prompt, so there is nothing to draft; give other prompts",
            code="U619",
        )
    return samples, tokens / seconds


def _verified(
    model: Any, tasks: list[dict[str, torch.Tensor]], new: int, pairs: int, setting: tuple[Any, ...]
) -> TimedSetting:
    draft, length, confidence, foreseen = setting
    speculator = Speculator(model, draft, length=length, confidence=confidence)
    ratios, different, totals = [], 0, [0, 0, 0, 0, 0]
    ran = 0.0
    for turn in range(pairs):
        plain = ours = 0.0
        for task in tasks:
            expected, spent = _timed(partial(Decoder(model).generate, **task, **_greedy(new)), model)
            plain += spent
            found, spent = _timed(partial(speculator.generate, **task, **_greedy(new)), model)
            ours += spent
            if turn == 0:
                s = speculator.stats
                different += not torch.equal(expected, found)
                counts = (s.drafted, s.accepted, s.rounds, s.tokens - 1, s.close_calls)
                totals = [a + b for a, b in zip(totals, counts, strict=True)]
                ran += (s.layers_per_token or 0) * (s.tokens - 1)
        ratios.append(plain / ours)
    drafted, accepted, rounds, tokens, close = totals
    return TimedSetting(
        draft, length, confidence, foreseen, statistics.median(ratios), min(ratios), max(ratios),
        accepted / drafted if drafted else None, tokens / max(1, rounds), ran / max(1, tokens), different, close,
    )  # fmt: skip


def _timed(call: Callable[[], Any], model: Any) -> tuple[Any, float]:
    start = synchronized_time(device_of(model))
    out = call()
    return out, synchronized_time(device_of(model)) - start


def _tuned(
    model: Any,
    tasks: list[Any],
    new: int,
    plain: float,
    rows: list[dict[str, Any]],
    verified: list[TimedSetting],
    seconds: float,
) -> Tuned:
    best = max(verified, key=lambda v: v.speedup)
    use = best.speedup >= WORTH and best.worst >= 1
    spread = f"{best.speedup:.2f} x plain decoding ({best.worst:.2f} to {best.best:.2f} over rounds)"
    if use:
        verdict = f"use {best.draft} with at most {best.length} drafted tokens: {spread}"
    else:
        verdict = f"do not use it here: the best draft, {best.draft}, reaches {spread}"
    notes = [
        f"{v.draft}: {v.different} of {len(tasks)} texts differ from plain decoding ({v.close_calls} close calls)"
        for v in verified
        if v.different
    ]
    return Tuned(
        len(tasks), new, str(device_of(model)), str(model.dtype).removeprefix("torch."), torch.get_num_threads(), plain,
        rows, verified, best.draft if use else None, best.length if use else 0, best.confidence if use else None,
        best.speedup if use else 1.0, verdict, seconds, notes,
    )  # fmt: skip
