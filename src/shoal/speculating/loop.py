"""The decoding loop: draft, verify, drop rejected tokens, as `generate` calls it in place of its own."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from transformers.cache_utils import Cache
from transformers.generation import GenerateDecoderOnlyOutput

from shoal.decoding.growing_text import GrowingText
from shoal.speculating.accept import Candidate, Proposal, accept_one_of, largest_chance, pick
from shoal.speculating.chooser import Chooser, Finder
from shoal.speculating.draft_context import DraftContext
from shoal.speculating.draft_runner import Draft, DraftRunner, PreparedDraft
from shoal.speculating.forward_inputs import ForwardInputs
from shoal.speculating.generation_settings import GenerationSettings
from shoal.speculating.layer_outputs import LayerOutputs
from shoal.speculating.lengths import Length
from shoal.speculating.masked_draft import Masked, draft_masked
from shoal.speculating.rows import forget_past, keep_past, keep_places, require_croppable, require_dynamic
from shoal.speculating.stats import CLOSE, PhaseProfiler, Stats
from shoal.speculating.token_tree import TreeShape
from shoal.speculating.tree_drafting import draft_tree
from shoal.speculating.tree_masks import require_plain_rows


class Loop:
    """One generation. The text always ends in a token that is not in the cache yet."""

    def __init__(
        self,
        runner: DraftRunner,
        chooser: Chooser | None,
        finder: Finder | None,
        length: Length,
        rules: GenerationSettings,
        profiler: PhaseProfiler,
        tree: TreeShape | None = None,
    ) -> None:
        self.runner, self.chooser, self.finder, self.tree = runner, chooser, finder, tree
        self.length, self.rules, self.profiler = length, rules, profiler
        self.stats: Stats = profiler.stats
        self.prepared: PreparedDraft | None = None
        self.outputs = LayerOutputs(runner.stack, chooser.watches) if chooser is not None and chooser.watches else None

    @property
    def ids(self) -> torch.Tensor:
        """The text so far, [1, length]."""
        return self.text.ids

    def run(self, ids: torch.Tensor, prefill: Any, kwargs: dict[str, Any]) -> tuple[torch.Tensor, Cache]:
        """From the prompt [1, length] to the whole text; `prefill()` gives the stock prefill's output."""
        if self.chooser is not None:
            self.prepared = self.runner.prepare(self.chooser.begin(self.runner.spec))
        self.stats.prompt, self.stats.depth = ids.shape[1], self.runner.depth
        with self.profiler.on("prefill"):
            out = prefill()
        cache: Cache = out.past_key_values
        require_dynamic(cache)
        require_croppable(cache)
        if self.tree is not None:
            require_plain_rows(cache)
        self.feed, self.cache = ForwardInputs(self.runner.model, ids, kwargs), cache
        self.text = GrowingText(ids, self.rules.criteria, self.rules.streamer)
        self._commit(out.logits[:, -1].to(dtype=torch.float32, copy=True), Proposal(), 0)
        del out
        recording = keep_past(cache)
        try:
            with nullcontext() if self.outputs is None else self.outputs:
                while not self.text.done:
                    self._round()
        finally:
            forget_past(recording)
        return self.ids, cache

    def _round(self) -> None:
        self.stats.rounds += 1
        room = self.rules.end - self.ids.shape[1] - 1
        proposal, draft = self._propose(min(self.length.most, room))
        new = len(proposal) + 1
        text = torch.cat([self.ids, self.ids.new_tensor([proposal.tokens])], -1) if len(proposal) else self.ids
        with self.profiler.on("verify"):
            logits = self.runner.full(self.feed, text, new, self.cache) if draft is None else draft.verify(text, new)
        places = [0]
        while True:
            place = self._commit(logits[places[-1] : places[-1] + 1], proposal, places[-1])
            if self.text.done or place is None:
                break
            places.append(place)
        accepted = len(places) - (place is None)
        if self.outputs is not None:
            self.outputs.keep_accepted(new, places)
        keep_places(self.cache, new, places)
        self._count(proposal, accepted)

    def _count(self, proposal: Proposal, accepted: int) -> None:
        self.stats.drafted += len(proposal)
        self.stats.accepted += accepted
        self.stats.looked_up += len(proposal) if proposal.looked_up else 0
        if not proposal.looked_up:
            self.length.update(proposal.length, accepted)

    def _propose(self, most: int) -> tuple[Proposal, Draft | None]:
        if most < 1:
            return Proposal(), None
        with self.profiler.on("draft"):
            found = self.finder.find(self.ids, most) if self.finder is not None else []
        if found:
            proposal = Proposal(looked_up=True)
            for token in found:
                proposal.add(token, None)
            return proposal, None
        if self.chooser is None or self.length.rests():
            return Proposal(), None
        self._choose()
        most = most if self.chooser.most is None else min(most, self.chooser.most)
        if most < 1:
            return Proposal(), None
        with self.profiler.on("draft"):
            return self._draft(most)

    def _choose(self) -> None:
        assert self.chooser is not None
        with self.profiler.on("choose"):
            steps = self.chooser.again(
                DraftContext(self.runner, self.feed, self.cache, self.ids, self.stats, self.outputs)
            )
        if steps is not None:
            self.prepared = self.runner.prepare(steps)

    def _draft(self, most: int) -> tuple[Proposal, Draft]:
        assert self.prepared is not None
        draft, proposal, text = Draft(self.runner, self.prepared, self.feed, self.cache), Proposal(), self.ids
        if isinstance(self.chooser, Masked):
            return draft_masked(draft, self.chooser, text, most, self.rules, self.length), draft
        if self.tree is not None:
            return draft_tree(draft, self.tree, text, most, self.rules, self.length), draft
        while len(proposal) < most:
            scores = self.rules.processed(text, draft.next(text))
            token, probabilities = pick(scores, self.rules.sample)
            proposal.add(token, probabilities)
            text = torch.cat([text, text.new_tensor([[token]])], -1)
            if self.length.looks and self.length.stops(largest_chance(scores, probabilities)):
                break
        return proposal, draft

    def _commit(self, logits: torch.Tensor, proposal: Proposal, place: int) -> int | None:
        """Choose the token behind `place` by the base model's logits [1, vocabulary]; the place of a drafted token that
        it is, None where none is."""
        rules, behind = self.rules, proposal.children(place)
        if rules.logits is not None:
            rules.logits.append(logits.clone())
        scores = rules.processed(self.ids, logits)
        if rules.scores is not None:
            rules.scores.append(scores)
        drafted: list[Candidate] = [(proposal.tokens[one - 1], proposal.probabilities[one - 1]) for one in behind]
        token, which = accept_one_of(scores, drafted, rules.sample)
        if not rules.sample:
            best = scores.topk(2).values[0]
            self.stats.close_calls += bool(best[0] - best[1] < CLOSE)
        self.text.add(self.ids.new_tensor([token]), None if rules.scores is None else tuple(rules.scores))
        self.stats.tokens += 1
        return None if which is None else behind[which]


def answer(ids: torch.Tensor, cache: Cache, rules: GenerationSettings, as_dict: bool) -> Any:
    """What `generate` returns."""
    if not as_dict:
        return ids
    return GenerateDecoderOnlyOutput(
        sequences=ids,
        scores=None if rules.scores is None else tuple(rules.scores),
        logits=None if rules.logits is None else tuple(rules.logits),
        past_key_values=cache,
    )
