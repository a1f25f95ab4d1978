"""A generation metric: what the model writes for each source beside a reference, by corpus BLEU over tokens."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shoal.errors import DataError
from shoal.evaluation.pairs import target_ids, write_each
from shoal.evaluation.tasks import Item, Tasks, rows_of, score_tasks

ORDER = 4
"""The longest n-gram."""
KEYS = (("source", "target"), ("source", "reference"), ("src", "tgt"))


@dataclass(frozen=True, slots=True)
class Translations:
    """Sources with their reference translations (or answers), from one file."""

    name: str
    pairs: tuple[tuple[str, str], ...]
    sha256: str


def load_translations(path: str | Path, *, limit: int | None = None) -> Translations | None:
    """Read a .jsonl file with {"source", "target"} a line, the first `limit`; None where the first line is no such
    pair. Raises `DataError` D450 for a later line that is none, and what `load_tasks` raises for a file."""
    name, rows, sha256 = rows_of(path, limit=limit)
    pairs = [_pair(row) for row, _ in rows]
    if pairs[0] is None:
        return None
    for pair, (_, where) in zip(pairs, rows, strict=True):
        if pair is None:
            raise DataError(f"{where} is no translation; write {{source, target}}, both of them texts", code="D450")
    return Translations(name, tuple(pair for pair in pairs if pair is not None), sha256)


def _pair(row: dict[str, Any]) -> tuple[str, str] | None:
    for source, target in KEYS:
        if isinstance(row.get(source), str) and isinstance(row.get(target), str) and row[target].strip():
            return row[source], row[target]
    return None


def score_translations(
    model: Any, tokenizer: Any, translations: Translations, *, batch: int = 8
) -> tuple[float, float]:
    """(BLEU from 0 to 100 of what the model writes greedily, mean negative log-likelihood of the references in nats an
    item). BLEU is over the tokenizer's own tokens, as spBLEU is over SentencePiece's; a text may be twice as long as
    the longest reference and 8 tokens more."""
    special = set(getattr(tokenizer, "all_special_ids", ()))
    references = [
        [one for one in target_ids(tokenizer, target) if one not in special] for _, target in translations.pairs
    ]
    most = 2 * max(map(len, references)) + 8
    sources = [source for source, _ in translations.pairs]
    written = write_each(model, tokenizer, sources, new_tokens=most, batch=batch)
    items = tuple(Item(source, (target,)) for source, target in translations.pairs)
    likely = score_tasks(model, tokenizer, Tasks(translations.name, items, translations.sha256), batch=batch)
    return bleu(written, references), likely.nll


def bleu(written: Sequence[Sequence[int]], references: Sequence[Sequence[int]]) -> float:
    """Corpus BLEU from 0 to 100 of token sequences, one reference each.

    100 min(1, exp(1 - r / w)) (p_1 p_2 p_3 p_4)^(1/4), w and r the numbers of tokens written and in the references, p_n
    the share of the written n-grams that their reference holds, each as often as there at most. An order that matches
    nowhere counts as 1 / 2^k of one match, k numbering these orders, as in sacrebleu; one that nothing is long enough
    for is left out. 0 where not a single token matches.

    Source: Papineni et al. 2002; the smoothing of zero counts: Chen and Cherry 2014, method 3.
    """
    lengths = sum(map(len, written)), sum(map(len, references))
    logs, zeros, matches = [], 0, 0
    for n in range(1, ORDER + 1):
        match = total = 0
        for own, wanted in zip(written, references, strict=True):
            made, there = _ngrams(own, n), _ngrams(wanted, n)
            match += sum(min(count, there[gram]) for gram, count in made.items())
            total += sum(made.values())
        if not total:
            continue
        zeros, matches = zeros + (match == 0), matches + match
        logs.append(math.log((match or 2.0**-zeros) / total))
    if not matches:
        return 0.0
    return 100 * min(1.0, math.exp(1 - lengths[1] / lengths[0])) * math.exp(sum(logs) / len(logs))


def _ngrams(tokens: Sequence[int], n: int) -> Counter[tuple[int, ...]]:
    return Counter(tuple(tokens[start : start + n]) for start in range(len(tokens) - n + 1))
