"""From the cells of a comparison to its table, in Markdown as well, and to what may be said of it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, median, stdev
from typing import Any

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Entry:
    """One method at one budget: the mean over its seeds."""

    method: str
    budget: str
    seeds: int
    plan: str = ""
    """Of the first seed."""
    error: str = ""
    perplexity: dict[str, float] = field(default_factory=dict)
    """By text; the geometric mean over seeds."""
    spread: tuple[float, float] | None = None
    """Lowest and highest perplexity on the first text, of several seeds."""
    windows: tuple[float, ...] = ()
    """Mean cross-entropy of each window of the first text, for the first seed: what differences are judged by."""
    tasks: dict[str, float] = field(default_factory=dict)
    numbers: dict[str, float] = field(default_factory=dict)
    """kl, top1, repetition, params, kv, layers, price, prefill, decode, seconds, peak, as far as they are known."""

    @property
    def first(self) -> float:
        """Perplexity on the first text; infinite where there is none."""
        return next((v if math.isfinite(v) else math.inf for v in self.perplexity.values()), math.inf)


def entries(rows: Iterable[Row]) -> tuple[Entry, list[Entry]]:
    """(dense, methods by budget and perplexity) from the rows of `compare`."""
    dense, grouped = Entry("dense", "", 1), dict[tuple[str, str], list[Row]]()
    for row in rows:
        if row["key"] == "dense":
            dense = _entry("dense", "", [row])
        else:
            grouped.setdefault((row["budget"], row["method"]), []).append(row)
    found = [_entry(method, budget, own) for (budget, method), own in grouped.items()]
    budgets = list(dict.fromkeys(entry.budget for entry in found))
    return dense, sorted(found, key=lambda e: (budgets.index(e.budget), bool(e.error), e.first, e.method))


def _entry(method: str, budget: str, rows: Sequence[Row]) -> Entry:
    whole = [row for row in rows if "result" in row]
    if not whole:
        return Entry(method, budget, len(rows), error=str(rows[0].get("error", "not run")))
    results = [row["result"] for row in whole]
    texts = list(results[0].get("perplexity", {}))
    figures = {name: _exp_mean([r["nll"][name]["mean"] for r in results]) for name in texts}
    each = [_exp_mean([r["nll"][texts[0]]["mean"]]) for r in results] if texts else []
    tasks = {name: fmean(r["tasks"][name]["accuracy"] for r in results) for name in results[0].get("tasks", {})}
    numbers = {
        name: fmean(known)
        for name in ("unhealed", "kl", "top1", "repetition", "params", "kv", "layers", "flops", "price")
        if (known := [r[name] for r in results if isinstance(r.get(name), int | float)])
    }
    for name in ("prefill", "decode"):
        if known := [row["measured"][name]["median"] for row in whole if name in row["measured"]]:
            numbers[name] = median(known)
    for name in ("seconds", "healing", "peak"):
        if known := [row["measured"][name] for row in whole if row["measured"].get(name) is not None]:
            numbers[name] = fmean(known)
    return Entry(
        method,
        budget,
        len(whole),
        plan=str(results[0].get("plan", "")),
        perplexity=figures,
        spread=(min(each), max(each)) if len(each) > 1 else None,
        windows=tuple(map(_known, results[0]["nll"][texts[0]].get("windows", ()))) if texts else (),
        tasks=tasks,
        numbers=numbers,
    )


def _exp_mean(values: Sequence[float | None]) -> float:
    """exp of a mean of logarithms; infinite when one of them is not finite, or too large."""
    if any(value is None for value in values):
        return math.inf
    mean = fmean(value for value in values if value is not None)
    return math.exp(mean) if mean < 700 else math.inf


def columns(dense: Entry, found: Sequence[Entry]) -> tuple[list[str], list[list[Any]]]:
    """Heads and rows of the table: only what was measured. Times and sizes are shares of the dense model's."""
    everything = [dense, *found]
    texts = list(next((e.perplexity for e in everything if e.perplexity), {}))
    tasks = list(next((e.tasks for e in everything if e.tasks), {}))
    shown = [name for name in _NUMBERS if any(name in e.numbers for e in everything)]
    head = ["budget", "method", *[f"perplexity {t}" for t in texts], *tasks, *[_NUMBERS[name] for name in shown]]
    rows: list[list[Any]] = []
    for entry in everything:
        if entry.error:
            rows.append([entry.budget, entry.method, entry.error, *[None] * (len(head) - 3)])
            continue
        rows.append(
            [
                entry.budget,
                entry.method,
                *[entry.perplexity.get(t) for t in texts],
                *[entry.tasks.get(t) for t in tasks],
            ]
            + [entry.numbers.get(name) for name in shown]
        )
    return head, rows


