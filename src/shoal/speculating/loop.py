"""The decoding loop: draft, judge, take back, as `generate` calls it in place of its own."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import Cache
from transformers.generation import GenerateDecoderOnlyOutput

from shoal.decoding.growing_text import GrowingText
from shoal.speculating.accept import Offer, pick, verdict
from shoal.speculating.account import CLOSE, Meter, Stats
from shoal.speculating.chooser import Chooser, Finder
from shoal.speculating.feed import Feed
from shoal.speculating.lengths import Length
from shoal.speculating.rows import forget_past, keep_past, require_croppable, require_dynamic, take_back
from shoal.speculating.scene import Scene
from shoal.speculating.stage import Draft, Ready, Stage
from shoal.speculating.watch import Watch


@dataclass
class Rules:
    """How tokens are chosen and when to stop: what `generate` prepared."""

    processors: Any
    criteria: Any
    sample: bool
    end: int
    """The length of text at which generation ends at the latest."""
    streamer: Any = None
    scores: list[torch.Tensor] | None = None
    logits: list[torch.Tensor] | None = None

    def processed(self, ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Scores [1, vocabulary] that the next token behind `ids` is chosen by."""
        return self.processors(ids, logits) if len(self.processors) else logits


class Loop:
    """One generation. The text always ends in a token that is not in the cache yet."""

    def __init__(
        self, stage: Stage, chooser: Chooser | None, finder: Finder | None, length: Length, rules: Rules, meter: Meter
    ) -> None:
        self.stage, self.chooser, self.finder = stage, chooser, finder
        self.length, self.rules, self.meter = length, rules, meter
        self.stats: Stats = meter.stats
        self.ready: Ready | None = None
        self.watch = Watch(stage.stack, chooser.watches) if chooser is not None and chooser.watches else None

    @property
    def ids(self) -> torch.Tensor:
        """The text so far, [1, length]."""
        return self.text.ids

    def run(self, ids: torch.Tensor, prefill: Any, kwargs: dict[str, Any]) -> tuple[torch.Tensor, Cache]:
        """From the prompt [1, length] to the whole text; `prefill()` gives the stock prefill's output."""
        if self.chooser is not None:
            self.ready = self.stage.prepare(self.chooser.begin(self.stage.spec))
        self.stats.prompt, self.stats.depth = ids.shape[1], self.stage.depth
        with self.meter.on("prefill"):
            out = prefill()
        cache: Cache = out.past_key_values
        require_dynamic(cache)
        require_croppable(cache)
        self.feed, self.cache = Feed(self.stage.model, ids, kwargs), cache
        self.text = GrowingText(ids, self.rules.criteria, self.rules.streamer)
        self._commit(out.logits[:, -1].to(dtype=torch.float32, copy=True), None, None)
        del out
        recording = keep_past(cache)
        try:
            with nullcontext() if self.watch is None else self.watch:
                while not self.text.done:
                    self._round()
        finally:
            forget_past(recording)
        return self.ids, cache

    def _round(self) -> None:
        self.stats.rounds += 1
        room = self.rules.end - self.ids.shape[1] - 1
        offer, draft = self._offer(min(self.length.most, room))
        new = len(offer) + 1
        text = torch.cat([self.ids, self.ids.new_tensor([offer.tokens])], -1) if len(offer) else self.ids
        with self.meter.on("verify"):
            logits = self.stage.full(self.feed, text, new, self.cache) if draft is None else draft.judge(text, new)
        kept = 0
        for position in range(new):
            drafted = offer.tokens[position] if position < len(offer) else None
            stands = self._commit(
                logits[position : position + 1], drafted, offer.chances[position] if drafted is not None else None
            )
            kept += 1
            if self.text.done or not stands:
                break
        accepted = kept if stands else kept - 1
        if self.watch is not None:
            self.watch.settle(new, kept)
        take_back(self.cache, new - kept)
        self._judged(offer, accepted)

    def _judged(self, offer: Offer, accepted: int) -> None:
        self.stats.drafted += len(offer)
        self.stats.accepted += accepted
        self.stats.looked_up += len(offer) if offer.looked_up else 0
        if not offer.looked_up:
            self.length.judged(len(offer), accepted)

    def _offer(self, most: int) -> tuple[Offer, Draft | None]:
        if most < 1:
            return Offer(), None
        with self.meter.on("draft"):
            found = self.finder.find(self.ids, most) if self.finder is not None else []
        if found:
            return Offer(found, [None] * len(found), looked_up=True), None
        if self.chooser is None or self.length.rests():
            return Offer(), None
        self._choose()
        most = most if self.chooser.most is None else min(most, self.chooser.most)
        if most < 1:
            return Offer(), None
        with self.meter.on("draft"):
            return self._draft(most)

    def _choose(self) -> None:
        assert self.chooser is not None
        with self.meter.on("choose"):
            steps = self.chooser.again(Scene(self.stage, self.feed, self.cache, self.ids, self.stats, self.watch))
        if steps is not None:
            self.ready = self.stage.prepare(steps)

    def _draft(self, most: int) -> tuple[Offer, Draft]:
        assert self.ready is not None
        draft, offer, text = Draft(self.stage, self.ready, self.feed, self.cache), Offer(), self.ids
        while len(offer) < most:
            scores = self.rules.processed(text, draft.next(text))
            token, chances = pick(scores, self.rules.sample)
            offer.tokens.append(token)
            offer.chances.append(chances)
            text = torch.cat([text, text.new_tensor([[token]])], -1)
            if self.length.looks and self.length.stops(_largest(scores, chances)):
                break
        return offer, draft

    def _commit(self, logits: torch.Tensor, drafted: int | None, chances: torch.Tensor | None) -> bool:
        """Choose the next token by the base model's logits [1, vocabulary]; True when it is the drafted one."""
        rules = self.rules
        if rules.logits is not None:
            rules.logits.append(logits.clone())
        scores = rules.processed(self.ids, logits)
        if rules.scores is not None:
            rules.scores.append(scores)
        token, stands = verdict(scores, drafted, chances, rules.sample)
        if not rules.sample:
            best = scores.topk(2).values[0]
            self.stats.close_calls += bool(best[0] - best[1] < CLOSE)
        self.text.add(self.ids.new_tensor([token]), None if rules.scores is None else tuple(rules.scores))
        self.stats.tokens += 1
        return stands


def _largest(scores: torch.Tensor, chances: torch.Tensor | None) -> float:
    if chances is not None:
        return float(chances.max())
    return float((scores.max() - scores.logsumexp(-1)).exp())


def answer(ids: torch.Tensor, cache: Cache, rules: Rules, as_dict: bool) -> Any:
    """What `generate` returns."""
    if not as_dict:
        return ids
    return GenerateDecoderOnlyOutput(
        sequences=ids,
        scores=None if rules.scores is None else tuple(rules.scores),
        logits=None if rules.logits is None else tuple(rules.logits),
        past_key_values=cache,
    )
