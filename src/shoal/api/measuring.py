"""measure: one measure on one text, or several side by side, how far they agree, and whether the text was enough."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from inspect import signature
from typing import Any

from shoal.api.assess import Source, is_given, opened_base, text_of
from shoal.api.measuring_apart import measured_apart
from shoal.api.tracked import tell_scores
from shoal.data import Data
from shoal.data.spelled import TextSource
from shoal.errors import UsageError, tell_unused
from shoal.evaluation import Progress, RankAgreement, SubsampleAgreement, agreement_table, enough
from shoal.evaluation.cluster_resources import Cluster, require_reachable
from shoal.models.kinds import require_text
from shoal.models.load import Loaded
from shoal.record import plain
from shoal.registry import Entry, get
from shoal.report.tracking import require_trackers, tracking
from shoal.scores import Scores, Traits
from shoal.spelling import chosen, options_of, read


def reads_text(name: str) -> bool:
    """Whether the measure that is spelled so reads text. Raises U501 for a name that does not exist."""
    traits: Traits = getattr(import_module(get("measures", read(name).name).module), "TRAITS", Traits())
    return traits.text


def measure(
    source: Source,
    name: str = "block-influence",
    *,
    data: Any = "builtin",
    split: str = "calibrate",
    length: int = 512,
    limit: int = 16,
    stride: int | None = None,
    bos: bool = False,
    seed: int | None = None,
    batch: int = 1,
    stack: str | None = None,
    settings: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Scores:
    """Score every layer by the measure `name` (see `shoal ls measures`; NAME or NAME:key=value,key=value) on `limit`
    windows of `length` tokens.

    `settings` are the measure's own options; `options` go to `shoal.load`. Raises `UsageError` U501 for a name and U502
    for an option that does not exist, `DataError` for text that cannot be used. `name` may be a file, as `./mine.py`
    (`shoal.user_files`), which the scores' `detail` then names.
    """
    entry, own = chosen("measures", name, settings)
    loaded, function = opened_base(source, **options), entry.load()
    text = None
    if is_given(data) and not reads_text(name):
        tell_unused(f"data={data!s:.60}", f"the measure {entry.name} reads no text")
    if reads_text(name):
        require_text(loaded.model, f"the measure {name}")
        text = text_of(loaded, data, split=split, length=length, limit=limit, stride=stride, bos=bos, seed=seed)
    if "tokenizer" in signature(function).parameters:
        own["tokenizer"] = loaded.tokenizer
    scores: Scores = function(loaded.model, text, stack=stack, batch=batch, progress=progress, **own)
    return scores if entry.file is None else replace(scores, detail={**scores.detail, "file": entry.file.to_dict()})


@dataclass(frozen=True)
class Measured:
    """Scores by name (the measure's, or the measure's and the text's), and what they say together."""

    scores: dict[str, Scores]
    agreement: dict[tuple[str, str], RankAgreement]
    """Of every two that judge the same layers or spans."""
    enough: dict[str, SubsampleAgreement | str]
    """Empty unless asked for; a sentence where it cannot be said."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data; of a single score its own fields stand at the top."""
        enough = {
            name: {"why_not": own} if isinstance(own, str) else plain(own.to_dict())
            for name, own in self.enough.items()
        }
        if len(self.scores) == 1:
            (only,) = self.scores.values()
            return only.to_dict() | ({"enough": next(iter(enough.values()))} if enough else {})
        pairs = [{"of": list(pair), **plain(own.to_dict())} for pair, own in self.agreement.items()]
        scores = {name: own.to_dict() for name, own in self.scores.items()}
        return {"scores": scores, "agreement": pairs, **({"enough": enough} if enough else {})}


def measure_several(
    source: Source,
    names: Sequence[str],
    *,
    data: Sequence[Any] = ("builtin",),
    settings: Mapping[str, Mapping[str, Any]] | None = None,
    lowest: int = 8,
    stability: bool = False,
    cluster: Cluster | None = None,
    track: Sequence[str] = (),
    progress: Progress | None = None,
    load: Mapping[str, Any] | None = None,
    **options: Any,
) -> Measured:
    """Score every layer by each of the measures on each of the texts, with the model loaded once.

    `settings`: by measure, its own options. `lowest`: how many of the least important layers are compared, at most half
    of the stack. `stability`: also say how many sequences are enough. `cluster`: where measures, texts
    and, where a measure allows it, shares of a text are looked at side by side. `track`: experiment trackers
    (`shoal.report.tracking`) that are told the scores, a step for each layer. `load` goes to `shoal.load`, `options` to
    `shoal.measure`. Raises what `shoal.measure` raises, U501 and U502 before the model is loaded.
    """
    asked = _asked(names, settings or {})
    require_trackers(track)
    loaded = opened_base(source, **(load or {}))
    named = all(isinstance(text, str | TextSource) for text in data)
    texts = list(dict.fromkeys(data)) if named else list(data)
    wanted = {
        (typed if len(texts) == 1 else f"{typed} on {_words(text, number)}"): (entry, own, text)
        for typed, (entry, own) in asked.items()
        for number, text in enumerate(texts)
    }
    scores = (
        {
            name: measure(loaded, entry.name, data=text, settings=own, progress=_named(progress, name), **options)
            for name, (entry, own, text) in wanted.items()
        }
        if cluster is None or cluster.address is None
        else _apart(loaded, wanted, cluster, progress, **options)
    )
    with tracking(track, "measure", {"model": loaded.source}) as told:
        tell_scores(told, scores)
    k = max(1, min(lowest, min(len(found.values) for found in scores.values()) // 2))
    return Measured(scores, agreement_table(scores, k=k), _stability(scores, k) if stability else {})


def _words(text: Any, number: int) -> str:
    return str(text) if isinstance(text, str | TextSource) else f"text {number + 1}"


def _apart(
    loaded: Loaded,
    wanted: Mapping[str, tuple[Entry, dict[str, Any], Any]],
    cluster: Cluster,
    progress: Progress | None,
    *,
    stack: str | None = None,
    batch: int = 1,
    **reading: Any,
) -> dict[str, Scores]:
    """The scores by name, from processes of the cluster; each text is read once, here."""
    require_reachable(cluster, loaded)
    texts: dict[Any, Data] = {}
    tasks = list[tuple[Entry, dict[str, Any], Data | None]]()
    for entry, own, text in wanted.values():
        if not reads_text(entry.name):
            tasks.append((entry, own, None))
            continue
        require_text(loaded.model, f"the measure {entry.name}")
        key = text if isinstance(text, str | TextSource) else id(text)
        if key not in texts:
            texts[key] = text_of(loaded, text, **{"split": "calibrate", "length": 512, "limit": 16, **reading})
        tasks.append((entry, own, texts[key]))
    found = measured_apart(measure, loaded, tasks, cluster, batch=batch, progress=progress, stack=stack)
    return dict(zip(wanted, found, strict=True))


def _asked(names: Sequence[str], settings: Mapping[str, Mapping[str, Any]]) -> dict[str, tuple[Entry, dict[str, Any]]]:
    """Each measure once, by what was typed, with its options: `settings` by name of the measure, and the typed ones."""
    found = {}
    for spelled in map(read, names):
        entry = get("measures", spelled.name)
        typed = replace(spelled, name=entry.name)
        found[str(typed)] = entry, options_of(entry, typed, settings.get(entry.name))
    return found


def settings_of(names: Sequence[str], pairs: Sequence[str]) -> dict[str, dict[str, Any]]:
    """["name=value", ...] -> options by measure: each goes to every measure that has it. Raises U502 when none has."""
    named = {entry.name: entry for entry in (get("measures", read(name).name) for name in names)}
    found: dict[str, dict[str, Any]] = {name: {} for name in named}
    for pair in pairs:
        takers = [entry for entry in named.values() if _option(pair) in entry.options()]
        if not takers and len(named) > 1:
            raise UsageError(
                f"none of {', '.join(found)} has an option {_option(pair)!r}; see shoal ls measures", code="U502"
            )
        for entry in takers or named.values():
            found[entry.name] |= entry.typed([pair])
    return found


def _option(pair: str) -> str:
    return pair.partition("=")[0].strip().replace("-", "_")


def _stability(scores: Mapping[str, Scores], k: int) -> dict[str, SubsampleAgreement | str]:
    found: dict[str, SubsampleAgreement | str] = {}
    for name, own in scores.items():
        try:
            found[name] = enough(own, k=k)
        except UsageError as error:
            found[name] = str(error)
    return found


def _named(progress: Progress | None, name: str) -> Progress | None:
    """A bar for each score, whatever stage the measure itself names."""
    return None if progress is None else lambda done, total, _: progress(done, total, name)
