"""What a draft would be worth, from one pass over a text that the base model wrote and a few timed calls.

Where the text is known, whether a draft would have drafted each of its tokens is read off one pass; the rounds of any
draft length and confidence are then counted without running them, and timed by what each of their passes takes.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from transformers.cache_utils import Cache

from shoal.executing.timing import now
from shoal.plan.steps import Run
from shoal.speculating.account import Stats
from shoal.speculating.chooser import Finder
from shoal.speculating.feed import Feed
from shoal.speculating.rows import lent
from shoal.speculating.scene import Scene
from shoal.speculating.stage import Ready, Stage

WIDTHS = (1, 2, 3, 5, 9)
"""Tokens in the timed passes of the base model."""


@dataclass(frozen=True)
class Told:
    """A prompt and how the base model goes on: ids [1, length], the first `prompt` of them given."""

    ids: torch.Tensor
    prompt: int

    @property
    def new(self) -> int:
        return int(self.ids.shape[1]) - self.prompt


@dataclass(frozen=True)
class Hits:
    """For each new token behind the first: would it have been drafted, and how sure was the draft?"""

    right: list[bool]
    sure: list[float]


@dataclass
class Times:
    """Seconds of passes."""

    full: dict[int, float] = field(default_factory=dict)
    """Tokens -> a pass of the base model."""
    head: dict[int, float] = field(default_factory=dict)
    """Tokens -> all of a pass but the layers."""

    def part(self, layers: int, depth: int, new: int) -> float:
        """A pass of `new` tokens through `layers` of the `depth` layers, and the head."""
        full, head = _at(self.full, new), _at(self.head, new)
        return head + (full - head) * layers / depth


class Foresight:
    """Told texts, ready to be drafted."""

    def __init__(self, stage: Stage, told: Sequence[Told]) -> None:
        """Prefills every prompt but for its last token. Use inside `with stage:`."""
        self.stage, self.told = stage, list(told)
        self.scenes = [_scene(stage, one) for one in told]
        self.times = Times()

    def hits(self, steps: tuple[Run, ...]) -> list[Hits]:
        """What a draft of `steps` would have drafted, text by text."""
        found = []
        for scene, told in zip(self.scenes, self.told, strict=True):
            right, sure = scene.hits(steps, scene.cache, told.prompt)
            found.append(Hits(right[1:].tolist(), sure[1:].tolist()))
        return found

    def time_base(self, repeats: int = 3) -> Times:
        """Time the base model at several widths, and the head alone."""
        scene = self.scenes[0]
        alone = self.stage.prepare(tuple(Run(i) for i in range(self.stage.depth)))
        for new in WIDTHS:
            text = scene.ids[:, : self.told[0].prompt - 1]
            text = torch.cat([text, scene.ids[:, -1:].expand(1, new)], -1)
            rows = [lent(scene.cache, range(len(scene.cache.layers)), 0) for _ in range(2 * repeats)]
            self.times.full[new] = _median(
                partial(lambda text, new, rows: self.stage.full(scene.feed, text, new, rows.pop()), text, new, rows),
                repeats,
                scene.ids.device,
            )
            self.times.head[new] = _median(partial(self._head, alone, text, new), repeats, scene.ids.device)
        return self.times

    def _head(self, alone: Ready, text: torch.Tensor, new: int) -> None:
        scene = self.scenes[0]
        nothing = lent(scene.cache, (), 0)
        nothing.layers = list(scene.cache.layers)
        self.stage.logits(alone.rest, scene.feed, text, new, nothing)

    def time_draft(self, steps: tuple[Run, ...], repeats: int = 3) -> float:
        """Seconds of one drafted token, the choice included."""
        scene, ready = self.scenes[0], self.stage.prepare(steps)
        text = scene.ids[:, : self.told[0].prompt]
        rows = [lent(scene.cache, ready.draft.rows, 0) for _ in range(2 * repeats)]

        def once() -> None:
            self.stage.logits(ready.draft, scene.feed, text, 1, rows.pop()).argmax(-1).item()
            ready.draft.forget()

        return _median(once, repeats, scene.ids.device)


@dataclass(frozen=True)
class Setting:
    """What is foreseen: a draft of layers, a look into the text, or both."""

    steps: tuple[Run, ...] = ()
    finder: Finder | None = None
    length: int = 4
    confidence: float | None = None


def foreseen(
    setting: Setting,
    told: Sequence[Told],
    hits: Sequence[Hits] | None,
    times: Times,
    draft: float,
    shared: int,
    depth: int,
) -> tuple[float, float, float]:
    """(seconds for each new token, acceptance, tokens for each round) over all texts.

    `hits`: of the draft of layers; `draft`: seconds of one drafted token; `shared`: layers shared with verification.
    """
    seconds, drafted, accepted, rounds, tokens = 0.0, 0, 0, 0, 0
    for number, one in enumerate(told):
        for offered, stood, looked in _rounds(setting, one, None if hits is None else hits[number]):
            rounds, drafted, accepted, tokens = rounds + 1, drafted + offered, accepted + stood, tokens + stood + 1
            if looked or not offered:
                seconds += times.part(depth, depth, offered + 1)
                continue
            ahead = times.part(shared, depth, 1) - _at(times.head, 1)
            seconds += offered * draft + ahead + times.part(depth - shared, depth, offered + 1)
    return seconds / tokens, accepted / drafted if drafted else 0.0, tokens / rounds


def _rounds(setting: Setting, told: Told, hits: Hits | None) -> Iterator[tuple[int, int, bool]]:
    """(drafted, accepted, looked up) of each round; the first new token is the prefill's."""
    text, at = told.ids[0].tolist(), told.prompt + 1
    while at < len(text):
        most = min(setting.length, len(text) - at - 1)
        found = setting.finder.find(told.ids[:, :at], most) if setting.finder is not None and most > 0 else []
        if found:
            stood = next((n for n, token in enumerate(found) if token != text[at + n]), len(found))
            yield len(found), stood, True
        elif hits is not None and most > 0:
            first = at - told.prompt - 1
            offered = _drafted(hits, first, most, setting.confidence)
            stood = next((n for n in range(offered) if not hits.right[first + n]), offered)
            yield offered, stood, False
        else:
            stood = 0
            yield 0, 0, False
        at += stood + 1


