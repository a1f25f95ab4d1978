"""Hypothesis strategies for steps, plans and almost-plans.

Each draws little: drawing, not the code under test, is what property tests wait for.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from itertools import chain

from hypothesis import strategies as st

from shoal.plan import KV, Base, Exit, Map, Parallel, Plan, Run, Step
from shoal.plan.notation import map_weights
from shoal.plan.sources import FILLS, StackLayer
from shoal.plan.steps import JOINS, PARTS

SIGNS = "0123456789-,amxkv@:?/()[]|~!=;. \n"
NAMES = ["g", "7", "a", "m", "x2", "w.1", "_+-.", "-", "base", "map-0-1", "project"]

names = st.sampled_from(NAMES)
maybe_names = st.sampled_from([None, None, *NAMES])
fills = st.sampled_from([None, *FILLS])
parts = st.sampled_from(PARTS)


@cache
def layers(depth: int) -> st.SearchStrategy[int]:
    return st.integers(0, depth - 1)


@cache
def runs(depth: int) -> st.SearchStrategy[Run]:
    """Single runs with any mix of part, weights, sources, fill and gate."""
    maybe = st.none() | layers(depth)
    both = st.builds(KV, maybe, fills, maybe)
    apart = st.builds(KV, st.none(), fills, maybe, maybe, maybe)
    added = st.builds(KV, st.none(), fills, maybe, maybe, layers(depth), st.just(True))
    across = st.builds(StackLayer, st.sampled_from(["encoder", "_2"]), layers(depth))
    ties = maybe | across | st.sampled_from([name for name in NAMES if name not in ("7", "w.1")])
    return st.builds(Run, layers(depth), parts, maybe_names, both | apart | added, maybe_names, ties)


def _ladder(first: int, last: int, part: str) -> list[Step]:
    """Plain neighbouring layers, up or down."""
    order = range(first, last + 1) if first <= last else range(first, last - 1, -1)
    return [Run(i, part) for i in order]  # type: ignore[arg-type]


def _tied(ladder: list[Step], tie: int, turn: int, depth: int, stack: str | None) -> list[Step]:
    """The same, each tied to one layer, or to layers up or down, of this stack or of another."""
    places = [(tie + turn * n) % depth for n in range(len(ladder))]
    ties = [place if stack is None else StackLayer(stack, place) for place in places]
    return [replace(run, tie=tie) for run, tie in zip(ladder, ties, strict=True) if isinstance(run, Run)]


def _map(one: int, other: int, weights: str | None, gate: str | None) -> list[Step]:
    first, last = sorted([one, other])
    return [Map(first, last, weights or map_weights(first, last), gate)]


@cache
def pieces(depth: int) -> st.SearchStrategy[list[Step]]:
    """What folds into one piece of text, and lone steps that must not fold into their neighbours."""
    number, run = layers(depth), runs(depth)
    return st.one_of(
        st.builds(_ladder, number, number, parts),
        st.builds(
            _tied,
            st.builds(_ladder, number, number, parts),
            number,
            st.sampled_from([0, 1, -1]),
            st.just(depth),
            st.sampled_from([None, None, "encoder"]),
        ),
        st.builds(lambda i, part, times: [Run(i, part)] * times, number, parts, st.integers(1, 3)),
        st.builds(lambda step, times: [step] * times, run, st.integers(1, 3)),
        st.builds(_map, number, number, maybe_names, maybe_names),
        st.builds(
            lambda branches, join: [Parallel(tuple(branches), join)],
            st.lists(run, min_size=2, max_size=3),
            st.sampled_from(JOINS),
        ),
        st.builds(lambda name, head, gate: [Exit(name, head or "base", gate)], names, maybe_names, maybe_names),
    )


@cache
def steps(depth: int) -> st.SearchStrategy[tuple[Step, ...]]:
    """Any steps that depth notation can write, in all four kinds."""
    return st.lists(pieces(depth), min_size=1, max_size=5).map(lambda found: tuple(chain.from_iterable(found)))


def _plan(stacks: list[tuple[str, int, tuple[Step, ...]]], fingerprint: str, source: str | None) -> Plan:
    base = Base("llama", fingerprint, tuple((name, depth) for name, depth, _ in stacks), source)
    return Plan(base, tuple((name, steps) for name, _, steps in stacks))


plans = st.builds(
    _plan,
    st.lists(
        st.tuples(st.sampled_from(["decoder", "encoder", "_2"]), st.just(9), steps(9)),
        min_size=1,
        max_size=3,
        unique_by=lambda stack: stack[0],
    ),
    st.text(max_size=3),
    st.none() | st.text(max_size=3),
)
"""Plans of one to three stacks whose layers all exist."""

json_values = st.recursive(
    st.sampled_from([None, True, 0, 12, -1, 10**400, 1.5, float("nan"), float("inf"), "", "0-3", "\ud800", "decoder"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["decoder", "", "format", "base"]) | st.text(max_size=2), inner, max_size=3)
    ),
    max_leaves=5,
)
