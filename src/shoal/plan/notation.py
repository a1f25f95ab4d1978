"""Depth notation: the plan a person types and reads.

    0-11,14-29      layers 0 to 11 and 14 to 29 (0-based, both ends included)      29-0   reversed
    12a   12m       only the attention, only the mlp of layer 12                   10x3   layer 10 three times
    [10-14]x3       the span three times, as a loop; written out flat: 10-14,10-14,10-14
    (7|8)           layers 7 and 8 in parallel; (7|8)mean averages                 13@12  layer 13 reads layer 12's KV
    (7|8)bypass     in parallel, and 8's mlp also sees what 7's attention wrote
    ~12-15          a fitted map for layers 12 to 15; ~12-15:ID names its weights
    13@v0   13@k12  layer 13 reads layer 0's values alone, layer 12's keys alone; 13@v0+ adds them to its own
    26@a25          layer 26 takes over layer 25's attention map
    15=0            layer 15 with the matrices of layer 0; its norms and biases are its own
    15-29=0-14      the same pair by pair; 1-29=0: all with those of layer 0
    0-5=encoder.0-5 with the matrices of layers of another stack
    0=ID,15=ID      layers 0 and 15 with the new matrices ID; 15=ID:OWN and what OWN holds for it alone
    20:ID           layer 20 with the weights ID        20?g  behind gate g        20?g/project  and its KV fill
    !early?g        an exit behind a gate; !early=ID?g with its own head; !end=ID at the end: the plan's own head
    encoder: 0-5; decoder: 0-11      several stacks

`parse_steps(format_steps(s)) == s` for every legal tuple of steps; the formatter writes one canonical text.
"""

from __future__ import annotations

import re
from typing import NoReturn, assert_never

from shoal.errors import NotationError
from shoal.plan.folding import folded, tied_span
from shoal.plan.select import run_of
from shoal.plan.sources import (
    FILLS,
    KV,
    STACK_NAME,
    AttentionMap,
    Fill,
    LayerKeys,
    LayerKV,
    LayerValues,
    NewTensors,
    SharedMatrices,
    Source,
    StackLayer,
    TiedLayer,
)
from shoal.plan.steps import JOINS, NAME, Exit, Join, Map, Parallel, PartName, Run, Step, runs

MAX_STEPS = 10_000
_ID = NAME.pattern
_NUM = r"\d{1,6}"
_RUN = re.compile(
    rf"(?P<first>{_NUM})(?:-(?P<last>{_NUM}))?(?P<part>[am])?(?:x(?P<times>{_NUM}))?"
    rf"(?:=(?:(?:(?P<stack>{STACK_NAME.pattern})\.)?(?P<tie>{_NUM})(?:-(?P<tie_last>{_NUM}))?|(?P<shared>{_ID})))?"
    rf"(?P<sources>(?:@(?:[ka]?{_NUM}|v{_NUM}\+?))*)"
    rf"(?::(?P<weights>{_ID}))?(?:\?(?P<gate>{_ID}))?(?:/(?P<fill>[a-z]+))?",
    re.ASCII,
)
_SOURCE = re.compile(rf"@([kva]?)({_NUM})(\+?)", re.ASCII)
_MAP = re.compile(rf"~(?P<first>{_NUM})(?:-(?P<last>{_NUM}))?(?::(?P<weights>{_ID}))?(?:\?(?P<gate>{_ID}))?", re.ASCII)
_EXIT = re.compile(rf"!(?P<name>{_ID})(?:=(?P<head>{_ID}))?(?:\?(?P<gate>{_ID}))?", re.ASCII)
_GROUP = re.compile(r"\((?P<body>[^()]*)\)(?P<join>[a-z]*)", re.ASCII)
_LOOP = re.compile(rf"\[(?P<body>.*)\]x(?P<times>{_NUM})", re.ASCII | re.DOTALL)
_PARTS: dict[str | None, PartName] = {None: "layer", "a": "attention", "m": "mlp"}
_LETTER: dict[PartName, str] = {"layer": "", "attention": "a", "mlp": "m"}


def map_weights(first: int, last: int) -> str:
    """The id that a map's weights have unless the plan says otherwise."""
    return f"map-{first}-{last}"


