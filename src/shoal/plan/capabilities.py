"""What a step can do: one table that everybody asks who runs, decides, drafts, streams or writes plans.

A row for each trait of a step, a field for each way to run or keep a plan. An answer is *right*, right by another way,
or refused with a code. What a family of models adds to this (layers without parts, recurrent layers, orders in which
they cannot run) is not in the table: `check`, `refuse_order` and the policies' own rules say it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal, assert_never

from shoal.plan.answers import (
    DECIDING,
    FAST_HEAD,
    GATED_KV,
    KV_BESIDE_ENCODER,
    NO_BLOCK,
    NO_CAUSAL_DECODER,
    NO_DRAFT,
    NO_HEAD,
    NO_PARTS,
    OK,
    ONE_BY_ONE,
    PAGED_POLICY,
    SHARDED_TENSORS,
    UNDECIDED,
    UNGATED,
    UNORDERED_DRAFT,
    WRITTEN_EXIT,
    WRITTEN_GATE,
    WRITTEN_GROUP,
    WRITTEN_HEAD,
    WRITTEN_KV,
    WRITTEN_MAP,
    WRITTEN_PART,
    Answer,
    Refused,
    Right,
    Row,
    Way,
)
from shoal.plan.later import later_sources
from shoal.plan.notation import format_steps
from shoal.plan.source_answers import (
    CHECKPOINTED_LATER,
    FAST_LATER,
    FAST_MAP,
    GATED_HALF,
    GATED_LATER,
    GATED_MAP,
    MAP_BESIDE_ENCODER,
    PAGED_HALF,
    PAGED_LATER,
    PAGED_MAP,
    SHARDED_TIE,
    WRITTEN_SHARED_MAP,
)
from shoal.plan.sources import (
    AttentionMap,
    LayerKeys,
    LayerKV,
    LayerValues,
    NewTensors,
    SharedMatrices,
    Source,
    TiedLayer,
)
from shoal.plan.steps import Exit, Map, Parallel, Run, Step, runs

Trait = Literal[
    "layer", "part", "new tensors", "tie", "KV source", "half KV source", "attention map", "later source", "map",
    "parallel group", "gate", "exit", "own head", "repeat", "other part", "reorder",
]  # fmt: skip
"""What there is to say of a step; see `traits`."""


@cache
def row(trait: Trait) -> Row:
    """The answers for one trait."""
    # fmt: off
    match trait:
        case "layer":
            return Row(live=OK, uncached=OK, cached=OK, static_cache=OK, padded=OK, checkpointed=OK, offloaded=OK,
                       sharded=OK, beside_encoder=OK, paged=OK, gated=OK, drafted=OK, fast=OK, streamed=OK, written=OK,
                       gguf=OK)
        case "part":
            return Row(live=OK, uncached=OK, cached=OK, static_cache=OK, padded=OK, checkpointed=OK, offloaded=OK,
                       sharded=OK, beside_encoder=NO_PARTS, paged=OK, gated=OK, drafted=OK, fast=OK, streamed=OK,
                       written=WRITTEN_PART, gguf=NO_BLOCK)
        case "new tensors":
            return Row(live=OK, uncached=OK, cached=OK, static_cache=OK, padded=OK, checkpointed=OK,
                       offloaded=OK, sharded=SHARDED_TENSORS, beside_encoder=OK, paged=OK, gated=OK,
                       drafted=NO_DRAFT, fast=OK, streamed=ONE_BY_ONE, written=OK, gguf=NO_BLOCK)
        case "tie":
            return Row(live=OK, uncached=OK, cached=OK, static_cache=OK, padded=OK, checkpointed=OK,
                       offloaded=OK, sharded=SHARDED_TIE, beside_encoder=OK, paged=OK, gated=OK,
                       drafted=NO_DRAFT, fast=OK, streamed=ONE_BY_ONE, written=OK, gguf=NO_BLOCK)
        case "KV source" | "half KV source" | "attention map" | "later source":
            return _taken(trait)
        case "map" | "parallel group":
            return Row(live=OK, uncached=OK, cached=OK, static_cache=OK, padded=OK, checkpointed=OK, offloaded=OK,
                       sharded=OK, beside_encoder=OK, paged=OK, gated=UNGATED, drafted=NO_DRAFT, fast=OK,
                       streamed=ONE_BY_ONE, written=WRITTEN_MAP if trait == "map" else WRITTEN_GROUP, gguf=NO_BLOCK)
        case "gate" | "exit" | "own head":
            return _decided(trait)
        case "repeat" | "other part" | "reorder":
            return _placed(trait)
        case _:
            assert_never(trait)
    # fmt: on


def _taken(trait: Literal["KV source", "half KV source", "attention map", "later source"]) -> Row:
    # fmt: off
    match trait:
        case "KV source":
            return Row(live=OK, uncached=OK, cached=OK, static_cache=OK, padded=OK, checkpointed=OK,
                       offloaded=OK, sharded=OK, beside_encoder=KV_BESIDE_ENCODER, paged=OK, gated=GATED_KV,
                       drafted=NO_DRAFT, fast=OK, streamed=ONE_BY_ONE, written=WRITTEN_KV, gguf=NO_BLOCK)
        case "half KV source":
            return Row(live=OK, uncached=OK, cached=OK, static_cache=OK, padded=OK, checkpointed=OK,
                       offloaded=OK, sharded=OK, beside_encoder=KV_BESIDE_ENCODER, paged=PAGED_HALF, gated=GATED_HALF,
                       drafted=NO_DRAFT, fast=OK, streamed=ONE_BY_ONE, written=WRITTEN_KV, gguf=NO_BLOCK)
        case "attention map":
            return Row(live=OK, uncached=OK, cached=OK, static_cache=OK, padded=OK, checkpointed=OK,
                       offloaded=OK, sharded=OK, beside_encoder=MAP_BESIDE_ENCODER, paged=PAGED_MAP, gated=GATED_MAP,
                       drafted=NO_DRAFT, fast=FAST_MAP, streamed=ONE_BY_ONE, written=WRITTEN_SHARED_MAP, gguf=NO_BLOCK)
        case "later source":
            return Row(live=OK, uncached=OK, cached=OK, static_cache=OK, padded=OK, checkpointed=CHECKPOINTED_LATER,
                       offloaded=OK, sharded=OK, beside_encoder=KV_BESIDE_ENCODER, paged=PAGED_LATER,
                       gated=GATED_LATER, drafted=NO_DRAFT, fast=FAST_LATER, streamed=ONE_BY_ONE, written=WRITTEN_KV,
                       gguf=NO_BLOCK)
        case _:
            assert_never(trait)
    # fmt: on


def _decided(trait: Literal["gate", "exit", "own head"]) -> Row:
    # fmt: off
    match trait:
        case "gate" | "exit":
            return Row(live=UNDECIDED, uncached=OK, cached=OK, static_cache=OK, padded=OK, checkpointed=OK,
                       offloaded=OK, sharded=OK, beside_encoder=NO_CAUSAL_DECODER, paged=PAGED_POLICY, gated=OK,
                       drafted=NO_DRAFT, fast=DECIDING, streamed=ONE_BY_ONE, gguf=NO_BLOCK,
                       written=WRITTEN_GATE if trait == "gate" else WRITTEN_EXIT)
        case "own head":
            return Row(live=OK, uncached=OK, cached=OK, static_cache=OK, padded=OK, checkpointed=OK, offloaded=OK,
                       sharded=OK, beside_encoder=OK, paged=OK, gated=OK, drafted=NO_DRAFT, fast=FAST_HEAD,
                       streamed=ONE_BY_ONE, written=WRITTEN_HEAD, gguf=NO_HEAD)
        case _:
            assert_never(trait)
    # fmt: on


def _placed(trait: Literal["repeat", "other part", "reorder"]) -> Row:
    # fmt: off
    match trait:
        case "repeat":
            return Row(live=OK, uncached=OK, cached=OK, static_cache=OK, padded=OK, checkpointed=OK, offloaded=OK,
                       sharded=OK, beside_encoder=OK, paged=OK, gated=OK, drafted=UNORDERED_DRAFT, fast=OK,
                       streamed=OK, written=OK, gguf=OK)
        case "other part":
            return Row(live=OK, uncached=OK, cached=OK, static_cache=OK, padded=OK, checkpointed=OK, offloaded=OK,
                       sharded=OK, beside_encoder=NO_PARTS, paged=OK, gated=OK, drafted=UNORDERED_DRAFT, fast=OK,
                       streamed=OK, written=OK, gguf=NO_BLOCK)
        case "reorder":
            return Row(live=OK, uncached=OK, cached=OK, static_cache=OK, padded=OK, checkpointed=OK, offloaded=OK,
                       sharded=OK, beside_encoder=OK, paged=OK, gated=OK, drafted=UNORDERED_DRAFT, fast=OK,
                       streamed=ONE_BY_ONE, written=OK, gguf=OK)
        case _:
            assert_never(trait)
    # fmt: on


def answer(trait: Trait, way: Way) -> Answer:
    """What becomes of a step with this trait."""
    found: Answer = getattr(row(trait), way)
    return found


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why one step is refused, and with which code."""

    code: str
    message: str
    trait: Trait
    step: Step