_NUMBERS = {
    "unhealed": "before healing",
    "kl": "KL",
    "top1": "top-1",
    "repetition": "repetition",
    "price": "budget used",
    "layers": "layers",
    "kv": "KV",
    "decode": "decode time",
    "prefill": "prefill time",
    "seconds": "search s",
    "healing": "healing s",
}


def markdown(dense: Entry, found: Sequence[Entry]) -> str:
    """The table for a README."""
    head, rows = columns(dense, found)
    lines = ["| " + " | ".join(head) + " |", "|" + "|".join("---" if i < 2 else "---:" for i in range(len(head))) + "|"]
    lines += ["| " + " | ".join(_text(value) for value in row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def _text(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return "inf" if math.isinf(value) else f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"
    return str(value).replace("|", "\\|").replace("\n", " ")


def advice(dense: Entry, found: Sequence[Entry]) -> list[str]:
    """A plain sentence for each budget: which method to use here, and what is no worse; of healed plans a second one,
    on whether healing changed the order."""
    said = []
    for budget in dict.fromkeys(entry.budget for entry in found):
        own = [e for e in found if e.budget == budget and not e.error and math.isfinite(e.first)]
        if not own:
            said.append(f"At {budget} no method gave a usable model.")
            continue
        best = own[0]
        alike = [e.method for e in own[1:] if _alike(best, e)]
        also = f"; {', '.join(alike)} {'is' if len(alike) == 1 else 'are'} within 2 standard errors" if alike else ""
        speed = f", decode time {best.numbers['decode']:.2f} of dense" if "decode" in best.numbers else ""
        worth = f"perplexity {best.first:.2f}" + (f" (dense {dense.first:.2f})" if dense.perplexity else "")
        said.append(f"At {budget} use {best.method}: {worth}{speed}{also}.{_reordered(own)}")
    return said


def _reordered(own: Sequence[Entry]) -> str:
    """Where the plan that was best before healing stands after it, and how far the two orders agree; nothing where
    fewer than two plans were healed."""
    healed = [e for e in own if math.isfinite(e.numbers.get("unhealed", math.inf))]
    if len(healed) < 2:
        return ""
    from scipy.stats import kendalltau

    before = [e.numbers["unhealed"] for e in healed]
    agreement = float(kendalltau(before, [e.first for e in healed]).statistic)
    first = healed[before.index(min(before))]
    place = f"healed it is number {healed.index(first) + 1} of {len(healed)}"
    tau = "" if math.isnan(agreement) else f" (Kendall's tau of the two orders {agreement:.2f})"
    return f" Before healing {first.method} was best with {min(before):.2f}; {place}{tau}."


def _alike(best: Entry, other: Entry) -> bool:
    """Whether the mean difference of the windows' cross-entropies, paired, is below two of its standard errors."""
    if len(best.windows) != len(other.windows) or len(best.windows) < 2:
        return best.first == other.first
    gaps = [b - a for a, b in zip(best.windows, other.windows, strict=True)]
    return math.isfinite(sum(gaps)) and fmean(gaps) <= 2 * stdev(gaps) / math.sqrt(len(gaps))


def _known(value: float | None) -> float:
    return math.inf if value is None else value


def frontier(found: Sequence[Entry], of: str) -> list[Entry]:
    """The entries that no other beats in both perplexity and the number `of`, by that number."""
    known = [e for e in found if of in e.numbers and math.isfinite(e.first)]
    best, kept = math.inf, []
    for entry in sorted(known, key=lambda e: (e.numbers[of], e.first)):
        if entry.first < best:
            best = entry.first
            kept.append(entry)
    return kept
