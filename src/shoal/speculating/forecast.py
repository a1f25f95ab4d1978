"""A forecast of how fast a draft would be, from one pass over a text that the base model wrote and a few timed calls.

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

from shoal.executing.timing import synchronized_time
from shoal.plan.steps import Run
from shoal.speculating.chooser import Finder
from shoal.speculating.draft_context import DraftContext
from shoal.speculating.draft_runner import DraftRunner, PreparedDraft
from shoal.speculating.forward_inputs import ForwardInputs
from shoal.speculating.rows import select_rows
from shoal.speculating.stats import Stats

WIDTHS = (1, 2, 3, 5, 9)
"""Tokens in the timed passes of the base model."""


@dataclass(frozen=True)
class SampleText:
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


class Forecast:
    """Sample texts with their prompts prefilled, for which drafts are compared."""

    def __init__(self, runner: DraftRunner, samples: Sequence[SampleText]) -> None:
        """Every prompt but for its last token is prefilled. Use it inside `with runner:`."""
        self.runner, self.samples = runner, list(samples)
        self.contexts = [_context(runner, one) for one in samples]
        self.times = Times()

    def hits(self, steps: tuple[Run, ...]) -> list[Hits]:
        """What a draft of `steps` would have drafted, text by text."""
        found = []
        for context, sample in zip(self.contexts, self.samples, strict=True):
            right, sure = context.hits(steps, context.cache, sample.prompt)
            found.append(Hits(right[1:].tolist(), sure[1:].tolist()))
        return found

    def time_base(self, repeats: int = 3) -> Times:
        """Time the base model at several widths, and the head alone."""
        context = self.contexts[0]
        alone = self.runner.prepare(tuple(Run(i) for i in range(self.runner.depth)))
        for new in WIDTHS:
            text = context.ids[:, : self.samples[0].prompt - 1]
            text = torch.cat([text, context.ids[:, -1:].expand(1, new)], -1)
            rows = [select_rows(context.cache, range(len(context.cache.layers)), 0) for _ in range(2 * repeats)]
            self.times.full[new] = _median(
                partial(lambda text, new, rows: self.runner.full(context.feed, text, new, rows.pop()), text, new, rows),
                repeats,
                context.ids.device,
            )
            self.times.head[new] = _median(partial(self._head, alone, text, new), repeats, context.ids.device)
        return self.times

    def _head(self, alone: PreparedDraft, text: torch.Tensor, new: int) -> None:
        context = self.contexts[0]
        nothing = select_rows(context.cache, (), 0)
        nothing.layers = list(context.cache.layers)
        self.runner.logits(alone.remaining, context.feed, text, new, nothing)

    def time_draft(self, steps: tuple[Run, ...], repeats: int = 3) -> float:
        """Seconds of one drafted token, the choice included."""
        context, prepared = self.contexts[0], self.runner.prepare(steps)
        text = context.ids[:, : self.samples[0].prompt]
        rows = [select_rows(context.cache, prepared.draft.rows, 0) for _ in range(2 * repeats)]

        def once() -> None:
            self.runner.logits(prepared.draft, context.feed, text, 1, rows.pop()).argmax(-1).item()
            prepared.draft.forget()

        return _median(once, repeats, context.ids.device)


@dataclass(frozen=True)
class DraftSetting:
    """What a forecast is made for: a draft of layers, a lookup in the text, or both."""

    steps: tuple[Run, ...] = ()
    finder: Finder | None = None
    length: int = 4
    confidence: float | None = None


def predict_speed(
    setting: DraftSetting,
    samples: Sequence[SampleText],
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
    for number, one in enumerate(samples):
        for proposed, stood, looked in _rounds(setting, one, None if hits is None else hits[number]):
            rounds, drafted, accepted, tokens = rounds + 1, drafted + proposed, accepted + stood, tokens + stood + 1
            if looked or not proposed:
                seconds += times.part(depth, depth, proposed + 1)
                continue
            shared_pass = times.part(shared, depth, 1) - _at(times.head, 1)
            seconds += proposed * draft + shared_pass + times.part(depth - shared, depth, proposed + 1)
    return seconds / tokens, accepted / drafted if drafted else 0.0, tokens / rounds


def _rounds(setting: DraftSetting, sample: SampleText, hits: Hits | None) -> Iterator[tuple[int, int, bool]]:
    """(drafted, accepted, looked up) of each round; the first new token is the prefill's."""
    text, at = sample.ids[0].tolist(), sample.prompt + 1
    while at < len(text):
        most = min(setting.length, len(text) - at - 1)
        found = setting.finder.find(sample.ids[:, :at], most) if setting.finder is not None and most > 0 else []
        if found:
            stood = next((n for n, token in enumerate(found) if token != text[at + n]), len(found))
            yield len(found), stood, True
        elif hits is not None and most > 0:
            first = at - sample.prompt - 1
            proposed = _drafted(hits, first, most, setting.confidence)
            stood = next((n for n in range(proposed) if not hits.right[first + n]), proposed)
            yield proposed, stood, False
        else:
            stood = 0
            yield 0, 0, False
        at += stood + 1


def _drafted(hits: Hits, first: int, most: int, confidence: float | None) -> int:
    """Tokens drafted before the draft is unsure; behind a wrong token it is taken to be as sure as behind the right."""
    if confidence is None:
        return most
    return next((n + 1 for n in range(most) if hits.sure[first + n] < confidence), most)


def _context(runner: DraftRunner, sample: SampleText) -> DraftContext:
    prompt = sample.ids[:, : sample.prompt - 1]
    out = runner.model(prompt, use_cache=True, return_dict=True)
    cache: Cache = out.past_key_values
    feed = ForwardInputs.of_prompt(runner.model, prompt, runner.takes)
    return DraftContext(runner, feed, cache, sample.ids, Stats())


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
        start = synchronized_time(device)
        call()
        spent.append(synchronized_time(device) - start)
    return statistics.median(spent)