def parse_steps(text: str) -> tuple[Step, ...]:
    """Read the notation of one stack. Raises `NotationError` that quotes the piece it cannot read."""
    steps: list[Step] = []
    called = 0
    for piece in _split(text):
        new = _parse_piece(piece)
        steps.extend(new)
        called += sum(max(1, sum(1 for _ in runs((step,)))) for step in new)
        if called > MAX_STEPS:
            _fail(piece, f"the plan has more than {MAX_STEPS} steps")
    if not steps:
        raise NotationError("the plan is empty; write layers such as 0-11,14-29")
    return tuple(steps)


def format_steps(steps: tuple[Step, ...]) -> str:
    """The canonical text of one stack's steps."""
    pieces: list[str] = []
    position = 0
    while position < len(steps):
        step = steps[position]
        length = folded(steps, position)
        match step:
            case Run() if length > 1 and steps[position + 1] == step:
                pieces.append(_format_run(step, f"x{length}"))
            case Run() if length > 1:
                last = run_of(steps[position + length - 1])
                assert last is not None
                pieces.append(f"{step.layer}-{last.layer}{_LETTER[step.part]}{tied_span(step.tie, last.tie)}")
            case Run():
                pieces.append(_format_run(step))
            case Map():
                span = f"{step.first}" if step.first == step.last else f"{step.first}-{step.last}"
                named = "" if step.weights == map_weights(step.first, step.last) else f":{step.weights}"
                pieces.append(f"~{span}{named}{_gate(step.gate)}")
            case Parallel():
                body = "|".join(_format_run(branch) for branch in step.branches)
                pieces.append(f"({body}){'' if step.join == 'sum' else step.join}")
            case Exit():
                head = "" if step.head == "base" else f"={step.head}"
                pieces.append(f"!{step.name}{head}{_gate(step.gate)}")
            case _:
                assert_never(step)
        position += length
    return ",".join(pieces)


def _split(text: str) -> list[str]:
    """Pieces between commas that are not inside brackets: a group in round ones may stand inside square ones."""
    pieces, inside, start = [], "", 0
    for position, char in enumerate(text):
        if char in "([":
            inside += char
        elif char in ")]":
            if inside[-1:] != {")": "(", "]": "["}[char]:
                _fail(text[: position + 1][-20:], "brackets do not match")
            inside = inside[:-1]
        if inside not in ("", "(", "[", "[("):
            _fail(text[: position + 1][-20:], "brackets do not match")
        if char == "," and not inside:
            pieces.append(text[start:position])
            start = position + 1
    if inside:
        _fail(text[start:][:20], "a bracket is not closed")
    pieces.append(text[start:])
    stripped = [piece.strip() for piece in pieces]
    if len(stripped) == 1 and not stripped[0]:
        return []
    for piece in stripped:
        if not piece:
            _fail(text[:40], "there is nothing between two commas")
    return stripped


def _parse_piece(piece: str) -> list[Step]:
    if found := _LOOP.fullmatch(piece):
        if not found["body"].strip():
            _fail(piece, "there is nothing to run between the brackets")
        once, times = parse_steps(found["body"]), int(found["times"])
        if times < 1:
            _fail(piece, "a span cannot run 0 times; leave it out instead")
        if len(once) * times > MAX_STEPS:
            _fail(piece, f"the plan has more than {MAX_STEPS} steps")
        return list(once) * times
    if found := _MAP.fullmatch(piece):
        first, last = int(found["first"]), int(found["last"] or found["first"])
        if last < first:
            _fail(piece, "a map's span must go upwards")
        return [Map(first, last, found["weights"] or map_weights(first, last), found["gate"])]
    if found := _EXIT.fullmatch(piece):
        return [Exit(found["name"], found["head"] or "base", found["gate"])]
    if found := _GROUP.fullmatch(piece):
        branches: list[Run] = []
        for part in found["body"].split("|"):
            branches += _parse_runs(part.strip())
            if len(branches) > MAX_STEPS:
                _fail(piece, f"the plan has more than {MAX_STEPS} steps")
        if len(branches) < 2:
            _fail(piece, "a parallel group needs at least two branches, as in (7|8)")
        return [Parallel(tuple(branches), _join(piece, found["join"]))]
    return list(_parse_runs(piece))


