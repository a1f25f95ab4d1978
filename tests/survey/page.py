"""The survey as a page: a row for every type, the counts at the top."""

from __future__ import annotations

import datetime as dt
import platform
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import transformers

from .survey import KINDS, LIMIT, PLANS, Row

PAGE = Path(__file__).parents[2] / "docs" / "supported-models.md"

HEAD = """# Supported models

Written by `python -m tests.survey.survey`; do not edit. {versions}, float32 on the CPU, {date}, {seconds:.0f} s.

Every causal model type that transformers names, as a model of 6 random layers made from the type's own config class
with small sizes. Each plan runs live and is written; the written folder is then loaded by `AutoModelForCausalLM` in
another process, and its logits, in one pass and in cached passes, are within {limit:g} of the live plan's: **right**.
A code means that Shoal refuses the plan before a weight is read; the last column says why (the first sentence met).
**n/a**: no two layers after the first are alike.

{buildable} of {types} types can be built. {counts}

| plan | notation | right | refused | n/a | wrong |
|---|---|---|---|---|---|
{by_kind}

"""
KIND_TITLE = "## Encoders, encoder-decoders and vision models"
KIND_HEAD = """{title}

Written by `python -m tests.survey.kinds`. {versions}, float32 on the CPU, {date}, {seconds:.0f} s.

{types} types under the Auto class of their usual checkpoints, each as a model whose stacks have 6 random layers. Every
plan above is laid on each stack alone and on `all` at once, runs live and is written; plain transformers loads the
written folder in another process. **right**: everything that it returns, and with a decoder the scores of cached
passes too, is within {limit:g} of the live plan's. {right} types are right for every plan on at least one row without
a refusal; {wrong} verdicts are wrong.

"""
PICTURE_TITLE = "## Models that read pictures and text"
PICTURE_HEAD = """{title}

Written by `python -m tests.survey.pictures`. {versions}, float32 on the CPU, {date}, {seconds:.0f} s.

The types of `AutoModelForImageTextToText`, each with a decoder of 6 random layers, which the plans above are laid on;
whatever makes tokens of a picture is carried along. **right**: the written folder, loaded by plain transformers in
another process, gives the live plan's logits within {limit:g}, in one pass, in passes over a cache and by `generate`:
after a text and, where *picture* says yes, after a prompt with a picture too.

{built} of {types} types were built so far. {right} are right for one plan or more, {pictures} of them with a picture;
{refused} are refused; {wrong} are wrong.

"""
ALIKE = "two layers of one kind change places"


def page(rows: list[Row], seconds: float) -> str:
    """The whole page."""
    built = [row for row in rows if row.missing is None]
    lines = [f"| type | {' | '.join(KINDS)} | notes |", "|---" * (len(KINDS) + 2) + "|"]
    lines += [_line(row) for row in built]
    lines += ["", "## Not surveyed", "", "| type | why transformers gives no tiny model of it that runs |", "|---|---|"]
    lines += [f"| {row.model_type} | {_cell(row.missing)} |" for row in rows if row.missing is not None]
    head = HEAD.format(
        versions=f"Python {platform.python_version()}, torch {_release(torch)}, transformers {_release(transformers)}",
        date=dt.datetime.now(tz=dt.UTC).date(),
        seconds=seconds,
        limit=LIMIT,
        buildable=len(built),
        types=len(rows),
        counts=_counts(built),
        by_kind="\n".join(_kind(built, kind) for kind in KINDS),
    )
    return head + "\n".join(lines) + "\n"


def _counts(built: list[Row]) -> str:
    verdicts = [row.verdicts for row in built]
    all_right = sum(set(found.values()) <= {"right", "n/a"} for found in verdicts)
    drops = [kind for kind in KINDS if kind.startswith("drop")]
    drop = sum(any(found[kind] == "right" for kind in drops) for found in verdicts)
    both = sum(
        any(found[kind] == "right" for kind in drops) and "right" in (found["swap"], found["swap alike"])
        for found in verdicts
    )
    wrong = sum(row.wrong for row in built)
    return (
        f"{all_right} are right for every plan, {drop} for a drop, {both} for a drop and a reorder; "
        f"{len(built) - both} are refused one of the two with a reason; {wrong} are wrong."
    )


def _kind(built: list[Row], kind: str) -> str:
    found = Counter(_class(row.verdicts[kind]) for row in built)
    text = f"`{PLANS[kind]}`" if kind in PLANS else ALIKE
    return (
        f"| {kind} | {text} | " + " | ".join(str(found[state]) for state in ("right", "refused", "n/a", "wrong")) + " |"
    )


