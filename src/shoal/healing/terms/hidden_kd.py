"""Distillation of hidden states."""

from __future__ import annotations

from typing import Literal

import torch
from torch.nn.functional import normalize

from shoal.errors import UsageError
from shoal.evaluation.distances import one_minus_cosine
from shoal.healing.blocks import blocks_at_gaps
from shoal.healing.seen import Seen
from shoal.plan import Run

NEEDS_TEACHER = True


def hidden_kd(seen: Seen, *, at: str = "all", by: Literal["relative", "cosine", "pkd"] = "relative") -> torch.Tensor:
    """The distance between the states behind the same base layer, meaned over layers, summed over tokens that count.

    s, t [tokens, hidden] are the student's and the teacher's state behind one base layer. `by` relative: |s - t|^2 /
    |t|^2; cosine: 1 - cos(s, t); pkd: |s / |s| - t / |t||^2, which is twice that. `at` all: every layer that runs as a
    step of its own; every:N: each N-th of the base's; holes: the last layer of each block beside a removed span. As
    layers keep the base's index, no map of layers is configured.

    Source: Romero et al. 2014 (FitNets, arXiv 1412.6550); pkd: Sun et al. 2019 (patient distillation, arXiv
    1908.09355), whose states are those of [CLS] alone: here all tokens.
    """
    layers = _layers(seen, at)
    told, shown = seen.teacher.behind, seen.student.behind
    counts = seen.counts
    found = [_distance(shown[layer][counts].float(), told[layer][counts].float(), by) for layer in layers]
    return torch.stack([one.sum() for one in found]).mean()


def _distance(s: torch.Tensor, t: torch.Tensor, by: str) -> torch.Tensor:
    if by == "relative":
        return (s - t).square().sum(-1) / t.square().sum(-1).clamp_min(1e-12)
    if by == "cosine":
        return one_minus_cosine(s, t)
    return (normalize(s, dim=-1) - normalize(t, dim=-1)).square().sum(-1)


def _layers(seen: Seen, at: str) -> list[int]:
    steps = seen.plan.steps(seen.stack)
    there = sorted({step.layer for step in steps if isinstance(step, Run) and step.part != "attention"})
    if at == "all":
        return there
    word, _, number = at.partition(":")
    if word == "every" and number.isdecimal() and int(number):
        every = [layer for layer in there if (layer + 1) % int(number) == 0]
        return every or there[-1:]
    if at == "holes":
        return [block.last for block in blocks_at_gaps(seen.plan, seen.stack, 1) if block.last in there] or there[-1:]
    raise UsageError(f"hidden-kd: at={at} is not one of all, holes, every:2; write hidden-kd:at=all", code="U502")