def traits(steps: tuple[Step, ...]) -> Iterator[tuple[Trait, Step, int]]:
    """What there is to say of each step, in order: its sources, what decides about it, its kind, and how it stands to
    the runs before it. With each the step, or the branch of a group, and the layer that ran before (-1: none)."""
    attended: set[int] = set()
    ran: set[int] = set()
    before = -1
    later: dict[int, list[Run]] = {}
    for position, run, source in later_sources(steps):
        if isinstance(source, LayerKV):
            later.setdefault(position, []).append(run)
    for position, step in enumerate(steps):
        for trait, one in _own(step, later.get(position, ())):
            yield trait, one, before
        for run in runs((step,)):
            if run.layer in ran:
                yield "repeat" if run.part != "mlp" and run.layer in attended else "other part", run, before
            if run.layer < before:
                yield "reorder", run, before
            before = run.layer
            ran.add(run.layer)
            attended |= {run.layer} if run.part != "mlp" else set()


def _own(step: Step, later: Sequence[Run] = ()) -> Iterator[tuple[Trait, Step]]:
    """Its traits alone. `later`: the runs in it whose KV source runs later."""
    match step:
        case Run():
            for source in step.sources:
                yield "later source" if isinstance(source, LayerKV) and step in later else _of_source(source), step
            if step.gate is not None or step.kv.fill is not None:
                yield "gate", step
            yield "layer" if step.part == "layer" else "part", step
        case Map():
            yield "map", step
            if step.gate is not None:
                yield "gate", step
        case Parallel():
            yield "parallel group", step
            for branch in step.branches:
                yield from _own(branch, later)
                if step.join == "bypass":
                    yield "part", branch
        case Exit():
            yield "own head" if step.gate is None else "exit", step
        case _:
            assert_never(step)