def _drafted(hits: Hits, first: int, most: int, confidence: float | None) -> int:
    """Tokens drafted before the draft is unsure; behind a wrong token it is taken to be as sure as behind the right."""
    if confidence is None:
        return most
    return next((n + 1 for n in range(most) if hits.sure[first + n] < confidence), most)


def _scene(stage: Stage, told: Told) -> Scene:
    prompt = told.ids[:, : told.prompt - 1]
    out = stage.model(prompt, use_cache=True, return_dict=True)
    cache: Cache = out.past_key_values
    kept = {"use_cache": True, "position_ids": torch.arange(told.prompt - 1, device=prompt.device)[None]}
    if "position_ids" not in stage.takes:
        del kept["position_ids"]
    return Scene(stage, Feed(stage.model, prompt, kept), cache, told.ids, Stats())


def _at(known: dict[int, float], new: int) -> float:
    """Seconds at `new` tokens, straight between the timed widths and on beyond them."""
    if new in known:
        return known[new]
    widths = sorted(known)
    low = max((w for w in widths if w < new), default=widths[0])
    high = min((w for w in widths if w > new), default=widths[-1])
    if low == high or high < new:
        low, high = widths[-2:]
    return known[low] + (known[high] - known[low]) * (new - low) / (high - low)


def _median(call: Callable[[], object], repeats: int, device: torch.device) -> float:
    spent = []
    call()
    for _ in range(repeats):
        start = now(device)
        call()
        spent.append(now(device) - start)
    return statistics.median(spent)