def _parse_runs(piece: str) -> list[Run]:
    found = _RUN.fullmatch(piece)
    if found is None:
        _fail(piece, "expected layers such as 3, 0-11, 12a, 12m, 10x3, 15=0, 13@12, (7|8) or ~12-15")
    first, last = int(found["first"]), int(found["last"] or found["first"])
    times = int(found["times"] or 1)
    if times < 1:
        _fail(piece, "a layer cannot run 0 times; leave it out instead")
    if (abs(last - first) + 1) * times > MAX_STEPS:
        _fail(piece, f"the plan has more than {MAX_STEPS} steps")
    kv = _kv(piece, found["sources"], _fill(piece, found["fill"]))
    order = range(first, last + 1) if last >= first else range(first, last - 1, -1)
    ties: list[int | StackLayer | str | None] = [found["shared"]] * len(order)
    if found["tie"] is not None:
        ties = _ties(piece, found["stack"], int(found["tie"]), found["tie_last"], len(order))
    return [
        Run(layer, _PARTS[found["part"]], found["weights"], kv, found["gate"], tie)
        for layer, tie in zip(order, ties, strict=True)
        for _ in range(times)
    ]


def _ties(
    piece: str, stack: str | None, first: int, last: str | None, count: int
) -> list[int | StackLayer | str | None]:
    """The tied layer of each of so many layers."""
    end = first if last is None else int(last)
    span = range(first, end + 1) if end >= first else range(first, end - 1, -1)
    if last is not None and len(span) != count:
        _fail(piece, f"{count} layers cannot be tied pair by pair to {len(span)}; name as many, or one")
    layers = [first] * count if last is None else span
    return [layer if stack is None else StackLayer(stack, layer) for layer in layers]


def _kv(piece: str, sources: str, fill: Fill | None) -> KV:
    """Of marks such as `@12`, `@k3@v0` or `@a11`."""
    found: dict[str, int] = {}
    for letter, digits, _ in _SOURCE.findall(sources):
        if letter in found:
            _fail(piece, f"it has two marks @{letter}; write one")
        found[letter] = int(digits)
    if "" in found and ("k" in found or "v" in found):
        _fail(piece, f"keys and values come from layer {found['']} already; write @{found['']} alone, or @k and @v")
    return KV(found.get(""), fill, found.get("a"), found.get("k"), found.get("v"), "+" in sources)


def _fill(piece: str, word: str | None) -> Fill | None:
    for fill in FILLS:
        if word == fill:
            return fill
    return None if word is None else _fail(piece, f"the KV fill must be one of {', '.join(FILLS)}")


def _join(piece: str, word: str) -> Join:
    for join in JOINS:
        if word == join:
            return join
    return "sum" if not word else _fail(piece, f"a group's join must be one of {', '.join(JOINS)}")


def _format_run(run: Run, times: str = "") -> str:
    sources = "".join(map(format_source, run.sources))
    fill = "" if run.kv.fill is None else f"/{run.kv.fill}"
    return f"{run.layer}{_LETTER[run.part]}{times}{sources}{_gate(run.gate)}{fill}"


def format_source(source: Source) -> str:
    """How depth notation writes a source behind the layer."""
    match source:
        case LayerKV():
            return f"@{source.layer}"
        case LayerKeys():
            return f"@k{source.layer}"
        case LayerValues():
            return f"@v{source.layer}{'+' if source.beside else ''}"
        case AttentionMap():
            return f"@a{source.layer}"
        case TiedLayer():
            return f"={source.layer}"
        case SharedMatrices():
            return f"={source.id}"
        case NewTensors():
            return f":{source.id}"
        case _:
            assert_never(source)


def _gate(name: str | None) -> str:
    return "" if name is None else f"?{name}"


def _fail(piece: str, why: str) -> NoReturn:
    quoted = piece if len(piece) <= 60 else piece[:60] + "..."
    raise NotationError(f"cannot read {quoted!r} in the plan: {why}")
