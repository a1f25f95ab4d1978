"""Drafts that the tuner compares: exits, skip sets by dynamic programming, attention-only layers, lookups."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from shoal.errors import ShoalError
from shoal.plan import Run, format_steps
from shoal.plan.select import run_of
from shoal.speculating.drafts.clasp import clasp
from shoal.speculating.drafts.lookup import lookup
from shoal.speculating.forecast import DraftSetting, Forecast, Hits, Times, predict_speed

LENGTHS = (1, 2, 3, 4, 6, 8)
CONFIDENCES = (None, 0.5, 0.8)
NGRAMS = (2, 3)


def layer_drafts(forecast: Forecast, few: bool = False) -> dict[str, tuple[Run, ...]]:
    """Draft text -> steps. `few`: three exits and one skip set.

    Exits at every eighth of the depth; for 1/15, 1/8 and 1/4 of the layers the skip set that CLaSp's dynamic
    programming finds at the end of the first prompt, over all layers and over the later half, which leaves the earlier
    half to be shared; the middle quarter and half of the layers without mlps.
    """
    depth = forecast.runner.depth
    eighths = (3, 6, 7) if few else range(1, 8)
    found: dict[str, tuple[Run, ...]] = {}
    for part in eighths:
        layers = max(1, round(depth * part / 8))
        found[f"exit:{layers}"] = tuple(Run(i) for i in range(layers))
    wanted = [*_skips(forecast, few), *(() if few else _attention_only(depth))]
    for steps in wanted:
        try:
            forecast.runner.prepare(steps)
        except ShoalError:
            continue  # a family in which these layers cannot be left out
        found.setdefault(f"skip:{format_steps(steps)}", steps)
    return found


def _skips(forecast: Forecast, few: bool) -> Iterator[tuple[Run, ...]]:
    runner, depth = forecast.runner, forecast.runner.depth
    context = replace(forecast.contexts[0], ids=forecast.samples[0].ids[:, : forecast.samples[0].prompt])
    for fraction in (15,) if few else (15, 8, 4):
        for first in (depth // 2,) if few else (1, depth // 2):
            skip = max(1, depth // fraction)
            if skip > depth - max(1, first):
                continue
            try:
                chosen = clasp(spec=runner.spec, skip=skip, first=first).again(context)
            except ShoalError:
                return  # a family whose layers cannot be tried alone
            yield tuple(run for run in map(run_of, chosen or ()) if run is not None)


def _attention_only(depth: int) -> Iterator[tuple[Run, ...]]:
    for share in (4, 2):
        low, high = depth // 2 - depth // (2 * share), depth // 2 + depth // (2 * share)
        yield tuple(Run(i, part="attention" if low <= i < high else "layer") for i in range(depth))


ForecastRow = dict[str, object]


def ranked(forecast: Forecast, times: Times, drafts: dict[str, tuple[Run, ...]], plain: float) -> list[ForecastRow]:
    """Every draft with its best length and confidence, fastest first; `plain`: seconds a token of plain decoding."""
    finders = {f"lookup:{ngram}": lookup(spec=forecast.runner.spec, ngram=ngram) for ngram in NGRAMS}
    rows = []
    for name, finder in finders.items():
        rows.append(_best(name, [DraftSetting(finder=finder, length=n) for n in LENGTHS], forecast, None, times, plain))
    for name, steps in drafts.items():
        hits, cost = forecast.hits(steps), forecast.time_draft(steps)
        for prefix in ("", "lookup:2+"):
            settings = [
                DraftSetting(steps, finders["lookup:2"] if prefix else None, n, c) for n in LENGTHS for c in CONFIDENCES
            ]
            rows.append(_best(prefix + name, settings, forecast, hits, times, plain, cost))
    return sorted(rows, key=lambda row: -float(row["speedup"]))  # type: ignore[arg-type]


def _best(
    name: str,
    settings: list[DraftSetting],
    forecast: Forecast,
    hits: Sequence[Hits] | None,
    times: Times,
    plain: float,
    cost: float = 0.0,
) -> ForecastRow:
    runner = forecast.runner
    shared = runner.prepare(settings[0].steps).shared if settings[0].steps else 0
    found = []
    for setting in settings:
        seconds, acceptance, tokens = predict_speed(setting, forecast.samples, hits, times, cost, shared, runner.depth)
        found.append(
            {
                "draft": name,
                "length": setting.length,
                "confidence": setting.confidence,
                "speedup": plain / seconds,
                "acceptance": acceptance,
                "tokens_per_round": tokens,
                "shared": shared,
                "draft_ms": 1000 * cost,
            }
        )
    return max(found, key=lambda row: float(row["speedup"]))  # type: ignore[arg-type]