def _of_source(source: Source) -> Trait:
    match source:
        case LayerKV():
            return "KV source"
        case LayerKeys() | LayerValues():
            return "half KV source"
        case AttentionMap():
            return "attention map"
        case TiedLayer():
            return "tie"
        case NewTensors() | SharedMatrices():
            return "new tensors"
        case _:
            assert_never(source)


def refused(trait: Trait, way: Way, step: Step, **names: object) -> Refusal | None:
    """What the table says of one step with this trait; None when it is right."""
    found = answer(trait, way)
    if not isinstance(found, Refused):
        return None
    return Refusal(found.code, found.sentence.format(**_words(trait, step), **names), trait, step)


def refusals(steps: tuple[Step, ...], way: Way, **names: object) -> Iterator[Refusal]:
    """Everything that keeps `steps` from going this way, step by step. `names`: what a sentence names beside steps."""
    for trait, step, before in traits(steps):
        if no := refused(trait, way, step, before=before, **names):
            yield no


def refusal(steps: tuple[Step, ...], way: Way, **names: object) -> Refusal | None:
    """The first of `refusals`; None when the steps may go this way."""
    return next(refusals(steps, way, **names), None)


def is_right(steps: tuple[Step, ...], way: Way) -> bool:
    """Whether every step goes this very way, and none by another."""
    return all(isinstance(answer(trait, way), Right) for trait, _, _ in traits(steps))


def _words(trait: Trait, step: Step) -> dict[str, object]:
    """What the sentences name."""
    words: dict[str, object] = {"step": format_steps((step,))}
    match step:
        case Run():
            source = step.tie if trait == "tie" else next((one.layer for one in step.layer_sources), None)
            return words | {"layer": step.layer, "part": step.part, "source": source, "weights": ", ".join(step.ids)}
        case Map():
            return words | {"span": f"{step.first}-{step.last}", "layer": f"{step.first}-{step.last}"}
        case Parallel() | Exit():
            return words
        case _:
            assert_never(step)