def _class(verdict: str) -> str:
    if verdict in ("right", "n/a"):
        return verdict
    return "wrong" if verdict.startswith("wrong") else "refused"


def _line(row: Row) -> str:
    notes = [f"{code}: {why}" for code, why in row.reasons.items()] + ([row.note] if row.note else [])
    return (
        f"| {row.model_type} | " + " | ".join(_cell(row.verdicts[k]) for k in KINDS) + f" | {_cell('; '.join(notes))} |"
    )


def _cell(text: str | None) -> str:
    return (text or "").replace("|", r"\|").replace("\n", " ").replace("<", "&lt;")


def _release(module: Any) -> str:
    return str(module.__version__).partition("+")[0]


def write_kinds(rows: list[Any], seconds: float) -> None:
    """Put the section of the second survey in place of an older one."""
    page = PAGE.read_text(encoding="utf-8")
    first = page.partition(f"\n{KIND_TITLE}")[0]
    _, title, rest = page.partition(f"\n{PICTURE_TITLE}")
    PAGE.write_text(f"{first.rstrip()}\n\n{kinds_section(rows, seconds)}{title}{rest}", encoding="utf-8")


def kept_kinds() -> str:
    """The sections of the other surveys as they stand on the page, for a page that is written anew."""
    _, title, rest = PAGE.read_text(encoding="utf-8").partition(f"\n{KIND_TITLE}")
    return title + rest


def write_pictures(rows: list[Any], seconds: float) -> None:
    """Put the section of the third survey at the end of the page, in place of an older one."""
    page = PAGE.read_text(encoding="utf-8").partition(f"\n{PICTURE_TITLE}")[0]
    PAGE.write_text(f"{page.rstrip()}\n\n{pictures_section(rows, seconds)}", encoding="utf-8")


def pictures_section(rows: list[Any], seconds: float) -> str:
    """A row for every type of which there is a tiny model, and why there is none of the others."""
    built = [row for row in rows if row.missing is None]
    right = [row for row in built if any(verdict == "right" for verdict in row.verdicts.values())]
    head = PICTURE_HEAD.format(
        title=PICTURE_TITLE,
        versions=f"Python {platform.python_version()}, torch {_release(torch)}, transformers {_release(transformers)}",
        date=dt.datetime.now(tz=dt.UTC).date(),
        seconds=seconds,
        limit=LIMIT,
        types=len(rows),
        built=len(built),
        right=len(right),
        pictures=sum(row.picture == "yes" for row in right),
        refused=len(built) - len(right),
        wrong=sum(row.wrong for row in built),
    )
    lines = [f"| type | {' | '.join(KINDS)} | picture | notes |", "|---" * (len(KINDS) + 3) + "|"]
    for row in built:
        said = [f"{code}: {why}" for code, why in row.reasons.items()] + ([row.note] if row.note else [])
        said += [] if row.picture == "yes" else [f"no picture: {row.picture}"]
        verdicts = " | ".join(_cell(row.verdicts[kind]) for kind in KINDS)
        seen = "yes" if row.picture == "yes" else "no"
        lines.append(f"| {row.model_type} | {verdicts} | {seen} | {_cell('; '.join(said))} |")
    lines += ["", "Not surveyed:", "", "| type | why not |", "|---|---|"]
    lines += [f"| {row.model_type} | {_cell(row.missing)} |" for row in rows if row.missing is not None]
    return head + "\n".join(lines) + "\n"


def kinds_section(rows: list[Any], seconds: float) -> str:
    """A row for every type and stack."""
    found = {row.model_type for row in rows if row.verdicts and set(row.verdicts.values()) == {"right"}}
    wrong = sum(verdict.startswith("wrong") for row in rows for verdict in row.verdicts.values())
    head = KIND_HEAD.format(
        title=KIND_TITLE,
        versions=f"Python {platform.python_version()}, torch {_release(torch)}, transformers {_release(transformers)}",
        date=dt.datetime.now(tz=dt.UTC).date(),
        seconds=seconds,
        types=len({row.model_type for row in rows}),
        limit=LIMIT,
        right=len(found),
        wrong=wrong,
    )
    lines = [f"| type | Auto class | stack | {' | '.join(PLANS)} | notes |", "|---" * (len(PLANS) + 4) + "|"]
    for row in rows:
        notes = "; ".join(f"{code}: {why}" for code, why in row.reasons.items()) or row.missing or ""
        verdicts = " | ".join(_cell(row.verdicts.get(kind, "not built")) for kind in PLANS)
        lines.append(f"| {row.model_type} | {row.auto} | {row.stack} | {verdicts} | {_cell(notes)} |")
    return head + "\n".join(lines) + "\n"
