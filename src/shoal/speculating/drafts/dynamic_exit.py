"""Draft by an exit that is chosen anew before every round, and by as many tokens as are worth it there."""

from __future__ import annotations

from dataclasses import dataclass, field

from shoal.errors import UsageError
from shoal.examples import DraftExamples
from shoal.plan import Run, Spec
from shoal.plan.price import head_in_layers
from shoal.speculating.chooser import Chooser
from shoal.speculating.draft_context import DraftContext

REST = 8, 64
"""Tokens between two looks while nothing is worth drafting, at first and at most: a look costs a call of the head."""

EXAMPLES = DraftExamples(("dynamic-exit:places=4",))


def dynamic_exit(*, spec: Spec, places: int = 8, decay: float = 0.95, length: int = 8) -> Chooser:
    """Leave behind the layer E and draft as many tokens d as give the most tokens for each layer that runs.

    tpl(E, d) = (1 - a^(d+1)) / (1 - a) / (d (E + h) + L + h), a = a[E] the share of the tokens written so far that the
    exit E would have drafted, a token counting `decay` times as much as the next one, L the depth, h what the head
    costs in layers (by FLOPs). The states of each verification tell a[E] for all exits at once; only norm and head run
    for it. E: every `places`-th part of the depth; d: 0 to `length`, 0 meaning plain decoding until the next look, 8
    tokens on, then 16, up to 64; a look sees the last 8 tokens.

    Source: DEL (Zarch et al., COLM 2025, arXiv 2504.05598), rule and decay from its abstract and memory.

    How we differ: the head counts (there layers alone do), not drafting is a choice, and drafts end by the `confidence`
    of every other draft.
    """
    depth = spec.stack("decoder").depth
    if not 2 <= places <= depth or not 0 < decay <= 1 or length < 1:
        raise UsageError(
            f"dynamic-exit cannot choose among {places} places with a decay of {decay} and {length} tokens; use 2 to "
            f"{depth} places, a decay above 0 and up to 1, and 1 token or more",
            code="U614",
        )
    exits = sorted({max(1, round(depth * n / places)) for n in range(1, places)})
    return _DynamicExit(exits, decay, length)


@dataclass
class _DynamicExit(Chooser):
    exits: list[int]
    decay: float
    length: int
    most: int | None = 0
    hits: list[float] = field(default_factory=list)
    seen: float = 0.0
    looked: int = 0
    rest: int = REST[0]

    def __post_init__(self) -> None:
        self.watches = [layers - 1 for layers in self.exits]

    def begin(self, spec: Spec) -> tuple[Run, ...]:
        """Plain decoding until something is known of this text."""
        self.hits, self.seen, self.looked, self.most, self.rest = [0.0] * len(self.exits), 0.0, 0, 0, REST[0]
        return _exit(self.exits[0])

    def again(self, context: DraftContext) -> tuple[Run, ...] | None:
        """The exit for the coming round."""
        self.looked = self.looked or context.length
        if not self.most and context.length - self.looked < self.rest:
            return None
        self.looked = context.length
        found = context.exit_matches()
        if found is None:
            return None
        for token in found.T.tolist():
            self.seen = self.decay * self.seen + 1
            self.hits = [self.decay * old + new for old, new in zip(self.hits, token, strict=True)]
        layers = context.runner.spec.stack("decoder").layers
        head = head_in_layers(context.runner.spec)
        shares = [hit / self.seen for hit in self.hits]
        chosen, self.most = _worth_most(self.exits, shares, self.length, len(layers), head)
        self.rest = REST[0] if self.most else min(REST[1], 2 * self.rest)
        return _exit(chosen)


def _worth_most(exits: list[int], shares: list[float], length: int, depth: int, head: float) -> tuple[int, int]:
    """(exit, drafted tokens) with the most tokens for each layer; the smaller where two are worth the same."""
    options = [(e, d, a) for e, a in zip(exits, shares, strict=True) for d in range(length + 1)]

    def worth(option: tuple[int, int, float]) -> tuple[float, int]:
        e, d, a = option
        return sum(a**n for n in range(d + 1)) / (d * (e + head) + depth + head), -d

    e, d, _ = max(options, key=worth)
    return e, d


def _exit(layers: int) -> tuple[Run, ...]:
    return tuple(Run(i) for i in range(layers))
